"""One helper for each law that every plan obeys; each raises AssertionError where it does not."""

from collections.abc import Sequence

import numpy as np

from seqbatch import Bucketing, Chunking, Packing, Padding, Splicing
from seqbatch.pieces import dropped_side
from seqbatch.plan import Plan
from seqbatch.strategy import Strategy


def new_tokens(plan: Plan) -> np.ndarray:
    """(P, 3) sequence, start, length of all pieces without their context."""
    left = 0 if plan.left_context is None else plan.left_context
    right = 0 if plan.right_context is None else plan.right_context
    return np.stack([plan.sequence, plan.start + left, plan.length - left - right], axis=1)


def law_exactly_once(
    lengths: np.ndarray, *plans: Plan, dropped: np.ndarray | None = None, empty: np.ndarray | None = None
) -> None:
    """Every token outside context lies in exactly one piece or one row of what was dropped; of pairs, on both sides."""
    if dropped is None:
        dropped = plans[0].dropped
    if lengths.ndim == 2:
        empty = lengths.min(axis=1) == 0
        for side in range(2):
            rest = dropped_side(dropped, side)
            law_exactly_once(lengths[:, side], *(plan.sides[side] for plan in plans), dropped=rest, empty=empty)
        return
    empty = lengths == 0 if empty is None else empty
    rows = np.stack([dropped["sequence"], dropped["start"], dropped["length"]], axis=1)
    pieces = np.concatenate([*(new_tokens(plan) for plan in plans), rows[rows[:, 2] > 0]])
    assert (pieces[:, 2] > 0).all(), "a piece without a new token"
    offset = np.concatenate([[0], np.cumsum(lengths)])
    assert (pieces[:, 1] >= 0).all()
    assert (pieces[:, 1] + pieces[:, 2] <= lengths[pieces[:, 0]]).all(), "a piece beyond its sequence"
    begins = offset[pieces[:, 0]] + pieces[:, 1]
    order = np.argsort(begins, kind="stable")
    ends = begins[order] + pieces[order, 2]
    expected = np.concatenate([[0], ends[:-1]]) if len(ends) else ends
    assert (begins[order] == expected).all(), "a token placed twice or not at all"
    assert (ends[-1] if len(ends) else 0) == offset[-1], "tokens missing at the end"
    listed = np.sort(dropped["sequence"][dropped["reason"] == "empty"])
    assert listed.tolist() == np.flatnonzero(empty).tolist(), "empty ones not listed"
    for plan in plans:
        assert plan.tokens == new_tokens(plan)[:, 2].sum()


def law_disjoint(plan: Plan) -> None:
    """Pieces lie inside their grid and no two share a cell."""
    if plan.pairs:
        for side in plan.sides:
            law_disjoint(side)
        return
    batch = np.repeat(np.arange(len(plan)), np.diff(plan.batch_ptr))
    assert (plan.lane >= 0).all()
    assert (plan.lane < plan.lanes[batch]).all(), "a piece beside its grid"
    assert (plan.step >= 0).all()
    assert (plan.step + plan.length <= plan.steps[batch]).all(), "a piece below its grid"
    order = np.lexsort((plan.step, plan.lane, batch))
    assert (order == np.arange(len(order))).all(), (
        "pieces that are not in the order of lanes and steps, as loaders need"
    )
    same_lane = (np.diff(batch[order]) == 0) & (np.diff(plan.lane[order]) == 0)
    gap = plan.step[order][1:] - (plan.step + plan.length)[order][:-1]
    assert (gap[same_lane] >= 0).all(), "two pieces overlap"
    assert (np.diff(plan.batch_ptr) > 0).all(), "a batch without a piece"


def law_budget(plan: Plan, strategy: Strategy) -> None:
    """No batch is larger than its settings allow; only a sequence left `alone` may be, in one lane."""
    pieces = np.diff(plan.batch_ptr)
    match strategy:
        case Padding():
            assert (pieces <= strategy.batch_size).all()
            assert (plan.steps % strategy.pad_to_multiple_of == 0).all()
        case Bucketing():
            assert (plan.steps % strategy.pad_to_multiple_of == 0).all()
            a, b = strategy.cost
            limit = strategy.max_tokens or strategy.batch_size
            each = a * plan.steps + b * plan.steps**2 if strategy.max_tokens else np.ones(len(plan))
            if each.ndim == 2:
                each = {"sum": np.sum, "max": np.max}[strategy.budget](each, axis=1)
            within = plan.lanes * each <= limit * (1 + 1e-6)
            alone = (strategy.overlong == "alone") & (plan.lanes == 1) & (pieces == 1)
            assert (within | alone).all(), "a batch over budget"
            assert (pieces <= (strategy.max_sequences or np.inf)).all()
            multiple = strategy.batch_size_multiple
            assert ((pieces < multiple) | (pieces % multiple == 0) | (plan.lanes % multiple == 0)).all()
        case Splicing():
            assert (plan.lanes == strategy.num_lanes).all()
            assert (plan.steps <= strategy.chunk_size).all()
        case Chunking():
            assert (new_tokens(plan)[:, 2] <= strategy.chunk_size).all()
            assert (plan.lanes <= strategy.batch_size).all()
            assert not strategy.carry or (plan.lanes == strategy.batch_size).all()
        case Packing():
            assert (plan.steps == strategy.capacity).all()
            assert (plan.lanes == strategy.rows).all()
            bins = np.repeat(np.arange(len(plan)), pieces) * strategy.rows + plan.lane
            assert np.bincount(bins, minlength=1).max() <= (strategy.max_sequences or np.inf)


