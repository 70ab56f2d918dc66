"""What a strategy has to place: the sequences that are not empty, and what becomes of overlong ones."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from seqbatch.ordering import IntArray, constant
from seqbatch.strategy import check_choice

__all__ = ["DROPPED", "OVERLONG", "REASONS", "Pieces", "dropped_rows", "fit_overlong", "not_empty"]

REASONS = ("empty", "overlong", "drop_last", "tail")
DROPPED = np.dtype([("sequence", "<i8"), ("start", "<i8"), ("length", "<i8"), ("reason", "<U9")])
OVERLONG = ("error", "split", "truncate", "drop", "alone")


class Pieces(NamedTuple):
    """Columns of equal length: tokens ``start : start + length`` of a sequence."""

    sequence: IntArray | None
    """None means piece i is the whole sequence i, the usual case, which then costs no memory."""
    start: IntArray
    length: IntArray

    def take(self, order: IntArray) -> tuple[IntArray, IntArray]:
        """Return sequence and start of the pieces at the positions `order`."""
        start = constant(0, len(order)) if self.start.strides == (0,) else self.start[order]
        return order if self.sequence is None else self.sequence[order], start


def not_empty(lengths: IntArray) -> tuple[Pieces, NDArray[np.void]]:
    """Return one piece for each sequence that has a token, and rows for those that have none.

    >>> pieces, dropped = not_empty(np.array([3, 0, 2]))
    >>> pieces.sequence, dropped["sequence"]
    (array([0, 2]), array([1]))
    """
    if lengths.min() > 0:
        return Pieces(None, constant(0, len(lengths)), lengths), dropped_rows("empty", *np.empty((3, 0), np.int64))
    empty = np.flatnonzero(lengths == 0)
    kept = np.flatnonzero(lengths)
    nothing = constant(0, len(empty))
    return Pieces(kept, constant(0, len(kept)), lengths[kept]), dropped_rows("empty", empty, nothing, nothing)


def fit_overlong(pieces: Pieces, limit: int, policy: str, why: str) -> tuple[Pieces, NDArray[np.void]]:
    """Apply the ``overlong`` policy to whole sequences longer than `limit`.

    Args:
        pieces: Whole sequences.
        limit: The most tokens one lane may hold, at least 1.
        policy: ``"error"``, ``"split"`` into pieces of `limit` tokens and a rest, ``"truncate"`` to
            the first `limit` tokens, ``"drop"``, or ``"alone"``, which leaves them as they are.
        why: Where the limit comes from, for the message.

    Returns:
        The pieces, and rows for the tokens that the policy leaves out.

    Raises:
        ValueError: for ``"error"`` and a sequence over the limit, naming the longest.

    >>> pieces, _ = not_empty(np.array([5, 2]))
    >>> fit_overlong(pieces, 2, "split", "max_tokens=2")[0].length
    array([2, 2, 1, 2])
    """
    nothing = dropped_rows("overlong", *np.empty((3, 0), np.int64))
    if policy == "alone" or not len(pieces.length) or pieces.length.max() <= limit:
        return pieces, nothing
    long = pieces.length > limit
    sequence, length = pieces.take(np.arange(len(long)))[0], pieces.length
    if policy == "error":
        worst = int(np.argmax(length))
        raise ValueError(
            f"sequence {sequence[worst]} has {length[worst]} tokens, but {why} allows at most {limit}"
            f" ({long.sum()} of {len(long)} sequences are longer): raise the limit, or choose what to do with"
            ' overlong="split", "truncate", "drop" or "alone"'
        )
    if policy == "split":
        count = -(-length // limit)
        sequence, whole = np.repeat(sequence, count), np.repeat(length, count)
        start = limit * (np.arange(len(sequence)) - np.repeat(np.cumsum(count) - count, count))
        return Pieces(sequence, start, np.minimum(limit, whole - start)), nothing
    if policy == "truncate":
        cut = dropped_rows("overlong", sequence[long], constant(limit, int(long.sum())), length[long] - limit)
        return Pieces(sequence, constant(0, len(length)), np.minimum(length, limit)), cut
    left_out = dropped_rows("overlong", sequence[long], constant(0, int(long.sum())), length[long])
    return Pieces(sequence[~long], constant(0, int((~long).sum())), length[~long]), left_out


def dropped_rows(reason: str, sequence: IntArray, start: IntArray, length: IntArray) -> NDArray[np.void]:
    """Return rows for ``Plan.dropped``, all of one `reason`.

    >>> dropped_rows("empty", np.array([3]), np.array([0]), np.array([0]))["reason"]
    array(['empty'], dtype='<U9')
    """
    check_choice("reason", reason, REASONS)
    rows = np.empty(len(sequence), dtype=DROPPED)
    rows["sequence"], rows["start"], rows["length"], rows["reason"] = sequence, start, length, reason
    return rows
