"""A linear recurrence over time as a PyTorch operator: ``seqbatch::linear_scan`` and its backward.

Custom operators with kernels for CPU (numba) and CUDA (Triton), compiled when they are first called, and shapes for
``torch.compile``. The derivative is a linear recurrence too, backwards in time, and the derivative of that one is the
forward scan again: the two operators differentiate each other, any number of times.

Source: Martin & Cundy, arXiv 1709.04057, for affine recurrences as scans; the parts of a cell's graph that are such
recurrences are the components of Hwang & Sung, arXiv 1503.02852.
"""

from typing import Any

import torch
from torch import Tensor

from seqbatch.rnn.checks import check_linear, check_no_tangent
from seqbatch.rnn.reference import carry_dtype

__all__ = ["linear_scan", "linear_scan_reference"]


def linear_scan(
    a: Tensor, b: Tensor, initial: Tensor, *, reset: Tensor | None = None, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``state = a[t] * state + b[t]`` over all steps; :func:`linear_scan_reference` states it in full.

    Args:
        a: (T, B, H), any floating dtype.
        b: (T, B, H), in a's dtype.
        initial: (B, H), the state before the first step.
        reset: (T, B) bool, true where a new piece starts: the state is 0 before that step. None: nowhere.
        mask: (T, B) bool, true on real steps: elsewhere the state is held. None: everywhere.

    Returns:
        The state that enters each step, after its reset, (T, B, H), and the state after the last step, (B, H). Both in
        float32, or float64 for float64. Gradients of a, b and initial do not cross a reset, and nothing of a and b is
        seen where mask is false: NaN neither.

    Raises:
        TypeError: An argument is not a tensor.
        RuntimeError: A shape does not fit, tensors lie on different devices, or a forward-mode derivative is asked for.
        ValueError: A dtype is not allowed.

    >>> a, b = torch.full((3, 1, 1), 0.5), torch.ones(3, 1, 1)
    >>> before, last = linear_scan(a, b, torch.full((1, 1), 8.0))
    >>> before.flatten().tolist(), last.item()
    ([8.0, 5.0, 3.5], 2.75)
    >>> before, last = linear_scan(a, b, b[0], reset=torch.tensor([[False], [False], [True]]))
    >>> before.flatten().tolist(), last.item()
    ([1.0, 1.5, 0.0], 1.0)
    """
    check_linear(a, b, initial, reset, mask)
    check_no_tangent("linear_scan", (a, b, initial))
    before, last = _scan(a, b, initial.to(carry_dtype(a.dtype)), reset, mask)
    return before, last


def linear_scan_reference(
    a: Tensor, b: Tensor, initial: Tensor, *, reset: Tensor | None = None, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """:func:`linear_scan` in plain torch, one step after the other: its specification.

    >>> one = torch.ones(3, 1, 1)
    >>> before, last = linear_scan_reference(one, one, one[0], mask=torch.tensor([[True], [False], [True]]))
    >>> before.flatten().tolist(), last.item()
    ([1.0, 2.0, 2.0], 3.0)
    """
    a, b, state = (x.to(carry_dtype(a.dtype)) for x in (a, b, initial))
    if mask is not None:  # what padding holds must not reach a derivative, not even as 0 * NaN
        a, b = torch.where(mask[..., None], a, 0.0), torch.where(mask[..., None], b, 0.0)
    before = []
    for t in range(len(a)):
        if reset is not None:
            state = torch.where(reset[t, :, None], 0.0, state)
        before.append(state)
        new = a[t] * state + b[t]
        state = new if mask is None else torch.where(mask[t, :, None], new, state)
    return torch.stack(before) if before else a, state


def _device(x: Tensor) -> Any:
    """The module with the kernels of a tensor's device."""
    if x.is_cuda:
        from seqbatch.rnn import linear_scan_triton

        return linear_scan_triton
    from seqbatch.rnn import linear_scan_kernels

    return linear_scan_kernels


@torch.library.custom_op("seqbatch::linear_scan", mutates_args=(), device_types=("cpu", "cuda"))
def _scan(a: Tensor, b: Tensor, initial: Tensor, reset: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    found: tuple[Tensor, Tensor] = _device(a).forward(a, b, initial, reset, mask)
    return found


@torch.library.custom_op("seqbatch::linear_scan_backward", mutates_args=(), device_types=("cpu", "cuda"))
def _scan_backward(
    grad_before: Tensor, grad_last: Tensor, a: Tensor, before: Tensor, reset: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of a, b and initial."""
    found: tuple[Tensor, Tensor, Tensor] = _device(a).backward(grad_before, grad_last, a, before, reset, mask)
    return found


@_scan.register_fake
def _(a: Tensor, b: Tensor, initial: Tensor, reset: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    return a.new_empty(a.shape, dtype=initial.dtype), initial.new_empty(initial.shape)


@_scan_backward.register_fake
def _(
    grad_before: Tensor, grad_last: Tensor, a: Tensor, before: Tensor, reset: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return a.new_empty(a.shape), a.new_empty(a.shape), grad_last.new_empty(grad_last.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    a, _, _, reset, mask = inputs
    ctx.save_for_backward(a, output[0], reset, mask)


def _differentiate(ctx: Any, grad_before: Tensor, grad_last: Tensor) -> tuple[Tensor | None, ...]:
    return (*_scan_backward(grad_before, grad_last, *ctx.saved_tensors), None, None)


def _keep_twice(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[2:], output[1])


def _differentiate_twice(
    ctx: Any, grad_of_a: Tensor, grad_of_b: Tensor, grad_of_initial: Tensor
) -> tuple[Tensor | None, ...]:
    """The derivative of the derivative, with ``before`` as an input of its own.

    The backward walk is ``g <- a g + grad_before`` with grad_b = g and grad_a = g before: its derivative walks forward
    again, fed by what its outputs are weighed by.
    """
    a, before, reset, mask, grad_b = ctx.saved_tensors
    fed = grad_of_b + before * grad_of_a
    entering, last = _scan(a.to(before.dtype), fed.to(before.dtype), grad_of_initial, reset, mask)
    through_a, through_before = grad_b * entering, grad_b * grad_of_a
    if mask is not None:
        through_a, through_before = (torch.where(mask[..., None], x, 0.0) for x in (through_a, through_before))
    return entering, last, through_a.to(a.dtype), through_before.to(before.dtype), None, None


_scan.register_autograd(_differentiate, setup_context=_keep)
_scan_backward.register_autograd(_differentiate_twice, setup_context=_keep_twice)