def law_tight(plan: Plan, strategy: Strategy) -> None:
    """Where nothing asks for more, a grid ends with its last piece and has no lane without one."""
    if isinstance(strategy, Packing) or getattr(strategy, "static_shapes", False):
        return
    if plan.pairs:
        for side in plan.sides:
            law_tight(side, strategy)
        return
    ends = np.maximum.reduceat(plan.step + plan.length, plan.batch_ptr[:-1]) if len(plan) else plan.steps
    multiple = getattr(strategy, "pad_to_multiple_of", 1)
    assert (-(-ends // multiple) * multiple == plan.steps).all(), "steps that no piece reaches"
    if not plan.carry:
        lanes = np.maximum.reduceat(plan.lane, plan.batch_ptr[:-1]) + 1 if len(plan) else plan.lanes
        assert (lanes == plan.lanes).all(), "lanes without a piece"


def law_deterministic(strategy: Strategy, lengths: np.ndarray) -> None:
    """The same arguments give the same plan; the next epoch and another seed give another one."""
    plan = strategy.plan(lengths, seed=3, epoch=1)
    assert plan.digest == strategy.plan(list(lengths), seed=3, epoch=1).digest
    others = [strategy.plan(lengths, seed=3, epoch=2), strategy.plan(lengths, seed=4, epoch=1)]
    if not strategy.shuffle:
        assert all(plan.digest == other.digest for other in others)
    elif len(plan) > 3 and len(np.unique(plan.sequence)) > 30:  # windows of one long sequence have no mates
        assert all(plan.digest != other.digest for other in others), "the same batches every epoch"


def law_ranks(lengths: np.ndarray, plan: Plan, num_replicas: int, tail: str = "split") -> None:
    """All ranks take the same number of steps and together run the plan once, in balanced steps."""
    shards = [plan.shard(rank, num_replicas, tail=tail) for rank in range(num_replicas)]
    assert len({len(shard) for shard in shards}) == 1, "ranks of different length"
    law_exactly_once(lengths, *shards, dropped=shards[0].dropped)
    for side in (side for shard in shards for side in shard.sides):
        batch = np.repeat(np.arange(len(side)), np.diff(side.batch_ptr))
        assert (side.step + side.length <= side.steps[batch]).all()
        assert (side.lane < side.lanes[batch]).all()
        assert (side.lanes >= 1).all()
    if plan.carry:
        law_carried_ranks(plan, shards)
        return
    full = len(plan) // num_replicas
    cells = np.stack([shard.costs() for shard in shards])[:, :full]
    if plan.shuffle and full:
        highest, lowest = cells.max(axis=0), cells.min(axis=0)
        order = np.lexsort((highest, lowest))
        assert (highest[order][:-1] <= lowest[order][1:]).all(), "steps whose costs interleave"
    if full and tail == "split" and len(plan) % num_replicas == 0:
        assert cells.sum() == plan.cells


def law_carried_ranks(plan: Plan, shards: Sequence[Plan]) -> None:
    """Rank r runs lanes ``[r*B/W, (r+1)*B/W)`` of every batch, in order."""
    for step, whole in enumerate(plan):
        share = whole.lanes // len(shards)
        parts = [shard[step] for shard in shards]
        assert all(part.steps == whole.steps and part.lanes == share for part in parts)
        lanes = np.concatenate([part.lane + rank * share for rank, part in enumerate(parts)])
        sequences = np.concatenate([part.sequence for part in parts])
        assert sorted(zip(lanes, sequences, strict=True)) == sorted(zip(whole.lane, whole.sequence, strict=True))


def law_resume(lengths: np.ndarray, plan: Plan, phases: Sequence[tuple[int, int]], last: int) -> None:
    """Through any history of ranks and steps, and then to the end, every token comes exactly once."""
    history: list[tuple[int, int]] = []
    done: list[Plan] = []
    for num_replicas, steps in [*phases, (last, -1)]:
        shards = [plan.shard(rank, num_replicas, history=history) for rank in range(num_replicas)]
        taken = len(shards[0]) if steps < 0 else min(steps, len(shards[0]))
        done += [first_steps(shard, taken) for shard in shards]
        again = [
            plan.shard(rank, num_replicas, history=[*history, (num_replicas, taken)]) for rank in range(num_replicas)
        ]
        for shard, rest in zip(shards, again, strict=True):
            assert rest_of(shard, taken).digest == rest.digest, "resuming on as many ranks changes the order"
        history.append((num_replicas, taken))
    law_exactly_once(lengths, *done, dropped=plan.dropped)


def first_steps(plan: Plan, count: int) -> Plan:
    """The first `count` batches of a rank."""
    return _part(plan, 0, count)


def rest_of(plan: Plan, count: int) -> Plan:
    """What a rank has left after `count` batches."""
    return _part(plan, count, len(plan))


def _part(plan: Plan, begin: int, end: int) -> Plan:
    pieces = slice(plan.batch_ptr[begin], plan.batch_ptr[end])
    columns = {name: getattr(plan, name) for name in ("sequence", "start", "length", "step", "lane")}
    columns |= {name: getattr(plan, name) for name in ("left_context", "right_context")}
    return Plan(
        **{name: None if column is None else column[pieces] for name, column in columns.items()},
        batch_ptr=plan.batch_ptr[begin : end + 1] - plan.batch_ptr[begin],
        steps=plan.steps[begin:end],
        lanes=plan.lanes[begin:end],
        carry=plan.carry,
        dropped=plan.dropped,
    )
