"""Each law fails on a plan that breaks it: a law that cannot fail proves nothing."""

from dataclasses import fields, replace

import laws
import numpy as np
import pytest

import seqbatch.ordering
import seqbatch.plan
import seqbatch.sharding
from seqbatch import Bucketing, Chunking, Packing, Padding, Splicing
from seqbatch.plan import Plan
from seqbatch.sharding import Schedule, schedule

LENGTHS = np.random.default_rng(0).integers(1, 30, 200)
PLANS = {
    "padding": Padding(8).plan(LENGTHS),
    "bucketing": Bucketing(max_tokens=200).plan(LENGTHS),
    "splicing": Splicing(8, 16).plan(LENGTHS),
    "chunking": Chunking(8, 10, left_context=2).plan(LENGTHS),
    "packing": Packing(64).plan(LENGTHS),
}
every_plan = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())


def changed(column: np.ndarray, at: int, by: int) -> np.ndarray:
    column = column.copy()
    column[at] += by
    return column


@every_plan
@pytest.mark.parametrize(("name", "by"), [("sequence", 1), ("start", 1), ("length", 1), ("length", -1)])
def test_exactly_once_sees_a_wrong_piece(plan: Plan, name: str, by: int) -> None:
    """A piece of another sequence, elsewhere in it, longer or shorter breaks the first law."""
    at = int(np.argmax(plan.length))
    with pytest.raises((AssertionError, IndexError)):
        laws.law_exactly_once(LENGTHS, replace(plan, **{name: changed(getattr(plan, name), at, by)}))


@every_plan
def test_exactly_once_sees_a_lost_and_a_repeated_piece(plan: Plan) -> None:
    """One piece left out, or one in place of another, breaks the first law."""
    ptr = plan.batch_ptr.copy()
    ptr[-1] -= 1
    columns = {f.name: getattr(plan, f.name) for f in fields(plan)}
    lost = {
        name: column[:-1] if isinstance(column, np.ndarray) and len(column) == len(plan.sequence) else column
        for name, column in columns.items()
    }
    with pytest.raises(AssertionError):
        laws.law_exactly_once(LENGTHS, Plan(**(lost | {"batch_ptr": ptr})))
    twice = {name: getattr(plan, name).copy() for name in ("sequence", "start", "length")}
    for column in twice.values():
        column[0] = column[1]
    with pytest.raises(AssertionError):
        laws.law_exactly_once(LENGTHS, replace(plan, **twice))


@every_plan
@pytest.mark.parametrize(("name", "value"), [("lane", 10_000), ("lane", -1), ("step", 10_000), ("step", -1)])
def test_disjoint_sees_a_piece_outside_its_grid(plan: Plan, name: str, value: int) -> None:
    """A piece beside or below its grid breaks the second law."""
    column = getattr(plan, name).copy()
    column[0] = value
    with pytest.raises(AssertionError):
        laws.law_disjoint(replace(plan, **{name: column}))


@every_plan
def test_disjoint_sees_an_overlap(plan: Plan) -> None:
    """Two pieces of a batch that start in the same cell break the second law."""
    first = int(np.argmax(np.diff(plan.batch_ptr) > 1))
    at = plan.batch_ptr[first]
    lane, step = plan.lane.copy(), plan.step.copy()
    lane[at + 1], step[at + 1] = lane[at], step[at]
    with pytest.raises(AssertionError):
        laws.law_disjoint(replace(plan, lane=lane, step=step))


def test_budget_sees_a_lane_too_many() -> None:
    """Every kind of limit is noticed when a batch passes it."""
    for strategy in (Padding(8), Bucketing(max_tokens=200), Splicing(8, 16), Chunking(8, 10), Packing(64)):
        plan = strategy.plan(LENGTHS)
        smaller = replace(strategy, **{name: getattr(strategy, name) - 1 for name in strategy.at_least if name in {
            "batch_size", "num_lanes", "capacity"} and getattr(strategy, name)} or {"max_tokens": 190})  # fmt: skip
        with pytest.raises(AssertionError):
            laws.law_budget(plan, smaller)


def test_tight_sees_an_unused_step() -> None:
    """A grid longer than its longest piece is noticed."""
    plan = Padding(8).plan(LENGTHS)
    with pytest.raises(AssertionError):
        laws.law_tight(replace(plan, steps=plan.steps + 1), Padding(8))


@pytest.mark.parametrize(
    "strategy", [Padding(8), Bucketing(max_tokens=200), Splicing(8, 16), Chunking(8, 10), Packing(64)]
)
def test_deterministic_sees_an_epoch_that_is_ignored(strategy: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the epoch did not reach the random bits, the law would fail."""
    bits = seqbatch.ordering.random_bits
    frozen = lambda count, *key: bits(count, key[-1])  # noqa: E731
    monkeypatch.setattr("seqbatch.ordering.random_bits", frozen)
    monkeypatch.setattr("seqbatch.strategy.random_bits", frozen)
    with pytest.raises(AssertionError, match="every epoch"):
        laws.law_deterministic(strategy, LENGTHS)


@pytest.mark.parametrize("num_replicas", [2, 3, 8])
def test_ranks_sees_repeated_lost_and_unbalanced_batches(num_replicas: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A schedule that repeats a batch, loses one, or mixes costs is noticed."""
    plan = PLANS["padding"]

    def repeating(*args: object, **kwargs: object) -> Schedule:
        groups, left_over = schedule(*args, **kwargs)
        groups[0, 0] = groups[-1, -1]
        return Schedule(groups, left_over)

    def losing(*args: object, **kwargs: object) -> Schedule:
        groups, left_over = schedule(*args, **kwargs)
        return Schedule(groups[1:], left_over)

    def mixing(*args: object, **kwargs: object) -> Schedule:
        groups, left_over = schedule(*args, **kwargs)
        return Schedule(np.sort(groups.ravel()).reshape(groups.shape), left_over)

    for broken in (repeating, losing, mixing):
        monkeypatch.setattr(seqbatch.plan, "schedule", broken)
        with pytest.raises(AssertionError):
            laws.law_ranks(LENGTHS, plan, num_replicas)


def test_resume_sees_a_history_that_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """If steps taken were dealt again, or the order changed on resuming, the law would fail."""
    plan = PLANS["bucketing"]
    forgetful = lambda *args, history, **kwargs: schedule(*args, history=history[-1:], **kwargs)  # noqa: E731
    monkeypatch.setattr(seqbatch.plan, "schedule", forgetful)
    with pytest.raises((AssertionError, ValueError)):
        laws.law_resume(LENGTHS, plan, [(8, 1), (3, 1)], last=5)


def test_carried_ranks_see_lanes_of_another_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that runs another rank's lanes is noticed."""
    restrict = Plan._restrict
    monkeypatch.setattr(
        Plan, "_restrict", lambda self, batches, first, end, **kw: restrict(self, batches, first * 0, end - first, **kw)
    )
    with pytest.raises(AssertionError):
        laws.law_ranks(LENGTHS, PLANS["splicing"], 2)
