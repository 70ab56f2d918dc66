"""Batch statistics as PyTorch operators: ``seqbatch::batch_norm_groups``, ``seqbatch::bn_lstm`` and their backwards.

Custom operators with kernels for CPU (numba) and CUDA (Triton, torch), shapes for ``torch.compile`` and hand-written
derivatives, through the statistics. They are differentiable once.
"""

from typing import Any

import torch
from torch import Tensor

from seqbatch.rnn.reference import carry_dtype

__all__ = ["batch_norm_groups", "bn_lstm"]

Four = tuple[Tensor, Tensor, Tensor, Tensor]


def batch_norm_groups(
    x: Tensor, group: Tensor, source: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor]:
    """Batch normalization of rows by groups, as :func:`seqbatch.rnn.norm_reference.normalize` states it.

    Shapes: x (R, D), group (R,) int64, source (G,) int64, mean and var (G, D), weight and bias (D,). Computed in
    float32 at least, returned in x's dtype. No gradient flows to mean and var, given or returned.

    >>> x, zero = torch.tensor([[1.0], [3.0], [9.0]]), torch.zeros(1)
    >>> group, source = torch.tensor([0, 0, -1]), torch.tensor([0])
    >>> batch_norm_groups(x, group, source, x[:1], x[:1], zero + 1, zero, 0.0)[0].T.round().tolist()
    [[-1.0, 1.0, 0.0]]
    """
    carry, dtype = carry_dtype(x.dtype), x.dtype
    width, groups = x.shape[-1], len(source)
    for name, given, shape in (
        ("group", group, (len(x),)),
        ("mean", mean, (groups, width)),
        ("var", var, (groups, width)),
        ("weight", weight, (width,)),
        ("bias", bias, (width,)),
    ):
        if given.shape != shape:
            raise RuntimeError(f"{name} must have shape {shape}, got {tuple(given.shape)}")
    floats = [t.to(carry).contiguous() for t in (x, mean, var, weight, bias)]
    with torch.autocast(x.device.type, enabled=False):
        y, mean, var = _normalize(floats[0], group.contiguous(), source, *floats[1:], eps)
    return y.to(dtype), mean, var


