"""Costs that are fitted, splits against trying all, predictions against numbers worked out by hand."""

from fractions import Fraction
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from seqbatch.pipeline.costs import (
    CHUNKS,
    LINKS,
    Link,
    PartCost,
    balanced_split,
    fit_cost,
    predict,
    stage_costs,
    tune,
)
from seqbatch.pipeline.schedules import schedule
from seqbatch.pipeline.timeline import simulate

FREE = Link("free", float("inf"), 0.0, "none")
WIRES = {"link": FREE, "network": FREE}
TRUE = PartCost(2e-4, 3e-5, 4e-7, 3e-4, 5e-5, 9e-7, 64.0, 32.0)


def layer(fixed: float, *, steps: int = 64, lanes: int = 64, **more: float) -> PartCost:
    """A layer whose forward takes 1 s, `fixed` of it whatever the lanes, and whose backward takes 2 s."""
    step, cell = fixed / steps, (1 - fixed) / steps / lanes
    return PartCost(0, step, cell, 0, 2 * step, 2 * cell, **more)


def test_a_fit_finds_the_costs_that_made_the_times() -> None:
    """And passes widths on."""
    rows = [(n, b, TRUE.forward(n, b), TRUE.backward(n, b)) for n in (1, 16, 256) for b in (1, 8, 128)]
    found = fit_cost(rows, parameter_bytes=64, output_width_bytes=32)

    np.testing.assert_allclose(found, TRUE, rtol=1e-6)


def test_a_fit_has_no_negative_cost_and_small_times_count_as_much() -> None:
    """Times that fall with lanes get no negative cost; relative errors count, not those of the longest."""
    falling = [(8, 1, 1.0, 1.0), (8, 9, 0.9, 0.9), (32, 1, 4.0, 4.0), (32, 9, 3.6, 3.6)]
    assert min(fit_cost(falling)) >= 0

    # Two small grids say 1 s per call; a huge one says that steps are cheaper than they are.
    rows = [(1, 1, 1.01, 1.01), (2, 1, 1.02, 1.02), (2, 2, 1.02, 1.02), (100_000, 1, 900.0, 900.0)]
    assert fit_cost(rows).forward(1, 1) == pytest.approx(1.01, rel=0.01)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([(1, 1, 1, 1), (2, 2, 1, 1)], "3 rows or more"),
        ([(1, 1, 1), (2, 2, 1), (3, 2, 1)], "3 rows or more"),
        ([(1, 1, 1, 1), (2, 2, 1, 0), (3, 2, 1, 1)], "must be positive"),
        ([(8, 4, 1, 1), (16, 4, 1, 1), (32, 4, 1, 1)], r"of different lanes, got \[\(8.0, 4.0\)"),
    ],
)
def test_what_cannot_be_fitted(rows: list[tuple[float, ...]], said: str) -> None:
    """Too few, too short, no times, or all of one number of lanes."""
    with pytest.raises(ValueError, match=said):
        fit_cost(rows)


def all_splits(layers: int, stages: int, empty: bool) -> list[tuple[int, ...]]:
    """Every split into stages, with an empty last one if that may be."""
    found = []
    for cuts in combinations(range(1, layers + empty * (stages > 1)), stages - 1):
        ends = (0, *cuts, layers)
        found.append(tuple(b - a for a, b in pairwise(ends)))
    return found


@example(costs=[4, 1, 1, 1, 1], stages=3, ends=(0, 0), scale=1.0)  # where filling up to the largest is not best
@given(
    costs=st.lists(st.integers(0, 6), min_size=1, max_size=8),
    stages=st.integers(1, 6),
    ends=st.tuples(st.integers(0, 8), st.integers(0, 8)),
    scale=st.sampled_from([1.0, 0.1, 1e-6 / 3]),
)
def test_splits_are_the_best_of_all(costs: list[int], stages: int, ends: tuple[int, int], scale: float) -> None:
    """Least largest stage, then least sum of squares, then earlier stages larger, for whole and for odd numbers."""
    head, tail = ends
    numbers = [cost * scale for cost in costs]
    exact = [Fraction(number) for number in [head * scale, *numbers, tail * scale]]
    if stages > len(costs) + (tail > 0):
        with pytest.raises(ValueError, match="too many"):
            balanced_split(numbers, stages, head=head * scale, tail=tail * scale)
        return

    def rank(split: tuple[int, ...]) -> Any:
        sums, begin = [], 1
        for count in split:
            sums.append(sum(exact[begin : begin + count]))
            begin += count
        sums[0] += exact[0]
        sums[-1] += exact[-1]
        return max(sums), sum(one * one for one in sums), [-count for count in split]

    best = min(all_splits(len(costs), stages, tail > 0), key=rank)
    assert balanced_split(numbers, stages, head=head * scale, tail=tail * scale) == best


