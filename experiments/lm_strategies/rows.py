"""Rows that are written as they finish, with the machine that they were measured on."""

import csv
import os
import time
from pathlib import Path

import torch

from seqbatch.measure import environment

__all__ = ["Elsewhere", "append_rows", "machine"]


def machine(device: str) -> dict[str, str]:
    """Return what the numbers depend on besides the code: also the memory allocator's settings, where they are set."""
    record = environment() | {"torch": torch.__version__, "threads": str(torch.get_num_threads())}
    record["malloc"] = " ".join(f"{key}={os.environ[key]}" for key in sorted(os.environ) if key.startswith("MALLOC_"))
    return record | ({"device": torch.cuda.get_device_name()} if device == "cuda" else {"device": "cpu"})


class Elsewhere:
    """What the cores did besides this process since the object was made, time stolen by other guests included.

    The stock LSTM kernels wait for all threads at every step: beside another busy process they take ten times as long.
    """

    def __init__(self) -> None:
        self._begin = self._now()

    def share(self) -> float:
        """Return the share of all cores' time that went to others, 0 to 1; NaN where there is no /proc/stat."""
        wall, busy, own = (now - begin for now, begin in zip(self._now(), self._begin, strict=True))
        return round(max(busy - own, 0.0) / (wall * (os.cpu_count() or 1)), 3)

    @staticmethod
    def _now() -> tuple[float, float, float]:
        stat, busy = Path("/proc/stat"), float("nan")
        if stat.exists():
            ticks = [int(field) for field in stat.read_text().splitlines()[0].split()[1:9]]
            busy = (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")  # all but idle and waiting for disk
        return time.perf_counter(), busy, time.process_time()


def append_rows(path: Path, rows: list[dict[str, object]]) -> None:
    """Append rows to a CSV file, in the order of its columns; a new one gets its header from the first row.

    Raises:
        ValueError: the file has other columns.
    """
    new, header = not path.exists(), list(rows[0])
    if not new:
        with open(path, newline="") as file:
            header = next(csv.reader(file))
        if sorted(header) != sorted(rows[0]):
            raise ValueError(f"{path} has the columns {header}, the new rows have {list(rows[0])}: move the file away")
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, header)
        if new:
            writer.writeheader()
        writer.writerows(rows)
