"""How many bins best fit and the linear programme need, and how long they take; see README.md beside this file.

python -m experiments.packing.run [--quick]
"""

import argparse
import statistics
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import scipy
from tqdm import tqdm

from experiments.common import spread, write_rows
from seqbatch import Packing, cutting
from seqbatch.lengths import load_corpus
from seqbatch.measure import environment, timed
from seqbatch.ordering import IntArray

HERE = Path(__file__).parent
CAPACITY = 4_096


def inputs(count: int) -> Iterator[tuple[str, IntArray, int]]:
    """Yield (name, lengths, capacity): three hard sets of `count`, two easy ones of ten times as many, two corpora."""
    drawn = {
        "normal(1400, 120)": lambda rng: rng.normal(1400, 120, count),
        "uniform(800, 2400)": lambda rng: rng.integers(800, 2401, count),
        "lognormal(7.2, 0.45)": lambda rng: rng.lognormal(7.2, 0.45, count),
        "gamma(2, 12)": lambda rng: np.minimum(rng.gamma(2, 12, 10 * count), 512),
        "lognormal(4.5, 1)": lambda rng: rng.lognormal(4.5, 1.0, 10 * count),
    }
    for name, draw in drawn.items():
        yield name, np.clip(np.rint(draw(np.random.default_rng(0))), 1, CAPACITY).astype(np.int64), CAPACITY
    for name in ("librispeech_devtest_clean", "code_python_functions"):
        lengths = load_corpus(name)
        capacity = int(2.5 * np.median(lengths))
        yield name, lengths[(lengths > 0) & (lengths <= capacity)], capacity


def measure(name: str, lengths: IntArray, capacity: int, repeats: int) -> dict[str, object]:
    """Solve anew `repeats` times; best fit, the solver and the next epoch's plan take turns."""
    best_fit, optimal = Packing(capacity), Packing(capacity, algorithm="optimal")
    epoch = iter(range(1_000_000))

    def solve() -> None:
        cutting._solved.clear()
        optimal.solve(lengths)

    jobs = {
        "best_fit": lambda: best_fit.plan(lengths, epoch=next(epoch)),
        "solve": solve,
        "next_epoch": lambda: optimal.plan(lengths, epoch=next(epoch)),
    }
    timings = timed(jobs, repeats)
    found = optimal.solve(lengths)
    row: dict[str, object] = {
        "lengths": name,
        "count": len(lengths),
        "different": len(np.unique(lengths)),
        "capacity": capacity,
        "best_fit_bins": found.best_fit_bins,
        "optimal_bins": found.bins,
        "bound": found.bound,
        "fewer_percent": round(100 * (1 - found.bins / found.best_fit_bins), 3),
        "gap_percent": round(100 * (found.bins / found.bound - 1), 3),
        "status": found.status,
        "unit": found.unit,
    }
    for job, timing in timings.items():
        row[f"{job}_seconds"] = round(statistics.median(timing.wall), 4)
        row[f"{job}_ms_median_range"] = spread(timing.wall)
    row["solve_cpu_seconds_least"] = round(min(timings["solve"].cpu), 3)
    return row


def main() -> None:
    """Measure all and write results.csv."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tenth of the lengths, one repeat, nothing written")
    quick = parser.parse_args().quick
    record = environment()
    record["versions"] += f", scipy {scipy.__version__}"
    rows: list[dict[str, object]] = []
    for name, lengths, capacity in tqdm(list(inputs(10_000 if quick else 100_000)), unit="input"):
        rows.append(measure(name, lengths, capacity, 1 if quick else 3) | record)
        tqdm.write(str({key: value for key, value in rows[-1].items() if key not in record}))
        if not quick:
            write_rows(HERE / "results.csv", rows)


if __name__ == "__main__":
    main()