def test_splits_that_cannot_be() -> None:
    """The message says how many stages there may be."""
    with pytest.raises(ValueError, match="4 stages are too many for 3 layers: take at most 3 stages"):
        balanced_split([1, 1, 1], 4)
    with pytest.raises(ValueError, match="5 stages are too many for 3 layers and a stage of its own"):
        balanced_split([1, 1, 1], 5, tail=1)
    with pytest.raises(ValueError, match="not negative, got"):
        balanced_split([1, -1], 2)


def test_costs_of_stages_are_sums() -> None:
    """Embedding first, head last; the width sent is that of the last part."""
    embed, head = TRUE._replace(output_width_bytes=7.0), TRUE._replace(output_width_bytes=11.0)
    first, middle, last = stage_costs([TRUE] * 3, (2, 1, 0), embed=embed, head=head)

    assert first.forward(5, 3) == pytest.approx(3 * TRUE.forward(5, 3))
    assert (first.parameter_bytes, first.output_width_bytes) == (3 * 64, 32)
    assert middle == TRUE and last == head
    assert stage_costs([TRUE], (1,), embed=embed)[0].output_width_bytes == 32
    with pytest.raises(ValueError, match="must sum to that"):
        stage_costs([TRUE] * 3, (2, 2))
    with pytest.raises(ValueError, match=r"needs a layer, .* got the split \(3, 0\)"):
        stage_costs([TRUE] * 3, (3, 0))


@pytest.mark.parametrize(("fixed", "wave", "micro"), [(0.0, 2.91, 2.91), (0.5, 2.91, 0.65), (0.9, 2.91, 0.40)])
def test_time_chunks_keep_what_micro_batches_lose(fixed: float, wave: float, micro: float) -> None:
    """Speed-up of 4 stages and 8 units, by the share of a step that does not depend on its lanes."""

    def speedup(mode: str) -> float:
        (row,) = predict(
            [layer(fixed)] * 4, steps=64, lanes=64, stages=[4], replicas=[1], chunks=[8], mode=mode, **WIRES
        )
        return round(float(row["speedup"]), 2)

    assert (speedup("full"), speedup("truncated"), speedup("microbatch")) == (wave, wave, micro)


@pytest.mark.parametrize(("overhead", "chunks", "speedup"), [(0.001, 64, 3.66), (0.01, 16, 3.04), (0.05, 8, 2.30)])
def test_what_an_action_costs_decides_how_fine_to_cut(overhead: float, chunks: int, speedup: float) -> None:
    """(chunks + 3) * 3 * (1 / chunks + 2 / 3 * overhead) seconds, against 12 on one device."""
    best = tune([layer(0.5)] * 4, steps=64, lanes=64, stages=4, overhead=overhead, **WIRES)

    assert best.chunks == chunks == min(CHUNKS, key=lambda m: (m + 3) * (3 / m + 2 * overhead))
    assert best.step_s == pytest.approx((chunks + 3) * (3 / chunks + 2 * overhead))
    assert 12 / best.step_s == pytest.approx(speedup, abs=0.005)


@pytest.mark.parametrize(
    ("mode", "chunks", "name"),
    [("full", 8, "wavefront"), ("truncated", 8, "1f1b"), ("microbatch", 8, "1f1b"), ("truncated", 2, "gpipe")],
)
def test_modes_have_their_timetables(mode: str, chunks: int, name: str) -> None:
    """Under latency 1f1b takes longer than the others; gpipe runs where chunks are too few for it."""
    link = Link("slow", float("inf"), 0.3, "")
    best = tune([layer(0.0)] * 4, steps=64, lanes=64, stages=4, chunks=[chunks], mode=mode, link=link, network=link)
    line = simulate(schedule(name, stages=4, chunks=chunks), 1 / chunks, 2 / chunks, latency=0.3)

    assert (best.step_s, best.bubble) == pytest.approx((line.makespan, line.bubble))


def test_one_device_is_the_unit() -> None:
    """Speed-up and efficiency 1 without cutting, in every mode."""
    for mode in ("full", "truncated", "microbatch"):
        (row,) = predict([TRUE] * 4, embed=TRUE, head=TRUE, steps=30, lanes=7, stages=[1], replicas=[1], mode=mode,
                         link=LINKS["pcie"], network=LINKS["ethernet"], overhead=1e-5)  # fmt: skip
        assert (row["chunks"], row["split"], row["devices"]) == (1, (4,), 1)
        assert (row["speedup"], row["efficiency"], row["bubble"]) == (1, 1, 0)
        assert row["step_s"] == pytest.approx(6 * (TRUE.forward(30, 7) + TRUE.backward(30, 7)) + 2e-5)
        assert row["tokens_per_s"] == pytest.approx(210 / row["step_s"])


