"""Which strategy trains fastest on given lengths, cell and device: predicted from a few grids, then measured.

A comparison calibrates the device model on full grids, predicts every strategy at every batch size, and then
trains on batches of each plan as a loader makes them, all rows taking turns. The recommendation
follows what was measured.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from seqbatch.advice import Recommendation, recommend
from seqbatch.collating import collate
from seqbatch.datasets import PieceDataset, TokenArray
from seqbatch.lengths import as_lengths
from seqbatch.measure import Calibration, Timing, calibrate, environment, free_bytes, peak_memory, stopwatch
from seqbatch.ordering import IntArray
from seqbatch.plan import Plan
from seqbatch.simulate import DeviceModel, named, sized
from seqbatch.steps import RankBatches
from seqbatch.strategy import Strategy, check_integer
from seqbatch.workload import VOCABULARY, Workload

if TYPE_CHECKING:
    import pandas as pd

    from seqbatch.batch import SequenceBatch

__all__ = ["STRATEGIES", "Comparison", "compare"]

STRATEGIES = ("padding", "pool_sort", "token_budget", "static_shapes", "splicing", "chunking", "packing")
"""The names that are compared where nothing else is said: one of each kind."""
TURNS = 3
_CELLS_TO_MEASURE = 1000  # of a grid whose memory says what a cell needs
_MOST_BATCHES = 256  # of a row's sample
_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "alloc_failed", "bad_alloc")
_CALIBRATION, _WARM_UP = 0.15, 0.2  # shares of the time
_PATIENCE = 4  # times its share of the time that a row may take, rather than not be measured


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` found.

    Attributes:
        frame: One row per strategy and batch size; see :func:`compare`.
        lengths: (N,) the lengths compared.
        calibration: The device model and the grids it was fitted to and tested on.
        setting: ``cell``, ``hidden``, ``layers``, ``device``, ``dtype``, ``chunk_size``,
            ``seconds``, ``seed``.
        environment: Machine and versions.
        recommendation: Which row to use and why; None where no row ran or was predicted.
        interrupted: Whether Ctrl-C ended it; rows that were measured at least once are there.
    """

    frame: "pd.DataFrame"
    lengths: IntArray
    calibration: Calibration | None
    setting: dict[str, object]
    environment: dict[str, str]
    recommendation: Recommendation | None
    interrupted: bool = False


@dataclass
class _Row:
    """A strategy at a batch size, and what is known of it so far."""

    name: str
    size: int | None
    strategy: Strategy
    plan: Plan
    seconds: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))  # predicted, of each batch
    sample: IntArray = field(default_factory=lambda: np.zeros(0, np.int64))
    timing: Timing = field(default_factory=Timing)  # of the sample, once a turn, loading included
    loading: float = 0.0  # seconds of all turns that the data path took
    memory: float | None = None
    note: str = ""

    def speed(self, seconds_of_sample: float) -> float:
        """Real tokens per second of the epoch, if all of it is as far from the prediction as the sample was.

        The mean of the sample alone would be too low, by different shares in rows with more batches and fewer.
        """
        whole = seconds_of_sample * float(self.seconds.sum()) / float(self.seconds[self.sample].sum())
        return self.plan.tokens / whole

    def columns(self) -> dict[str, object]:
        """The row of the frame."""
        total, wall = float(self.seconds.sum()), self.timing.wall
        predicted = self.plan.tokens / total if total else None
        measured = self.speed(self.timing.median) if wall else None
        return {
            "strategy": self.name,
            "batch_size": self.size,
            "settings": repr(self.strategy),
            "padding_efficiency": self.plan.padding_efficiency,
            "batches": len(self.plan),
            "steps": int(self.plan.steps.sum()),
            "cells": self.plan.cells,
            "predicted": predicted,
            "measured": measured,
            "low": self.speed(self.timing.high) if wall else None,
            "high": self.speed(self.timing.low) if wall else None,
            "error": predicted / measured - 1 if predicted and measured else None,
            "memory_mib": None if self.memory is None else self.memory / 2**20,
            "loader_share": self.loading / sum(wall) if wall else None,
            "batches_measured": len(self.sample) if wall else 0,
            "note": self.note,
        }


