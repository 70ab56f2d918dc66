"""The steps of an epoch as a rank runs them: plans cut to placements, and what the ranks share."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from seqbatch.ordering import IntArray
from seqbatch.placement import PieceIndices, Placement, loss_counts
from seqbatch.plan import BatchPlan, Plan

__all__ = ["PairBatches", "RankBatches", "Steps"]


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
        per_batch = _loss_tokens(plan.sides[-1], lengths[:, -1] if plan.pairs else lengths, next_token)
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
        self.block = _Block(0, [], [], [], [], [], {})
        self.held: IntArray | None = None
        if before is not None and len(self.first):
            self.held = _ends(before.sequence, before.start + before.length, before.step, before.lane, before.lanes)
            self.held = self.held[:, self.first[0] : self.end[0]]

    def place(self, step: int, common: dict[str, Any]) -> PieceIndices:
        """Return the batch of a step; steps are asked for in order, since state is carried from one to the next."""
        if not self.block.begin <= step < self.block.begin + len(self.block.lanes):
            self.block = self._gather(step)
        number = step - self.block.begin
        part = slice(self.block.ptr[number], self.block.ptr[number + 1])
        columns = {name: column[part] for name, column in self.block.columns.items()}
        lanes = self.block.lanes[number]
        continues = np.zeros(part.stop - part.start, np.bool_)
        if self.plan.carry:
            sequence, start, length, place, lane = (columns[n] for n in ("sequence", "start", "length", "step", "lane"))
            if self.held is not None:
                continues = (place == 0) & (self.held[0, lane] == sequence) & (self.held[1, lane] == start)
            self.held = _ends(sequence, start + length, place, lane, lanes)
        placement = Placement(
            **columns,
            steps=self.block.steps[number],
            lanes=lanes,
            continues=continues,
            carry=self.plan.carry,
            next_token=self.next_token,
            loss_tokens=self.block.loss_tokens[number],
            template=self.template,
            **common,
        )
        return PieceIndices(self.block.indices[part], placement)

    def _gather(self, begin: int) -> "_Block":
        """Look up the pieces of the next steps at once: a rank's lanes of their batches.

        Strategies place pieces by lane and step, so they are in order.
        """
        plan, steps = self.plan, slice(begin, begin + _STEPS)
        batches, first, end = self.batches[steps], self.first[steps], self.end[steps]
        counts = np.diff(plan.batch_ptr)[batches]
        offset = np.cumsum(counts) - counts
        pieces = np.arange(counts.sum()) + np.repeat(plan.batch_ptr[batches] - offset, counts)
        owner = np.repeat(np.arange(len(batches)), counts)
        lane = plan.lane[pieces] - first[owner]
        if (end - first != plan.lanes[batches]).any():
            keep = (lane >= 0) & (lane < (end - first)[owner])
            pieces, owner, lane = pieces[keep], owner[keep], lane[keep]
        nothing = np.zeros(len(pieces), np.int64)
        columns: dict[str, Any] = {n: getattr(plan, n)[pieces] for n in ("sequence", "start", "length", "step")}
        columns["lane"] = lane
        for name in ("left_context", "right_context"):
            column = getattr(plan, name)
            columns[name] = nothing if column is None else column[pieces]
        columns["whole"] = self.lengths[columns["sequence"]]
        ptr = np.append(0, np.cumsum(np.bincount(owner, minlength=len(batches))))
        loss = loss_counts(**{n: columns[n] for n in _LOSS}, next_token=self.next_token)
        loss_tokens = np.diff(np.append(0, np.cumsum(loss))[ptr])
        return _Block(
            begin,
            ptr.tolist(),
            plan.steps[batches].tolist(),
            np.maximum(end - first, 1).tolist(),
            loss_tokens.tolist(),
            columns["sequence"].tolist(),
            columns,
        )


class PairBatches:
    """The batches of one rank of a plan of pairs; only targets have `next_token`."""

    def __init__(
        self, plan: Plan, lengths: IntArray, batches: tuple[IntArray, IntArray, IntArray], next_token: bool
    ) -> None:
        self.source = RankBatches(plan.sides[0], lengths[:, 0], batches, None, False)
        self.target = RankBatches(plan.sides[1], lengths[:, 1], batches, None, next_token)
        # Whose tokens show shapes and dtypes where there is no pair: on both sides it must have some.
        self.source.template = self.target.template = int(np.argmax(lengths.min(axis=1) > 0))

    def place(self, step: int, common: dict[str, Any]) -> PieceIndices:
        """Return the batch of a step."""
        source, target = self.source.place(step, common), self.target.place(step, common)
        return PieceIndices(target, target.placement, source.placement)


_STEPS = 32  # batches that are looked up at once: calls of numpy cost more than the few pieces of one
_LOSS = ("start", "length", "left_context", "right_context", "whole")


class _Block(NamedTuple):
    """Consecutive steps of a rank."""

    begin: int  # the first of them
    ptr: list[int]  # where the pieces of each begin
    steps: list[int]
    lanes: list[int]
    loss_tokens: list[int]
    indices: list[int]  # the sequences of all pieces
    columns: dict[str, Any]  # of all pieces, by name


def _ends(sequence: IntArray, end: IntArray, step: IntArray, lane: IntArray, lanes: int) -> IntArray:
    """(2, B): the sequence that each lane holds at the end of a batch, and the token that would come next; or -1."""
    held = np.full((2, lanes), -1, np.int64)
    last = np.argsort(step, kind="stable")
    held[:, lane[last]] = sequence[last], end[last]
    return held


def _loss_tokens(plan: Plan, lengths: IntArray, next_token: bool) -> IntArray:
    """(M,) positions of each batch that carry loss."""
    left = 0 if plan.left_context is None else plan.left_context
    right = 0 if plan.right_context is None else plan.right_context
    whole = lengths[plan.sequence] if next_token else plan.length
    count = loss_counts(plan.start, plan.length, left, right, whole, next_token)
    return np.diff(np.append(0, np.cumsum(count))[plan.batch_ptr])
