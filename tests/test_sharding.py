"""Schedules: who runs which batch when, and what a history may say."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqbatch import Bucketing, Padding, Splicing
from seqbatch.sharding import check_history, lane_ranges, schedule

PLAN = Padding(4).plan(np.random.default_rng(0).integers(1, 40, 150))


def test_one_rank_runs_a_random_order() -> None:
    """Every batch comes first about equally often over the epochs."""
    first = [int(schedule(np.arange(6.0), 1, key=(0, epoch)).groups[0, 0]) for epoch in range(600)]

    assert set(range(6)) == set(first)
    assert np.bincount(first).min() > 60


@given(st.integers(1, 40), st.integers(1, 9))
def test_without_shuffle_steps_are_the_batches_in_order(count: int, num_replicas: int) -> None:
    """Rank r runs batches r, r + W, r + 2 W, whatever they cost."""
    groups, left_over = schedule(np.random.default_rng(0).random(count), num_replicas, shuffle=False)

    assert list(range(count)) == [*groups.ravel().tolist(), *left_over.tolist()]


def test_batches_of_equal_cost_meet_others_each_epoch() -> None:
    """Ties are broken at random, not by the order of the plan."""
    groups = {tuple(sorted(schedule(np.ones(32), 4, key=(0, epoch)).groups[0])) for epoch in range(20)}

    assert len(groups) > 15


def test_no_batch_is_left_over_more_often_than_others() -> None:
    """Of ten batches for four ranks, each of the ten is among the two left over now and then."""
    left = np.concatenate([schedule(np.arange(1.0, 11), 4, key=(0, epoch)).left_over for epoch in range(500)])

    assert np.bincount(left, minlength=10).min() > 50


@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 30))
def test_lanes_of_left_over_batches_are_dealt_evenly(left: int, more: int, lanes: int) -> None:
    """Each lane to one rank, none to two, and no rank has two more lanes of a batch than another."""
    num_replicas = left + more
    left_over, all_lanes = np.arange(left), np.full(left, lanes)

    batch, first, end = lane_ranges(left_over, all_lanes, num_replicas)

    for number in left_over:
        own = batch == number
        assert list(range(lanes)) == [lane for a, b in zip(first[own], end[own], strict=True) for lane in range(a, b)]
        assert np.ptp((end - first)[own]) <= 1
    assert len(batch) == num_replicas


def test_the_last_step_is_split_by_lanes() -> None:
    """38 batches on 5 ranks: seven steps and the lanes of three batches; a rank without one gets an empty lane."""
    shards = [PLAN.shard(rank, 5) for rank in range(5)]

    assert [len(shard) for shard in shards] == [8] * 5
    last = [shard[-1] for shard in shards]
    assert all(part.lanes >= 1 for part in last)

    shards = [Padding(2).plan([3, 3, 3]).shard(rank, 8) for rank in range(8)]
    assert [len(shard) for shard in shards] == [1] * 8
    assert [shard[0].lanes for shard in shards] == [1] * 8
    assert sum(shard.tokens for shard in shards) == 9


def test_tail_drop_lists_what_it_leaves_out() -> None:
    """On every rank the same rows."""
    shards = [PLAN.shard(rank, 5, tail="drop") for rank in range(5)]

    assert [len(shard) for shard in shards] == [7] * 5
    assert all((shards[0].dropped == shard.dropped).all() for shard in shards)
    assert {"tail"} == set(shards[0].dropped["reason"])
    assert PLAN.tokens == sum(shard.tokens for shard in shards) + shards[0].dropped["length"].sum()


@pytest.mark.parametrize(("cost", "at_least"), [((1.0, 0.0), 0.98), ((0.0, 1.0), 0.97)])
@pytest.mark.parametrize("num_replicas", [2, 3, 5, 8])
def test_steps_are_balanced(cost: tuple[float, float], at_least: float, num_replicas: int) -> None:
    """Mean cost / largest cost of a step, averaged, for many batches under a budget."""
    plan = Bucketing(max_tokens=2048).plan(np.random.default_rng(0).gamma(2, 12, 50_000).astype(np.int64) + 1)
    costs = plan.costs(cost)[plan.schedule(num_replicas, cost=cost).groups]

    assert (costs.mean(axis=1) / costs.max(axis=1)).mean() >= at_least


def test_costs_do_not_change_which_sequences_meet() -> None:
    """Only the order."""
    batches = [{tuple(part.sequence) for part in PLAN.shard(0, 1, cost=cost)} for cost in ((1.0, 0.0), (0.0, 1.0))]

    assert batches[0] == batches[1] == {tuple(part.sequence) for part in PLAN}


@pytest.mark.parametrize(
    ("history", "message"),
    [
        ([[8, 100]], "8 ranks took 100 steps, but there were only 5"),
        ([[8, 3], [3, 100]], "3 ranks took 100 steps, but there were only 5"),
        ([[0, 3]], "num_replicas in history must be at least 1, got 0"),
        ([[3, -1]], "steps in history must be at least 0, got -1"),
        ([3, 4], "must be .*, got the entry 3"),
        ([[3]], "must be .*, got the entry"),
        (["34"], "must be .*, got the entry '34'"),
    ],
)
def test_histories_that_cannot_be_are_refused(history: list, message: str) -> None:
    """Saying which entry, and what there was to take."""
    with pytest.raises(ValueError, match=message):
        PLAN.shard(0, 2, history=history)


@pytest.mark.parametrize("history", [5, None])
def test_a_history_is_a_list(history: object) -> None:
    """Saying of what."""
    with pytest.raises(TypeError, match=r"history must be .*, oldest first, got"):
        PLAN.shard(0, 2, history=history)


def test_histories_are_added_up() -> None:
    """Saving twice under as many ranks is saving once."""
    assert check_history([[8, 3], [8, 2], [5, 0], (3, 1), [8, 2]]) == [(8, 5), (3, 1), (8, 2)]


@pytest.mark.parametrize(
    ("rank", "num_replicas", "message"), [(2, 2, "0..1"), (-1, 2, "at least 0"), (0, 0, "at least 1")]
)
def test_ranks_out_of_range_are_refused(rank: int, num_replicas: int, message: str) -> None:
    """Saying the range."""
    with pytest.raises(ValueError, match=message):
        PLAN.shard(rank, num_replicas)


def test_carried_lanes_are_only_shared_evenly() -> None:
    """The message names the numbers of ranks that would do, also for a history."""
    plan = Splicing(12, 8).plan(range(1, 100))
    with pytest.raises(ValueError, match=r"num_replicas=5 does not divide the 12 lanes .* use one of 1, 2, 3, 4, 6"):
        plan.shard(0, 5)
    with pytest.raises(ValueError, match="num_replicas=8 does not divide"):
        plan.shard(0, 2, history=[[8, 1]])
    with pytest.raises(ValueError, match=r"history took 1000 steps, but the plan has \d+"):
        plan.shard(0, 2, history=[[2, 1000]])


def test_a_rank_of_a_carried_plan_keeps_its_own_lanes() -> None:
    """Rank 1 of 3 owns the second third, from the first batch to the last, also after a resume."""
    plan = Splicing(12, 8).plan(range(1, 100))
    shard = plan.shard(1, 3, history=[[4, 2]])

    assert len(shard) == len(plan) - 2
    for whole, own in zip([*plan][2:], shard, strict=True):
        mine = (whole.lane >= 4) & (whole.lane < 8)
        assert own.sequence.tolist() == whole.sequence[mine].tolist()
        assert own.lane.tolist() == (whole.lane[mine] - 4).tolist()
        assert (own.steps, own.lanes) == (whole.steps, 4)


def test_the_order_after_a_change_of_ranks_depends_on_the_history() -> None:
    """Runs that went different ways do not go on in step."""
    plan = Padding(1).plan([5] * 64)
    orders = [plan.shard(0, 1, history=[[ranks, 0], [2, 1]]).sequence.tolist() for ranks in (1, 4)]
    later = [plan.schedule(1, history=[[4, 4]]).groups, plan.schedule(1, history=[[8, 2]]).groups]

    assert orders[0] == orders[1], "an entry of no steps says nothing"
    assert np.argsort(later[0].ravel()).tolist() != np.argsort(later[1].ravel()).tolist()


def test_tail_and_cost_are_checked() -> None:
    """Before anything is planned."""
    with pytest.raises(ValueError, match="tail must be one of 'split', 'drop', got 'keep'"):
        PLAN.shard(0, 2, tail="keep")
    with pytest.raises(ValueError, match="cost"):
        PLAN.shard(0, 2, cost=(0.0, 0.0))
