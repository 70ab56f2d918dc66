"""Plans over a bounded buffer: the lengths of the items at hand in, the placements of their batches out.

What a stream runs on, without the stream: numbers only, so that it can be measured alone. A pool is planned
as an epoch is, by the same strategies. Lanes are dealt as :class:`~seqbatch.Splicing` deals them, buffer after
buffer, and where one buffer ends and the next begins changes nothing: a sequence goes to the lane that ends
first, and the sequences that begin in a window are the same however many are known that begin after it.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from seqbatch.ordering import IntArray, constant, random_bits, random_order
from seqbatch.pieces import Pieces
from seqbatch.placement import Placement
from seqbatch.plan import Plan
from seqbatch.splicing import cut_windows, deal_lanes
from seqbatch.strategy import Strategy

__all__ = ["Open", "PoolPlan", "WindowPlan", "plan_pool", "plan_windows"]


class Open(NamedTuple):
    """The sequences that go on in the next window, one row for each lane that has one, lanes rising."""

    lane: IntArray
    sequence: IntArray
    start: IntArray
    """The first token that is still to come."""
    whole: IntArray
    """All tokens of the sequence."""

    @classmethod
    def nothing(cls) -> "Open":
        """Return no rows: every lane is free."""
        return cls(*np.empty((4, 0), np.int64))


class WindowPlan(NamedTuple):
    """The windows of one buffer that are sure, and what is open after each."""

    plan: Plan
    """Its column ``sequence`` holds the numbers of the source."""
    whole: IntArray
    """(P,) tokens of the sequence that each piece is of."""
    begin: IntArray
    """(N,) the step at which each new item begins, counted from the first window, never falling: after window w
    those below ``(w + 1) * chunk_size`` have begun."""
    opened: Open
    """The rows of all windows, one after another."""
    open_ptr: IntArray
    """(M + 1,) which rows are those of each window."""

    def placements(self, *, next_token: bool = False) -> Iterator[Placement]:
        """Return the windows in order."""
        # A piece at step 0 that does not begin its sequence goes on with it: the pieces of a sequence share a lane.
        continues = (self.plan.step == 0) & (self.plan.start > 0)
        order = np.arange(len(self.plan))
        return _placements(self.plan, self.plan.sequence, self.whole, continues, order, next_token)

    def open_after(self, window: int) -> Open:
        """Return what is open at the end of a window."""
        part = slice(self.open_ptr[window], self.open_ptr[window + 1])
        return Open(*(column[part] for column in self.opened))


class PoolPlan(NamedTuple):
    """The plan of one pool, and the way through its batches."""

    plan: Plan
    order: IntArray
    """(M,) the order in which the batches are given: at random where the strategy shuffles."""
    sequence: IntArray
    """(N,) the source's number of each item."""
    lengths: IntArray

    def placements(self, *, given: int = 0, next_token: bool = False) -> Iterator[Placement]:
        """Return the batches but for the first `given` of them.

        Args:
            given: Batches that were given before.
            next_token: As of :class:`~seqbatch.placement.Placement`.
        """
        no = np.zeros(len(self.plan.sequence), np.bool_)
        sequence, whole = self.sequence[self.plan.sequence], self.lengths[self.plan.sequence]
        return _placements(self.plan, sequence, whole, no, self.order[given:], next_token)


def plan_pool(
    strategy: Strategy, sequence: IntArray, lengths: IntArray, *, key: tuple[int, ...] = (0,), pool: int = 0
) -> PoolPlan:
    """Plan one pool with a strategy whose pieces come sorted by lane and step, as those of streams do.

    Args:
        strategy: ``Bucketing`` or ``Packing``.
        sequence: (N,) the source's number of each item.
        lengths: (N,) their tokens.
        key: With `pool` decides every random choice: seed, epoch and shard.
        pool: The number of the pool.

    Raises:
        ValueError: an item that the strategy cannot place; the message names it by its number in the source.

    >>> from seqbatch import Packing
    >>> pool = plan_pool(Packing(4), np.array([10, 11, 12]), np.array([3, 2, 1]))
    >>> sorted(p.sequence.tolist() for p in pool.placements())
    [[10, 12], [11]]
    """
    # A key of numbers, hashed: pools of all epochs and shards draw from streams of their own.
    seed = int(random_bits(1, *key, "pool")[0])
    try:
        plan = strategy.plan(lengths, seed=seed, epoch=pool)
    except ValueError as error:
        at = int(np.argmax(lengths))
        raise ValueError(
            f"the buffer cannot be planned; its longest item, {lengths[at]} tokens, is number {sequence[at]} of the "
            f"source (below, number {at} of the buffer): {error}"
        ) from error
    shuffled = random_order(len(plan), seed, pool, "batches") if strategy.shuffle else np.arange(len(plan))
    return PoolPlan(plan, shuffled, sequence, lengths)


