"""In which order batch statistics let a recurrence walk: rows in groups that share their statistics.

A recurrent layer with batch statistics cannot walk lane by lane: what normalizes a row depends on all rows
of its group, and a row needs the state of the row before it. So the real rows of a batch are listed
(:class:`Rows`), whatever its form, and sorted into groups (:class:`Walk`) such that every row's predecessor
stands in an earlier group. Padding is in no group and costs nothing.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from seqbatch.rnn.calls import Call
from seqbatch.rnn.checks import check_offsets

__all__ = ["Rows", "Statistics", "Walk", "group_of"]

Statistics = Literal["frame", "sequence", "age"]


@dataclass(frozen=True)
class Rows:
    """The real rows of a batch in the order of one direction, lane after lane.

    Attributes:
        at: (L,) int64, the row of the batch, t * B + b, or the row of the flat input.
        lane: (L,) int64.
        frame: (L,) int64, how many real rows the lane has before this one.
        age: (L,) int64, how many steps the row's piece has before it, those of earlier batches included.
        begins: (L,) bool, whether a reset stands between this row and the lane's real row before.
        lengths: (B,) int64, real rows of each lane.
        cleared: (B,) bool, whether a reset follows the lane's last real row.
        total: Rows of the batch, padding included.
    """

    at: Tensor
    lane: Tensor
    frame: Tensor
    age: Tensor
    begins: Tensor
    lengths: Tensor
    cleared: Tensor
    total: int

    @classmethod
    def of(cls, call: Call, age: Tensor | None = None, reverse: bool = False) -> "Rows":
        """List the rows of a call.

        Args:
            call: The call, checked.
            age: (B,) int64, steps that the piece a lane goes on with had in earlier batches; None: 0.
            reverse: Whether the direction walks back in time; it starts at each lane's last real row.

        >>> x = torch.zeros(3, 2, 1)
        >>> reset = torch.tensor([[True, True], [False, False], [True, False]])
        >>> mask = torch.tensor([[True, True], [True, True], [True, False]])
        >>> rows = Rows.of(Call.of("BNLSTM", x, reset, mask, None, weight=x, input_size=1, batch_first=False))
        >>> rows.at.tolist(), rows.age.tolist(), rows.frame.tolist()
        ([0, 2, 4, 1, 3], [0, 1, 0, 0, 1], [0, 1, 2, 0, 1])
        """
        if call.cu_seqlens is not None:
            return cls._of_flat(call.cu_seqlens, len(call.rows), age, reverse)
        steps, lanes = call.rows.shape[:2]
        empty = call.rows.new_zeros(steps, lanes, dtype=torch.bool)
        real = ~empty if call.mask is None else call.mask
        clear = empty if call.reset is None else call.reset
        if reverse:  # the piece that starts at t + 1 was walked before step t
            clear, real = torch.cat([clear[1:], empty[:1]]).flip(0), real.flip(0)
        lane, step = real.T.nonzero(as_tuple=True)
        lengths, resets = real.sum(0), clear.cumsum(0)
        frame, index = _frames(lane, lengths), torch.arange(len(lane), device=lane.device)
        so_far = resets[step, lane]
        before = torch.where(frame == 0, 0, torch.cat([so_far[:1], so_far[:-1]]))
        begins = so_far > before
        start = torch.where(begins | (frame == 0), index, 0).cummax(0).values if len(index) else index
        carried = torch.zeros_like(lane) if age is None else age[lane]
        last = (lengths.cumsum(0) - 1).clamp(min=0)
        ends = resets[-1] > (torch.where(lengths > 0, so_far[last], 0) if len(lane) else 0)
        at = (steps - 1 - step if reverse else step) * lanes + lane
        grown = index - start + torch.where(begins[start], 0, carried)
        return cls(at, lane, frame, grown, begins, lengths, ends, steps * lanes)

    @cached_property
    def real(self) -> Tensor | None:
        """(total,) bool, which rows of the batch are real; None: all."""
        if len(self.at) == self.total:
            return None
        return torch.zeros(self.total, dtype=torch.bool, device=self.at.device).index_fill_(0, self.at, True)

    @classmethod
    def _of_flat(cls, cu_seqlens: Tensor, total: int, age: Tensor | None, reverse: bool) -> "Rows":
        check_offsets(cu_seqlens, total)
        offsets = cu_seqlens.long()
        lengths = offsets.diff()
        lane = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)
        frame = _frames(lane, lengths)
        at = offsets[lane] + (lengths[lane] - 1 - frame if reverse else frame)
        grown = frame if age is None else frame + age[lane]
        never, ends = torch.zeros_like(lane, dtype=torch.bool), torch.zeros_like(lengths, dtype=torch.bool)
        return cls(at, lane, frame, grown, never, lengths, ends, total)


def _frames(lane: Tensor, lengths: Tensor) -> Tensor:
    return torch.arange(len(lane), device=lane.device) - (lengths.cumsum(0) - lengths)[lane]


def group_of(statistics: Statistics, frame: Tensor, age: Tensor, max_steps: int) -> Tensor:
    """The group of each row where nothing is recurrent: its frame, its age up to ``max_steps - 1``, or one for all.

    >>> group_of("age", torch.arange(4), torch.tensor([7, 8, 0, 1]), 3).tolist()
    [2, 2, 0, 1]
    """
    if statistics == "sequence":
        return torch.zeros_like(frame)
    return frame if statistics == "frame" else age.clamp(max=max_steps - 1)


@dataclass(frozen=True)
class Walk:
    """The rows of a direction in groups, each row with the place of the state before it.

    States stand in a table: first one for each lane that has rows, with which it enters the batch, then one for each
    piece that begins, then one for each walked row.

    Attributes:
        source: (R,) int64, which row of ``Rows`` (not of the batch) is walked; some several times with `fill`.
        frame: (R,) int64, as in ``Rows``; of filling rows the frame that they fill.
        age: (R,) int64, likewise.
        previous: (R,) int64, the place of the state before the row.
        offsets: (G + 1,) int64 on the CPU, where groups begin.
        runs: (G,) int64 on the CPU: the place of the first previous state where a group's stand in line, else -1.
        slots: (G,) int64, the running statistics of each group.
        place: (L,) int64, where each row of ``Rows`` is walked; what ``source`` has besides counts in statistics only.
        last: (B,) int64, the place of each lane's state after the batch; -1 for a lane without rows.
        lanes: The lanes that have rows.
        entering: Places before those of the walked rows: lanes with rows and pieces that begin.
    """

    source: Tensor
    frame: Tensor
    age: Tensor
    previous: Tensor
    offsets: Tensor
    runs: Tensor
    slots: Tensor
    place: Tensor
    last: Tensor
    lanes: Tensor
    entering: int

    @classmethod
    def of(cls, rows: Rows, statistics: Statistics, max_steps: int, fill: bool = False) -> "Walk":
        """Sort rows into groups.

        Args:
            rows: The rows.
            statistics: ``"frame"``: rows with as many real rows of their lane before them. ``"age"``: rows as old
                as each other, in order of age; those of age ``max_steps - 1`` and more follow, frame by frame.
            max_steps: Number of running statistics.
            fill: Let every lane go on to the longest one's end with its own rows from the first, which count in
                the statistics and change no state.

        >>> lane, begins = torch.tensor([0, 0, 1]), torch.zeros(3, dtype=torch.bool)
        >>> frame, lengths, never = torch.tensor([0, 1, 0]), torch.tensor([2, 1]), torch.zeros(2, dtype=torch.bool)
        >>> walk = Walk.of(Rows(torch.tensor([0, 2, 1]), lane, frame, frame, begins, lengths, never, 4), "frame", 9)
        >>> walk.source.tolist(), walk.offsets.tolist(), walk.previous.tolist(), walk.last.tolist()
        ([0, 2, 1], [0, 2, 3], [0, 1, 2], [4, 3])
        """
        count, lanes, device = len(rows.at), len(rows.lengths), rows.at.device
        index = torch.arange(count, device=device)
        first, lane_index = rows.lengths.cumsum(0) - rows.lengths, torch.arange(lanes, device=device)
        source, frame, fillers = index, rows.frame, index[:0]
        if fill and count:
            missing = torch.where(rows.lengths > 0, rows.lengths.max() - rows.lengths, 0)
            lane = lane_index.repeat_interleave(missing)
            frames = rows.lengths[lane] + _frames(lane, missing)
            source = torch.cat([index, first[lane] + frames % rows.lengths[lane]])
            frame, fillers = torch.cat([frame, frames]), first[lane] + rows.lengths[lane] - 1
        age = rows.age[source]
        key = frame if statistics == "frame" else torch.where(age >= max_steps - 1, max_steps - 1 + frame, age)
        order = key.argsort(stable=True)
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(order), device=device)
        held = rows.lengths > 0
        there = held.nonzero()[:, 0]
        place, entering = rank[:count], len(there) + int(rows.begins.sum())
        before = torch.where(rows.frame == 0, (held.cumsum(0) - 1)[rows.lane], entering + place[index - 1])
        before = torch.where(rows.begins, len(there) + rows.begins.cumsum(0) - 1, before)
        before = torch.cat([before, entering + place[fillers]])[order]
        keys, counts = key[order].unique_consecutive(return_counts=True)  # type: ignore[no-untyped-call]
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        last = torch.full_like(rows.lengths, -1).index_copy_(
            0, there, entering + place[(first + rows.lengths - 1)[there]]
        )
        return cls(
            source[order],
            frame[order],
            age[order],
            before,
            offsets.cpu(),
            _runs(before, offsets).cpu(),
            keys.clamp(max=max_steps - 1),
            place,
            last,
            there,
            entering,
        )


def _runs(previous: Tensor, offsets: Tensor) -> Tensor:
    """The first of each group's numbers where each is the one before it plus 1, else -1."""
    first = previous[offsets[:-1]]
    jumps = torch.cat([offsets.new_zeros(1), (previous.diff() != 1).cumsum(0)])  # up to and with each row
    return torch.where(jumps[offsets[1:] - 1] == jumps[offsets[:-1]], first, -1)
