"""What each strategy wastes on given lengths, before anything is trained.

The plans that are counted here are the plans that train. Costs that depend on a device come from a
model of three numbers, seconds per batch, per step and per cell: a recurrent net pays for each *step*
it walks through, however few lanes are left, so padding, short batches and many lanes cost in
different ways.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from seqbatch.bucketing import Bucketing
from seqbatch.chunking import Chunking
from seqbatch.lengths import as_lengths
from seqbatch.ordering import IntArray
from seqbatch.packing import Packing
from seqbatch.padding import Padding
from seqbatch.plan import Plan
from seqbatch.splicing import Splicing
from seqbatch.strategy import Strategy, check_choice, check_integer

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "DEFAULT",
    "PAIR_STRATEGIES",
    "STRATEGIES",
    "DeviceModel",
    "named",
    "rank_balance",
    "re_meeting",
    "simulate",
    "sized",
]


@dataclass(frozen=True)
class DeviceModel:
    """Seconds that a batch takes: ``batch + steps * step + cells * cell``.

    The defaults are no measurement. They put the *knee*, the number of lanes at which a step's cells
    take as long as the step itself, at 50, where Unno's 2015 talk saw padding stop to scale.

    Args:
        batch_us: Microseconds per batch (launching, optimizer).
        step_us: Microseconds per sequential step.
        cell_ns: Nanoseconds per cell.
        large_batch: Cells from which on a batch outgrows caches or the memory that an allocator keeps.
        large_cell_ns: Nanoseconds more for each cell of a batch beyond these.

    >>> DeviceModel(batch_us=0, step_us=20, cell_ns=400).knee
    50.0
    """

    batch_us: float = 200.0
    step_us: float = 20.0
    cell_ns: float = 400.0
    large_batch: float = 0.0
    large_cell_ns: float = 0.0

    def __post_init__(self) -> None:
        values = (self.batch_us, self.step_us, self.cell_ns)
        if not all(0 <= value < float("inf") for value in values) or not any(values):
            raise ValueError(f"batch_us, step_us and cell_ns must not be negative, nor all 0, got {values}")
        if not (0 <= self.large_batch < float("inf") and 0 <= self.large_cell_ns < float("inf")):
            more = (self.large_batch, self.large_cell_ns)
            raise ValueError(f"large_batch and large_cell_ns must be finite and not negative, got {more}")

    @property
    def knee(self) -> float:
        """The number of lanes from which on cells cost more than steps."""
        return 1e3 * self.step_us / self.cell_ns if self.cell_ns else float("inf")

    def times(self, steps: ArrayLike, cells: ArrayLike, calls: ArrayLike = 1) -> NDArray[np.float64]:
        """Return the seconds of batches of so many steps and cells each, in so many calls."""
        steps, cells, calls = (np.asarray(values, np.float64) for values in (steps, cells, calls))
        beyond = np.maximum(cells - calls * self.large_batch, 0)
        times: NDArray[np.float64] = 1e-6 * (calls * self.batch_us + steps * self.step_us)
        times = times + 1e-9 * (cells * self.cell_ns + beyond * self.large_cell_ns)
        return times

    def seconds(self, plan: Plan) -> float:
        """Return how long the batches of `plan` take, one after another."""
        steps = plan.steps.sum(axis=1) if plan.pairs else plan.steps
        return float(self.times(steps, steps * plan.lanes).sum())


class _Scale(NamedTuple):
    """What a budget is made of, so that batches of different strategies hold about the same."""

    lanes: int
    mean: float
    longest: int
    chunk_size: int
    buckets: int = 8

    @property
    def tokens(self) -> int:
        return max(self.longest, round(self.lanes * self.mean))

    @property
    def rows(self) -> int:
        return max(1, round(self.lanes * self.mean / self.longest))


STRATEGIES: dict[str, Callable[[_Scale], Strategy]] = {
    "padding": lambda s: Padding(s.lanes),
    "pool_sort": lambda s: Bucketing(batch_size=s.lanes, window=20 * s.lanes),
    "token_budget": lambda s: Bucketing(max_tokens=s.tokens),
    "buckets": lambda s: Bucketing(max_tokens=s.tokens, num_buckets=s.buckets),
    "static_shapes": lambda s: Bucketing(max_tokens=s.tokens, static_shapes=True),
    "splicing": lambda s: Splicing(s.lanes, s.chunk_size),
    "splicing_round_robin": lambda s: Splicing(s.lanes, s.chunk_size, assign="round_robin"),
    "chunking": lambda s: Chunking(s.lanes, s.chunk_size),
    "chunking_carry": lambda s: Chunking(s.lanes, s.chunk_size, carry=True),
    "packing": lambda s: Packing(s.longest, rows=s.rows),
    "packing_next_fit": lambda s: Packing(s.longest, rows=s.rows, algorithm="next_fit"),
    "packing_optimal": lambda s: Packing(s.longest, rows=s.rows, algorithm="optimal"),
}
"""The strategies that `simulate` knows by name; a batch size stands for that many lanes of mean length."""
DEFAULT = tuple(name for name in STRATEGIES if name != "packing_optimal")
"""Those that are simulated where nothing is said: all but the one that may take seconds to solve."""

PAIR_STRATEGIES = ("padding", "pool_sort", "token_budget", "buckets", "static_shapes")
"""Those that place pairs."""
_PAIR_BUCKETS = 48  # two dimensions take more buckets than one


def simulate(
    lengths: ArrayLike,
    *,
    strategies: Iterable[str | Strategy] | str | None = None,
    batch_sizes: Sequence[int] = (1, 2, 4, 8, 16, 32, 64, 128, 256),
    chunk_size: int = 35,
    device: DeviceModel | None = None,
    num_replicas: int = 8,
    cost: tuple[float, float] = (1.0, 0.0),
    seed: int = 0,
    progress: bool = False,
) -> "pd.DataFrame":
    """Plan each strategy at each batch size and count what it wastes.

    Args:
        lengths: (N,) tokens of each sequence, or (N, 2) of the two sides of pairs.
        strategies: Names of :data:`STRATEGIES`, by default :data:`DEFAULT` (for pairs those that place them), sized by
            `batch_sizes`: lanes for padding, splicing and chunks; a budget of ``max(longest, round(B * mean))``
            tokens; bins as long as the longest sequence and the number of rows nearest to ``B * mean`` tokens.
            Or strategies themselves, which are counted once, whatever the batch sizes.
        batch_sizes: B of each row.
        chunk_size: Steps of a window or chunk.
        device: Predicts the throughput; see :class:`DeviceModel`.
        num_replicas: Ranks for ``rank_balance``.
        cost: (a, b) of a batch's cost ``a * l + b * l**2`` for ``rank_balance``.
        seed: Seed of the plans.
        progress: Show a bar on standard error, if that is a terminal.

    Returns:
        One row per strategy and batch size: ``strategy``, ``batch_size`` (lanes), ``settings`` (the
        constructor call), ``padding_efficiency``, ``tokens``, ``cells``, ``steps`` (sequential, over all
        batches, of pairs on both sides), ``batches``, ``budget_use`` (tokens / budgets; none without one),
        ``over_budget`` (batches), ``rank_balance`` (mean / max cost over ranks), ``re_meeting`` (share
        of mates that meet again next epoch), ``dropped`` (sequences, empty ones not counted) and
        ``tokens_per_s`` (real tokens, predicted).

    >>> frame = simulate([5, 1, 4, 2, 3, 3], strategies=["padding", "splicing"], batch_sizes=[2])
    >>> frame[["strategy", "batch_size", "tokens"]].values.tolist()
    [['padding', 2, 18], ['splicing', 2, 18]]
    """
    import pandas as pd
    from tqdm import tqdm

    array = as_lengths(lengths, pairs=True)
    chosen = named(strategies, DEFAULT, pairs=array.ndim == 2)
    sizes = [check_integer("a batch size", size, at_least=1) for size in batch_sizes]
    check_integer("num_replicas", num_replicas, at_least=1)
    jobs = list(sized(array, chosen, sizes, chunk_size))
    device = device or DeviceModel()
    bar = tqdm(jobs, disable=None if progress else True, unit="plan", leave=False)
    return pd.DataFrame(
        [
            {"strategy": name, "batch_size": size} | _count(strategy, array, seed, device, num_replicas, cost)
            for name, size, strategy in bar
        ]
    )


def _count(
    strategy: Strategy, lengths: IntArray, seed: int, device: DeviceModel, num_replicas: int, cost: tuple[float, float]
) -> dict[str, object]:
    """Return the columns of one row of `simulate`."""
    plan, next_plan = (strategy.plan(lengths, seed=seed, epoch=epoch) for epoch in (0, 1))
    budget, over_budget = _budget(strategy, plan)
    seconds = device.seconds(plan)
    return {
        "settings": repr(strategy),
        "padding_efficiency": plan.padding_efficiency,
        "tokens": plan.tokens,
        "cells": plan.cells,
        "steps": int(plan.steps.sum()),
        "batches": len(plan),
        "budget_use": plan.tokens / (len(plan) * budget) if budget and len(plan) else None,
        "over_budget": over_budget,
        "rank_balance": rank_balance(plan, num_replicas, cost=cost),
        "re_meeting": re_meeting(plan, next_plan),
        "dropped": len(np.unique(plan.dropped["sequence"][plan.dropped["reason"] != "empty"])),
        "tokens_per_s": plan.tokens / seconds if seconds else None,
    }


def _budget(strategy: Strategy, plan: Plan) -> tuple[int, int]:
    """Return the tokens that a batch may hold, 0 where that is not what is limited, and batches over budget."""
    if isinstance(strategy, Packing):
        return strategy.capacity * strategy.rows, 0
    if not isinstance(strategy, Bucketing) or strategy.max_tokens is None:
        return 0, 0
    over = int((plan.lanes > strategy.lanes_at(plan.steps)).sum())
    counts_tokens = strategy.cost == (1.0, 0.0) and (strategy.budget == "sum" or not plan.pairs)
    return strategy.max_tokens if counts_tokens else 0, over


def named(
    strategies: "Iterable[str | Strategy] | str | Strategy | None", default: Sequence[str], *, pairs: bool
) -> list[str | Strategy]:
    """Return strategies as a list: one alone, `default` for None, all of :data:`DEFAULT` for ``"all"``.

    Of those two only what places pairs, if there are pairs.

    >>> named(None, ["padding", "packing"], pairs=True)
    ['padding']
    """
    if strategies is None or (isinstance(strategies, str) and strategies == "all"):
        names = default if strategies is None else DEFAULT
        return [name for name in names if not pairs or name in PAIR_STRATEGIES]
    return [strategies] if isinstance(strategies, str | Strategy) else list(strategies)


def sized(
    lengths: ArrayLike, strategies: Iterable[str | Strategy], sizes: Sequence[int], chunk_size: int
) -> Iterable[tuple[str, int | None, Strategy]]:
    """Yield (name, batch size, strategy): each name of `strategies` at each size, strategies themselves once."""
    array = np.asarray(lengths)
    pairs = array.ndim == 2
    array = array[array.min(axis=1) > 0].sum(axis=1) if pairs else array[array > 0]
    if not len(array):
        raise ValueError("every sequence is empty: there is nothing to plan")
    buckets = _PAIR_BUCKETS if pairs else 8
    for strategy in strategies:
        if isinstance(strategy, Strategy):
            yield type(strategy).__name__, None, strategy
            continue
        check_choice(
            "a strategy for pairs" if pairs else "a strategy", strategy, PAIR_STRATEGIES if pairs else tuple(STRATEGIES)
        )
        for size in sizes:
            scale = _Scale(size, float(array.mean()), int(array.max()), chunk_size, buckets)
            yield strategy, size, STRATEGIES[strategy](scale)


def rank_balance(plan: Plan, num_replicas: int = 8, *, cost: tuple[float, float] = (1.0, 0.0)) -> float | None:
    """Return mean cost / largest cost over the ranks of a step, total over total.

    What share of the ranks' time synchronous steps use. The left-over last step is cut evenly and not
    counted.

    Returns:
        A number in (0, 1]; None where there are fewer batches than ranks, or where `num_replicas` does
        not divide the lanes of a carried plan.

    >>> rank_balance(Padding(1, shuffle=False).plan([4, 2, 4, 2]), 2)
    0.75
    """
    if plan.carry:
        return 1.0 if len(plan) and plan.lanes[0] % num_replicas == 0 else None
    groups = plan.costs(cost)[plan.schedule(num_replicas, cost=cost).groups]
    return float(groups.mean(axis=1).sum() / groups.max(axis=1).sum()) if len(groups) else None


def re_meeting(plan: Plan, next_plan: Plan) -> float | None:
    """Return the share of batch mates of `plan` that are mates again in `next_plan`.

    Mates are pairs of sequences whose first tokens lie in the same batch. 1 means the same batches
    every epoch; a full shuffle of N sequences in batches of B gives about ``B / N``.

    Returns:
        A number in [0, 1]; None where no batch has a pair.

    >>> plan = Padding(2, shuffle=False).plan([1, 2, 3, 4])
    >>> re_meeting(plan, plan)
    1.0
    """
    count = 1 + max(int(p.sequence.max(initial=-1)) for p in (plan, next_plan))
    first, second = (_batch_of(p, count) for p in (plan, next_plan))
    both = (first >= 0) & (second >= 0)
    mates = _pairs(np.bincount(first[both]))
    again = _pairs(np.unique(first[both] * max(len(next_plan), 1) + second[both], return_counts=True)[1])
    return again / mates if mates else None


def _batch_of(plan: Plan, count: int) -> IntArray:
    """The batch in which each sequence begins, -1 for those that do not."""
    left = 0 if plan.left_context is None else plan.left_context
    begins = plan.start + left == 0
    batch = np.full(count, -1)
    batch[plan.sequence[begins]] = np.repeat(np.arange(len(plan)), np.diff(plan.batch_ptr))[begins]
    return batch


def _pairs(counts: IntArray) -> int:
    return int((counts * (counts - 1) // 2).sum())
