"""The SRU recurrence as PyTorch operators: ``seqbatch::sru_scan`` and its backward.

Both are custom operators with a kernel for CPU (numba) and one for CUDA (Triton), shapes for
``torch.compile``, and a hand-written derivative; the backward is differentiable itself, through the
reference. Kernels are imported, and compiled, when they are first called.

Memory kept for backward, per step, lane and column: u (k values), the skip (one value, the layer's
input itself) and c (one value of at least float32). Gates are computed again. Without gradients c is not written.
"""

import math
from typing import Any

import torch
from torch import Tensor

from seqbatch.rnn import reference
from seqbatch.rnn.checks import Scan, check_no_tangent, check_offsets, check_scan

__all__ = ["sru_scan"]

_ARGUMENTS = (
    "Tensor u, Tensor? skip, Tensor? weight_c, Tensor? bias, Tensor initial, Tensor? dropout, "
    "Tensor? reset, Tensor? mask, Tensor? cu_seqlens, "
    "str activation, bool bidirectional, float scale, bool dropout_inside, bool keep"
)
_DIFFERENTIABLE = 5  # the first five arguments have a gradient


def sru_scan(
    u: Tensor,
    skip: Tensor | None,
    weight_c: Tensor | None,
    bias: Tensor | None,
    initial: Tensor,
    *,
    dropout: Tensor | None = None,
    reset: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    activation: str = "identity",
    bidirectional: bool = False,
    scale: float = 1.0,
    dropout_inside: bool = False,
) -> tuple[Tensor, Tensor]:
    """The recurrence of SRU at the machine's speed; differentiable, and twice.

    Arguments are those of :func:`seqbatch.rnn.reference.sru_scan`, which states the equations (Lei et
    al., arXiv 1709.02755). Shapes: u (T, B, k, H) or flat (S, k, H), skip and h without the k axis,
    initial and last (B, H) or (N, H), reset and mask (T, B) bool, cu_seqlens (N + 1,).

    Returns:
        h in u's dtype, and the last state in float32 (float64 for float64).

    Raises:
        RuntimeError: A shape does not fit, or tensors lie on different devices.
        ValueError: A dtype or a flag is not allowed, or cu_seqlens is no list of offsets.

    >>> u, zero = torch.zeros(3, 1, 3, 2), torch.zeros(1, 2)
    >>> u[:, :, 0] = 1.0  # z = 1, f = r = 1/2
    >>> sru_scan(u, None, None, None, zero)[1].tolist()
    [[0.875, 0.875]]
    >>> reset = torch.tensor([[False], [False], [True]])
    >>> sru_scan(u, None, None, None, zero, reset=reset)[1].tolist()
    [[0.5, 0.5]]
    """
    flags = (dropout, reset, mask, cu_seqlens)
    scan = Scan(u, skip, weight_c, bias, initial, *flags, activation, bidirectional, float(scale), dropout_inside)
    learning = any(x is not None and x.requires_grad for x in (u, skip, weight_c, bias, initial))
    scan = scan._replace(keep=learning and torch.is_grad_enabled())
    check_scan(scan)
    check_no_tangent("sru_scan", (u, skip, weight_c, bias, initial))
    h, _, last = _forward(*scan._replace(initial=initial.to(reference.carry_dtype(u.dtype))))
    return h, last


