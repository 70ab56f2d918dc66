"""The simulator counts the plans that train, and its theory agrees with them."""

import numpy as np
import pandas as pd
import pytest
import strategies
from hypothesis import given
from hypothesis import strategies as st

from seqbatch import Bucketing, Padding, Splicing
from seqbatch.distributions import expected_efficiency, gamma
from seqbatch.simulate import DEFAULT, STRATEGIES, DeviceModel, rank_balance, re_meeting, simulate

LENGTHS = gamma(2, 10).lengths(2000)


def test_rows_are_the_counts_of_the_plans() -> None:
    """One row per strategy and batch size, each what the plan of its printed settings says."""
    frame = simulate(LENGTHS, batch_sizes=[4, 16], seed=3)

    assert [(name, size) for name in DEFAULT for size in (4, 16)] == list(
        zip(frame["strategy"], frame["batch_size"], strict=True)
    )
    for row in frame.to_dict("records"):
        plan = eval(row["settings"], vars(__import__("seqbatch.simulate", fromlist=["x"]))).plan(LENGTHS, seed=3)
        assert (plan.cells, plan.tokens, len(plan)) == (row["cells"], row["tokens"], row["batches"])
        assert plan.steps.sum() == row["steps"]
        assert plan.padding_efficiency == row["padding_efficiency"]
        assert LENGTHS.sum() == row["tokens"]
        assert row["over_budget"] == 0


def test_the_strategy_that_may_take_seconds_is_left_out_unless_it_is_named() -> None:
    """It is known by name, and never worse than best fit."""
    frame = simulate(LENGTHS, strategies=["packing", "packing_optimal"], batch_sizes=[64])

    assert [*DEFAULT, "packing_optimal"] == list(STRATEGIES)
    assert frame["batches"][1] <= frame["batches"][0]
    assert 'algorithm="optimal"' in frame["settings"][1].replace("'", '"')


def test_budgets_are_those_of_the_batch_size() -> None:
    """max_tokens = max(longest, round(B * mean)); bins as long as the longest, rows nearest to B * mean."""
    longest, mean = int(LENGTHS.max()), LENGTHS.mean()
    frame = simulate(LENGTHS, strategies=["token_budget", "packing"], batch_sizes=[2, 64])

    assert [
        f"Bucketing(max_tokens={longest})",
        f"Bucketing(max_tokens={round(64 * mean)})",
        f"Packing({longest})",
        f"Packing({longest}, rows={round(64 * mean / longest)})",
    ] == frame["settings"].tolist()


@pytest.mark.parametrize(
    ("size", "expected"),
    [(2, 0.727), (4, 0.564), (8, 0.459), (16, 0.387), (32, 0.334), (64, 0.295), (128, 0.264), (256, 0.240)],
)
def test_padding_uses_what_the_talks_slide_says(size: int, expected: float) -> None:
    """Gamma of shape 2: simulated, exact for the lengths drawn, and in theory."""
    lengths = gamma(2, 10).lengths(200_000)
    [simulated] = simulate(lengths, strategies=["padding"], batch_sizes=[size])["padding_efficiency"]

    assert expected == pytest.approx(simulated, abs=0.01)
    assert expected == pytest.approx(gamma(2, 10).expected_efficiency(size), abs=6e-4)


@pytest.mark.parametrize("size", [2, 7, 32, 300])
def test_padding_costs_in_the_mean_what_the_closed_form_says(size: int) -> None:
    """The mean number of cells over seeds is the exact expectation, within four standard errors."""
    lengths = LENGTHS[:500]
    cells = [Padding(size).plan(lengths, seed=seed).cells for seed in range(200)]
    error = np.std(cells) / np.sqrt(len(cells))

    assert lengths.sum() / expected_efficiency(lengths, size) == pytest.approx(np.mean(cells), abs=4 * error)


# Unno's talk, section by section: used slots / all slots for integer gamma lengths, shape 2, mean 20.
TABLE = {
    "padding": (0.460, 0.335, 0.296),
    "pool_sort": (0.908, 0.870, 0.852),
    "splicing": (0.999, 0.998, 0.995),
    "splicing_round_robin": (0.982, 0.939),
}


@pytest.mark.parametrize("name", TABLE)
def test_strategies_use_what_the_talks_table_says(name: str) -> None:
    """Mean of forty draws of 20,480 sentences; the table is one draw, and with more lanes one draw says little."""
    draws = [gamma(2, 10).lengths(20_480, seed=seed) for seed in range(40)]
    frames = [simulate(draw, strategies=[name], batch_sizes=[8, 32, 64][: len(TABLE[name])], seed=5) for draw in draws]
    mean = np.mean([frame["padding_efficiency"] for frame in frames], axis=0)

    assert list(TABLE[name]) == pytest.approx(mean.tolist(), abs=0.01)


