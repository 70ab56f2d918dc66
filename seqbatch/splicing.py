"""Sentence splicing: lanes in which the next sequence starts where the last one ended.

No cell is empty until the data run out; the model clears a lane's state where a piece starts
(``reset``). Batches are windows of `chunk_size` steps over all lanes, and state flows from window to
window, so a sequence that crosses an edge goes on in the next batch (Chen et al. 2014, "Efficient
GPU-based training of recurrent neural network language models using spliced sentence bunch").
"""

from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike

from seqbatch.lengths import as_lengths
from seqbatch.ordering import IntArray, stable_order
from seqbatch.pieces import Pieces, not_empty
from seqbatch.plan import Plan
from seqbatch.strategy import Strategy, check_choice

__all__ = ["Splicing", "cut_windows", "deal_lanes"]


@dataclass(frozen=True, repr=False)
class Splicing(Strategy):
    """`num_lanes` lanes without gaps, cut into windows of `chunk_size` steps; state is carried.

    Args:
        num_lanes: Lanes of every batch (B).
        chunk_size: Steps of every batch but those at the end that fewer are left for (T).
        assign: ``"first_free"`` gives the next sequence to the lane that ends first and wastes at
            most the longest sequence a lane; ``"round_robin"`` gives sequence i to lane
            ``i % num_lanes`` as Chen et al. did, and leaves a ragged end.
        shuffle: Take the sequences in random order, new in each epoch.

    Raises:
        TypeError, ValueError: a setting of the wrong type or range.

    >>> plan = Splicing(2, chunk_size=3).plan([4, 2, 3, 3])
    >>> plan.tokens, plan.cells, plan.carry
    (12, 12, True)
    """

    num_lanes: int
    chunk_size: int
    _: KW_ONLY
    assign: str = "first_free"
    shuffle: bool = True

    at_least: ClassVar[dict[str, int]] = {"num_lanes": 1, "chunk_size": 1}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("assign", self.assign, ("first_free", "round_robin"))

    def plan(self, lengths: ArrayLike, *, seed: int = 0, epoch: int = 0) -> Plan:
        pieces, dropped = not_empty(as_lengths(lengths))
        order = self._order(len(pieces.length), seed, epoch)
        lane, begin = deal_lanes(pieces.length[order], self.num_lanes, self.assign)
        return Plan(
            **cut_windows(pieces, order, lane, begin, self.num_lanes, self.chunk_size),
            dropped=dropped,
            carry=True,
            **self._provenance(seed, epoch),
        )


def deal_lanes(reserved: IntArray, num_lanes: int, assign: str) -> tuple[IntArray, IntArray]:
    """Give sequences, in the order they come, to lanes.

    Args:
        reserved: (N,) steps for which each occupies its lane.
        num_lanes: Lanes.
        assign: ``"first_free"`` or ``"round_robin"``.

    Returns:
        (lane, begin): the lane of each sequence and its first step in that lane.

    >>> deal_lanes(np.array([4, 1, 2, 1]), 2, "first_free")
    (array([0, 1, 1, 1]), array([0, 0, 1, 3]))
    """
    if assign == "first_free":
        from seqbatch.kernels import first_free

        lane, begin = np.empty_like(reserved), np.empty_like(reserved)
        first_free(reserved, num_lanes, lane, begin)
        return lane, begin
    rows = np.zeros((-(-len(reserved) // num_lanes), num_lanes), np.int64)
    rows.ravel()[: len(reserved)] = reserved
    begin = (np.cumsum(rows, axis=0) - rows).ravel()[: len(reserved)]
    return np.arange(len(reserved)) % num_lanes, begin


def cut_windows(
    pieces: Pieces, order: IntArray, lane: IntArray, begin: IntArray, num_lanes: int, chunk_size: int
) -> dict[str, Any]:
    """Cut lanes into windows of `chunk_size` steps, one batch each.

    Args:
        pieces: Whole sequences.
        order: (N,) the order in which they were dealt.
        lane: (N,) the lane of each, in that order.
        begin: (N,) its first step in the lane.
        num_lanes: Lanes of every batch.
        chunk_size: Steps of a window; one that is not filled to its end has as many as are used.

    Returns:
        The piece and batch columns of a plan, pieces of a batch sorted by lane and step.
    """
    length = pieces.length[order]
    chunk_size = min(chunk_size, int((begin + length).max(initial=1)))
    first = begin // chunk_size
    count = (begin + length - 1) // chunk_size - first + 1
    window = np.repeat(first - np.cumsum(count) + count, count) + np.arange(count.sum())
    lane, begin, length, sequence = (np.repeat(c, count) for c in (lane, begin, length, order))
    start = np.maximum(window * chunk_size - begin, 0)
    end = np.minimum((window + 1) * chunk_size - begin, length)
    num_windows = int(window.max(initial=-1)) + 1
    by_window = stable_order(window * num_lanes + lane, bound=max(num_windows, 1) * num_lanes)
    batch_ptr = np.append(0, np.cumsum(np.bincount(window, minlength=num_windows)))
    step = np.maximum(begin - window * chunk_size, 0)
    steps = np.zeros(num_windows, np.int64)
    np.maximum.at(steps, window, step + end - start)
    sequence, offset = pieces.take(sequence)
    columns = {"sequence": sequence, "start": start + offset, "length": end - start, "step": step, "lane": lane}
    return {name: column[by_window] for name, column in columns.items()} | {
        "batch_ptr": batch_ptr,
        "steps": steps,
        "lanes": np.full(num_windows, num_lanes),
    }
