"""Timetables of a pipeline: which stage runs which unit, in which order, on every rank.

A *unit* is what a batch is cut into: a chunk of steps (all lanes) or a micro-batch (some lanes, all steps). A stage is
a run of layers; stage s lives on rank ``s % ranks``, so a rank with ``virtual`` stages is passed that often ("looped").
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from seqbatch.strategy import check_choice, check_integer

__all__ = ["SCHEDULES", "Action", "Timetable", "schedule"]

SCHEDULES = ("wavefront", "gpipe", "1f1b")


class Action(NamedTuple):
    """One stage's forward or backward pass over one unit; written F or B, unit@stage.

    >>> print(Action(stage=2, backward=True, unit=5))
    B5@2
    """

    stage: int
    backward: bool
    unit: int

    def __str__(self) -> str:
        return f"{'FB'[self.backward]}{self.unit}@{self.stage}"


@dataclass(frozen=True)
class Timetable:
    """The order in which each rank works.

    Attributes:
        name: One of `SCHEDULES`.
        ranks: Devices.
        stages: Stages on all ranks; stage s lives on rank ``s % ranks``.
        units: Chunks or micro-batches of a batch.
        orders: The actions of each rank, all 2 * stages / ranks * units of them.
        chained: Whether a stage's forward of unit k needs that of k - 1, and its backward that of k + 1, as time chunks
            do under backpropagation through all of them; micro-batches, and chunks whose gradient is cut, do not.
    """

    name: str
    ranks: int
    stages: int
    units: int
    orders: tuple[tuple[Action, ...], ...]
    chained: bool

    def __post_init__(self) -> None:
        wanted = [Action(s, b, u) for s in range(self.stages) for b in (False, True) for u in range(self.units)]
        by_rank = [[action for action in wanted if self.rank_of(action.stage) == rank] for rank in range(self.ranks)]
        if [sorted(order) for order in self.orders] != by_rank:
            raise ValueError(f"each rank must do each action of its stages once; these do not: {self.orders}")

    def rank_of(self, stage: int) -> int:
        """The rank on which a stage lives."""
        return stage % self.ranks


def schedule(name: str, *, stages: int, chunks: int, virtual: int = 1) -> Timetable:
    """Return the timetable of a schedule, in the order of torch.distributed.pipelining's engine.

    Args:
        name: "wavefront" (``ScheduleLoopedBFS``): all forwards, then all backwards, units *descending*, which is what
            backpropagation through time chunks needs; a rank does all units of a stage before the next of its stages.
            "gpipe" (``ScheduleGPipe``, Huang et al. 2019, arXiv 1811.06965): backwards ascending. "1f1b"
            (``Schedule1F1B``, Narayanan et al. 2021, arXiv 2104.04473): backwards as soon as they can, ascending.
        stages: Stages on all ranks together.
        chunks: Units that a batch is cut into.
        virtual: Stages on each rank, 1 but for the wavefront.

    Raises:
        ValueError: `virtual` does not divide `stages`; more than 1 for other schedules than the wavefront; fewer
            chunks than stages for 1f1b.

    >>> for order in schedule("wavefront", stages=2, chunks=3).orders:
    ...     print(*order)
    F0@0 F1@0 F2@0 B2@0 B1@0 B0@0
    F0@1 F1@1 F2@1 B2@1 B1@1 B0@1
    >>> print(*schedule("1f1b", stages=2, chunks=3).orders[0])
    F0@0 F1@0 B0@0 F2@0 B1@0 B2@0
    """
    check_choice("schedule", name, SCHEDULES)
    for what, value in (("stages", stages), ("chunks", chunks), ("virtual", virtual)):
        check_integer(what, value, at_least=1)
    if stages % virtual:
        raise ValueError(f"virtual stages per rank must divide stages, got virtual={virtual} and stages={stages}")
    if virtual > 1 and name != "wavefront":
        raise ValueError(f"only the wavefront takes several stages per rank, got virtual={virtual} for {name}")
    if name == "1f1b" and chunks < stages:
        raise ValueError(
            f"1f1b needs at least as many chunks as stages, got {chunks} chunks for {stages} stages: cut finer, or "
            "take gpipe or wavefront"
        )
    ranks = stages // virtual
    orders = tuple(_order(name, range(rank, stages, ranks), stages, chunks) for rank in range(ranks))
    return Timetable(name, ranks, stages, chunks, orders, chained=name == "wavefront")


def _order(name: str, local: range, stages: int, chunks: int) -> tuple[Action, ...]:
    """The actions of the rank that has these stages."""
    if name == "1f1b":
        return tuple(_one_forward_one_backward(local[0], stages - local[0], chunks))
    forward = [Action(stage, False, unit) for stage in local for unit in range(chunks)]
    units = range(chunks)[::-1] if name == "wavefront" else range(chunks)
    return (*forward, *(Action(stage, True, unit) for stage in reversed(local) for unit in units))


def _one_forward_one_backward(stage: int, ahead: int, chunks: int) -> Iterator[Action]:
    """As many forwards first as there are stages from this one on, then a backward and a forward in turn."""
    for unit in range(chunks + ahead):
        if unit >= ahead:
            yield Action(stage, True, unit - ahead)
        if unit < chunks:
            yield Action(stage, False, unit)