def compare(
    lengths: ArrayLike,
    *,
    cell: str = "sru",
    hidden: int = 256,
    layers: int = 1,
    device: str = "cpu",
    dtype: str = "float32",
    strategies: Iterable[str | Strategy] | str | None = None,
    batch_sizes: Sequence[int] = (4, 16, 64, 256),
    chunk_size: int = 64,
    seconds: float = 300.0,
    seed: int = 0,
    progress: bool = False,
) -> Comparison:
    """Predict and measure the throughput of each strategy at each batch size.

    Measured is forward and backward of :class:`~seqbatch.workload.Workload` over a sample of the plan's batches,
    spread evenly over all of them in the order of what they cost, as a loader makes them; median of three turns. The
    prediction leaves the making of batches out. All plans are in memory at once: of hundreds of millions of
    sequences, compare some.

    Args:
        lengths: (N,) tokens of each sequence, or (N, 2) of pairs, whose two sides the layers then run one after the
            other, as an encoder and a decoder of that size would.
        cell: ``"sru"``, ``"lstm"``, ``"bnlstm"`` or ``"nn.LSTM"`` (torch's, without resets and mask).
        hidden: Units of a layer, and input features.
        layers: Layers.
        device: ``"cpu"``, ``"cuda"`` or ``"cuda:N"``.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float64"``.
        strategies: Names of :data:`~seqbatch.simulate.STRATEGIES`, or strategies; by default one of each kind.
        batch_sizes: B of each row; see :func:`~seqbatch.simulate.simulate`.
        chunk_size: Steps of a window or chunk.
        seconds: About how long all may take; rows get equal shares of it.
        seed: Seed of the plans.
        progress: Show bars on standard error, if that is a terminal.

    Returns:
        The rows in ``frame``: ``strategy``, ``batch_size``, ``settings``, ``padding_efficiency``, ``batches`` (of an
        epoch, which are its updates), ``steps``, ``cells``, ``predicted`` and ``measured`` real tokens per second with
        ``low`` and ``high`` of the turns, ``error`` (predicted / measured - 1), ``memory_mib`` (most bytes beyond the
        weights, of the largest batch), ``loader_share`` (of the time, for making batches and moving them; on CUDA the
        host's, which the device does not wait for),
        ``batches_measured`` and ``note``: why a row was not measured, such as for want of memory.

    Raises:
        ValueError: settings out of range, a device that is not there, nothing to plan.

    >>> names = ["padding", "splicing"]
    >>> found = compare([5, 1, 4, 2, 3, 3] * 4, hidden=4, batch_sizes=[4], seconds=1, strategies=names)
    >>> found.frame[["strategy", "batches"]].values.tolist()
    [['padding', 6], ['splicing', 1]]
    """
    array = as_lengths(lengths, pairs=True)
    sizes = [check_integer("a batch size", size, at_least=1) for size in batch_sizes]
    check_integer("seed", seed, at_least=0)
    if not 0 < seconds < float("inf"):
        raise ValueError(f"seconds must be a number above 0, got {seconds!r}")
    workload = Workload(cell, hidden=hidden, layers=layers, device=device, dtype=dtype)
    chosen = named(strategies, STRATEGIES, pairs=array.ndim == 2)
    rows = [
        _Row(name, size, strategy, strategy.plan(array, seed=seed))
        for name, size, strategy in sized(array, chosen, sizes, chunk_size)
    ]
    if not rows:
        raise ValueError("there is nothing to compare: give at least one strategy and one batch size")
    record = environment(workload.device)
    trial = _Trial(workload, array, rows, seconds, progress)
    interrupted = False
    try:
        trial.run()
    except KeyboardInterrupt:
        interrupted = True
    import pandas as pd

    frame = pd.DataFrame([row.columns() for row in rows])
    numbers = [name for name in frame if name not in ("strategy", "settings", "note")]
    frame = frame.astype({name: "float64" for name in numbers if frame[name].dtype == object})
    setting = {"cell": cell, "hidden": hidden, "layers": layers, "device": device, "dtype": dtype,
               "chunk_size": chunk_size, "seconds": seconds, "seed": seed}  # fmt: skip
    advice = recommend(frame, [row.plan for row in rows], flags=cell != "nn.LSTM")
    return Comparison(frame, array, trial.calibration, setting, record, advice, interrupted)


