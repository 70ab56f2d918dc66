"""How long planning takes and how good the plans are; see README.md beside this file.

python -m experiments.planning.run [--quick]
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from experiments.common import peak_mib, spread, write_rows
from seqbatch import Bucketing, Packing
from seqbatch.edges import find_edges
from seqbatch.measure import environment, timed
from seqbatch.ordering import IntArray
from seqbatch.plan import Plan
from seqbatch.simulate import rank_balance, re_meeting
from seqbatch.strategy import Strategy

HERE = Path(__file__).parent
BUDGET, CAPACITY = 16_384, 4_096
RANKS = (2, 3, 5, 8)


def lengths(name: str, count: int) -> IntArray:
    """(a) gamma(2, 12), at most 512; (b) lognormal(4.5, 1), at most 4096; seed 0."""
    rng = np.random.default_rng(0)
    drawn, most = (rng.gamma(2, 12, count), 512) if name == "a" else (rng.lognormal(4.5, 1.0, count), 4096)
    return np.clip(np.rint(drawn), 1, most).astype(np.int64)


def quality(strategy: Strategy, array: IntArray, plan: Plan) -> dict[str, object]:
    """What the plan is worth, apart from time."""
    row: dict[str, object] = {"batches": len(plan), "padding_efficiency": round(plan.padding_efficiency, 5)}
    if isinstance(strategy, Packing):
        row["lower_bound"] = -(-int(array.sum()) // strategy.capacity)
    if isinstance(strategy, Bucketing) and not strategy.static_shapes:
        row["over_budget"] = int((plan.steps * plan.lanes > BUDGET).sum())
        row["re_meeting"] = round(re_meeting(plan, strategy.plan(array, epoch=1)) or 0, 5)
        # One order of steps, by quadratic cost, balances both.
        groups = {ranks: plan.schedule(ranks, cost=(0, 1)).groups for ranks in RANKS}
        for name, cost in (("linear", (1.0, 0.0)), ("quadratic", (0.0, 1.0))):
            costs = plan.costs(cost)
            for ranks, group in groups.items():
                balance = (costs[group].mean(axis=1) / costs[group].max(axis=1)).mean()
                row[f"balance_{name}_{ranks}"] = round(float(balance), 4)
        row["balance_linear_8_own_order"] = round(rank_balance(plan, 8) or 0, 4)
    return row


def one_plan(strategy: Strategy, name: str, count: int) -> Callable[[], Plan]:
    """Return the planning of one epoch as a job, its kernels loaded."""
    array = lengths(name, count)
    strategy.plan(array[:1000])
    return partial(strategy.plan, array)


def measure(name: str, count: int, repeats: int) -> list[dict[str, object]]:
    """Time the plans of one set of lengths beside a stable argsort of the same array."""
    array = lengths(name, count)
    strategies: dict[str, Strategy] = {
        "token budget": Bucketing(max_tokens=BUDGET),
        "packing, best fit": Packing(CAPACITY),
        "static shapes, 8 optimal edges": Bucketing(max_tokens=BUDGET, static_shapes=True),
    }
    epoch = iter(range(1_000_000))
    jobs = {"argsort": lambda: np.argsort(array, kind="stable")}
    jobs |= {what: lambda s=s: s.plan(array, epoch=next(epoch)) for what, s in strategies.items()}
    jobs["finding 8 optimal edges alone"] = lambda: find_edges(array, 8)
    seconds = {name: timing.wall for name, timing in timed(jobs, repeats).items()}
    rows = []
    for what in jobs:
        ratios = [mine / base for mine, base in zip(seconds[what], seconds["argsort"], strict=True)]
        row: dict[str, object] = {
            "lengths": name, "count": count, "job": what, "ms_median_range": spread(seconds[what]),
            "seconds_median": round(statistics.median(seconds[what]), 5),
            "over_argsort_median": round(statistics.median(ratios), 3),
            "over_argsort_range": f"{min(ratios):.2f}-{max(ratios):.2f}",
        }  # fmt: skip
        if what in strategies:
            peak = peak_mib(partial(one_plan, strategies[what], name, count))
            row["peak_mib_above_input"] = None if peak is None else round(peak, 1)
            row |= quality(strategies[what], array, strategies[what].plan(array))
        rows.append(row)
        print({key: value for key, value in row.items() if key != "seconds_median"}, flush=True)
    return rows


def main() -> None:
    """Measure all sizes and write results.csv."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="only 100,000 lengths, three repeats, nothing written")
    quick = parser.parse_args().quick
    begin = time.perf_counter()
    for strategy in (Bucketing(max_tokens=BUDGET), Bucketing(max_tokens=BUDGET, static_shapes=True), Packing(CAPACITY)):
        strategy.plan(lengths("a", 1000))
    compile_seconds = round(time.perf_counter() - begin, 2)
    print(f"loading or compiling the kernels: {compile_seconds} s")
    rows = []
    for count, repeats in ((100_000, 3),) if quick else ((1_000_000, 15), (10_000_000, 5)):
        for name in ("a", "b"):
            rows += measure(name, count, repeats)
    for row in rows:
        if row["count"] == 10_000_000:
            small = next(
                r for r in rows if r["count"] == 1_000_000 and (r["lengths"], r["job"]) == (row["lengths"], row["job"])
            )
            row["over_1m"] = round(row["seconds_median"] / small["seconds_median"], 2)  # type: ignore[operator]
    rows = [row | {"kernels_ready_s": compile_seconds} | environment() for row in rows]
    if not quick:
        write_rows(HERE / "results.csv", rows)


if __name__ == "__main__":
    main()
