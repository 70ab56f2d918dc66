"""The linear recurrence on CPU: numba.

A walk works on some lanes and some columns and touches nothing else, so that walks run side by side; interpreter lock
released. The state is carried in the rows of the output itself: each is the next one's input, still in cache.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from seqbatch.rnn.activations import compiled_fast
from seqbatch.rnn.threads import Span, run_blocks

__all__ = ["backward", "forward"]

Array = NDArray[Any]
Flags = NDArray[np.bool_]


def forward(a: Tensor, b: Tensor, initial: Tensor, reset: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """:func:`seqbatch.rnn.linear_scan.linear_scan_reference`; initial's dtype is the carried one.

    >>> two = torch.full((3, 1, 1), 2.0)
    >>> forward(two, two, two[0], None, None)[0].flatten().tolist()
    [2.0, 6.0, 14.0]
    """
    carry = initial.dtype
    before, last = torch.empty(a.shape, dtype=carry), torch.empty(initial.shape, dtype=carry)
    arrays = (*(_array(x, carry) for x in (a, b, initial)), _flags(reset), _flags(mask), before.numpy(), last.numpy())

    def block(lanes: Span, columns: Span, *_: object) -> None:
        _walk(*arrays, lanes, columns)

    run_blocks(block, a.shape[1], a.shape[2], 1, a.numel())
    return before, last


def backward(
    grad_before: Tensor, grad_last: Tensor, a: Tensor, before: Tensor, reset: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of a, b and initial.

    >>> two = torch.full((3, 1, 1), 2.0)
    >>> backward(0 * two, two[0], two, two, None, None)[1].flatten().tolist()
    [8.0, 4.0, 2.0]
    """
    carry = before.dtype
    grad_a, grad_b = (torch.empty(a.shape, dtype=carry) for _ in range(2))
    grad_initial = torch.empty(grad_last.shape, dtype=carry)
    inputs = (*(_array(x, carry) for x in (grad_before, grad_last, a, before)), _flags(reset), _flags(mask))
    outputs = (grad_a.numpy(), grad_b.numpy(), grad_initial.numpy())

    def block(lanes: Span, columns: Span, *_: object) -> None:
        _walk_back(*inputs, *outputs, lanes, columns)

    run_blocks(block, a.shape[1], a.shape[2], 1, a.numel())
    return grad_a.to(a.dtype), grad_b.to(a.dtype), grad_initial


def _array(x: Tensor, dtype: torch.dtype) -> Array:
    array: Array = x.detach().to(dtype).contiguous().numpy()
    return array


def _flags(flags: Tensor | None) -> Flags:
    """What is absent has no elements."""
    return np.empty((0, 0), np.bool_) if flags is None else _array(flags, torch.bool)


@compiled_fast
def _walk(
    a: Array,
    b: Array,
    initial: Array,
    reset: Flags,
    mask: Flags,
    before: Array,
    last: Array,
    lanes: tuple[int, int],
    columns: tuple[int, int],
) -> None:
    """Fill before (T, B, H) and last (B, H) for some lanes and columns."""
    steps, (lo, hi) = len(a), columns
    for n in range(lanes[0], lanes[1]):
        new = before[0, n, lo:hi] if steps else last[n, lo:hi]
        new[:] = initial[n, lo:hi]
        for t in range(steps):
            state = before[t, n, lo:hi]
            if len(reset) and reset[t, n]:
                state[:] = 0
            new = before[t + 1, n, lo:hi] if t + 1 < steps else last[n, lo:hi]
            if len(mask) and not mask[t, n]:
                new[:] = state
                continue
            factor, term = a[t, n, lo:hi], b[t, n, lo:hi]
            for j in range(hi - lo):
                new[j] = factor[j] * state[j] + term[j]


@compiled_fast
def _walk_back(
    grad_before: Array,
    grad_last: Array,
    a: Array,
    before: Array,
    reset: Flags,
    mask: Flags,
    grad_a: Array,
    grad_b: Array,
    grad_initial: Array,
    lanes: tuple[int, int],
    columns: tuple[int, int],
) -> None:
    """Fill grad_a, grad_b (T, B, H) and grad_initial (B, H), which carries the state's gradient."""
    lo, hi = columns
    for n in range(lanes[0], lanes[1]):
        carry = grad_initial[n, lo:hi]
        carry[:] = grad_last[n, lo:hi]
        for t in range(len(a) - 1, -1, -1):
            d_a, d_b, d_before = grad_a[t, n, lo:hi], grad_b[t, n, lo:hi], grad_before[t, n, lo:hi]
            if len(mask) and not mask[t, n]:
                d_a[:] = 0
                d_b[:] = 0
                for j in range(hi - lo):
                    carry[j] += d_before[j]
            else:
                factor, state = a[t, n, lo:hi], before[t, n, lo:hi]
                d_b[:] = carry
                for j in range(hi - lo):
                    d_a[j] = carry[j] * state[j]
                for j in range(hi - lo):
                    carry[j] = carry[j] * factor[j] + d_before[j]
            if len(reset) and reset[t, n]:
                carry[:] = 0