def test_a_heavy_head_gets_a_stage_and_bounds_the_speedup() -> None:
    """4 layers of 3 s and a softmax of 24 s: at most 36 / 24."""
    head = PartCost(*(8 * cost for cost in layer(0.0)))
    rows = predict([layer(0.0)] * 4, head=head, steps=64, lanes=64, stages=[2, 5], replicas=[1], **WIRES)

    assert [row["split"] for row in rows] == [(4, 0), (1, 1, 1, 1, 0)]
    assert all(1.3 < row["speedup"] < 1.5 for row in rows)


def test_replicas_pay_for_averaging() -> None:
    """A ring: 2 (W - 1) / W of the largest stage's bytes and 2 (W - 1) latencies, on the link within a node."""
    link, network = Link("near", 100.0, 0.25, ""), Link("far", 10.0, 0.5, "")
    layers = [layer(0.5, parameter_bytes=400.0), layer(0.5, parameter_bytes=40.0)]
    settings = {"steps": 64, "lanes": 64, "stages": [1], "link": link, "network": network, "per_node": 4}
    alone, near, far = predict(layers, replicas=[1, 4, 8], chunks=[1], **settings)

    assert alone["step_s"] == pytest.approx(6)
    assert near["step_s"] == pytest.approx(6 + 2 * 3 / 4 * 440 / 100 + 2 * 3 * 0.25)
    assert far["step_s"] == pytest.approx(6 + 2 * 7 / 8 * 440 / 10 + 2 * 7 * 0.5)
    assert far["speedup"] == pytest.approx(8 * 6 / far["step_s"])
    assert far["efficiency"] == pytest.approx(6 / far["step_s"])
    (pair,) = predict(layers, replicas=[4], chunks=[1], **(settings | {"stages": [2], "per_node": 8}))
    assert pair["step_s"] == pytest.approx(6 + 2 * 0.25 + 2 * 3 / 4 * 400 / 100 + 2 * 3 * 0.25)


def test_hops_between_nodes_take_the_network() -> None:
    """The slowest pipeline counts: with 3 stages and 4 devices a node, the second one crosses, the first does not."""
    link, network = Link("near", 1e3, 0.25, ""), Link("far", 1e2, 0.5, "")
    settings = {"steps": 10, "lanes": 5, "stages": [3], "per_node": 4, "chunks": [1], "link": link, "network": network}
    layers = [layer(0.5, steps=10, lanes=5, output_width_bytes=2.0)] * 3
    near, far = predict(layers, replicas=[1, 2], **settings)

    assert near["step_s"] == pytest.approx(9 + 4 * (100 / 1e3 + 0.25))
    # Devices 3, 4, 5 hold the second pipeline; averaging takes 2 latencies of the network.
    assert far["step_s"] == pytest.approx(9 + 2 * (100 / 1e3 + 0.25) + 2 * (100 / 1e2 + 0.5) + 2 * 0.5)


def test_the_last_piece_is_padded_and_what_is_too_fine_left_out() -> None:
    """10 steps in 4 chunks are 4 times 3; no chunk has less than a step, no micro-batch less than a lane."""
    layers = [layer(0.0, steps=10, lanes=3)] * 2
    best = tune(layers, steps=10, lanes=3, stages=1, chunks=[4], **WIRES)
    assert best.step_s == pytest.approx(6 * 12 / 10)
    assert tune(layers, steps=10, lanes=3, stages=2, chunks=[2, 64], **WIRES).chunks == 2
    with pytest.raises(ValueError, match=r"10 steps cannot be cut into any of chunks=\[16\]"):
        tune(layers, steps=10, lanes=3, stages=2, chunks=[16], **WIRES)
    with pytest.raises(ValueError, match="3 lanes cannot be cut"):
        tune(layers, steps=10, lanes=3, stages=2, chunks=[4], mode="microbatch", **WIRES)
    with pytest.raises(ValueError, match="mode must be one of 'full'"):
        tune(layers, steps=10, lanes=3, stages=2, mode="wave", **WIRES)
    with pytest.raises(ValueError, match="3 stages are too many for 2 layers"):
        predict(layers, steps=10, lanes=3, stages=[1, 3], replicas=[1], **WIRES)


def test_links_are_sane() -> None:
    """Nearer is faster, in bytes and in latency, and each says where its numbers come from."""
    order = ["memory", "nvlink", "pcie", "infiniband", "ethernet"]

    assert list(LINKS) == order == [link.name for link in LINKS.values()]
    assert sorted(LINKS.values(), key=lambda link: -link.bandwidth) == list(LINKS.values())
    assert sorted(LINKS.values(), key=lambda link: link.latency) == list(LINKS.values())
    assert all("bandwidth: " in link.source and "latency: " in link.source for link in LINKS.values())
