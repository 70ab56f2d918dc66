"""Batch statistics and the BN-LSTM recurrence on CPU: one matrix product and one fused pass for each group."""

from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from seqbatch.rnn import bnlstm_kernels, norm_kernels
from seqbatch.rnn.threads import Span, run_blocks

__all__ = ["bn_lstm", "bn_lstm_backward", "normalize", "normalize_backward"]

Array = NDArray[Any]


def normalize(
    x: Tensor, group: Tensor, source: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`seqbatch.rnn.norm_reference.normalize`, of contiguous rows in float32 or float64."""
    y, mean, var = torch.empty_like(x), mean.clone(), var.clone()
    inputs = (*_arrays((x, group, source)), _counts(group, source), *_arrays((mean, var, weight, bias)))
    (output,) = _arrays((y,))

    def block(_: Span, columns: Span, *__: object) -> None:
        norm_kernels.normalize(*inputs, eps, columns, output)

    run_blocks(block, 1, x.shape[1], 1, x.numel(), _share(x.shape[1]))
    return y, mean, var


def normalize_backward(
    grad: Tensor, x: Tensor, group: Tensor, source: Tensor, mean: Tensor, var: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, weight and bias."""
    outputs = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)
    arrays = _arrays(outputs)
    inputs = (*_arrays((grad, x, group, source)), _counts(group, source), *_arrays((mean, var, weight)))

    def block(_: Span, columns: Span, *__: object) -> None:
        norm_kernels.normalize_backward(*inputs, eps, columns, *arrays)

    run_blocks(block, 1, x.shape[1], 1, x.numel(), _share(x.shape[1]))
    return outputs


def _share(width: int) -> int:
    """Columns for each thread, whole cache lines; a result does not depend on their number."""
    return max(-(-width // (16 * torch.get_num_threads())) * 16, 1)


def _counts(group: Tensor, source: Tensor) -> Array:
    """Rows of each group; the kernels rely on there being no other groups."""
    if len(group) and not -1 <= int(group.min()) <= int(group.max()) < len(source):
        raise ValueError(f"groups must lie in -1..{len(source) - 1}, got {int(group.min())}..{int(group.max())}")
    counts: Array = np.bincount(group.numpy() + 1, minlength=len(source) + 1)[1:]
    return counts


def bn_lstm(
    outside: Tensor,
    inside: Tensor | None,
    weight: Tensor,
    gammas: tuple[Tensor | None, Tensor | None, Tensor | None],
    states: tuple[Tensor, Tensor],
    walk: tuple[Tensor, Tensor, Tensor, Tensor],
    moments: tuple[Tensor, Tensor, Tensor, Tensor],
    eps: float,
) -> tuple[Tensor, ...]:
    """:func:`seqbatch.rnn.norm_reference.bn_lstm`, and what its derivative needs besides: W h + inside.

    ``walk`` holds previous, offsets, runs and source.
    """
    previous, offsets, runs, source = walk
    entering, rows, width = len(states[0]), len(outside), weight.shape[1]
    h, c = (torch.empty(entering + rows, width, dtype=outside.dtype) for _ in range(2))
    h[:entering], c[:entering] = states
    a = torch.empty_like(outside) if inside is None else inside.clone()
    share = _share(width)
    used, transposed = tuple(x.clone() for x in moments), weight.t().contiguous()
    inputs = (*_arrays((a, outside, previous)), _weights(gammas, outside), _arrays(used))
    outputs = _arrays((c, h))
    for where, run in _groups(offsets, runs, source):
        lo, hi = where[:2]
        before = h[run : run + hi - lo] if run >= 0 else h.index_select(0, previous[lo:hi])
        part = a[lo:hi]
        if inside is None:
            torch.mm(before, transposed, out=part)
        else:
            part.addmm_(before, transposed)

        def block(_: Span, columns: Span, *__: object, where: Any = where) -> None:
            bnlstm_kernels.step_forward(*inputs, where, entering, eps, columns, *outputs)

        run_blocks(block, 1, width, 1, 4 * (hi - lo) * width, share)
    return h, c, a, *used


def bn_lstm_backward(
    grads: tuple[Tensor, Tensor],
    weight: Tensor,
    gammas: tuple[Tensor | None, Tensor | None, Tensor | None],
    tables: tuple[Tensor, Tensor],
    saved: tuple[Tensor, Tensor],
    walk: tuple[Tensor, Tensor, Tensor, Tensor],
    moments: tuple[Tensor, Tensor, Tensor, Tensor],
    eps: float,
) -> tuple[Tensor, ...]:
    """The gradients of outside, inside, weight, gamma_h, gamma_c, beta_c, h0 and c0."""
    previous, offsets, runs, source = walk
    (h, c), (a, outside) = tables, saved
    width, share = weight.shape[1], _share(weight.shape[1])
    entering = len(h) - len(a)
    grad_h, grad_c = (x.clone() for x in grads)
    grad_outside = torch.empty_like(a)
    grad_a = torch.empty_like(a) if gammas[0] is not None else grad_outside
    sums = tuple(torch.zeros(n * width, dtype=a.dtype) for n in (4, 1, 1, 4))
    owed = np.zeros((2, 4 * width), sums[0].numpy().dtype), np.zeros((2, width), sums[0].numpy().dtype)
    inputs = (*_arrays((a, outside, c, previous)), _weights(gammas, a), _arrays(moments))
    outputs = (owed, _arrays(sums), *_arrays((grad_h, grad_c, grad_outside, grad_a)))
    for where, run in reversed(_groups(offsets, runs, source)):
        lo, hi = where[:2]

        def block(_: Span, columns: Span, *__: object, where: Any = where) -> None:
            bnlstm_kernels.step_backward(*inputs, where, entering, eps, columns, *outputs)

        run_blocks(block, 1, width, 1, 4 * (hi - lo) * width, share)
        if run >= 0:
            grad_h[run : run + hi - lo].addmm_(grad_a[lo:hi], weight)
        else:
            grad_h.index_add_(0, previous[lo:hi], grad_a[lo:hi] @ weight)
    grad_weight = grad_a.t() @ h.index_select(0, previous)
    first = grad_h[:entering].clone(), grad_c[:entering].clone()
    return grad_outside, grad_a, grad_weight, *sums[:3], *first


def _groups(offsets: Tensor, runs: Tensor, source: Tensor) -> list[tuple[tuple[int, int, int, int], int]]:
    """First row, end, number and source of each group, and where its states before stand in line."""
    found = zip(pairwise(offsets.tolist()), runs.tolist(), source.tolist(), strict=True)
    return [((lo, hi, g, s), run) for g, ((lo, hi), run, s) in enumerate(found)]


def _arrays(tensors: tuple[Tensor, ...]) -> tuple[Array, ...]:
    """Here and not in the threads, in which gradients are recorded."""
    return tuple(x.numpy() for x in tensors)


def _weights(gammas: tuple[Tensor | None, ...], like: Tensor) -> tuple[Array, ...]:
    """What is absent has no elements."""
    return tuple((like.new_empty(0) if x is None else x).numpy() for x in gammas)
