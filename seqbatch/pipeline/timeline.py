"""When each action of a timetable runs, given how long stages and hops take: makespan, idle share, memory."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from seqbatch.pipeline.schedules import Action, Timetable
from seqbatch.strategy import check_integer

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Timeline", "bubble_formula", "simulate"]

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Timeline:
    """A timetable with times.

    Attributes:
        timetable: What ran.
        start: (2, stages, units) seconds at which each forward [0] and backward [1] begins; the first begins at 0.
        end: (2, stages, units) seconds at which it ends.
    """

    timetable: Timetable
    start: FloatArray
    end: FloatArray

    @property
    def makespan(self) -> float:
        """Seconds until all is done."""
        return float(self.end.max())

    @property
    def busy(self) -> FloatArray:
        """(ranks,) seconds that each rank works."""
        seconds = (self.end - self.start).sum(axis=(0, 2))
        busy: FloatArray = seconds.reshape(-1, self.timetable.ranks).sum(axis=0)
        return busy

    @property
    def bubble(self) -> float:
        """The share of all ranks' time in which they are idle."""
        if not self.makespan:
            return 0.0
        return max(0.0, float(1 - self.busy.sum() / (self.timetable.ranks * self.makespan)))  # sums are rounded

    @property
    def peak(self) -> tuple[int, ...]:
        """The most (stage, unit) pairs of each rank whose activations it keeps: forward ran, backward not ended."""
        change = ([-1 if action.backward else 1 for action in order] for order in self.timetable.orders)
        return tuple(int(np.cumsum(steps).max()) for steps in change)

    def rank_of(self, stage: int) -> int:
        """The rank on which a stage lives."""
        return self.timetable.rank_of(stage)

    def to_frame(self) -> "pd.DataFrame":
        """One row per action in the order of each rank: rank, stage, backward, unit, start, end.

        >>> from seqbatch.pipeline.schedules import schedule
        >>> simulate(schedule("wavefront", stages=2, chunks=1), 1.0, 2.0).to_frame().values.tolist()[0]
        [0, 0, False, 0, 0.0, 1.0]
        """
        import pandas as pd

        rows = []
        for rank, order in enumerate(self.timetable.orders):
            for action in order:
                place = int(action.backward), action.stage, action.unit
                rows.append((rank, *action, float(self.start[place]), float(self.end[place])))
        return pd.DataFrame(rows, columns=["rank", *Action._fields, "start", "end"])


def simulate(
    timetable: Timetable,
    forward: ArrayLike,
    backward: ArrayLike,
    *,
    latency: ArrayLike = 0.0,
    transfer: ArrayLike = 0.0,
) -> Timeline:
    """Run a timetable: each rank does its actions in order, each as soon as what it needs is there.

    A forward needs the stage before, a backward the stage after and its own forward; in a chained timetable also its
    neighbour in time. A message leaves when its action ends; those on one directed link between two ranks go one
    after the other, `transfer` seconds each, and arrive `latency` seconds later. The sender does not wait for them.
    Stages on one rank need no message.

    Args:
        timetable: What runs in which order.
        forward: Seconds of a forward: one number, (stages,) or (stages, units).
        backward: Seconds of a backward, likewise.
        latency: Seconds that a message is under way: one number, or (stages - 1,), those between stage s and s + 1.
        transfer: Seconds that a message occupies its link, likewise.

    Raises:
        ValueError: times are negative or of another shape, or the order has actions wait for each other for ever.

    >>> from seqbatch.pipeline.schedules import schedule
    >>> line = simulate(schedule("wavefront", stages=4, chunks=8), forward=1.0, backward=2.0)
    >>> line.makespan, round(line.bubble, 3), line.peak
    (33.0, 0.273, (8, 8, 8, 8))
    """
    run = _Run(timetable, _seconds("forward", forward, timetable), _seconds("backward", backward, timetable),
               _hops("latency", latency, timetable), _hops("transfer", transfer, timetable))  # fmt: skip
    waiting = set(range(timetable.ranks))
    while waiting:
        waiting = {other for rank in sorted(waiting) for other in run.advance(rank)}
    if any(run.left):
        raise ValueError(run.deadlock())
    size = (2, timetable.stages, timetable.units)
    return Timeline(timetable, *(np.array(times, np.float64).reshape(size) for times in (run.start, run.end)))


def bubble_formula(stages: int, chunks: int, virtual: int = 1) -> float:
    """The idle share ``(R - 1) / (V * M + R - 1)`` of R ranks, V stages each and M equal chunks, with free hops.

    It holds for the wavefront, gpipe and 1f1b (V = 1): Huang et al. 2019 (GPipe, arXiv 1811.06965, section 2.3) and
    Narayanan et al. 2021 (arXiv 2104.04473, section 2.2), who write it relative to the time of work.

    Args:
        stages: Stages on all ranks together, V * R.
        chunks: Units that a batch is cut into.
        virtual: Stages on each rank.

    Raises:
        ValueError: `virtual` does not divide `stages`, or it is more than 1 and there are fewer chunks than ranks:
            then chunks come round too early for their rank, and no formula is known.

    >>> bubble_formula(stages=4, chunks=9)
    0.25
    """
    for what, value in (("stages", stages), ("chunks", chunks), ("virtual", virtual)):
        check_integer(what, value, at_least=1)
    if stages % virtual:
        raise ValueError(f"virtual stages per rank must divide stages, got virtual={virtual} and stages={stages}")
    ranks = stages // virtual
    if virtual > 1 and chunks < ranks:
        raise ValueError(f"the formula needs as many chunks as ranks when looped, got {chunks} for {ranks} ranks")
    return (ranks - 1) / (virtual * chunks + ranks - 1)


