"""Timetables against torch's engine; their timelines against formulas, published tables, laws and a naive twin."""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from types import MethodType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed import pipelining
from torch.distributed.pipelining.schedules import _ComputationType

from seqbatch.pipeline.schedules import Action, Timetable, schedule
from seqbatch.pipeline.timeline import Timeline, bubble_formula, simulate

SHAPES = [(1, 1), (1, 4), (2, 2), (2, 7), (4, 4), (4, 8), (5, 6)]


@pytest.fixture
def fake_world() -> Iterator[Any]:
    """Ranks that are never started, for building torch's schedules."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    def start(size: int, rank: int = 0) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()
        dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())

    yield start
    if dist.is_initialized():
        dist.destroy_process_group()


def torch_stage(index: int, stages: int) -> pipelining.PipelineStage:
    size = torch.zeros(1, 1)
    return pipelining.PipelineStage(
        torch.nn.Linear(1, 1), index, stages, torch.device("cpu"), input_args=(size,), output_args=(size,)
    )


def computed(order: dict[int, list[Any]]) -> tuple[tuple[Action, ...], ...]:
    """The computations of torch's order: no bubbles, no communication."""
    kinds = {_ComputationType.FORWARD: False, _ComputationType.FULL_BACKWARD: True}
    return tuple(
        tuple(
            Action(one.stage_index, kinds[one.computation_type], one.microbatch_index)
            for one in order[rank]
            if one is not None and one.computation_type in kinds
        )
        for rank in sorted(order)
    )


@pytest.mark.parametrize(("ranks", "chunks"), [*SHAPES, (4, 2), (3, 1)])
@pytest.mark.parametrize("virtual", [1, 2, 3])
def test_the_wavefront_is_torchs_looped_bfs(fake_world: Any, ranks: int, chunks: int, virtual: int) -> None:
    """Of the class itself, on every rank."""
    fake_world(ranks)
    stages = [torch_stage(ranks * k, ranks * virtual) for k in range(virtual)]
    theirs = pipelining.ScheduleLoopedBFS(stages, chunks, loss_fn=torch.nn.functional.mse_loss)

    assert schedule("wavefront", stages=ranks * virtual, chunks=chunks, virtual=virtual).orders == computed(
        theirs.pipeline_order
    )


@pytest.mark.parametrize(("stages", "chunks"), [*SHAPES, (4, 2), (3, 1)])
def test_gpipe_is_torchs(fake_world: Any, stages: int, chunks: int) -> None:
    """Of the order that the class says."""
    fake_world(stages)
    theirs = pipelining.ScheduleGPipe(torch_stage(0, stages), chunks, loss_fn=torch.nn.functional.mse_loss)

    assert schedule("gpipe", stages=stages, chunks=chunks).orders == computed(theirs._get_pipeline_order() or {})


