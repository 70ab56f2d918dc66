"""Where the inserted steps of an LSTM go, so that stock kernels clear and hold their state.

A *flush* step drives the gates i, f and o to exactly 0, and with them c, h and every gradient through the
step. A *hold* step drives i and o to 0 and f to 1: c stays as it is and the output is 0. A lane gets one
flush step before each of its resets but one at step 0; lanes with fewer resets than others make up the
number with more flush steps at their first one, or, without any, with hold steps at the end. Padding
becomes hold steps.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Layout", "holes", "move"]


@dataclass(frozen=True)
class Layout:
    """Steps of a batch with inserted ones.

    Attributes:
        place: (T, B) int64, the step at which each step of the batch now stands.
        source: (T + K, B) int64, the step of the batch that stands there, any for an inserted one.
        real: (T + K, B) bool, whether a real token stands there.
        flush: (T + K, B) bool.
        hold: (T + K, B) bool.
        inserted: K, the largest number of resets after step 0 of any lane.
    """

    place: Tensor
    source: Tensor
    real: Tensor
    flush: Tensor
    hold: Tensor
    inserted: int

    @classmethod
    def of(cls, steps: int, lanes: int, reset: Tensor | None, mask: Tensor | None, device: torch.device) -> "Layout":
        """Lay out a batch; waits for the device once, for K.

        >>> reset = torch.tensor([[True, True], [False, False], [True, False]])
        >>> layout = Layout.of(3, 2, reset, None, reset.device)
        >>> layout.inserted, layout.place.T.tolist()
        (1, [[0, 1, 3], [0, 1, 2]])
        >>> layout.flush.nonzero().tolist(), layout.hold.nonzero().tolist()
        ([[2, 0]], [[3, 1]])
        """
        now = torch.arange(steps, device=device)[:, None].expand(steps, lanes)
        real = torch.ones(steps, lanes, dtype=torch.bool, device=device) if mask is None else mask
        inside = torch.zeros_like(real) if reset is None else reset & (now > 0)
        count = inside.sum(0)
        inserted = int(count.max()) if reset is not None and lanes else 0
        if not inserted:
            return cls(now, now, real, torch.zeros_like(real), ~real, 0)
        surplus = torch.where(count > 0, inserted - count, 0)
        shift = inside.cumsum(0)
        place = now + shift + torch.where(shift > 0, surplus, 0)
        shape = (steps + inserted, lanes)
        source = torch.zeros(shape, dtype=torch.int64, device=device).scatter_(0, place, now)
        kept = torch.zeros(shape, dtype=torch.bool, device=device).scatter_(0, place, real)
        taken = torch.zeros(shape, dtype=torch.bool, device=device).scatter_(0, place, True)
        flush = ~taken & (count > 0)
        return cls(place, source, kept, flush, ~kept & ~flush, inserted)


def holes(layout: Layout, given: Tensor, reverse: bool) -> bool:
    """Whether a hold step loses an h that a later real step of the same piece needs; waits for the device.

    A hold step keeps c but not h. That is harmless where no real step of the piece follows in the
    direction's order, and where h is 0 anyway: before the first real step after a flush or a zero state.

    Args:
        layout: The steps as they will run.
        given: (B,) bool, the lanes whose initial h may differ from 0 in this direction.
        reverse: The direction.

    >>> mask = torch.tensor([[True], [False], [True]])
    >>> layout = Layout.of(3, 1, None, mask, mask.device)
    >>> holes(layout, torch.tensor([False]), reverse=False)
    True
    """
    real, flush = (layout.real.flip(0), layout.flush.flip(0)) if reverse else (layout.real, layout.flush)
    before = real.cumsum(0) - real.long() + given  # an initial h counts as a real step before the first
    since_flush = before - torch.where(flush, before, 0).cummax(0).values
    after_other = torch.cat([torch.zeros_like(real[:1]), ~real[:-1]])
    return bool((real & after_other & (since_flush > 0)).any())


def move(rows: Tensor, take: Tensor, keep: Tensor | None, back: Tensor, stay: Tensor | None) -> Tensor:
    """Rows to other places: ``out[p] = rows[take[p]] if keep[p] else 0``, with an inverse for its derivative.

    None keeps all.

    Every kept row goes to one place, so that the derivative is a move too: ``back`` and ``stay`` are its
    ``take`` and ``keep``. (torch's own derivative adds up rows, which is several times slower on CPU.)

    >>> take, keep = torch.tensor([1, 0, 0]), torch.tensor([True, True, False])
    >>> move(torch.tensor([[5.0], [7.0]]), take, keep, torch.tensor([1, 0]), keep[:2]).T.tolist()
    [[7.0, 5.0, 0.0]]
    """
    moved: Tensor = _Move.apply(rows, take, keep, back, stay)  # type: ignore[no-untyped-call]
    return moved


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, take: Tensor, keep: Tensor | None, back: Tensor, stay: Tensor | None) -> Tensor:
        ctx.save_for_backward(take, keep, back, stay)
        moved = rows.index_select(0, take)
        return moved if keep is None else moved.masked_fill_(~keep[:, None], 0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        take, keep, back, stay = ctx.saved_tensors
        return move(grad, back, stay, take, keep), None, None, None, None
