"""What callers may pass: the arguments of a scan and of a layer, and errors that say what to do.

Errors have the class that ``torch.nn.LSTM`` raises where it has one: RuntimeError for sizes and
devices, ValueError for dtypes and numbers of dimensions.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from seqbatch.rnn.reference import ACTIVATIONS

__all__ = ["Scan", "check_flags", "check_linear", "check_no_tangent", "check_offsets", "check_scan"]


class Scan(NamedTuple):
    """The arguments of :func:`seqbatch.rnn.reference.sru_scan`, in its order, and whether c is wanted.

    >>> Scan(torch.zeros(2, 1, 3, 4), None, None, None, torch.zeros(1, 4)).activation
    'identity'
    """

    u: Tensor
    skip: Tensor | None
    weight_c: Tensor | None
    bias: Tensor | None
    initial: Tensor
    dropout: Tensor | None = None
    reset: Tensor | None = None
    mask: Tensor | None = None
    cu_seqlens: Tensor | None = None
    activation: str = "identity"
    bidirectional: bool = False
    scale: float = 1.0
    dropout_inside: bool = False
    keep: bool = True  # the states, which only a backward needs


def check_scan(scan: Scan) -> None:
    """Refuse shapes, dtypes and devices that do not fit together.

    >>> check_scan(Scan(torch.zeros(2, 1, 5, 4), None, None, None, torch.zeros(1, 4)))
    Traceback (most recent call last):
        ...
    RuntimeError: u must be (T, B, k, H), or (S, k, H) with cu_seqlens, with k = 3 or 4 planes, got (2, 1, 5, 4)
    """
    u, flat = scan.u, scan.cu_seqlens is not None
    if u.dim() != 4 - flat or u.shape[-2] not in (3, 4):
        raise RuntimeError(
            f"u must be (T, B, k, H), or (S, k, H) with cu_seqlens, with k = 3 or 4 planes, got {tuple(u.shape)}"
        )
    if not u.is_floating_point():
        raise ValueError(f"u must have a floating dtype, got {u.dtype}")
    if scan.activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {scan.activation!r}")
    columns = u.shape[-1]
    if scan.bidirectional and columns % 2:
        raise RuntimeError(f"u must have an even number of columns for two directions, got {columns}")
    if u.shape[-2] == 4 and scan.skip is not None:
        raise RuntimeError("skip must be None when u holds four planes: the fourth is the skip")
    check_flags(u, scan.reset, scan.mask, scan.cu_seqlens)
    lanes = scan.cu_seqlens.shape[0] - 1 if scan.cu_seqlens is not None else u.shape[1]
    _check_shape("skip", scan.skip, (*u.shape[:-2], columns), u)
    _check_shape("weight_c", scan.weight_c, (2, columns), u)
    _check_shape("bias", scan.bias, (2, columns), u)
    _check_shape("initial", scan.initial, (lanes, columns), u)
    _check_shape("dropout", scan.dropout, (lanes, columns), u)
    if scan.dropout is not None and scan.dropout.requires_grad:
        raise ValueError("dropout is a mask, which no gradient flows to: pass dropout.detach()")


def check_linear(a: Tensor, b: Tensor, initial: Tensor, reset: Tensor | None, mask: Tensor | None) -> None:
    """Refuse what :func:`seqbatch.rnn.linear_scan.linear_scan` does not take.

    >>> check_linear(torch.zeros(5, 2, 3), torch.zeros(5, 2, 3), torch.zeros(3), None, None)
    Traceback (most recent call last):
        ...
    RuntimeError: initial must have shape (2, 3), got (3,)
    """
    for name, given, shape in (("a", a, "(T, B, H)"), ("b", b, "(T, B, H)"), ("initial", initial, "(B, H)")):
        if not isinstance(given, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(given).__name__}: expand it to {shape}")
    if a.dim() != 3:
        raise RuntimeError(f"a must be (T, B, H), got {tuple(a.shape)}")
    if not a.is_floating_point():
        raise ValueError(f"a must have a floating dtype, got {a.dtype}")
    _check_shape("b", b, tuple(a.shape), a)
    if b.dtype != a.dtype:
        raise ValueError(f"b must have a's dtype, {a.dtype}, got {b.dtype}; convert it: b.to(a.dtype)")
    _check_shape("initial", initial, tuple(a.shape[1:]), a)
    check_flags(a, reset, mask, None)


def check_no_tangent(name: str, tensors: Iterable[Tensor | None]) -> None:
    """Refuse forward mode, in which torch takes the derivative of a custom operator for 0.

    >>> check_no_tangent("sru_scan", (torch.zeros(2), None))
    """
    if forward_ad._current_level >= 0 and any(_tangent(x) for x in tensors):
        raise RuntimeError(
            f"{name} has no forward-mode derivative (torch's custom operators would take it for 0): use reverse mode, "
            "torch.autograd.grad or backward"
        )


def _tangent(x: Tensor | None) -> bool:
    return x is not None and forward_ad.unpack_dual(x).tangent is not None  # type: ignore[no-untyped-call]


def check_flags(rows: Tensor, reset: Tensor | None, mask: Tensor | None, cu_seqlens: Tensor | None) -> None:
    """Refuse flags that do not fit rows of shape (T, B, ...), or (S, ...) with cu_seqlens.

    >>> check_flags(torch.zeros(5, 2, 3), torch.zeros(2, 5, dtype=torch.bool), None, None)
    Traceback (most recent call last):
        ...
    RuntimeError: reset must have shape (5, 2), one flag for each step and lane, got (2, 5)
    """
    for name, given in (("reset", reset), ("mask", mask), ("cu_seqlens", cu_seqlens)):
        if given is not None and not isinstance(given, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(given).__name__}: torch.as_tensor({name})")
    if cu_seqlens is not None:
        if reset is not None or mask is not None:
            raise ValueError(
                f"{'reset' if mask is None else 'mask'} and cu_seqlens exclude each other: "
                "in the flat form every sequence starts afresh and no row is padding"
            )
        if cu_seqlens.dim() != 1 or not len(cu_seqlens):
            raise RuntimeError(f"cu_seqlens must be (N + 1,) offsets, got shape {tuple(cu_seqlens.shape)}")
        if cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"cu_seqlens must be int32 or int64, got {cu_seqlens.dtype}")
        _check_device("cu_seqlens", cu_seqlens, rows)
    for name, flags in (("reset", reset), ("mask", mask)):
        if flags is not None:
            if flags.dtype != torch.bool:
                raise ValueError(f"{name} must be bool, got {flags.dtype}; convert it: {name}.bool()")
            shape = rows.shape[:-1][:2]
            if flags.shape != shape:
                raise RuntimeError(
                    f"{name} must have shape {tuple(shape)}, one flag for each step and lane, got {tuple(flags.shape)}"
                )
            _check_device(name, flags, rows)


def check_offsets(cu_seqlens: Tensor, tokens: int) -> None:
    """Refuse offsets that do not cut ``tokens`` rows; on CUDA the device checks, without a wait.

    >>> check_offsets(torch.tensor([0, 3, 2, 5]), 5)
    Traceback (most recent call last):
        ...
    ValueError: cu_seqlens must not decrease, got 2 after 3 at position 2
    """
    if cu_seqlens.is_cuda:
        good = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == tokens) & (cu_seqlens.diff() >= 0).all()
        torch._assert_async(good, f"cu_seqlens must start at 0, end at {tokens} and not decrease")
        return
    first, final = int(cu_seqlens[0]), int(cu_seqlens[-1])
    if first != 0:
        raise ValueError(f"cu_seqlens must start at 0, got {first}")
    if final != tokens:
        raise ValueError(f"cu_seqlens must end at the number of rows, {tokens}, got {final}")
    falls = (cu_seqlens.diff() < 0).nonzero()
    if len(falls):
        at = int(falls[0]) + 1
        raise ValueError(
            f"cu_seqlens must not decrease, got {int(cu_seqlens[at])} after {int(cu_seqlens[at - 1])} at position {at}"
        )


def _check_shape(name: str, tensor: Tensor | None, shape: tuple[int, ...], like: Tensor) -> None:
    if tensor is None:
        return
    if tensor.shape != shape:
        raise RuntimeError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
    if not tensor.is_floating_point():
        raise ValueError(f"{name} must have a floating dtype, got {tensor.dtype}")
    _check_device(name, tensor, like)


def _check_device(name: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.device != like.device:
        raise RuntimeError(f"{name} must be on the input's device, {like.device}, got {tensor.device}")
