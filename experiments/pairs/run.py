"""What padding costs where every example has two lengths, and how long plans of pairs take; see README.md here.

python -m experiments.pairs.run [--quick]
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from experiments.common import spread, write_rows
from seqbatch import Bucketing, Padding, load_corpus
from seqbatch.lengths import corpus_names
from seqbatch.measure import environment, timed
from seqbatch.ordering import IntArray, random_order
from seqbatch.pair_kernels import cut_pairs
from seqbatch.plan import Plan
from seqbatch.simulate import re_meeting
from seqbatch.strategy import Strategy

HERE = Path(__file__).parent
BUDGETS = (8192, 2048)
BUCKETS = (16, 48, 96)


def sorts(lengths: IntArray) -> dict[str, IntArray]:
    """The orders that toolkits sort all pairs by, ties at random."""
    drawn = random_order(len(lengths), 0, 0, "ties")
    source, target = lengths[drawn].T
    return {
        "random order": drawn,
        "sorted by the sum": drawn[np.argsort(source + target, kind="stable")],
        "sorted by the longer side": drawn[np.argsort(np.maximum(source, target), kind="stable")],
        "sorted by (source, target)": drawn[np.lexsort((target, source))],
        "sorted by (target, source)": drawn[np.lexsort((source, target))],
    }


def cut(lengths: IntArray, order: IntArray, budget: int) -> tuple[float, int]:
    """Return (padding efficiency, batches) where batches take the next pair while the padded budget holds."""
    source, target = (np.ascontiguousarray(side) for side in lengths[order].T)
    costs = np.arange(int(lengths.max()) + 1)
    ends, longest = np.empty(len(order), np.int64), np.empty((2, len(order)), np.int64)
    stops, most = np.array([len(order)]), len(order)
    count = cut_pairs(source, target, costs, costs, True, np.int64(budget), most, 1, stops, ends, longest)
    sizes = np.diff(ends[:count], prepend=0)
    return float(lengths.sum() / (sizes * longest[:, :count].sum(axis=0)).sum()), count


def by_strategy(lengths: IntArray, strategy: Strategy, budget: int) -> dict[str, object]:
    """What a plan wastes."""
    plan = strategy.plan(lengths)
    again = re_meeting(plan, strategy.plan(lengths, epoch=1))
    return {
        "padding_efficiency": round(plan.padding_efficiency, 4),
        "batches": len(plan),
        "over_budget": int((plan.costs() > budget).sum()),
        "re_meeting": round(again or 0, 3),
    }


def strategies(lengths: IntArray, budget: int) -> dict[str, Strategy]:
    """Ours, and zero padding with the pairs whose real tokens would fill the budget."""
    per_batch = round(budget / float(lengths.sum(axis=1).mean()))
    return {
        f"padding, {per_batch} pairs": Padding(per_batch),
        "pool sort": Bucketing(max_tokens=budget),
        **{f"{k} optimal edges": Bucketing(max_tokens=budget, num_buckets=k) for k in BUCKETS},
        f"{BUCKETS[1]} optimal edges, static shapes": Bucketing(
            max_tokens=budget, num_buckets=BUCKETS[1], static_shapes=True
        ),
    }


def efficiency(name: str) -> list[dict[str, object]]:
    """One row for each way to batch a corpus of pairs, at each budget."""
    lengths, rows = load_corpus(name), []
    for budget in BUDGETS:
        common = {"corpus": name, "pairs": len(lengths), "tokens": int(lengths.sum()), "budget": budget}
        for method, order in sorts(lengths).items():
            used, batches = cut(lengths, order, budget)
            row = {"method": method, "padding_efficiency": round(used, 4), "batches": batches, "over_budget": 0}
            rows.append(common | row)
        for method, strategy in strategies(lengths, budget).items():
            rows.append(common | {"method": method} | by_strategy(lengths, strategy, budget))
        for row in rows[-len(sorts(lengths)) - len(strategies(lengths, budget)) :]:
            print(row, flush=True)
    return rows


def times(name: str, count: int, repeats: int) -> list[dict[str, object]]:
    """Seconds of planning `count` pairs drawn from a corpus, beside sorting them by (source, target)."""
    corpus = load_corpus(name)
    lengths = corpus[np.random.default_rng(0).integers(0, len(corpus), count)]
    epoch = iter(range(1_000_000))

    def job(strategy: Strategy) -> Callable[[], Plan]:
        return lambda: strategy.plan(lengths, epoch=next(epoch))

    jobs: dict[str, Callable[[], object]] = {"numpy.lexsort": partial(np.lexsort, (lengths[:, 1], lengths[:, 0]))}
    jobs["pool sort"] = job(Bucketing(max_tokens=BUDGETS[0]))
    jobs[f"{BUCKETS[1]} optimal edges"] = job(Bucketing(max_tokens=BUDGETS[0], num_buckets=BUCKETS[1]))
    rows: list[dict[str, object]] = []
    for what, timing in timed(jobs, repeats).items():
        median = round(statistics.median(timing.wall), 4)
        rows.append(
            {"corpus": name, "pairs": count, "job": what, "seconds": median, "ms_median_range": spread(timing.wall)}
        )
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Count and time all, and write efficiency.csv and times.csv."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="100,000 pairs and three repeats, nothing written")
    quick = parser.parse_args().quick
    names = corpus_names(pairs=True)
    counted = [row for name in names for row in efficiency(name)]
    timings = [row for name in names for row in times(name, 100_000 if quick else 1_000_000, 3 if quick else 9)]
    if not quick:
        write_rows(HERE / "efficiency.csv", counted)
        write_rows(HERE / "times.csv", [row | environment() for row in timings])


if __name__ == "__main__":
    main()
