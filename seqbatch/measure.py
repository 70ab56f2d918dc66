"""Time, memory and the machine: what measured numbers are made of, and the cost model they calibrate."""

import ctypes
import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from seqbatch.simulate import DeviceModel

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Calibration", "Timing", "calibrate", "environment", "free_bytes", "peak_memory", "stopwatch", "timed"]

Job = Callable[[], object]
_STATUS = Path("/proc/self/status")
_MUCH_BETTER = 0.7  # share of the error that a price of large batches may leave
_CLEAR_REFS = Path("/proc/self/clear_refs")
_CGROUP = Path("/sys/fs/cgroup")


@dataclass
class Timing:
    """Seconds of a job, once for each time it ran.

    Attributes:
        wall: Seconds on the clock; on a CUDA device between two events of its stream.
        cpu: Seconds that the process's threads computed meanwhile. Far less than `wall` times threads: the job
            waited, or others used the machine.
    """

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Of the wall clock."""
        return statistics.median(self.wall)

    @property
    def low(self) -> float:
        """The fastest."""
        return min(self.wall)

    @property
    def high(self) -> float:
        """The slowest."""
        return max(self.wall)


@contextmanager
def stopwatch(device: torch.device | str, into: Timing) -> Iterator[None]:
    """Time a block and append it to `into`; on a CUDA device waits for the device, before and after.

    >>> timing = Timing()
    >>> with stopwatch("cpu", timing):
    ...     _ = sum(range(1000))
    >>> len(timing.wall), timing.median > 0
    (1, True)
    """
    cuda = torch.device(device).type == "cuda"
    if cuda:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda.synchronize(device)
        begin.record(torch.cuda.current_stream(device))
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    if cuda:
        end.record(torch.cuda.current_stream(device))
        end.synchronize()
    into.cpu.append(time.process_time() - cpu)
    into.wall.append(begin.elapsed_time(end) / 1e3 if cuda else time.perf_counter() - wall)


def timed(jobs: Mapping[str, Job], repeats: int, *, device: torch.device | str = "cpu") -> dict[str, Timing]:
    """Return the timing of each job, run `repeats` times after a turn that is not counted.

    The jobs take turns, so that drift of the machine hits all alike.

    >>> sorted(timed({"a": lambda: None, "b": lambda: None}, repeats=3))
    ['a', 'b']
    """
    timings = {name: Timing() for name in jobs}
    for job in jobs.values():
        job()
    for _ in range(repeats):
        for name, job in jobs.items():
            gc.collect()
            with stopwatch(device, timings[name]):
                job()
    return timings


def environment(device: torch.device | str = "cpu") -> dict[str, str]:
    """Return what measured numbers depend on besides the code: ``cpu``, ``cores``, ``threads``, ``versions``.

    On a CUDA device also ``gpu``.

    >>> sorted(environment())
    ['cores', 'cpu', 'threads', 'versions']
    """
    import numba

    cpu = platform.processor() or "unknown"
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    record = {"cpu": cpu, "cores": str(os.cpu_count()), "threads": str(torch.get_num_threads())}
    if torch.device(device).type == "cuda":
        versions["cuda"] = str(torch.version.cuda)
        if find_spec("triton"):
            versions["triton"] = version("triton")
        record["gpu"] = torch.cuda.get_device_name(device)
    versions["numba"] = numba.__version__
    return record | {"versions": ", ".join(f"{name} {version}" for name, version in versions.items())}


def free_bytes(device: torch.device | str = "cpu") -> int | None:
    """Return the bytes that could still be allocated, by a container too; None where the system does not say."""
    if torch.device(device).type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    available = _proc(Path("/proc/meminfo"), "MemAvailable")
    try:
        limit, used = (int((_CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # no such limit
        return available
    return limit - used if available is None else min(available, limit - used)


def peak_memory(job: Job, device: torch.device | str = "cpu") -> float | None:
    """Run a job and return the bytes it needs at most beyond what is there before it; None where Linux is not.

    Of the process's resident memory, after what was freed before has been given back to the system; on a CUDA
    device of torch's allocator.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        job()
        torch.cuda.synchronize(device)
        return float(torch.cuda.max_memory_allocated(device) - before)
    resident = _begin_high_water()
    job()
    peak = _proc(_STATUS, "VmHWM")
    return None if resident is None or peak is None else max(0.0, peak - resident)


def _begin_high_water() -> int | None:
    """Let the high-water mark begin anew, after what is free has gone back; the bytes resident now."""
    try:
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
        _CLEAR_REFS.write_text("5")
    except (OSError, TypeError):  # not Linux, or not allowed
        return None
    return _proc(_STATUS, "VmRSS")


def _proc(path: Path, name: str) -> int | None:
    """A line of kB of a file of the kernel's, in bytes; None where it is missing."""
    rows = path.read_text().splitlines() if path.exists() else []
    return next((int(row.split()[1]) * 1024 for row in rows if row.startswith(name + ":")), None)