def _forward_cpu(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    from seqbatch.rnn.cpu import forward

    return forward(_checked(Scan(*arguments)))


def _forward_cuda(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    from seqbatch.rnn.cuda import forward

    return forward(_checked(Scan(*arguments)))


def _backward_cpu(grad_h: Tensor, grad_last: Tensor, c: Tensor, *arguments: Any) -> list[Tensor]:
    from seqbatch.rnn.cpu import backward

    return backward(grad_h, grad_last, c, Scan(*arguments))


def _backward_cuda(grad_h: Tensor, grad_last: Tensor, c: Tensor, *arguments: Any) -> list[Tensor]:
    from seqbatch.rnn.cuda import backward

    return backward(grad_h, grad_last, c, Scan(*arguments))


def _checked(scan: Scan) -> Scan:
    """Offsets are checked here, where they have values even under ``torch.compile``."""
    if scan.cu_seqlens is not None:
        check_offsets(scan.cu_seqlens, len(scan.u))
    return scan


_forward = torch.library.custom_op(
    "seqbatch::sru_scan",
    _forward_cpu,
    mutates_args=(),
    device_types="cpu",
    schema=f"({_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
)
_backward = torch.library.custom_op(
    "seqbatch::sru_scan_backward",
    _backward_cpu,
    mutates_args=(),
    device_types="cpu",
    schema=f"(Tensor grad_h, Tensor grad_last, Tensor c, {_ARGUMENTS}) -> Tensor[]",
)
_forward.register_kernel("cuda", _forward_cuda)
_backward.register_kernel("cuda", _backward_cuda)


@_forward.register_fake
def _forward_shapes(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    u, initial = arguments[0], arguments[4]
    shape = (*u.shape[:-2], u.shape[-1])
    return u.new_empty(shape), initial.new_empty(shape if arguments[-1] else (0,)), initial.new_empty(initial.shape)


@_backward.register_fake
def _backward_shapes(grad_h: Tensor, grad_last: Tensor, c: Tensor, *arguments: Any) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in arguments[:_DIFFERENTIABLE] if x is not None]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    h, c, _ = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(c)
    ctx.settings = inputs[9:]
    ctx.save_for_backward(*inputs[:9], c)
    ctx.shape = h.shape, h.dtype


def _differentiate(ctx: Any, grad_h: Tensor | None, _: Any, grad_last: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, c = ctx.saved_tensors
    if c.numel() != math.prod(ctx.shape[0]):  # not kept: under vmap no input says that it will be differentiated
        c = _forward(*tensors, *ctx.settings[:-1], True)[1]
    if grad_h is None:
        grad_h = tensors[0].new_zeros(ctx.shape[0], dtype=ctx.shape[1])
    if grad_last is None:
        grad_last = torch.zeros_like(tensors[4])
    grads = iter(_backward(grad_h, grad_last, c, *tensors, *ctx.settings))
    found = [None if x is None else next(grads) for x in tensors[:_DIFFERENTIABLE]]
    return (*found, *[None] * (len(Scan._fields) - _DIFFERENTIABLE))


def _keep_twice(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.settings = inputs[12:]
    ctx.save_for_backward(*inputs[:12])


def _differentiate_twice(ctx: Any, grads: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    """The derivative of the derivative: differentiate the reference twice.

    c is a function of the other inputs, which the reference follows itself: its own gradient is None.
    """
    grad_h, grad_last, _, *tensors = ctx.saved_tensors
    with torch.enable_grad():
        outer = [None if x is None else x.detach().requires_grad_() for x in (grad_h, grad_last)]
        inner = [None if x is None else x.detach().requires_grad_() for x in tensors[:_DIFFERENTIABLE]]
        given = [x for x in inner if x is not None]
        h, _, last = reference.sru_scan(*inner, *tensors[_DIFFERENTIABLE:], *ctx.settings[:-1])  # type: ignore[arg-type]
        first = torch.autograd.grad((h, last), given, outer, create_graph=True, materialize_grads=True)
        pairs = [(x, g) for x, g in zip(first, grads, strict=True) if g is not None]
        wanted = [*outer, *given]
        second = torch.autograd.grad([x for x, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True)
    found = iter(second[2:])
    inner_grads = [None if x is None else next(found) for x in inner]
    return (second[0], second[1], None, *inner_grads, *[None] * (len(Scan._fields) - _DIFFERENTIABLE))


_forward.register_autograd(_differentiate, setup_context=_keep)
_backward.register_autograd(_differentiate_twice, setup_context=_keep_twice)