class _Trial:
    """The rows of one comparison as they are run, within the time that is given."""

    def __init__(self, workload: Workload, lengths: IntArray, rows: list[_Row], seconds: float, progress: bool) -> None:
        self.workload, self.lengths, self.rows, self.progress = workload, lengths, rows, progress
        self.seconds = seconds
        self.calibration: Calibration | None = None
        self.per_cell = 0.0  # bytes
        self.data = [PieceDataset(_any_tokens(side)) for side in np.atleast_2d(lengths.T)]

    def run(self) -> None:
        """Calibrate, predict, warm up and measure; what is known is in the rows at any time."""
        rows = []
        for row in self.rows:
            row.note = self.workload.why_not(row.plan) if len(row.plan) else "no batch: the corpus is too small"
            rows += [] if row.note else [row]
        free = free_bytes(self.workload.device)
        if free is not None and self.workload.weight_bytes > free:
            for row in rows:
                row.note = _too_large("the weights and their gradients need", self.workload.weight_bytes, free)
            return
        if not rows:
            return
        if not self._fits(rows, lambda: self._calibrate(rows)) or self.calibration is None:
            return
        rows = [row for row in rows if self._choose(row, self.calibration.device, len(rows))]
        for row in self._bar(rows, "warming up"):
            self._fits([row], partial(self._warm_up, row))
        for _ in self._bar(range(TURNS), "measuring"):
            for row in self._bar([row for row in rows if not row.note], "turn", unit="row"):
                self._fits([row], partial(self._measure, row))

    def _fits(self, rows: list[_Row], job: Callable[[], None]) -> bool:
        """Run a job; if memory runs out, note so on the rows that it concerns and return False."""
        try:
            job()
        except (MemoryError, RuntimeError) as error:  # torch's out-of-memory errors are RuntimeErrors
            if not isinstance(error, MemoryError) and not any(sign in str(error).lower() for sign in _OUT_OF_MEMORY):
                raise
        else:
            return True
        for row in rows:
            row.note = "out of memory"
        if self.workload.device.type == "cuda":  # after the error, which holds on to tensors, is gone
            torch.cuda.empty_cache()
        return False

    def _bar(self, items: Any, name: str, unit: str = "it") -> Iterator[Any]:
        from tqdm import tqdm

        bar: Iterator[Any] = tqdm(items, disable=None if self.progress else True, desc=name, unit=unit, leave=False)
        return bar

    def _calibrate(self, rows: list[_Row]) -> None:
        """Fit the device model on grids that span the plans', and see what memory a cell needs."""
        fitted, held_out = grids([row.plan for row in rows])
        work, device = self.workload, self.workload.device
        work.module, work.table  # noqa: B018 - made before anything is timed
        work.grid(2, 2)()  # kernels are compiled
        work.forget_gradients()
        by_cells = sorted(fitted, key=np.prod)
        steps, lanes = next((grid for grid in by_cells if np.prod(grid) >= _CELLS_TO_MEASURE), by_cells[-1])
        memory = peak_memory(work.grid(steps, lanes), device) or 0.0
        self.per_cell = max(memory - work.weight_bytes / 3, 0.0) / (steps * lanes)
        free = free_bytes(device) or float("inf")
        fitted, held_out = ([g for g in some if self.per_cell * np.prod(g) < 0.5 * free] for some in (fitted, held_out))
        seconds = _CALIBRATION * self.seconds
        self.calibration = calibrate(
            work.grid, at_least_three(fitted), held_out, device=device, seconds=seconds, progress=self.progress
        )

    def _choose(self, row: _Row, device: DeviceModel, count: int) -> bool:
        """Predict a row and choose which batches to measure; False if none, with a note why."""
        row.seconds = device.times(*self.workload.effort(row.plan))
        needed = self.per_cell * int(row.plan.costs().max()) + self.workload.weight_bytes / 3
        free = free_bytes(self.workload.device)
        if free is not None and needed > 0.9 * free:
            row.note = _too_large("its largest batch needs", needed, free)
            return False
        share = (1 - _CALIBRATION - _WARM_UP) * self.seconds / ((TURNS + 1) * count)
        mean = float(row.seconds.mean())
        if mean > _PATIENCE * share:
            row.note = f"a batch takes about {mean:.1f} s, its share of the time is {share:.1f} s: give more seconds"
            return False
        number = int(np.clip(share / mean, 1, min(_MOST_BATCHES, len(row.plan))))
        places = ((np.arange(number) + 0.5) * len(row.plan) / number).astype(np.int64)
        row.sample = np.sort(np.argsort(row.seconds, kind="stable")[places])
        return True

    def _warm_up(self, row: _Row) -> None:
        """Train on the largest batch, to know its memory, and once on the sample, so that its shapes are known."""
        largest = np.array([np.argmax(row.plan.costs())])
        self.workload.forget_gradients()
        row.memory = peak_memory(lambda: self._train(row, largest), self.workload.device)
        self._train(row, row.sample)

    def _measure(self, row: _Row) -> None:
        timing = Timing()
        with stopwatch(self.workload.device, timing):
            loading = self._train(row, row.sample)
        row.timing.wall += timing.wall
        row.timing.cpu += timing.cpu
        row.loading += loading

    def _train(self, row: _Row, batches: IntArray) -> float:
        """Train on some batches of a plan; returns the seconds that making and moving them took."""
        state, loading = None, 0.0
        source = self._batches(row.plan, batches)
        while True:
            begin = time.perf_counter()
            batch = next(source, None)
            loading += time.perf_counter() - begin
            if batch is None:
                return loading
            state = self.workload.train(batch, state)

    def _batches(self, plan: Plan, batches: IntArray) -> "Iterator[SequenceBatch]":
        """The batches as a loader makes them, on the device; of pairs the two sides, one after the other."""
        everything = (batches, np.zeros_like(batches), plan.lanes[batches])
        makers = [
            RankBatches(side, lengths, everything, None, next_token=False)
            for side, lengths in zip(plan.sides, np.atleast_2d(self.lengths.T), strict=True)
        ]
        common = {"step_loss_tokens": 1, "num_replicas": 1, "update": True, "position": {}}
        for step in range(len(batches)):
            for data, maker in zip(self.data, makers, strict=True):
                batch: Any = collate(data.__getitems__(maker.place(step, common)))
                if self.workload.device.type == "cuda":  # from other memory the copy would wait for the device
                    batch = batch.pin_memory()
                yield batch.to(self.workload.device, non_blocking=True)