def test_a_strategy_of_ones_own_is_counted_once() -> None:
    """Whatever the batch sizes."""
    frame = simulate(LENGTHS, strategies=[Bucketing(max_tokens=999, overlong="alone")], batch_sizes=[1, 2])

    assert [
        (name, None if pd.isna(size) else size)
        for name, size in zip(frame["strategy"], frame["batch_size"], strict=True)
    ] == [("Bucketing", None)]


def test_sequences_over_the_budget_are_counted() -> None:
    """Those left alone are the only batches over budget."""
    frame = simulate([50, 60, 3, 4], strategies=[Bucketing(max_tokens=10, overlong="alone")])
    assert frame["over_budget"].tolist() == [2]
    frame = simulate([50, 60, 3, 0], strategies=[Bucketing(max_tokens=10, overlong="drop")])
    assert frame["dropped"].tolist() == [2]


@given(strategies.lengths(min_size=2), st.integers(1, 6))
def test_re_meeting_counts_pairs(lengths: np.ndarray, size: int) -> None:
    """As many pairs of mates that are mates again as a count of all pairs finds."""
    plans = [Padding(size).plan(lengths, epoch=epoch) for epoch in (0, 1)]
    pairs = [{(a, b) for part in plan for a in part.sequence for b in part.sequence if a < b} for plan in plans]
    expected = len(pairs[0] & pairs[1]) / len(pairs[0]) if pairs[0] else None

    assert expected == re_meeting(*plans)
    assert re_meeting(plans[0], plans[0]) in (1.0, None)


def test_re_meeting_counts_a_cut_sequence_where_it_begins() -> None:
    """Sequences that begin in the same window are mates, however long they are."""
    plan = Splicing(2, 4, shuffle=False).plan([3, 9, 2, 2])

    assert re_meeting(plan, plan) == 1.0


def test_rank_balance_is_mean_over_largest() -> None:
    """Total over total; carried plans are even where the ranks divide the lanes."""
    assert rank_balance(Padding(1).plan([4, 2, 4, 2]), 2) == (4 + 4 + 2 + 2) / 2 / (4 + 2)
    assert rank_balance(Splicing(8, 4).plan(LENGTHS), 4) == 1.0
    assert rank_balance(Splicing(8, 4).plan(LENGTHS), 3) is None
    assert rank_balance(Padding(2).plan([1, 2]), 2) is None


def test_the_device_model_adds_batches_steps_and_cells() -> None:
    """And its knee is where a step's cells cost as much as the step."""
    plan = Padding(2, shuffle=False).plan([3, 1, 2])
    device = DeviceModel(batch_us=100, step_us=10, cell_ns=1000)

    assert pytest.approx(device.seconds(plan)) == 2 * 100e-6 + 5 * 10e-6 + 8 * 1e-6
    assert device.knee == 10
    assert float("inf") == DeviceModel(cell_ns=0).knee
    for bad in ({"batch_us": -1}, {"batch_us": 0, "step_us": 0, "cell_ns": 0}, {"step_us": float("nan")}):
        with pytest.raises(ValueError, match="must not be negative, nor all 0"):
            DeviceModel(**bad)


def test_predicted_throughput_of_padding_saturates_and_that_of_splicing_does_not() -> None:
    """The talk's slide 10: past the knee, padding gains little, splicing goes on."""
    frame = simulate(gamma(2, 10).lengths(20_000), strategies=["padding", "splicing"], batch_sizes=[64, 256])
    padding, splicing = (
        frame[frame["strategy"] == name]["tokens_per_s"].to_numpy() for name in ("padding", "splicing")
    )

    assert padding[1] < 1.4 * padding[0]
    assert splicing[1] > 1.5 * splicing[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strategies": ["paddings"]}, "a strategy must be one of 'padding'"),
        ({"batch_sizes": [0]}, "a batch size must be at least 1"),
        ({"chunk_size": 0}, "chunk_size must be at least 1"),
        ({"num_replicas": 0}, "num_replicas must be at least 1"),
        ({"lengths": [0, 0]}, "every sequence is empty"),
        ({"lengths": []}, "at least one sequence"),
    ],
)
def test_arguments_that_cannot_be_are_refused(arguments: dict, message: str) -> None:
    """Saying what came and what would do."""
    with pytest.raises(ValueError, match=message):
        simulate(**({"lengths": LENGTHS} | arguments))
