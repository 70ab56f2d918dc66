"""One batch as numbers: which tokens lie where, what continues, and how much the loss counts.

A sampler yields a :class:`PieceIndices`: a plain list of sequence indices, which any map-style dataset
takes, with the batch's :class:`Placement` as an attribute. It holds all that a worker needs, so that no
worker ever looks up a plan, and none can be at another epoch than the sampler.
"""

from collections.abc import Iterable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from seqbatch.ordering import IntArray
from seqbatch.splicing import deal_lanes
from seqbatch.strategy import check_choice

__all__ = ["LAYOUTS", "PieceIndices", "Placement", "loss_counts", "targets_of"]

LAYOUTS = ("time_major", "batch_first", "flat")


@dataclass(eq=False)  # not frozen: that takes ten times as long to make, once a batch
class Placement:
    """The P pieces of one batch on its grid, sorted by lane and step: the order of the flat layout.

    Args:
        sequence: (P,) int64, which sequence a piece is of.
        start: (P,) its first token in that sequence, context included.
        length: (P,) its tokens, context included.
        step: (P,) the step of the grid at which its first token lies.
        lane: (P,) its lane.
        steps: Rows of the grid (T).
        lanes: Columns of the grid (B).
        left_context: (P,) tokens at its front that carry no loss.
        right_context: (P,) the same at its end.
        whole: (P,) tokens of the whole sequence.
        continues: (P,) bool, whether it goes on where its lane ended in the batch before.
        carry: Whether the state of a lane flows from batch to batch.
        next_token: Whether the target of a token is the next one, so that a sequence's last has none.
        loss_tokens: Positions that carry loss, in this batch; see `loss_spans`.
        step_loss_tokens: The same over all ranks and micro-steps of this optimizer step.
        num_replicas: Ranks among which the step is shared.
        update: Whether an optimizer step ends with this batch.
        position: The state to resume from after this batch, or None where no plan made it.
        template: A sequence whose item shows shapes and dtypes where there is no piece.
    """

    sequence: IntArray
    start: IntArray
    length: IntArray
    step: IntArray
    lane: IntArray
    steps: int
    lanes: int
    _: KW_ONLY
    left_context: IntArray
    right_context: IntArray
    whole: IntArray
    continues: NDArray[np.bool_]
    carry: bool = False
    next_token: bool = False
    loss_tokens: int = 0
    step_loss_tokens: int = 0
    num_replicas: int = 1
    update: bool = True
    position: Mapping[str, Any] | None = field(default=None, repr=False)
    template: int = 0

    @classmethod
    def of_lengths(
        cls, lengths: ArrayLike, *, num_lanes: int | None = None, multiple: int = 1, next_token: bool = False
    ) -> "Placement":
        """Place whole sequences: one a lane, or end to end in `num_lanes` lanes.

        Args:
            lengths: (N,) tokens of each, in the order of the batch; empty ones take no cell.
            num_lanes: Give each to the lane that ends first.
            multiple: Round the steps up to a multiple of this.
            next_token: As the attribute.

        >>> Placement.of_lengths([3, 1]).first("time_major")
        (array([0, 1]), 2)
        """
        length = np.asarray(lengths, np.int64).reshape(-1)
        sequence, step = np.arange(len(length)), np.zeros(len(length), np.int64)
        lane = sequence
        if num_lanes is not None:
            lane, step = deal_lanes(length, num_lanes, "first_free")
            sequence = np.lexsort((sequence, step, lane))
            lane, step, length = lane[sequence], step[sequence], length[sequence]
        tokens = int(np.maximum(length - next_token, 0).sum())
        return cls(
            sequence=sequence,
            start=np.zeros(len(length), np.int64),
            length=length,
            step=step,
            lane=lane,
            steps=-(-int((step + length).max(initial=0)) // multiple) * multiple,
            lanes=max(len(length), 1) if num_lanes is None else num_lanes,
            left_context=np.zeros(len(length), np.int64),
            right_context=np.zeros(len(length), np.int64),
            whole=length,
            continues=np.zeros(len(length), np.bool_),
            next_token=next_token,
            loss_tokens=tokens,
            step_loss_tokens=tokens,
        )

    @property
    def tokens(self) -> int:
        """Real cells: tokens of all pieces, context included (S)."""
        return int(self.length.sum())

    @cached_property
    def cu_seqlens(self) -> IntArray:
        """(P + 1,) where each piece begins among the tokens laid end to end."""
        return np.append(0, np.cumsum(self.length))

    def shape(self, layout: str) -> tuple[int, ...]:
        """(T, B), (B, T) or (S,)."""
        check_choice("layout", layout, LAYOUTS)
        if layout == "flat":
            return (self.tokens,)
        return (self.steps, self.lanes) if layout == "time_major" else (self.lanes, self.steps)

    def first(self, layout: str) -> tuple[IntArray, int]:
        """Return (cell of each piece's first token, distance to the next token's cell), cells numbered row by row."""
        match layout:
            case "time_major":
                return self.step * self.lanes + self.lane, self.lanes
            case "batch_first":
                return self.lane * self.steps + self.step, 1
            case _:
                return self.cu_seqlens[:-1], 1

    def cells(self, layout: str) -> IntArray:
        """(S,) the cell of every token, piece by piece."""
        first, stride = self.first(layout)
        return np.repeat(first - self.cu_seqlens[:-1] * stride, self.length) + np.arange(self.tokens) * stride

    def loss_spans(self) -> tuple[IntArray, IntArray]:
        """Return (begin, count), each (P,): which tokens of each piece carry loss, counted from the piece's first.

        Those outside context; with `next_token` not the last token of a sequence, which has no target.
        """
        columns = self.start, self.length, self.left_context, self.right_context, self.whole
        return self.left_context, loss_counts(*columns, self.next_token)

    @cached_property
    def single(self) -> bool:
        """Whether every lane holds at most one piece, which begins at step 0."""
        return bool((self.step == 0).all() and (np.diff(self.lane) > 0).all())


class PieceIndices(list[int]):
    """The indices of the sequences of a batch, one for each piece, and its :class:`Placement`.

    Of pairs `placement` is that of the targets, which carry the loss, and `source` that of the sources, else None.
    """

    def __init__(self, indices: Iterable[int], placement: Placement, source: Placement | None = None) -> None:
        super().__init__(indices)
        self.placement = placement
        self.source = source

    def __reduce__(self) -> tuple[Any, ...]:
        return PieceIndices, (list(self), self.placement, self.source)


def targets_of(next_token: str | int | None) -> tuple[bool, str | int | None]:
    """Return (whether an argument ``next_token`` asks for targets, the field that it names or None).

    >>> targets_of(False), targets_of(None), targets_of(True), targets_of("input_ids"), targets_of(0)
    ((False, None), (False, None), (True, None), (True, 'input_ids'), (True, 0))
    """
    if next_token is None or isinstance(next_token, bool | np.bool_):
        return bool(next_token), None
    return True, next_token


def loss_counts(
    start: IntArray,
    length: IntArray,
    left_context: IntArray | int,
    right_context: IntArray | int,
    whole: IntArray,
    next_token: bool,
) -> IntArray:
    """Return (P,) tokens of each piece that carry loss; see :meth:`Placement.loss_spans`.

    >>> loss_counts(np.array([0, 3]), np.array([3, 2]), 0, 0, np.array([5, 5]), next_token=True)
    array([3, 1])
    """
    count = length - left_context - right_context
    return np.maximum(count - (start + length - right_context == whole), 0) if next_token else count
