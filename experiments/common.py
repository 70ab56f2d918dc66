"""What all experiments share: the machine's record, interleaved timing, rows on disk."""

import csv
import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

__all__ = ["environment", "peak_mib", "timed", "write_rows"]


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


def peak_mib(job: Callable[[], object]) -> float | None:
    """Return by how many MiB `job` raised the process's resident memory at most; None where Linux is not."""
    status, refs = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not refs.exists():
        return None

    def field(name: str) -> float:
        return next(int(line.split()[1]) / 1024 for line in status.read_text().splitlines() if line.startswith(name))

    gc.collect()
    refs.write_text("5")
    before = field("VmRSS")
    job()
    return field("VmHWM") - before


def write_rows(path: Path, rows: Iterable[dict[str, object]]) -> None:
    """Write rows as CSV."""
    rows = list(rows)
    names = list(dict.fromkeys(name for row in rows for name in row))
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
    print(f"wrote {path}")