def _any_tokens(lengths: IntArray) -> TokenArray:
    offsets = np.append(0, np.cumsum(lengths))
    return TokenArray(np.resize(np.arange(VOCABULARY, dtype=np.uint8), offsets[-1]), offsets)


def grids(plans: Sequence[Plan]) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Return (steps, lanes) to fit a device model to and to test it on, which span the batches of the plans.

    Fitted are the smallest, the middle and the largest number of steps by those of lanes - of the typical batch of
    each plan -, up to the cells of the largest of these; that one and the one larger than three quarters of them, since
    cells can cost more where a batch outgrows caches or the memory that an allocator keeps. Tested are grids between.
    """
    sides = [side for plan in plans for side in plan.sides]
    typical = [(int(np.median(plan.steps)), int(np.median(plan.lanes))) for plan in sides]
    typical.sort(key=lambda grid: grid[0] * grid[1])
    steps, lanes = np.array(typical).T
    most = int(steps[-1] * lanes[-1])
    some_steps, some_lanes = (_spread(values.min(), values.max()) for values in (steps, lanes))

    def cross(a: IntArray, b: IntArray) -> list[tuple[int, int]]:
        return [(int(s), int(n)) for s in a for n in b if s * n <= most]

    fitted = [*cross(some_steps[::2], some_lanes[::2]), typical[3 * len(typical) // 4], typical[-1]]
    fitted = list(dict.fromkeys(fitted))
    fitted = at_least_three(fitted)
    return fitted, [grid for grid in cross(some_steps[1::2], some_lanes[1::2]) if grid not in fitted]


def at_least_three(fitted: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Add smaller grids - larger ones where there are none - until three numbers can be fitted.

    >>> at_least_three([(8, 4)])
    [(8, 4), (4, 4), (8, 2)]
    """
    fitted = list(fitted) or [(1, 1)]
    while len(fitted) < 3:
        steps, lanes = min(fitted, key=np.prod)
        smaller = [grid for grid in ((max(steps // 2, 1), lanes), (steps, max(lanes // 2, 1))) if grid not in fitted]
        fitted += smaller or [(2 * steps, lanes), (steps, 2 * lanes)]
    return fitted


def _spread(low: float, high: float) -> IntArray:
    """Five numbers from one end to the other, in equal ratios."""
    return np.unique(np.geomspace(max(low, 1), max(high, 1), 5).round().astype(np.int64))


def _too_large(what: str, needed: float, free: int) -> str:
    return f"{what} about {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
