"""What all experiments share beyond `seqbatch.measure`: memory of a process of its own, rows on disk."""

import csv
import statistics
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from seqbatch.measure import peak_memory

__all__ = ["peak_mib", "spread", "write_rows"]


def spread(seconds: list[float]) -> str:
    """Return the median and the range in milliseconds."""
    low, middle, high = min(seconds), statistics.median(seconds), max(seconds)
    return f"{1e3 * middle:.1f} ({1e3 * low:.1f}-{1e3 * high:.1f})"


def peak_mib(prepare: Callable[[], Callable[[], object]]) -> float | None:
    """Return by how many MiB a job raises resident memory at most; None where Linux is not.

    In a process of its own, so that no memory freed before is used again unseen.

    Args:
        prepare: An importable function that makes the input, warms up and returns the job.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_peak_here, prepare).result()


def _peak_here(prepare: Callable[[], Callable[[], object]]) -> float | None:
    peak = peak_memory(prepare())
    return None if peak is None else peak / 2**20


def write_rows(path: Path, rows: Iterable[dict[str, object]]) -> None:
    """Write rows as CSV."""
    rows = list(rows)
    names = list(dict.fromkeys(name for row in rows for name in row))
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
    print(f"wrote {path}")
