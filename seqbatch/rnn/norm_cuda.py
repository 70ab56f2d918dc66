"""Batch statistics on CUDA: normalization in torch, the BN-LSTM step in one Triton kernel beside the matrix product."""

from itertools import pairwise
from typing import Any

import torch
import triton
from torch import Tensor

from seqbatch.rnn import norm_triton
from seqbatch.rnn.cuda import on_device

__all__ = ["bn_lstm", "bn_lstm_backward", "normalize", "normalize_backward"]

BLOCK, ROWS = 16, 64  # units and rows of one tile: 64-byte reads, and a tile's four gates fit in registers


def normalize(
    x: Tensor, group: Tensor, source: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`seqbatch.rnn.norm_reference.normalize`; sums are taken in a fixed order."""
    by_group = _ByGroup(group, source)
    counts = by_group.counts.to(x.dtype).clamp(min=1)[:, None]
    own_mean = by_group.sums(x) / counts
    own_var = by_group.sums((x - own_mean[by_group.safe]).square()) / counts
    mean = torch.where(by_group.given, mean, own_mean[by_group.at])
    var = torch.where(by_group.given, var, own_var[by_group.at])
    y = (x - mean[by_group.safe]) * (weight * torch.rsqrt(var + eps))[by_group.safe] + bias
    return y.masked_fill_((group < 0)[:, None], 0), mean, var


def normalize_backward(
    grad: Tensor, x: Tensor, group: Tensor, source: Tensor, mean: Tensor, var: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, weight and bias."""
    by_group = _ByGroup(group, source)
    inv = torch.rsqrt(var + eps)
    normal = (x - mean[by_group.safe]) * inv[by_group.safe]
    plain, along = by_group.sums(grad), by_group.sums(torch.where((group < 0)[:, None], 0, grad * normal))
    grad_weight, grad_bias = along.sum(0), plain.sum(0)
    counts = by_group.counts.to(x.dtype).clamp(min=1)[:, None]
    plain, along = (by_group.lent(part) / counts for part in (plain, along))
    inner = grad - plain[by_group.safe] - normal * along[by_group.safe]
    flat = (var <= min(eps * eps, 1e-10)) & by_group.own[:, None]  # rows that are equal: see the reference
    grad_x = (weight * torch.where(flat, 0, inv))[by_group.safe] * inner
    return grad_x.masked_fill_((group < 0)[:, None], 0), grad_weight, grad_bias


class _ByGroup:
    """Sums over groups in the order of rows, without atomic additions."""

    def __init__(self, group: Tensor, source: Tensor) -> None:
        groups = len(source)
        self.order = group.argsort(stable=True)
        all_counts = torch.bincount(group + 1, minlength=groups + 1)
        self.offsets, self.counts = all_counts.cumsum(0), all_counts[1:]
        self.safe = group.clamp(min=0)
        self.at, self.given = source.clamp(min=0), (source < 0)[:, None]
        self.source, self.own = source, source == torch.arange(groups, device=source.device)

    def sums(self, rows: Tensor) -> Tensor:
        """(G, D): the sum of each group's rows."""
        return torch.segment_reduce(rows[self.order], "sum", offsets=self.offsets, axis=0, initial=0)

    def lent(self, sums: Tensor) -> Tensor:
        """The sums of each group with its own statistics and of those that borrow them; 0 for others."""
        lender = torch.where(self.source < 0, len(sums), self.source)
        total: Tensor = torch.zeros_like(torch.cat([sums, sums[:1]])).index_add_(0, lender, sums)[:-1]
        return torch.where(self.own[:, None], total, 0)


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
    """:func:`seqbatch.rnn.norm_reference.bn_lstm`, and what its derivative needs besides: W h + inside."""
    previous, offsets, runs, source = walk
    entering, rows, width = len(states[0]), len(outside), weight.shape[1]
    h, c = (outside.new_empty(entering + rows, width) for _ in range(2))
    h[:entering], c[:entering] = states
    a = torch.empty_like(outside) if inside is None else inside.clone()
    used, transposed = tuple(x.clone() for x in moments), weight.t()
    sources = source.to(outside.device)
    pointers = (a, outside, previous, sources, *_present(gammas, a), *_present(used, a), c, h)
    grid = (triton.cdiv(width, BLOCK),)
    constants = {"OF_H": gammas[0] is not None, "OF_C": gammas[1] is not None, "ROWS": ROWS, "BLOCK": BLOCK}
    with on_device(outside):
        for g, ((lo, hi), run) in enumerate(zip(pairwise(offsets.tolist()), runs.tolist(), strict=True)):
            before = h[run : run + hi - lo] if run >= 0 else h.index_select(0, previous[lo:hi])
            if inside is None:
                torch.mm(before, transposed, out=a[lo:hi])
            else:
                a[lo:hi].addmm_(before, transposed)
            norm_triton.step_forward[grid](*pointers, lo, hi, g, entering, width, eps, **constants)
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
    width = weight.shape[1]
    entering = len(h) - len(a)
    grad_h, grad_c = (x.clone() for x in grads)
    grad_outside = torch.empty_like(a)
    grad_a = torch.empty_like(a) if gammas[0] is not None else grad_outside
    owed = a.new_zeros(2, 4 * width), a.new_zeros(2, width)
    sums = tuple(a.new_zeros(n * width) for n in (4, 1, 1))
    sources = source.to(a.device)
    pointers = (a, outside, c, previous, sources, *_present(gammas, a), *_present(moments, a))
    outputs = (*owed, *sums, grad_h, grad_c, grad_outside, grad_a)
    grid = (triton.cdiv(width, BLOCK),)
    constants = {"OF_H": gammas[0] is not None, "OF_C": gammas[1] is not None, "ROWS": ROWS, "BLOCK": BLOCK}
    groups = list(enumerate(zip(pairwise(offsets.tolist()), runs.tolist(), strict=True)))
    with on_device(a):
        for g, ((lo, hi), run) in reversed(groups):
            norm_triton.step_backward[grid](*pointers, *outputs, lo, hi, g, entering, width, eps, **constants)
            if run >= 0:
                grad_h[run : run + hi - lo].addmm_(grad_a[lo:hi], weight)
            else:
                grad_h[previous[lo:hi]] += grad_a[lo:hi] @ weight  # rows of a group have different predecessors
    grad_weight = grad_a.t() @ h.index_select(0, previous)
    return grad_outside, grad_a, grad_weight, *sums, grad_h[:entering].clone(), grad_c[:entering].clone()


def _present(tensors: tuple[Tensor | None, ...], like: Tensor) -> tuple[Any, ...]:
    """A pointer that is not read for what is absent."""
    return tuple(like if x is None or not x.numel() else x for x in tensors)
