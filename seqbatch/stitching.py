"""Putting a model's outputs on pieces together to outputs on whole sequences."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from seqbatch.batch import SequenceBatch

__all__ = ["stitch"]


def stitch(outputs: Iterable[tuple[SequenceBatch, Any]]) -> Iterator[tuple[int, Tensor]]:
    """Yield (sequence, its whole output) as sequences complete: context trimmed, pieces joined in order.

    Only sequences of which some pieces are missing are held, so memory is bounded by what is open.

    Args:
        outputs: (batch, output) pairs, the output with a row for each token in any form that
            :meth:`SequenceBatch.flatten` takes.

    Yields:
        (sequence, (T_i, ...)): the index in the dataset and one row for each of its tokens. Empty sequences are in
        no batch, so they do not come.

    Raises:
        ValueError: the outputs end while sequences are incomplete.

    >>> import seqbatch
    >>> data = seqbatch.TokenArray.of_sequences([[1, 2, 3, 4, 5], [6, 7]])
    >>> loader = seqbatch.make_loader(data, seqbatch.Chunking(2, 2, left_context=1), train=False)
    >>> [(i, x.tolist()) for i, x in stitch((batch, 10 * batch.data) for batch in loader)]
    [(0, [10, 20, 30, 40, 50]), (1, [60, 70])]
    """
    parts: dict[int, dict[int, Tensor]] = {}
    missing: dict[int, int] = {}
    for batch, output in outputs:
        if not isinstance(batch, SequenceBatch):
            raise TypeError(f"stitch takes SequenceBatches, got {type(batch).__name__}: of pairs stitch batch.target")
        at = batch.placement
        columns = (at.sequence, at.start + at.left_context, at.left_context, at.length - at.right_context, at.whole)
        rows = zip(*(column.tolist() for column in columns), strict=True)
        for (sequence, begin, first, end, whole), piece in zip(rows, batch.unbatch(output), strict=True):
            own = piece[first:end]
            missing[sequence] = missing.get(sequence, whole) - len(own)
            # A copy, where the rest comes later: the piece is a view of the outputs of its whole batch.
            parts.setdefault(sequence, {})[begin] = own.clone() if missing[sequence] else own
            if missing[sequence] == 0:
                done = parts.pop(sequence)
                del missing[sequence]
                yield sequence, torch.cat([done[key] for key in sorted(done)])
    if parts:
        some = ", ".join(map(str, list(parts)[:5]))
        raise ValueError(
            f"the outputs ended with {len(parts)} sequences incomplete ({some}, ...): stitch a whole epoch of one "
            "loader; with several ranks gather the pieces first, or use a strategy that keeps sequences whole"
        )