def bn_lstm(
    outside: Tensor,
    inside: Tensor | None,
    weight: Tensor,
    gammas: tuple[Tensor | None, Tensor | None, Tensor | None],
    states: tuple[Tensor, Tensor],
    walk: Four,
    moments: Four,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Four]:
    """The recurrence of BN-LSTM, as :func:`seqbatch.rnn.norm_reference.bn_lstm` states it, at the machine's speed.

    Args:
        outside: (R, 4H).
        inside: (R, 4H) or None.
        weight: (4H, H).
        gammas: gamma_h (4H,), gamma_c (H,) and beta_c (H,), or None for a term that is not normalized.
        states: h0 and c0, (S, H) each.
        walk: previous (R,), and on the CPU offsets (G + 1,), runs (G,) of :class:`seqbatch.rnn.walks.Walk` and
            source (G,); all int64.
        moments: (G, 4H), (G, 4H), (G, H) and (G, H).
        eps: Added to variances.

    Returns:
        h and c, (S + R, H) each, and the moments that were used, which no gradient flows to; all in float32, or
        float64 for float64.

    >>> index, one = torch.tensor([0]), torch.ones(1, 1)
    >>> still = (torch.zeros(1, 4), torch.ones(1, 4), torch.zeros(1, 1), torch.ones(1, 1))
    >>> walk = (index, torch.tensor([0, 1]), index, index - 1)
    >>> h, c, _ = bn_lstm(torch.zeros(1, 4), None, torch.zeros(4, 1), (None,) * 3, (one, one), walk, still)
    >>> c.tolist()
    [[1.0], [0.5]]
    """
    carry = carry_dtype(outside.dtype)

    def wide(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.to(carry).contiguous()

    arguments = [wide(x) for x in (outside, inside, weight, *gammas, *states)]
    given = [wide(x) for x in moments]
    with torch.autocast(outside.device.type, enabled=False):
        h, c, _, *used = _bn_lstm(*arguments, *walk, *given, eps)
    return h, c, tuple(used)


def _device(x: Tensor) -> Any:
    """The module with the kernels of a tensor's device."""
    if x.is_cuda:
        from seqbatch.rnn import norm_cuda

        return norm_cuda
    from seqbatch.rnn import norm_cpu

    return norm_cpu


@torch.library.custom_op("seqbatch::batch_norm_groups", mutates_args=())
def _normalize(
    x: Tensor, group: Tensor, source: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    found: tuple[Tensor, Tensor, Tensor] = _device(x).normalize(x, group, source, mean, var, weight, bias, eps)
    return found


@_normalize.register_fake
def _(
    x: Tensor, group: Tensor, source: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(mean), torch.empty_like(var)


@torch.library.custom_op("seqbatch::batch_norm_groups_backward", mutates_args=())
def _normalize_backward(
    grad: Tensor, x: Tensor, group: Tensor, source: Tensor, mean: Tensor, var: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    found: tuple[Tensor, Tensor, Tensor] = _device(x).normalize_backward(grad, x, group, source, mean, var, weight, eps)
    return found


@_normalize_backward.register_fake
def _(
    grad: Tensor, x: Tensor, group: Tensor, source: Tensor, mean: Tensor, var: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, group, source, _, _, weight, _, ctx.eps = inputs
    _, mean, var = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(mean, var)
    ctx.save_for_backward(x, group, source, mean, var, weight)


def _differentiate(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 8
    x, weight, bias = _normalize_backward(grad.contiguous(), *ctx.saved_tensors, ctx.eps)
    return x, None, None, None, None, weight, bias, None


_normalize.register_autograd(_differentiate, setup_context=_keep)


_WEIGHTS = "Tensor weight, Tensor? gamma_h, Tensor? gamma_c, Tensor? beta_c"
_WALK = "Tensor previous, Tensor offsets, Tensor runs, Tensor source"
_MOMENTS = "Tensor mean_h, Tensor var_h, Tensor mean_c, Tensor var_c, float eps"


def _run(*arguments: Any) -> tuple[Tensor, ...]:
    outside, inside, weight, *rest, eps = arguments
    gammas, states, walk, moments = tuple(rest[:3]), tuple(rest[3:5]), tuple(rest[5:9]), tuple(rest[9:13])
    found: tuple[Tensor, ...] = _device(outside).bn_lstm(outside, inside, weight, gammas, states, walk, moments, eps)
    return found


def _run_backward(*arguments: Any) -> list[Tensor]:
    grad_h, grad_c, has_inside, weight, *rest, eps = arguments
    gammas, tables, saved, walk, moments = (tuple(rest[i:j]) for i, j in ((0, 3), (3, 5), (5, 7), (7, 11), (11, 15)))
    grads = _device(weight).bn_lstm_backward((grad_h, grad_c), weight, gammas, tables, saved, walk, moments, eps)
    outside, inside, weight, *sums, h0, c0 = grads
    present = [s for s, gamma in zip(sums, gammas, strict=True) if gamma is not None]
    return [outside, *([inside] if has_inside else []), weight, *present, h0, c0]


_bn_lstm = torch.library.custom_op(
    "seqbatch::bn_lstm",
    _run,
    mutates_args=(),
    schema=f"(Tensor outside, Tensor? inside, {_WEIGHTS}, Tensor h0, Tensor c0, {_WALK}, {_MOMENTS}) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
_bn_lstm_backward = torch.library.custom_op(
    "seqbatch::bn_lstm_backward",
    _run_backward,
    mutates_args=(),
    schema=f"(Tensor grad_h, Tensor grad_c, bool has_inside, {_WEIGHTS}, Tensor h, Tensor c, Tensor a, Tensor outside, "
    f"{_WALK}, {_MOMENTS}) -> Tensor[]",
)


@_bn_lstm.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    outside, weight, h0, moments = arguments[0], arguments[2], arguments[6], arguments[12:16]
    table = outside.new_empty(h0.shape[0] + outside.shape[0], weight.shape[1])
    likes = (table, table, outside, *moments)
    return tuple(torch.empty_like(x) for x in likes)


@_bn_lstm_backward.register_fake
def _(*arguments: Any) -> list[Tensor]:
    _, _, has_inside, weight, *gammas = arguments[:7]
    table, a = arguments[7], arguments[9]
    first = table.new_empty(table.shape[0] - a.shape[0], table.shape[1])
    likes = [a, *([a] if has_inside else []), weight, *(g for g in gammas if g is not None), first, first]
    return [torch.empty_like(x) for x in likes]


def _keep_walk(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    outside, inside, weight, *gammas = inputs[:6]
    h, c, a, *moments = output
    ctx.set_materialize_grads(False)  # zeros for a would be as large
    ctx.mark_non_differentiable(a, *moments)
    ctx.has_inside, ctx.eps = inside is not None, inputs[-1]
    ctx.save_for_backward(weight, *gammas, h, c, a, outside, *inputs[8:12], *moments)


def _differentiate_walk(ctx: Any, grad_h: Tensor | None, grad_c: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    given = [torch.zeros_like(saved[4]) if g is None else g.contiguous() for g in (grad_h, grad_c)]
    grads = iter(_bn_lstm_backward(*given, ctx.has_inside, *saved, ctx.eps))
    wanted = (True, ctx.has_inside, True, *(g is not None for g in saved[1:4]), True, True)
    return (*(next(grads) if want else None for want in wanted), *[None] * 9)


_bn_lstm.register_autograd(_differentiate_walk, setup_context=_keep_walk)