class _Run:
    """What has happened so far. Times are lists, not arrays, since single numbers are read and written.

    The place of an action in them is ``(backward * stages + stage) * units + unit``.
    """

    def __init__(
        self, timetable: Timetable, forward: FloatArray, backward: FloatArray, latency: FloatArray, transfer: FloatArray
    ) -> None:
        self.timetable = timetable
        self.seconds: list[float] = np.concatenate([forward, backward]).ravel().tolist()
        self.latency: list[float] = latency.tolist()
        self.transfer: list[float] = transfer.tolist()
        self.start, self.end, self.arrival = ([math.inf] * len(self.seconds) for _ in range(3))
        """Infinite is not yet. The arrival is that of the outcome at the next stage (of a backward: the one before)."""
        self.free = [0.0] * timetable.ranks
        self.left = [list(reversed(order)) for order in timetable.orders]
        self.link_free: dict[tuple[int, int], float] = {}

    def needs(self, action: Action) -> list[tuple[list[float], int]]:
        """What an action waits for: its own forward, the neighbouring stage, the neighbour in time."""
        (stage, backward, unit), table = action, self.timetable
        here, needed = (backward * table.stages + stage) * table.units + unit, list[tuple[list[float], int]]()
        if backward:
            needed.append((self.end, here - table.stages * table.units))
        if stage != (table.stages - 1 if backward else 0):
            needed.append((self.arrival, here + table.units * (1 if backward else -1)))
        if table.chained and unit != (table.units - 1 if backward else 0):
            needed.append((self.end, here + (1 if backward else -1)))
        return needed

    def advance(self, rank: int) -> set[int]:
        """Do what can be done on a rank, and return the ranks that this may help."""
        left, told, units = self.left[rank], set[int](), self.timetable.units
        while left:
            action = left[-1]
            ready = max([self.free[rank], *(times[place] for times, place in self.needs(action))])
            if ready == math.inf:
                break
            left.pop()
            here = (action.backward * self.timetable.stages + action.stage) * units + action.unit
            self.start[here] = ready
            self.end[here] = self.free[rank] = ready + self.seconds[here]
            target = action.stage + (-1 if action.backward else 1)
            if 0 <= target < self.timetable.stages:
                self.arrival[here] = self.arrives(self.end[here], action.stage, target)
                told.add(self.timetable.rank_of(target))
        return told

    def arrives(self, time: float, source: int, target: int) -> float:
        """Send a message. A rank sends in its own order, so of a link it is enough to know when it is free."""
        link = self.timetable.rank_of(source), self.timetable.rank_of(target)
        if link[0] == link[1]:
            return time
        hop = min(source, target)
        gone = self.link_free[link] = max(time, self.link_free.get(link, 0.0)) + self.transfer[hop]
        return gone + self.latency[hop]

    def deadlock(self) -> str:
        """Who waits for what."""
        stuck = [(rank, left[-1]) for rank, left in enumerate(self.left) if left]
        said = []
        for rank, action in stuck[:8]:
            places = [place for times, place in self.needs(action) if times[place] == math.inf]
            missing = " and ".join(str(self.action_at(place)) for place in places)
            said.append(f"rank {rank} waits with {action} for {missing}")
        more = f"; and {len(stuck) - 8} more ranks" if len(stuck) > 8 else ""
        return f"this order never ends: {'; '.join(said)}{more} (F is forward, B backward, then unit@stage)"

    def action_at(self, place: int) -> Action:
        rest, unit = divmod(place, self.timetable.units)
        backward, stage = divmod(rest, self.timetable.stages)
        return Action(stage, bool(backward), unit)


def _seconds(name: str, value: ArrayLike, timetable: Timetable) -> FloatArray:
    """(stages, units) seconds of each action."""
    array, shape = _times(name, value), (timetable.stages, timetable.units)
    if array.shape not in ((), shape[:1], shape):
        raise ValueError(f"{name} must be one number, {shape[:1]} or {shape}, got the shape {array.shape}")
    return np.broadcast_to(array[:, None] if array.ndim == 1 else array, shape)


def _hops(name: str, value: ArrayLike, timetable: Timetable) -> FloatArray:
    """(stages - 1,) seconds of each hop."""
    array, shape = _times(name, value), (timetable.stages - 1,)
    if array.shape not in ((), shape):
        raise ValueError(f"{name} must be one number or {shape}, one between two stages, got the shape {array.shape}")
    return np.broadcast_to(array, shape)


def _times(name: str, value: ArrayLike) -> FloatArray:
    array = np.asarray(value, np.float64)
    if not (np.isfinite(array) & (array >= 0)).all():
        raise ValueError(f"{name} must be finite seconds, none negative, got {array.tolist()}")
    return array
