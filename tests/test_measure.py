"""Timing, memory and the calibrated cost model."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from seqbatch import measure
from seqbatch.measure import Timing, calibrate, environment, free_bytes, peak_memory, stopwatch, timed
from seqbatch.simulate import DeviceModel

MODEL = DeviceModel(batch_us=300, step_us=20, cell_ns=500)
GRIDS = [(1, 1), (1, 64), (64, 1), (64, 64), (8, 8)]


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], Callable[[], None]]:
    """Jobs whose stopwatch shows exactly what MODEL says."""
    ran: list[tuple[int, int]] = []

    @contextmanager
    def watch(device: object, into: Timing) -> Iterator[None]:
        yield
        steps, lanes = ran[-1]
        into.wall.append(float(MODEL.times(steps, steps * lanes)))

    monkeypatch.setattr(measure, "stopwatch", watch)
    return lambda steps, lanes: lambda: ran.append((steps, lanes))


def test_jobs_take_turns_after_one_that_is_not_counted() -> None:
    """Drift of the machine must hit all alike."""
    calls: list[str] = []
    timings = timed({name: lambda name=name: calls.append(name) for name in "ab"}, repeats=2)  # type: ignore[misc]

    assert "".join(calls) == "ababab"
    assert [len(timing.wall) for timing in timings.values()] == [2, 2]


def test_a_stopwatch_tells_computing_from_waiting() -> None:
    """Process time runs only while the process computes."""
    busy, idle = Timing(), Timing()
    with stopwatch("cpu", busy):
        sum(range(3_000_000))
    with stopwatch("cpu", idle):
        torch.utils.data.get_worker_info()

    assert busy.cpu[0] > idle.cpu[0]
    assert busy.low <= busy.median <= busy.high


def test_the_three_numbers_are_found(exact: Callable[[int, int], Callable[[], None]]) -> None:
    """On a device that is as the model says, also for grids that were not fitted to."""
    found = calibrate(exact, GRIDS, [(3, 7), (64, 16)], seconds=100)

    got = (found.device.batch_us, found.device.step_us, found.device.cell_ns)
    assert pytest.approx((MODEL.batch_us, MODEL.step_us, MODEL.cell_ns), rel=1e-6) == got
    assert len(found.errors(fitted=True)) == 5
    assert pytest.approx([0, 0], abs=1e-9) == found.errors(fitted=False)


def test_no_number_is_negative(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where more lanes cost less than nothing, a cell costs nothing."""
    seconds = {(1, 1): 3.0, (1, 10): 2.0, (10, 1): 5.0, (10, 10): 4.0}
    ran: list[tuple[int, int]] = []

    @contextmanager
    def watch(device: object, into: Timing) -> Iterator[None]:
        yield
        into.wall.append(seconds[ran[-1]])

    monkeypatch.setattr(measure, "stopwatch", watch)
    found = calibrate(lambda *grid: lambda: ran.append(grid), list(seconds), seconds=1e9)  # type: ignore[arg-type]

    assert found.device.cell_ns == 0
    assert found.device.step_us > 0


def test_what_large_batches_cost_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where cells cost more from some size on; and not where a few per cent of noise look like it."""
    grids = [(1, 1), (1, 64), (64, 1), (64, 64), (8, 8), (200, 64), (400, 64), (800, 64), (400, 128)]
    kinked = DeviceModel(300, 20, 500, large_batch=4096, large_cell_ns=700)
    noise = 1 + 0.03 * np.random.default_rng(0).standard_normal(100)
    for model in (kinked, MODEL):
        ran: list[tuple[int, int]] = []

        @contextmanager
        def watch(device: object, into: Timing, model: DeviceModel = model, ran: Any = ran) -> Iterator[None]:
            yield
            into.wall.append(float(model.times(ran[-1][0], np.prod(ran[-1]))) * noise[np.prod(ran[-1]) % 97])

        monkeypatch.setattr(measure, "stopwatch", watch)
        found = calibrate(lambda *grid: lambda: ran.append(grid), grids, [(600, 64)], seconds=1e9)  # type: ignore[arg-type, misc]  # noqa: B023
        assert pytest.approx(0, abs=0.1) == found.errors(fitted=False)[0]
        assert (found.device.large_cell_ns > 300) == (model is kinked)


def test_grids_that_take_too_long_are_left_out(exact: Callable[[int, int], Callable[[], None]]) -> None:
    """The four smallest stay, whatever the time."""
    ran = []

    def job(steps: int, lanes: int) -> Callable[[], None]:
        ran.append((steps, lanes))
        return exact(steps, lanes)

    found = calibrate(job, GRIDS, [(64, 32)], seconds=1e-9)

    assert len(found.points) == 4
    assert {(1, 1), (1, 64), (64, 1), (8, 8)} == set(ran)


def test_a_device_that_pays_by_the_step_keeps_its_grids_of_many_lanes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A grid of many steps by one lane says little of what many lanes take."""
    model, ran = DeviceModel(batch_us=300, step_us=45, cell_ns=2), []

    @contextmanager
    def watch(device: object, into: Timing) -> Iterator[None]:
        yield
        into.wall.append(float(model.times(ran[-1][0], np.prod(ran[-1]))))

    monkeypatch.setattr(measure, "stopwatch", watch)
    grids = [(s, b) for s in (64, 438, 3000) for b in (1, 8, 64)]
    found = calibrate(lambda *grid: lambda: ran.append(grid), grids, seconds=0.6)  # type: ignore[arg-type]

    assert {(64, 64), (438, 64)} <= set(zip(found.points["steps"], found.points["lanes"], strict=True))


def test_two_grids_are_too_few() -> None:
    """Three numbers cannot come out of them."""
    with pytest.raises(ValueError, match="at least three grids to fit to, got"):
        calibrate(lambda steps, lanes: lambda: None, [(1, 1), (2, 2), (1, 1)])


def test_memory_is_what_a_job_adds() -> None:
    """Not what was used before, and freed or kept."""
    kept = torch.ones(8 * 2**20)
    freed = torch.ones(64 * 2**20)
    del freed
    if (first := peak_memory(lambda: torch.ones(16 * 2**20).sum())) is None:
        pytest.skip("the system does not tell")

    assert pytest.approx(64 * 2**20, rel=0.1) == first
    assert pytest.approx(0, abs=8 * 2**20) == peak_memory(lambda: kept[0])


def test_the_record_says_what_numbers_depend_on() -> None:
    """And as text, for CSV files."""
    record = environment()

    assert f"torch {torch.__version__}" in record["versions"]
    assert str(torch.get_num_threads()) == record["threads"]
    assert (free := free_bytes()) is None or free > 2**20


def test_times_and_seconds_agree() -> None:
    """The seconds of a plan are the sum of its batches' times."""
    from seqbatch import Padding

    plan = Padding(3).plan([5, 1, 4, 2, 3, 3, 9])

    assert pytest.approx(MODEL.seconds(plan)) == MODEL.times(plan.steps, plan.steps * plan.lanes).sum()
    assert np.ndim(MODEL.times(1, 1)) == 0
