"""The steps of an epoch as a rank runs them: plans cut to placements, and what the ranks share."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seqbatch.ordering import IntArray
from seqbatch.placement import Placement
from seqbatch.plan import BatchPlan, Plan

__all__ = ["RankBatches", "Steps"]


@dataclass(frozen=True)
class Steps:
    """What is left of an epoch: the batches of each rank that is served, and what concerns all ranks."""

    batches: list[tuple[IntArray, IntArray, IntArray]]  # (batch, first lane, end lane) of each step, a rank
    totals: IntArray  # (steps,) positions that carry loss in the optimizer step that a step is part of, all ranks
    update: NDArray[np.bool_]  # (steps,) whether an optimizer step ends
    before: BatchPlan | None  # the batch before, where its lanes' state is carried on

    @classmethod
    def of(
        cls,
        plan: Plan,
        lengths: IntArray,
        ranks: Sequence[int],
        num_replicas: int,
        *,
        next_token: bool,
        accumulation: int,
        reset_lanes: bool,
        **options: Any,
    ) -> "Steps":
        """Lay out the steps of some ranks; `options` are those of :meth:`Plan.assign`."""
        batches = [plan.assign(rank, num_replicas, **options) for rank in ranks]
        per_batch = _loss_tokens(plan, lengths, next_token)
        before = None
        if plan.carry:
            done = len(plan) - len(batches[0][0])
            totals = per_batch[done:]
            before = plan[done - 1] if done and not reset_lanes else None
        else:
            groups, left_over = plan.schedule(num_replicas, **options)
            totals = per_batch[groups].sum(axis=1)
            if len(left_over) and options["tail"] == "split":
                totals = np.append(totals, per_batch[left_over].sum())
        micro, count = accumulation, len(totals)
        sums = np.add.reduceat(totals, np.arange(0, count, micro)) if count else totals
        last = (np.arange(count) % micro == micro - 1) | (np.arange(count) == count - 1)
        return cls(batches, np.repeat(sums, micro)[:count], last, before)


class RankBatches:
    """The batches of one rank as placements, one after the other."""

    def __init__(
        self,
        plan: Plan,
        lengths: IntArray,
        batches: tuple[IntArray, IntArray, IntArray],
        before: BatchPlan | None,
        next_token: bool,
    ) -> None:
        self.plan, self.lengths, self.next_token = plan, lengths, next_token
        self.batches, self.first, self.end = batches
        self.template = int(np.argmax(lengths > 0))
        self.held: IntArray | None = None
        if before is not None and len(self.first):
            self.held = _ends(before)[:, self.first[0] : self.end[0]]

    def place(self, step: int, common: dict[str, Any]) -> Placement:
        """Return the batch of a step; steps are asked for in order, since state is carried from one to the next."""
        batch = _lanes(self.plan[int(self.batches[step])], int(self.first[step]), int(self.end[step]))
        # Copies: a plan's columns are read-only, which torch does not like to index with.
        sequence, start, length, step_of, lane = (column.copy() for column in batch[:5])
        nothing = np.zeros(len(sequence), np.int64)
        left = nothing if batch.left_context is None else batch.left_context
        right = nothing if batch.right_context is None else batch.right_context
        continues = np.zeros(len(sequence), np.bool_)
        if self.plan.carry:
            if self.held is not None:
                continues = (batch.step == 0) & (self.held[0, lane] == sequence) & (self.held[1, lane] == start)
                continues &= start > 0
            self.held = _ends(batch)
        whole = self.lengths[sequence]
        loss_tokens = int(length.sum() - left.sum() - right.sum())
        if self.next_token:
            loss_tokens -= int((start + length - right == whole).sum())
        return Placement(
            sequence=sequence,
            start=start,
            length=length,
            step=step_of,
            lane=lane,
            steps=batch.steps,
            lanes=batch.lanes,
            left_context=left,
            right_context=right,
            whole=whole,
            continues=continues,
            carry=self.plan.carry,
            next_token=self.next_token,
            loss_tokens=loss_tokens,
            template=self.template,
            **common,
        )


def _lanes(batch: BatchPlan, first: int, end: int) -> BatchPlan:
    """Return some lanes of a batch, at least one, its pieces sorted by lane and step."""
    lane, step = batch.lane, batch.step
    chosen: Any = None
    if end - first != batch.lanes:
        chosen = np.flatnonzero((lane >= first) & (lane < end))
        lane, step = lane[chosen] - first, step[chosen]
    gap = np.diff(lane)
    if not ((gap > 0) | ((gap == 0) & (np.diff(step) > 0))).all():
        order = np.lexsort((step, lane))
        chosen = order if chosen is None else chosen[order]
        lane, step = lane[order], step[order]
    if chosen is None:
        return batch
    columns = {name: column[chosen] for name, column in batch._asdict().items() if isinstance(column, np.ndarray)}
    return batch._replace(**columns | {"step": step, "lane": lane, "lanes": max(end - first, 1)})


def _ends(batch: BatchPlan) -> IntArray:
    """(2, B): the sequence that each lane holds at the end of a batch, and the token that would come next; or -1."""
    held = np.full((2, batch.lanes), -1, np.int64)
    last = np.argsort(batch.step, kind="stable")
    held[:, batch.lane[last]] = batch.sequence[last], (batch.start + batch.length)[last]
    return held


def _loss_tokens(plan: Plan, lengths: IntArray, next_token: bool) -> IntArray:
    """(M,) positions of each batch that carry loss."""
    left = 0 if plan.left_context is None else plan.left_context
    right = 0 if plan.right_context is None else plan.right_context
    count = plan.length - left - right
    if next_token:
        count = count - (plan.start + plan.length - right == lengths[plan.sequence])
    return np.diff(np.append(0, np.cumsum(count))[plan.batch_ptr])
