"""Chunking: sequences cut into short pieces of about the same length.

*Independent* chunks meet at random, each starting from nothing; long dependencies are lost, and
context tokens that carry no loss soften the cut (Doetsch et al. 2014, "Fast and robust training of
recurrent neural networks for offline handwriting recognition"; Chen, Yan and Huo's context-sensitive
chunks). *Carried* chunks of a sequence follow each other in one lane and the state goes on from batch
to batch: truncated backpropagation through time. There a lane takes its next sequence at the next
batch, so states are only ever cleared between batches.
"""

from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from seqbatch.lengths import as_lengths
from seqbatch.ordering import constant, round_up
from seqbatch.pieces import Pieces, dropped_rows, not_empty
from seqbatch.plan import Plan
from seqbatch.splicing import cut_windows, deal_lanes
from seqbatch.strategy import Strategy

__all__ = ["Chunking"]


@dataclass(frozen=True, repr=False)
class Chunking(Strategy):
    """Batches of `batch_size` chunks of at most `chunk_size` new tokens each.

    Args:
        batch_size: Lanes of a batch, one chunk each.
        chunk_size: New tokens of a chunk; the last chunk of a sequence may have fewer.
        left_context: Tokens before a chunk, as far as the sequence has them, that are computed but
            carry no loss.
        right_context: The same after it.
        carry: Keep the chunks of a sequence in one lane, in order, and carry the state. Excludes
            context: the state is the context.
        shuffle: Take chunks (with `carry`, sequences) in random order, new in each epoch.
        drop_last: Leave out batches with an empty lane, which only the end of the data has.

    Raises:
        TypeError, ValueError: a setting of the wrong type or range, or context with `carry`.

    >>> plan = Chunking(2, chunk_size=4, left_context=1, shuffle=False).plan([6])
    >>> plan[0].start, plan[0].length, plan.left_context, plan.tokens
    (array([0, 3]), array([4, 3]), array([0, 1]), 6)
    """

    batch_size: int
    chunk_size: int
    _: KW_ONLY
    left_context: int = 0
    right_context: int = 0
    carry: bool = False
    shuffle: bool = True
    drop_last: bool = False

    at_least: ClassVar[dict[str, int]] = {"batch_size": 1, "chunk_size": 1, "left_context": 0, "right_context": 0}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.carry and (self.left_context or self.right_context):
            raise ValueError(
                f"carry=True hands the state on, so chunks overlap nothing: leave left_context={self.left_context} "
                f"and right_context={self.right_context} out, or set carry=False"
            )

    def plan(self, lengths: ArrayLike, *, seed: int = 0, epoch: int = 0) -> Plan:
        pieces, dropped = not_empty(as_lengths(lengths))
        columns = (self._carried if self.carry else self._independent)(pieces, seed, epoch)
        if self.drop_last:
            columns, unfilled = self._drop_unfilled(columns)
            dropped = np.concatenate([dropped, unfilled])
        return Plan(**columns, carry=self.carry, dropped=dropped, **self._provenance(seed, epoch))

    def _independent(self, pieces: Pieces, seed: int, epoch: int) -> dict[str, Any]:
        per_sequence = -(-pieces.length // self.chunk_size)
        source = np.repeat(np.arange(len(per_sequence)), per_sequence)
        first = np.cumsum(per_sequence) - per_sequence
        order = self._order(len(source), seed, epoch)
        source = source[order]
        begin = (order - first[source]) * self.chunk_size
        whole = pieces.length[source]
        end = np.minimum(begin + self.chunk_size, whole)
        left = np.minimum(begin, self.left_context)
        right = np.minimum(whole - end, self.right_context)
        length = end + right - begin + left
        batch_ptr = np.append(np.arange(0, len(order), self.batch_size), len(order))
        columns = {
            "sequence": pieces.take(source)[0],
            "start": begin - left,
            "length": length,
            "step": constant(0, len(order)),
            "lane": np.arange(len(order)) % self.batch_size,
            "batch_ptr": batch_ptr,
            "steps": np.maximum.reduceat(length, batch_ptr[:-1]) if len(order) else batch_ptr[:-1],
            "lanes": np.diff(batch_ptr),
        }
        return columns | (
            {"left_context": left, "right_context": right} if self.left_context + self.right_context else {}
        )

    def _carried(self, pieces: Pieces, seed: int, epoch: int) -> dict[str, Any]:
        order = self._order(len(pieces.length), seed, epoch)
        size = min(self.chunk_size, int(pieces.length.max(initial=1)))
        lane, begin = deal_lanes(round_up(pieces.length[order], size), self.batch_size, "first_free")
        return cut_windows(pieces, order, lane, begin, self.batch_size, size)

    def _drop_unfilled(self, columns: dict[str, Any]) -> tuple[dict[str, Any], NDArray[np.void]]:
        """Cut off the batches with an empty lane: the last one, or where state is carried the last ones."""
        ptr = columns["batch_ptr"]
        batches = int((np.diff(ptr) == self.batch_size).sum())
        pieces = int(ptr[batches])
        ends = {"batch_ptr": batches + 1, "steps": batches, "lanes": batches}
        left, right = (
            columns.get(name, constant(0, len(columns["start"]))) for name in ("left_context", "right_context")
        )
        rest = columns["sequence"], columns["start"] + left, columns["length"] - left - right
        rows = dropped_rows("drop_last", *(column[pieces:] for column in rest))
        return {name: column[: ends.get(name, pieces)] for name, column in columns.items()}, rows
