"""What is particular to bucketing: pools, budgets, static shapes, overlong sequences, settings."""

import numpy as np
import pytest
import strategies
import twins
from hypothesis import given
from hypothesis import strategies as st

from seqbatch import Bucketing, rows
from seqbatch.ordering import ENOUGH_BITS, random_bits
from seqbatch.plan import Plan
from seqbatch.simulate import re_meeting

LENGTHS = np.random.default_rng(1).integers(1, 50, 400)


def batches_of(plan: Plan) -> list[list[int]]:
    return [part.length.tolist() for part in plan]


@given(strategies.lengths(max_size=60), st.integers(1, 40), st.integers(60, 300), st.sampled_from([1, 4]))
def test_pool_sort_without_shuffle_is_the_naive_one(
    lengths: np.ndarray, window: int, budget: int, multiple: int
) -> None:
    """Pools of the data's order, sorted up and down in turn, cut greedily by the padded budget."""
    filled = lengths[lengths > 0].tolist()
    row = [length for pool in twins.pool_row(range(len(filled)), filled, window) for length in pool]
    expected = twins.greedy_batches(row, lambda longest: budget // (-(-longest // multiple) * multiple))

    strategy = Bucketing(max_tokens=budget, window=window, pad_to_multiple_of=multiple, overlong="alone", shuffle=False)
    plan = strategy.plan(lengths)

    assert expected == batches_of(plan)


@given(st.integers(1, 200), st.integers(0, 5))
def test_pool_sort_draws_its_pools_by_sorting_random_words(window: int, seed: int) -> None:
    """Which lengths share a pool is decided by the random words alone."""
    order = np.argsort(random_bits(len(LENGTHS), seed, 0, "order"), kind="stable").tolist()
    row = [length for pool in twins.pool_row(order, LENGTHS.tolist(), window) for length in pool]

    plan = Bucketing(max_tokens=500, window=window).plan(LENGTHS, seed=seed)

    assert row == plan.length.tolist()
    assert (LENGTHS[plan.sequence] == plan.length).all()


@pytest.mark.parametrize("shuffle", [True, False])
def test_keys_that_do_not_fit_into_64_bits_sort_the_same_pools(shuffle: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way around packed keys gives the same lengths in the same batches."""
    strategy = Bucketing(max_tokens=500, window=64, shuffle=shuffle)
    packed = strategy.plan(LENGTHS)
    monkeypatch.setattr(rows, "ENOUGH_BITS", 64)

    plan = strategy.plan(LENGTHS)

    assert batches_of(packed) == batches_of(plan)
    assert sorted(plan.sequence) == list(range(len(LENGTHS)))
    assert ENOUGH_BITS == 16


@pytest.mark.parametrize("scale", [1, 10**7])
def test_very_long_sequences_plan_like_short_ones(scale: int) -> None:
    """Lengths in the hundreds of millions take the same batches as the same lengths in units."""
    short = Bucketing(max_tokens=500, window=100).plan(LENGTHS)
    plan = Bucketing(max_tokens=500 * scale, window=100).plan(LENGTHS * scale)

    assert short.batch_ptr.tolist() == plan.batch_ptr.tolist()


def test_mates_of_equal_length_change_with_the_epoch() -> None:
    """Sequences of one length meet others in the next epoch."""
    first, second = (Bucketing(max_tokens=70).plan([7] * 200, epoch=epoch) for epoch in (0, 1))

    assert batches_of(first) == batches_of(second)
    assert {frozenset(part.sequence) for part in first} != {frozenset(part.sequence) for part in second}


@pytest.mark.parametrize("edges", [None, [8, 20, 64]])
def test_static_shapes_have_one_shape_for_each_edge(edges: list[int] | None) -> None:
    """Steps are the edge, lanes what the budget allows it, also in a bucket's last batch."""
    plan = Bucketing(max_tokens=640, static_shapes=True, bucket_edges=edges).plan(LENGTHS)

    assert (640 // plan.steps == plan.lanes).all()
    assert len(np.unique(plan.steps)) <= (3 if edges else 8)
    if edges:
        assert set(plan.steps) <= set(edges)
        for part in plan:
            assert all(part.steps == min(edge for edge in edges if edge >= length) for length in part.length)


def test_a_quadratic_budget_limits_long_sequences_more() -> None:
    """Lanes are max_tokens // (a*l + b*l*l) for each batch's longest."""
    plan = Bucketing(max_tokens=4000, cost=(1.0, 0.5), static_shapes=True, bucket_edges=[10, 20, 40, 80]).plan(LENGTHS)

    assert (4000 // (plan.steps + 0.5 * plan.steps**2) == plan.lanes).all()


@pytest.mark.parametrize(
    ("policy", "pieces", "dropped"),
    [
        ("split", [(0, 0, 10), (0, 10, 10), (0, 20, 5), (1, 0, 4)], []),
        ("truncate", [(0, 0, 10), (1, 0, 4)], [(0, 10, 15, "overlong")]),
        ("drop", [(1, 0, 4)], [(0, 0, 25, "overlong")]),
        ("alone", [(0, 0, 25), (1, 0, 4)], []),
    ],
)
@pytest.mark.parametrize(
    "settings",
    [
        {"max_tokens": 10},
        {"max_tokens": 10, "num_buckets": 2},
        {"max_tokens": 10, "static_shapes": True},
        {"max_tokens": 200, "bucket_edges": [5, 10]},
        {"batch_size": 4, "bucket_edges": [5, 10], "static_shapes": True},
        {"max_tokens": 110, "cost": (1.0, 1.0)},
    ],
    ids=str,
)
def test_overlong_sequences_follow_the_policy(
    settings: dict[str, object],
    policy: str,
    pieces: list[tuple[int, int, int]],
    dropped: list[tuple[int, int, int, str]],
) -> None:
    """Split, truncated, dropped or alone: nothing else, and what is lost is listed."""
    plan = Bucketing(**settings, overlong=policy, shuffle=False).plan([25, 4])

    assert pieces == sorted(zip(plan.sequence.tolist(), plan.start.tolist(), plan.length.tolist(), strict=True))
    assert dropped == plan.dropped.tolist()
    if policy == "alone":
        own = int(np.argmax(plan.steps))
        assert (plan.steps[own], plan.lanes[own]) == (25, 1)
        assert len(plan[own].sequence) == 1


def test_an_overlong_sequence_is_an_error_by_default() -> None:
    """The message names the sequence, its length, the setting and the ways out."""
    with pytest.raises(
        ValueError, match=r'sequence 1 has 25 tokens, but max_tokens=10 allows at most 10 .*overlong="split"'
    ):
        Bucketing(max_tokens=10).plan([3, 25])
    with pytest.raises(ValueError, match="the last of bucket_edges that fits, 8, allows at most 8"):
        Bucketing(max_tokens=100, bucket_edges=[4, 8]).plan([3, 9])
    with pytest.raises(ValueError, match="allows at most 8"):
        Bucketing(max_tokens=15, pad_to_multiple_of=8).plan([9])


def test_drop_last_leaves_out_what_the_end_cut_short() -> None:
    """One batch of a pool sort, at most one of each bucket; all of it listed."""
    plan = Bucketing(batch_size=16, drop_last=True).plan(LENGTHS[:390])
    assert (plan.lanes == 16).all()
    assert len(plan.dropped) == 390 % 16
    assert not len(Bucketing(batch_size=16, drop_last=True).plan(LENGTHS).dropped), "400 fill 25 batches"

    plan = Bucketing(max_tokens=640, static_shapes=True, drop_last=True).plan(LENGTHS)
    assert (np.diff(plan.batch_ptr) == plan.lanes).all()
    assert len(plan.sequence) + len(plan.dropped) == 400


def test_few_sequences_of_different_lengths_meet_others_in_the_next_epoch() -> None:
    """A full sort would make the same batches for ever; pools of half of all do not."""
    lengths = np.arange(1, 2001)
    first, second = (Bucketing(max_tokens=30_000).plan(lengths, epoch=epoch) for epoch in (0, 1))

    assert re_meeting(first, second) < 0.6
    assert first.padding_efficiency > 0.95


def test_the_budget_is_hard_for_any_cost() -> None:
    """Costs far below and far above one token, and budgets that float64 does not hold exactly."""
    for settings, lengths in (
        ({"max_tokens": 3_000_000**2, "cost": (0, 1)}, [2_999_999, 1000]),
        ({"max_tokens": 1, "cost": (1e-6, 0)}, [1] * 1_100_000),
        ({"max_tokens": 2**43}, [2**42] * 4),
        ({"max_tokens": 2**61 + 1, "cost": (1, 1e-9)}, [2**30] * 9),
    ):
        plan = Bucketing(**settings).plan(lengths)
        assert (plan.costs(settings.get("cost", (1, 0))) <= settings["max_tokens"]).all()
    assert Bucketing(max_tokens=2**43).plan([2**42] * 4).lanes.tolist() == [2, 2]
    with pytest.raises(ValueError, match="allows at most 3000000"):
        Bucketing(max_tokens=3_000_000**2, cost=(0, 1)).plan([4_000_000, 1000])


def test_default_window_keeps_waste_low_and_mates_new() -> None:
    """An eighth of many sequences, a hundred batches of few."""
    many = np.random.default_rng(0).gamma(2, 12, 100_000).astype(np.int64) + 1
    plan = Bucketing(max_tokens=512).plan(many)

    assert plan.padding_efficiency > 0.98


def test_static_edges_beyond_the_budget_are_not_used() -> None:
    """A sequence that would be padded over the budget is overlong, however short it is itself."""
    settings = {"max_tokens": 50, "bucket_edges": [10, 100], "static_shapes": True}
    with pytest.raises(ValueError, match="the last of bucket_edges that fits, 10, allows at most 10"):
        Bucketing(**settings).plan([3, 20])
    plan = Bucketing(**settings, overlong="split").plan([3, 20])
    assert np.unique(plan.steps).tolist() == [10]
    with pytest.raises(ValueError, match=r"no room for one sequence padded to any of bucket_edges, \(60,\)"):
        Bucketing(max_tokens=50, bucket_edges=[60], static_shapes=True)


BAD = {
    "give either max_tokens or batch_size": [{}, {"max_tokens": 8, "batch_size": 2}],
    "must be at least 1, got 0": [{"max_tokens": 0}, {"batch_size": 0}, {"max_tokens": 9, "window": 0}],
    "must be at least 1, got -1": [{"max_tokens": 9, "num_buckets": -1}],
    "goes with max_tokens": [
        {"batch_size": 2, "cost": (1.0, 1.0)},
        {"batch_size": 2, "max_sequences": 4},
        {"batch_size": 2, "batch_size_multiple": 2},
    ],
    "window is for pool sort": [
        {"max_tokens": 9, "window": 4, "num_buckets": 2},
        {"max_tokens": 9, "window": 4, "static_shapes": True},
    ],
    "must rise": [{"max_tokens": 9, "bucket_edges": e} for e in ([], [4, 2], [2, 2])],
    "bucket_edges are the edges": [
        {"max_tokens": 9, "bucket_edges": [4], "num_buckets": 2},
        {"max_tokens": 9, "bucket_edges": [4], "edges": "quantile"},
    ],
    "needs num_buckets": [{"max_tokens": 9, "edges": "quantile"}],
    "edges must be one of": [{"max_tokens": 9, "num_buckets": 2, "edges": "best"}],
    "overlong must be one of": [{"max_tokens": 9, "overlong": "keep"}],
    "has no room for one sequence": [
        {"max_tokens": 9, "pad_to_multiple_of": 16},
        {"max_tokens": 9, "cost": (0.0, 10.0)},
    ],
    "cost": [{"max_tokens": 9, "cost": c} for c in ((0, 0), (-1, 0), (1,), 1, (float("nan"), 1), (1, float("inf")))],
}


@pytest.mark.parametrize(("message", "settings"), [(m, s) for m, many in BAD.items() for s in many], ids=str)
def test_settings_that_cannot_be_are_refused(message: str, settings: dict[str, object]) -> None:
    """At construction, saying what came and what would do."""
    with pytest.raises(ValueError, match=message):
        Bucketing(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"max_tokens": 8.0},
        {"max_tokens": "8"},
        {"max_tokens": True},
        {"batch_size": 2, "shuffle": 1},
        {"batch_size": 2, "bucket_edges": [1.5]},
        {"batch_size": 2, "bucket_edges": 8},
    ],
    ids=str,
)
def test_settings_of_the_wrong_type_are_refused(settings: dict[str, object]) -> None:
    """Numbers are integers, switches are booleans."""
    with pytest.raises(TypeError, match="must be"):
        Bucketing(**settings)
