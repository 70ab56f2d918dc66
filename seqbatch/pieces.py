"""What a strategy has to place: the sequences that are not empty, and what becomes of overlong ones."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from seqbatch.ordering import IntArray, constant
from seqbatch.strategy import check_choice

__all__ = [
    "DROPPED",
    "DROPPED_PAIRS",
    "OVERLONG",
    "REASONS",
    "Pieces",
    "dropped_rows",
    "dropped_side",
    "fit_overlong",
    "fit_pairs",
    "not_empty",
]

REASONS = ("empty", "overlong", "drop_last", "tail")
DROPPED = np.dtype([("sequence", "<i8"), ("start", "<i8"), ("length", "<i8"), ("reason", "<U9")])
DROPPED_PAIRS = np.dtype([("sequence", "<i8"), ("start", "<i8"), ("length", "<i8", (2,)), ("reason", "<U9")])
OVERLONG = ("error", "split", "truncate", "drop", "alone")
_NONE: IntArray = np.empty(0, np.int64)


class Pieces(NamedTuple):
    """Columns of equal length: tokens ``start : start + length`` of a sequence; of pairs, `length` is (P, 2)."""

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

    Of pairs, one for each that has a token on both sides: a pair with an empty side teaches nothing.

    >>> pieces, dropped = not_empty(np.array([3, 0, 2]))
    >>> pieces.sequence, dropped["sequence"]
    (array([0, 2]), array([1]))
    >>> not_empty(np.array([[3, 4], [3, 0]]))[1]["length"].tolist()
    [[3, 0]]
    """
    if lengths.min() > 0:
        nothing = dropped_rows("empty", _NONE, _NONE, lengths[:0])
        return Pieces(None, constant(0, len(lengths)), lengths), nothing
    filled = (lengths if lengths.ndim == 1 else lengths.min(axis=1)) > 0
    empty, kept = np.flatnonzero(~filled), np.flatnonzero(filled)
    rows = dropped_rows("empty", empty, constant(0, len(empty)), lengths[empty])
    return Pieces(kept, constant(0, len(kept)), lengths[kept]), rows


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
    nothing = dropped_rows("overlong", _NONE, _NONE, _NONE)
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


def fit_pairs(pieces: Pieces, fits: NDArray[np.bool_], policy: str, why: str) -> tuple[Pieces, NDArray[np.void]]:
    """Apply the ``overlong`` policy to pairs.

    Args:
        pieces: Whole pairs.
        fits: (P,) whether a lane may hold the pair.
        policy: ``"error"``, ``"drop"`` or ``"alone"``, which leaves them as they are.
        why: The setting that limits a lane, for the message.

    Raises:
        ValueError: for ``"error"`` and a pair that does not fit, naming the longest; for a policy that cuts.

    >>> pieces, _ = not_empty(np.array([[5, 2], [1, 1]]))
    >>> fit_pairs(pieces, np.array([False, True]), "drop", "max_tokens=4")[1]["length"].tolist()
    [[5, 2]]
    """
    nothing = dropped_rows("overlong", _NONE, _NONE, pieces.length[:0])
    if policy in ("split", "truncate"):
        raise ValueError(
            f'overlong="{policy}" cuts a sequence, and what belongs together on the two sides of a pair is not known: '
            'use "error", "drop" or "alone", or cut the pairs yourself'
        )
    if policy == "alone" or fits.all():
        return pieces, nothing
    long = ~fits
    sequence = pieces.take(np.arange(len(long)))[0]
    if policy == "error":
        worst = int(np.argmax(np.where(long, pieces.length.sum(axis=1), -1)))
        source, target = pieces.length[worst]
        raise ValueError(
            f"pair {sequence[worst]} has {source} + {target} tokens, which {why} does not allow ({long.sum()} of "
            f'{len(long)} pairs do not fit): raise the limit, or choose overlong="drop" or "alone"'
        )
    rows = dropped_rows("overlong", sequence[long], constant(0, int(long.sum())), pieces.length[long])
    return Pieces(sequence[fits], constant(0, int(fits.sum())), pieces.length[fits]), rows


def dropped_rows(reason: str, sequence: IntArray, start: IntArray, length: IntArray) -> NDArray[np.void]:
    """Return rows for ``Plan.dropped``, all of one `reason`; `length` is (rows, 2) for pairs.

    >>> dropped_rows("empty", np.array([3]), np.array([0]), np.array([0]))["reason"]
    array(['empty'], dtype='<U9')
    """
    check_choice("reason", reason, REASONS)
    rows = np.empty(len(sequence), dtype=DROPPED if length.ndim == 1 else DROPPED_PAIRS)
    rows["sequence"], rows["start"], rows["length"], rows["reason"] = sequence, start, length, reason
    return rows


def dropped_side(dropped: NDArray[np.void], side: int) -> NDArray[np.void]:
    """Return what was dropped of one side of pairs, as rows of single sequences.

    >>> dropped_side(dropped_rows("tail", np.array([3]), np.array([0]), np.array([[5, 6]])), 1).tolist()
    [(3, 0, 6, 'tail')]
    """
    rows = np.empty(len(dropped), dtype=DROPPED)
    for name in ("sequence", "start", "reason"):
        rows[name] = dropped[name]
    rows["length"] = dropped["length"][:, side]
    return rows
