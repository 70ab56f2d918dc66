"""The linear recurrence on CUDA, in Triton: one program walks some columns of one lane through time.

The loads of ``UNROLL`` steps are issued before any of them is used, as in :mod:`seqbatch.rnn.triton_kernels`. Row
numbers are 64-bit, nothing is added atomically, and no launch waits for the device.

Shapes: a, b, before and their gradients (T, B, H); initial, last and their gradients (B, H); reset, mask (T, B) bytes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from seqbatch.rnn.cuda import BLOCK, on_device

__all__ = ["backward", "forward", "walk", "walk_back"]

AHEAD = {"forward": 12, "backward": 8}  # steps whose loads are in flight together: what registers hold without spills
_SIZES = ["steps", "lanes"]  # 1 and multiples of 16 are no cases of their own


def forward(a: Tensor, b: Tensor, initial: Tensor, reset: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """:func:`seqbatch.rnn.linear_scan.linear_scan_reference`; initial's dtype is the carried one."""
    a, b, initial = a.contiguous(), b.contiguous(), initial.contiguous()
    before, last = torch.empty_like(a, dtype=initial.dtype), torch.empty_like(initial)
    _launch(walk, AHEAD["forward"], (a, b, initial), (reset, mask), (before, last), a.shape)
    return before, last


def backward(
    grad_before: Tensor, grad_last: Tensor, a: Tensor, before: Tensor, reset: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of a, b and initial."""
    inputs = tuple(x.contiguous() for x in (grad_before, grad_last, a, before))
    grad_a, grad_b, grad_initial = (torch.empty_like(x) for x in (inputs[2], inputs[2], inputs[1]))
    _launch(walk_back, AHEAD["backward"], inputs, (reset, mask), (grad_a, grad_b, grad_initial), a.shape)
    return grad_a, grad_b, grad_initial


def _launch(kernel, ahead, inputs, flags, outputs, shape):
    steps, lanes, width = shape
    if not lanes * width:
        return
    # a pointer that is not read where there are no flags
    pointers = (*inputs, *(inputs[0] if x is None else x.contiguous().view(torch.uint8) for x in flags), *outputs)
    present = {"HAS_RESET": flags[0] is not None, "HAS_MASK": flags[1] is not None}
    with on_device(inputs[0]):
        kernel[(lanes, triton.cdiv(width, BLOCK))](
            *pointers, steps, lanes, width, **present, BLOCK=BLOCK, UNROLL=ahead, num_warps=1
        )


@triton.jit
def _flag(flags, row, live, HAS: tl.constexpr, ABSENT: tl.constexpr):
    found = live & ABSENT
    if HAS:
        found = tl.load(flags + row, mask=live, other=0) != 0
    return found


@triton.jit(do_not_specialize=_SIZES)
def walk(a, b, initial, reset, mask, before, last, steps, lanes, width,
         HAS_RESET: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr):  # fmt: skip
    """Fill before and last."""
    CARRY: tl.constexpr = before.dtype.element_ty
    lane = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real_column = column < width
    state = tl.load(initial + lane * width + column, real_column, 0)
    at = lane * 0
    while at < steps:
        factors = ()
        terms = ()
        for i in tl.static_range(UNROLL):
            place = ((at + i) * lanes + lane) * width + column
            live = real_column & (at + i < steps)
            factors += (tl.load(a + place, live, 0),)
            terms += (tl.load(b + place, live, 0),)
        for i in tl.static_range(UNROLL):
            row = (at + i) * lanes + lane
            live = at + i < steps
            state = tl.where(_flag(reset, row, live, HAS_RESET, False), 0.0, state)
            tl.store(before + row * width + column, state, real_column & live)
            new = factors[i].to(CARRY) * state + terms[i].to(CARRY)
            state = tl.where(live & _flag(mask, row, live, HAS_MASK, True), new, state)
        at += UNROLL
    tl.store(last + lane * width + column, state, real_column)


@triton.jit(do_not_specialize=_SIZES)
def walk_back(grad_before, grad_last, a, before, reset, mask, grad_a, grad_b, grad_initial, steps, lanes, width,
              HAS_RESET: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr):  # fmt: skip
    """Fill grad_a, grad_b and grad_initial."""
    CARRY: tl.constexpr = before.dtype.element_ty
    KIND: tl.constexpr = grad_a.dtype.element_ty
    lane = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real_column = column < width
    carry = tl.load(grad_last + lane * width + column, real_column, 0)
    at = lane * 0 + steps - 1
    while at >= 0:
        factors = ()
        states = ()
        fed = ()
        for i in tl.static_range(UNROLL):
            place = ((at - i) * lanes + lane) * width + column
            live = real_column & (at - i >= 0)
            factors += (tl.load(a + place, live, 0),)
            states += (tl.load(before + place, live, 0),)
            fed += (tl.load(grad_before + place, live, 0),)
        for i in tl.static_range(UNROLL):
            row = (at - i) * lanes + lane
            live = at - i >= 0
            real = _flag(mask, row, live, HAS_MASK, True)
            place = row * width + column
            tl.store(grad_a + place, tl.where(real, carry * states[i], 0.0).to(KIND), real_column & live)
            tl.store(grad_b + place, tl.where(real, carry, 0.0).to(KIND), real_column & live)
            carry = tl.where(real, carry * factors[i].to(CARRY), carry) + fed[i]  # what is not live is 0
            carry = tl.where(_flag(reset, row, live, HAS_RESET, False), 0.0, carry)
        at -= UNROLL
    tl.store(grad_initial + lane * width + column, carry, real_column)