def plan_windows(
    sequence: IntArray,
    lengths: IntArray,
    num_lanes: int,
    chunk_size: int,
    *,
    opened: Open | None = None,
    final: bool = True,
) -> WindowPlan:
    """Deal items to lanes, each to the lane that ends first, and cut the windows that are sure.

    Args:
        sequence: (N,) the source's number of each item.
        lengths: (N,) their tokens, at least 1.
        num_lanes: Lanes (B).
        chunk_size: Steps of a window (T).
        opened: What the lanes go on with.
        final: Whether no further item comes. Otherwise only windows that no further item can begin in are cut.

    >>> windows = plan_windows(np.array([7, 8, 9]), np.array([3, 5, 2]), 2, 4, final=False)
    >>> windows.begin, [(w.lane, w.length) for w in windows.placements()]
    (array([0, 0, 3]), [(array([0, 0, 1]), array([3, 1, 4]))])
    >>> windows.open_after(0)
    Open(lane=array([0, 1]), sequence=array([9, 8]), start=array([1, 4]), whole=array([2, 5]))
    """
    opened = Open.nothing() if opened is None else opened
    remaining = np.zeros(num_lanes, np.int64)
    remaining[opened.lane] = opened.whole - opened.start
    # One step more for every lane: dealt first, these rows then go to lanes 0, 1, ... even where nothing remains.
    lane, begin = deal_lanes(np.concatenate([remaining + 1, lengths]), num_lanes, "first_free")
    lane, begin = np.concatenate([opened.lane, lane[num_lanes:]]), begin[num_lanes:] - 1
    starts = np.concatenate([constant(0, len(opened.lane)), begin])
    length = np.concatenate([remaining[opened.lane], lengths])
    ends = np.zeros(num_lanes, np.int64)
    np.maximum.at(ends, lane, starts + length)
    horizon = int(-(-ends.max() // chunk_size) if final else ends.min() // chunk_size) * chunk_size
    here = np.flatnonzero(starts < horizon)
    start = np.concatenate([opened.start, constant(0, len(sequence))])[here]
    columns = cut_windows(
        Pieces(None, start, np.minimum(length[here], horizon - starts[here])),
        np.arange(len(here)),
        lane[here],
        starts[here],
        num_lanes,
        chunk_size,
    )
    item = here[columns["sequence"]]
    plan = Plan(**columns | {"sequence": np.concatenate([opened.sequence, sequence])[item]}, carry=True)
    whole = np.concatenate([opened.whole, lengths])[item]
    end = plan.start + plan.length
    at_edge = plan.step + plan.length == np.repeat(plan.steps, np.diff(plan.batch_ptr))
    still = np.flatnonzero(at_edge & (end < whole))
    rows = Open(*(column[still] for column in (plan.lane, plan.sequence, end, whole)))
    return WindowPlan(plan, whole, begin, rows, np.searchsorted(still, plan.batch_ptr))


def _placements(
    plan: Plan, sequence: IntArray, whole: IntArray, continues: NDArray[np.bool_], order: IntArray, next_token: bool
) -> Iterator[Placement]:
    """The batches of a plan in the given order; columns by piece: the source's numbers, their tokens."""
    count = plan.length - (plan.start + plan.length == whole) if next_token else plan.length
    loss_tokens = np.diff(np.append(0, np.cumsum(count))[plan.batch_ptr]).tolist()
    bounds, steps, lanes = plan.batch_ptr.tolist(), plan.steps.tolist(), plan.lanes.tolist()
    nothing = constant(0, len(sequence))
    for number in order.tolist():
        part = slice(bounds[number], bounds[number + 1])
        yield Placement(
            sequence=sequence[part],
            start=plan.start[part],
            length=plan.length[part],
            step=plan.step[part],
            lane=plan.lane[part],
            steps=steps[number],
            lanes=lanes[number],
            left_context=nothing[part],
            right_context=nothing[part],
            whole=whole[part],
            continues=continues[part],
            carry=plan.carry,
            next_token=next_token,
            loss_tokens=loss_tokens[number],
            step_loss_tokens=loss_tokens[number],
        )