@dataclass(frozen=True)
class Calibration:
    """A device model and the points it comes from.

    Attributes:
        device: Seconds per batch, step and cell.
        points: One row a measured grid: ``steps``, ``lanes``, ``seconds`` (median), ``low``, ``high``,
            ``predicted`` seconds, and ``fitted``: whether the model was fitted to it or is tested on it.
    """

    device: DeviceModel
    points: "pd.DataFrame"

    def errors(self, *, fitted: bool) -> NDArray[np.float64]:
        """Relative errors ``predicted / measured - 1`` of the points fitted to, or of the others."""
        rows = self.points[self.points["fitted"] == fitted]
        errors: NDArray[np.float64] = (rows["predicted"] / rows["seconds"] - 1).to_numpy()
        return errors


def calibrate(
    job: Callable[[int, int], Job],
    fitted: Sequence[tuple[int, int]],
    held_out: Sequence[tuple[int, int]] = (),
    *,
    device: torch.device | str = "cpu",
    seconds: float = 10.0,
    progress: bool = False,
) -> Calibration:
    """Measure a few grids and fit seconds per batch, per step and per cell, none negative.

    The sum of squared *relative* errors is least, so that small grids count as much as large ones. The grids take
    turns, as batches of different shapes do in training: one that is run over and over finds its memory warm. Each
    runs twice, and again while it has not taken its share of `seconds`; those that by the time of smaller ones would
    take a sixth of `seconds` at once are left out, but never the four smallest.

    Args:
        job: Makes the job of a grid of (steps, lanes).
        fitted: (steps, lanes) to fit to: at least 3, of different steps and lanes.
        held_out: (steps, lanes) to test the model on.
        device: Where the jobs run.
        seconds: About how long all may take.
        progress: Show a bar on standard error, if that is a terminal.

    >>> model = calibrate(lambda steps, lanes: lambda: time.sleep(1e-4 * steps), [(1, 1), (8, 1), (40, 2)], [(20, 2)])
    >>> model.points[["steps", "fitted"]].values.tolist()
    [[1, True], [8, True], [40, True], [20, False]]
    """
    import pandas as pd
    from tqdm import tqdm

    points = sorted(dict.fromkeys(fitted), key=np.prod)
    points += sorted(set(held_out) - set(points), key=np.prod)
    if len(set(fitted)) < 3:
        raise ValueError(f"three numbers need at least three grids to fit to, got {sorted(set(fitted))}")
    jobs: dict[tuple[int, int], Job] = {}
    share, took = seconds / (2 * len(points)), dict[tuple[int, int], float]()
    for steps, lanes in points:  # a first turn that is not counted
        # Time rises at most as steps and as lanes do.
        at_most = (t * max(1.0, steps / s) * max(1.0, lanes / n) for (s, n), t in took.items())
        if len(jobs) >= 4 and min(at_most) > seconds / 6:
            continue
        jobs[steps, lanes], timing = job(steps, lanes), Timing()
        with stopwatch(device, timing):
            jobs[steps, lanes]()
        took[steps, lanes] = timing.median
    timings = {point: Timing() for point in jobs}
    for _ in tqdm(range(15), disable=None if progress else True, unit="turn", desc="calibrating", leave=False):
        for point, run in jobs.items():
            if len(timings[point].wall) < 2 or sum(timings[point].wall) < share:
                with stopwatch(device, timings[point]):
                    run()
    rows = [
        {"steps": steps, "lanes": lanes, "seconds": timing.median, "low": timing.low, "high": timing.high,
         "fitted": (steps, lanes) in set(fitted)}
        for (steps, lanes), timing in timings.items()
    ]  # fmt: skip
    frame = pd.DataFrame(rows)
    model = _fit(frame[frame["fitted"]])
    predicted = model.times(frame["steps"].to_numpy(), (frame["steps"] * frame["lanes"]).to_numpy())
    return Calibration(model, frame.assign(predicted=predicted))


def _fit(points: "pd.DataFrame") -> DeviceModel:
    """Least squares of relative errors; with a price of large batches where that explains much more."""
    from scipy.optimize import nnls

    steps, lanes, seconds = (points[name].to_numpy(np.float64) for name in ("steps", "lanes", "seconds"))
    cells = steps * lanes
    terms = np.stack([1e-6 * np.ones_like(steps), 1e-6 * steps, 1e-9 * cells], axis=1)

    def solve(columns: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
        found: tuple[NDArray[np.float64], float] = nnls(columns / seconds[:, None], np.ones(len(seconds)))
        return found

    numbers, error = solve(terms)
    best = DeviceModel(*map(float, numbers))
    # From which size on it shows is looked for among the grids, two of which at least must lie beyond.
    for large in np.sort(cells)[len(cells) // 2 : -2] if len(cells) > 5 else ():
        numbers, left = solve(np.column_stack([terms, 1e-9 * np.maximum(cells - large, 0)]))
        if left < _MUCH_BETTER * error:
            batch, step, cell, more = map(float, numbers)
            best, error = DeviceModel(batch, step, cell, float(large), more), left / _MUCH_BETTER
    return best