@pytest.mark.parametrize(("stages", "chunks"), SHAPES)
def test_1f1b_is_torchs(fake_world: Any, stages: int, chunks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what the class does: what it says of the last rank is one micro-batch late."""
    monkeypatch.setattr("torch.distributed.pipelining.schedules._batch_p2p", lambda *_, **__: [])
    for rank, ours in enumerate(schedule("1f1b", stages=stages, chunks=chunks).orders):
        fake_world(stages, rank)
        theirs = pipelining.Schedule1F1B(torch_stage(rank, stages), chunks)
        did: list[Action] = []
        theirs._stage = SimpleNamespace(  # type: ignore[assignment]
            stage_index=rank,
            forward_one_chunk=lambda unit, *_, did=did, rank=rank, **__: did.append(Action(rank, False, unit)),
            backward_one_chunk=lambda unit, *_, did=did, rank=rank, **__: did.append(Action(rank, True, unit)),
            perform_reduce_grad=lambda _: None,
            **{f"get_{way}_{what}_ops": lambda _: [] for way in ("fwd", "bwd") for what in ("recv", "send")},
        )
        for name in ("_initialize_stage", "_maybe_compute_loss", "_maybe_get_loss", "_update_losses"):
            setattr(theirs, name, MethodType(lambda *_: None, theirs))
        theirs._step_microbatches([()] * chunks, [{}] * chunks)

        assert ours == tuple(did)


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("zigzag", {"stages": 2, "chunks": 2}, "schedule must be one of 'wavefront', 'gpipe', '1f1b', got 'zigzag'"),
        ("gpipe", {"stages": 0, "chunks": 2}, "stages must be at least 1, got 0"),
        ("wavefront", {"stages": 5, "chunks": 2, "virtual": 2}, "got virtual=2 and stages=5"),
        ("gpipe", {"stages": 4, "chunks": 2, "virtual": 2}, "only the wavefront takes several stages per rank"),
        ("1f1b", {"stages": 4, "chunks": 3}, "got 3 chunks for 4 stages: cut finer"),
    ],
)
def test_what_cannot_be_scheduled(name: str, settings: dict[str, int], said: str) -> None:
    """And why."""
    with pytest.raises(ValueError, match=said):
        schedule(name, **settings)


@pytest.mark.parametrize(
    ("name", "ranks", "chunks", "virtual"),
    [(name, *shape, 1) for name in ("wavefront", "gpipe", "1f1b") for shape in [*SHAPES, (8, 32)]]
    + [("wavefront", ranks, chunks, v) for ranks, chunks in [*SHAPES, (8, 32)] for v in (2, 3)],
)
def test_the_bubble_is_the_formula(name: str, ranks: int, chunks: int, virtual: int) -> None:
    """For equal stages and free hops, whatever a backward takes."""
    table = schedule(name, stages=ranks * virtual, chunks=chunks, virtual=virtual)
    line = simulate(table, 0.7, 1.9)

    assert line.bubble == pytest.approx(bubble_formula(ranks * virtual, chunks, virtual), abs=1e-12)
    assert line.makespan == pytest.approx(line.busy[0] / (1 - line.bubble))


@pytest.mark.parametrize(
    ("ranks", "virtual", "bubbles"),
    [
        (2, 1, (0.500, 0.333, 0.200, 0.111, 0.059, 0.030)),
        (4, 1, (0.750, 0.600, 0.429, 0.273, 0.158, 0.086)),
        (8, 1, (0.875, 0.778, 0.636, 0.467, 0.304, 0.179)),
        (4, 2, (0.750, 0.556, 0.273, 0.158, 0.086, 0.045)),
        (8, 2, (0.875, 0.765, 0.579, 0.304, 0.179, 0.099)),
    ],
)
def test_bubbles_also_where_there_is_no_formula(ranks: int, virtual: int, bubbles: tuple[float, ...]) -> None:
    """Idle shares at 1, 2, 4, ..., 32 chunks, backward twice as long as forward; from another simulator."""
    tables = (schedule("wavefront", stages=ranks * virtual, chunks=2**k, virtual=virtual) for k in range(6))

    assert tuple(round(simulate(table, 1, 2).bubble, 3) for table in tables) == bubbles


@pytest.mark.parametrize(("stages", "chunks"), SHAPES)
def test_how_many_activations_are_kept(stages: int, chunks: int) -> None:
    """All chunks in a wavefront; in 1f1b as many as there are stages to come."""
    wave, one = (simulate(schedule(name, stages=stages, chunks=chunks), 1, 2) for name in ("wavefront", "1f1b"))

    assert wave.peak == (chunks,) * stages
    assert one.peak == tuple(min(stages - rank, chunks) for rank in range(stages))
    assert simulate(schedule("wavefront", stages=2 * stages, chunks=chunks, virtual=2), 1, 2).peak[0] == 2 * chunks


def needs(table: Timetable, action: Action) -> list[Action]:
    """What must have ended before an action, once more."""
    stage, backward, unit = action
    step = -1 if backward else 1
    wanted = [(stage - step, unit)] + ([(stage, unit - step)] if table.chained else [])
    found = [Action(s, backward, u) for s, u in wanted if 0 <= s < table.stages and 0 <= u < table.units]
    return found + ([Action(stage, False, unit)] if backward else [])


def naive(table: Timetable, times: np.ndarray, latency: np.ndarray, transfer: np.ndarray) -> tuple[Any, Any]:
    """A simulation by events: the earliest thing that can happen next happens next."""
    queues = [list(order) for order in table.orders]
    free, links = [0.0] * table.ranks, dict[tuple[int, int], float]()
    start, end, there = {}, {}, dict[Action, float]()
    while any(queues):
        ready = []
        for rank, queue in enumerate(queues):
            if queue and all((end if need.stage == queue[0].stage else there).get(need) is not None
                             for need in needs(table, queue[0])):  # fmt: skip
                came = [end[need] if need.stage == queue[0].stage else there[need] for need in needs(table, queue[0])]
                ready.append((max([free[rank], *came]), rank))
        time, rank = min(ready)
        action = queues[rank].pop(0)
        start[action] = time
        end[action] = free[rank] = time + times[int(action.backward), action.stage, action.unit]
        other = action.stage + (-1 if action.backward else 1)
        if 0 <= other < table.stages:
            link, hop = (rank, other % table.ranks), min(other, action.stage)
            there[action] = end[action]
            if other % table.ranks != rank:
                links[link] = max(links.get(link, 0.0), end[action]) + transfer[hop]
                there[action] = links[link] + latency[hop]
    return start, end


@st.composite
def runs(draw: st.DrawFn) -> tuple[Timetable, np.ndarray, np.ndarray, np.ndarray]:
    """A timetable, (2, stages, units) times, latencies and transfers, zeros among them."""
    name = draw(st.sampled_from(["wavefront", "wavefront", "gpipe", "1f1b"]))
    virtual = draw(st.integers(1, 3)) if name == "wavefront" else 1
    stages = virtual * draw(st.integers(1, 4))
    chunks = draw(st.integers(stages if name == "1f1b" else 1, 6))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    some = draw(st.sampled_from([0.0, 0.3, 3.0]))
    times = random.random((2, stages, chunks)) * random.integers(0, 2, (2, stages, chunks))
    return (
        schedule(name, stages=stages, chunks=chunks, virtual=virtual),
        times + draw(st.sampled_from([0.0, 1.0])),
        some * random.random(stages - 1),
        draw(st.sampled_from([0.0, 1.0])) * random.random(stages - 1),
    )


def run(case: tuple[Timetable, np.ndarray, np.ndarray, np.ndarray]) -> Timeline:
    table, times, latency, transfer = case
    return simulate(table, *times, latency=latency, transfer=transfer)


@given(case=runs())
def test_timelines_equal_a_naive_simulation(case: tuple[Timetable, np.ndarray, np.ndarray, np.ndarray]) -> None:
    """To the bit."""
    line = run(case)
    start, end = naive(*case)

    for action, time in start.items():
        at = int(action.backward), action.stage, action.unit
        assert (line.start[at], line.end[at]) == (time, end[action])


@given(case=runs())
def test_laws_of_timelines(case: tuple[Timetable, np.ndarray, np.ndarray, np.ndarray]) -> None:
    """Order, one thing at a time, dependencies, and bounds of the makespan."""
    line, (table, times, latency, transfer) = run(case), case

    def at(action: Action) -> tuple[int, int, int]:
        return int(action.backward), action.stage, action.unit

    np.testing.assert_allclose(line.end - line.start, times, atol=1e-12)
    for order in table.orders:
        for one, other in pairwise(order):
            assert line.start[at(other)] >= line.end[at(one)]
        for action in order:
            for need in needs(table, action):
                hop = min(need.stage, action.stage)
                far = table.rank_of(need.stage) != table.rank_of(action.stage)
                takes = latency[hop] + transfer[hop] if far else 0.0
                assert line.start[at(action)] >= line.end[at(need)] + takes - 1e-12
    assert line.makespan >= line.busy.max() - 1e-12
    # The first unit goes up through all stages, and one comes down.
    hops = (latency + transfer).sum() if table.ranks > 1 else 0.0
    assert line.makespan >= (times[0].sum(axis=0) + times[1].sum(axis=0)).max() + 2 * hops - 1e-9
    assert 0 <= line.bubble <= 1


@given(case=runs(), more=st.floats(0, 2))
def test_more_latency_never_helps(case: tuple[Timetable, np.ndarray, np.ndarray, np.ndarray], more: float) -> None:
    """Of any one hop, nor more transfer."""
    table, times, latency, transfer = case
    slower = latency.copy()
    slower[len(slower) // 2 :][:1] += more

    assert run((table, times, slower, transfer)).makespan >= run(case).makespan
    assert run((table, times, latency, transfer + more)).makespan >= run(case).makespan


def test_links_carry_one_message_at_a_time() -> None:
    """And a sender does not wait; by hand: two stages, two units, 1 s each, 3 s on the wire, 1 s latency."""
    line = simulate(schedule("gpipe", stages=2, chunks=2), 1, 1, latency=1, transfer=3)

    assert line.start[0].tolist() == [[0, 1], [5, 8]]
    assert line.start[1].tolist() == [[14, 17], [9, 10]]


def test_a_chain_cannot_go_through_gpipe() -> None:
    """Its backward of chunk 0 would come before that of chunk 1, whose gradient it needs."""
    wrong = replace(schedule("gpipe", stages=2, chunks=3), chained=True)
    with pytest.raises(
        ValueError, match="never ends: rank 0 waits with B0@0 for B0@1 and B1@0; rank 1 waits with B0@1"
    ):
        simulate(wrong, 1, 2)


def test_a_rank_that_ends_does_not_hide_one_that_waits() -> None:
    """The last stage wants a unit that comes later."""
    good = schedule("wavefront", stages=3, chunks=2)
    last = good.orders[2]
    wrong = replace(good, orders=(*good.orders[:2], (last[2], *last[:2], last[3])))
    with pytest.raises(ValueError, match="rank 2 waits with B1@2 for F1@2"):
        simulate(wrong, 1, 2)


def test_a_timetable_is_whole() -> None:
    """Each action once, on the rank of its stage."""
    good = schedule("gpipe", stages=2, chunks=2)
    with pytest.raises(ValueError, match="once"):
        replace(good, orders=good.orders[::-1])
    with pytest.raises(ValueError, match="once"):
        replace(good, orders=(good.orders[0], good.orders[1][:-1]))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"forward": [1, 2, 3]}, r"forward must be one number, \(2,\) or \(2, 4\), got the shape \(3,\)"),
        ({"backward": -1}, "backward must be finite seconds, none negative, got -1"),
        ({"latency": [1, 2]}, r"latency must be one number or \(1,\)"),
        ({"transfer": float("nan")}, "transfer must be finite"),
    ],
)
def test_times_that_make_no_sense(settings: dict[str, Any], said: str) -> None:
    """Are named."""
    with pytest.raises(ValueError, match=said):
        simulate(schedule("gpipe", stages=2, chunks=4), **({"forward": 1, "backward": 1} | settings))


def test_times_may_differ_by_stage_and_by_unit() -> None:
    """A slow last stage bounds the makespan; rows say when each ran."""
    table = schedule("wavefront", stages=2, chunks=2)
    line = simulate(table, [1, 2], [[1, 1], [2, 4]])
    frame = line.to_frame()

    assert line.makespan == 1 + 2 + 2 + 4 + 2 + 1
    assert line.busy.tolist() == [4, 10]
    assert len(frame) == 8 and frame["end"].max() == line.makespan
    assert frame[frame["rank"] == 1]["unit"].tolist() == [0, 1, 1, 0]


def test_where_no_formula_holds() -> None:
    """Looped, with fewer chunks than ranks."""
    with pytest.raises(ValueError, match="got 2 for 4 ranks"):
        bubble_formula(8, 2, 2)
    with pytest.raises(ValueError, match="must divide"):
        bubble_formula(8, 4, 3)


def test_nothing_here_needs_torch() -> None:
    """Timetables are data."""
    code = "import sys, seqbatch.pipeline.timeline; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
