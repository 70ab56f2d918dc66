"""What all experiments share: the machine's record, interleaved timing, rows on disk."""

import csv
import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np

__all__ = ["environment", "peak_mib", "spread", "timed", "write_rows"]


def environment() -> dict[str, str]:
    """Return what the numbers depend on besides the code."""
    import numba

    cpu = platform.processor() or "unknown"
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    versions = f"python {platform.python_version()}, numpy {np.__version__}, numba {numba.__version__}"
    return {"cpu": cpu, "cores": str(os.cpu_count()), "versions": versions}


def timed(jobs: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Return seconds of each job, `repeats` times, the jobs taking turns so that drift hits all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for job in jobs.values():
        job()
    for _ in range(repeats):
        for name, job in jobs.items():
            gc.collect()
            begin = time.perf_counter()
            job()
            seconds[name].append(time.perf_counter() - begin)
    return seconds


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
    if not Path("/proc/self/clear_refs").exists():
        return None
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_peak_here, prepare).result()


def _peak_here(prepare: Callable[[], Callable[[], object]]) -> float:
    def field(name: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))

    job = prepare()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = field("VmRSS")
    result = job()
    peak = field("VmHWM") - before
    del result
    return peak


def write_rows(path: Path, rows: Iterable[dict[str, object]]) -> None:
    """Write rows as CSV."""
    rows = list(rows)
    names = list(dict.fromkeys(name for row in rows for name in row))
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
    print(f"wrote {path}")
