"""The SRU scan on CPU: from tensors to the numba kernels and back."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from seqbatch.rnn import cpu_kernels
from seqbatch.rnn.checks import Scan
from seqbatch.rnn.reference import carry_dtype
from seqbatch.rnn.threads import GROUPS, Span, run_blocks

__all__ = ["backward", "forward"]

_KINDS = {"identity": 0, "tanh": 1, "relu": 2}
Array = NDArray[Any]


def forward(scan: Scan) -> tuple[Tensor, Tensor, Tensor]:
    """Run the recurrence: h, c and the last state, as the reference defines them.

    >>> h, c, last = forward(Scan(torch.zeros(3, 1, 3, 2), None, None, None, torch.ones(1, 2)))
    >>> last.tolist()
    [[0.125, 0.125]]
    """
    carry = carry_dtype(scan.u.dtype)
    shape = (*scan.u.shape[:-2], scan.u.shape[-1])
    h, c = torch.empty(shape, dtype=carry), torch.empty(shape if scan.keep else (0,), dtype=carry)
    last = torch.empty(scan.initial.shape, dtype=carry)
    inputs, width = _arrays(scan, carry), scan.u.shape[-1]
    outputs = (h.numpy().reshape(-1, width), _rows(c, width), last.numpy())

    def block(lanes: Span, columns: Span, group: int, reverse: bool) -> None:
        cpu_kernels.forward(*inputs, _settings(scan, reverse), lanes, columns, *outputs)

    directions = 1 + scan.bidirectional
    run_blocks(block, len(last), width // directions, directions, h.numel())
    return h.to(scan.u.dtype), c, last


def backward(grad_h: Tensor, grad_last: Tensor, c: Tensor, scan: Scan) -> list[Tensor]:
    """The gradients of u, skip, weight_c, bias and initial, those that are not None.

    >>> scan = Scan(torch.zeros(1, 1, 3, 2), None, None, None, torch.ones(1, 2))
    >>> h, c, last = forward(scan)
    >>> backward(torch.zeros_like(h), torch.ones_like(last), c, scan)[1].tolist()
    [[0.5, 0.5]]
    """
    carry = c.dtype
    width, directions = scan.u.shape[-1], 1 + scan.bidirectional
    grad_u = torch.empty(scan.u.shape, dtype=carry)
    grad_skip = torch.empty(() if scan.skip is None else scan.skip.shape, dtype=carry)
    grad_initial = torch.empty(scan.initial.shape, dtype=carry)
    sums = torch.zeros(GROUPS, 4, width, dtype=carry)
    inputs = _arrays(scan, carry)
    gradients = (
        _rows(c, width),
        _rows(grad_h.to(carry), width),
        _array(grad_last, carry),
        grad_u.numpy().reshape(-1, *scan.u.shape[-2:]),
        grad_skip.numpy().reshape(-1, width) if scan.skip is not None else _absent(carry, 2),
        grad_initial.numpy(),
    )
    by_group = sums.numpy()

    def block(lanes: Span, columns: Span, group: int, reverse: bool) -> None:
        cpu_kernels.backward(*inputs, _settings(scan, reverse), lanes, columns, *gradients, by_group[group])

    run_blocks(block, len(grad_initial), width // directions, directions, c.numel())
    grads = (grad_u, grad_skip, sums[:, 2:].sum(0), sums[:, :2].sum(0), grad_initial)
    return [g.to(x.dtype) for g, x in zip(grads, scan[:5], strict=True) if x is not None]


def _settings(scan: Scan, reverse: bool) -> tuple[int, int, float, bool, bool]:
    stride = 1 if scan.cu_seqlens is not None else scan.u.shape[1]
    return stride, _KINDS[scan.activation], scan.scale, scan.dropout_inside, reverse


def _arrays(scan: Scan, carry: torch.dtype) -> tuple[Any, ...]:
    """The inputs as both kernels take them: contiguous, in the carried dtype, absent ones without elements."""
    width, lanes = scan.u.shape[-1], len(scan.initial)
    if scan.cu_seqlens is None:
        first, length = np.arange(lanes, dtype=np.int64), np.full(lanes, len(scan.u), dtype=np.int64)
    else:
        offsets = scan.cu_seqlens.numpy().astype(np.int64)
        first, length = offsets[:-1].copy(), np.diff(offsets)
    return (
        _array(scan.u, carry).reshape(-1, *scan.u.shape[-2:]),
        _absent(carry, 2) if scan.skip is None else _rows(scan.skip.to(carry), width),
        _absent(carry, 2) if scan.weight_c is None else _array(scan.weight_c, carry),
        np.zeros((2, width), _absent(carry, 1).dtype) if scan.bias is None else _array(scan.bias, carry),
        _array(scan.initial, carry),
        _absent(carry, 2) if scan.dropout is None else _array(scan.dropout, carry),
        _absent(torch.bool, 1) if scan.reset is None else _array(scan.reset).reshape(-1),
        _absent(torch.bool, 1) if scan.mask is None else _array(scan.mask).reshape(-1),
        first,
        length,
    )


def _rows(tensor: Tensor, width: int) -> Array:
    """(R, width); nothing stays nothing."""
    return _array(tensor).reshape(tensor.numel() // width if width else 0, width)


def _array(tensor: Tensor, dtype: torch.dtype | None = None) -> Array:
    array: Array = tensor.detach().to(dtype or tensor.dtype).contiguous().numpy()
    return array


def _absent(dtype: torch.dtype, dims: int) -> Array:
    array: Array = torch.empty((0,) * dims, dtype=dtype).numpy()
    return array
