"""The SRU scan on CUDA: which walk to take, and its launches. No launch waits for the device."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from seqbatch.rnn import triton_kernels
from seqbatch.rnn.checks import Scan
from seqbatch.rnn.reference import carry_dtype

__all__ = ["backward", "forward", "on_device"]

_KINDS = {"identity": 0, "tanh": 1, "relu": 2}
MANY = 8192  # columns that fill a device when each is walked by itself
PROGRAMS = 2048  # to have at least, where time is cut into chunks
CHUNK = 64  # least number of steps of a chunk
BLOCK = 32  # columns of a program: one of each thread of a warp
# Steps whose loads are in flight together: as many as registers hold; fewer with chunks, which are many programs.
AHEAD = {"forward": (12, 8), "backward": (6, 4), "combine": (8, 8)}


def on_device(x: Tensor) -> AbstractContextManager[Any]:
    """Launch where x lies; under Triton's interpreter that is nowhere."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def ahead(kernel: str, chunked: bool, flags: bool) -> int:
    """Steps whose loads a kernel has in flight; flags take registers of the forward walk."""
    return AHEAD[kernel][chunked or (flags and kernel == "forward")]


def forward(scan: Scan) -> tuple[Tensor, Tensor, Tensor]:
    """Run the recurrence: h, c and the last state, as the reference defines them."""
    scan = _contiguous(scan)
    carry, shape = carry_dtype(scan.u.dtype), (*scan.u.shape[:-2], scan.u.shape[-1])
    h, c = scan.u.new_empty(shape), scan.u.new_empty(shape if scan.keep else (0,), dtype=carry)
    last = scan.initial.clone()  # stays where there is no step
    walk = _Walk(scan, linear=scan.weight_c is None)
    if not walk.programs:
        return h, c, last
    none = scan.u
    with on_device(scan.u):
        entering = scan.initial
        if walk.chunked:
            maps = walk.maps(carry)
            outputs = (none, none, c, maps[1], maps[0], maps[2])
            triton_kernels.forward[walk.grid](*walk.inputs, *outputs, *walk.sizes, **walk.settings("forward", True))
            entering = walk.combine(maps, scan.initial, backward=False)
        outputs = (entering, h, c, last, none, none)
        triton_kernels.forward[walk.grid](*walk.inputs, *outputs, *walk.sizes, **walk.settings("forward"))
    return h, c, last


def backward(grad_h: Tensor, grad_last: Tensor, c: Tensor, scan: Scan) -> list[Tensor]:
    """The gradients of u, skip, weight_c, bias and initial, those that are not None."""
    scan, grad_h, grad_last = _contiguous(scan), grad_h.contiguous(), grad_last.contiguous()
    walk = _Walk(scan, linear=True)
    grad_u = torch.empty_like(scan.u)
    grad_skip = scan.u if scan.skip is None else torch.empty_like(scan.skip)
    grad_initial = grad_last.clone()
    peephole = scan.weight_c is not None
    sums = c.new_empty(walk.programs, 4 if peephole else 2, scan.u.shape[-1])
    if walk.programs:
        none = scan.u
        with on_device(scan.u):
            entering = grad_last
            states = (c, grad_h, grad_last)
            if walk.chunked:
                maps = walk.maps(c.dtype)
                outputs = (none, none, none, none, none, *maps)
                triton_kernels.backward[walk.grid](
                    *walk.inputs, *states, *outputs, *walk.sizes, **walk.settings("backward", True)
                )
                entering = walk.combine(maps, grad_last, backward=True)
            outputs = (entering, grad_u, grad_skip, grad_initial, sums, none, none, none)
            triton_kernels.backward[walk.grid](
                *walk.inputs, *states, *outputs, *walk.sizes, **walk.settings("backward")
            )
    grads = (grad_u, grad_skip, sums[:, 2:].sum(0), sums[:, :2].sum(0), grad_initial)
    return [g.to(x.dtype) for g, x in zip(grads, scan[:5], strict=True) if x is not None]


class _Walk:
    """How a scan is laid out over programs.

    Lanes are walked whole where their columns fill the device, else (and in the flat form, whose
    sequences may be few or of very different lengths) time is cut into chunks, if the walk is linear.
    """

    def __init__(self, scan: Scan, linear: bool) -> None:
        self.scan, self.flat = scan, scan.cu_seqlens is not None
        self.columns = scan.u.shape[-1]
        self.width = self.columns // (1 + scan.bidirectional)
        self.steps, self.lanes = len(scan.u), 1 if self.flat else scan.u.shape[1]
        self.chunked = linear and (self.flat or self.lanes * self.columns < MANY) and self.steps > 1
        self.blocks = -(-self.width // BLOCK) * (1 + scan.bidirectional)
        self.chunk = self.steps
        if self.chunked:
            wanted = self.steps * self.lanes * self.blocks // PROGRAMS
            self.chunk = min(max(1 << wanted.bit_length(), CHUNK), 16 * CHUNK)
        self.chunks = -(-self.steps // max(self.chunk, 1))
        walked = self.lanes * self.chunks if self.chunked else len(scan.initial)
        empty = not self.columns or not (self.steps or self.flat) or (self.chunked and not self.steps)
        self.programs = 0 if empty else walked
        self.grid = (self.programs, self.blocks)
        self.sizes = (self.steps, self.lanes, self.chunk, self.width)
        none = scan.u  # a pointer that is not read
        segment = none
        if self.chunked and scan.cu_seqlens is not None:
            rows = torch.arange(self.steps, device=scan.u.device, dtype=scan.cu_seqlens.dtype)
            segment = torch.searchsorted(scan.cu_seqlens, rows, right=True, out_int32=True) - 1
        optional = (scan.skip, scan.weight_c, scan.bias, scan.initial, scan.dropout)
        flags = (scan.reset, scan.mask)
        self.inputs = (
            scan.u,
            *(none if x is None else x for x in optional),
            *(none if x is None else x.view(torch.uint8) for x in flags),
            none if scan.cu_seqlens is None else scan.cu_seqlens,
            segment,
        )

    def settings(self, kernel: str, summary: bool = False) -> dict[str, Any]:
        scan = self.scan
        return {
            "SCALE": scan.scale,
            "PLANES": scan.u.shape[-2],
            "HAS_SKIP": scan.skip is not None,
            "PEEPHOLE": scan.weight_c is not None,
            "HAS_BIAS": scan.bias is not None,
            "HAS_DROPOUT": scan.dropout is not None,
            "HAS_RESET": scan.reset is not None,
            "HAS_MASK": scan.mask is not None,
            "FLAT": self.flat,
            "CHUNKED": self.chunked,
            "SUMMARY": summary,
            "KIND": _KINDS[scan.activation],
            "INSIDE": scan.dropout_inside,
            "TWO": scan.bidirectional,
            "BLOCK": BLOCK,
            "UNROLL": ahead(kernel, self.chunked, scan.reset is not None or scan.mask is not None),
            "num_warps": 1,
        } | ({"KEEP": scan.keep} if kernel == "forward" else {})

    def maps(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Room for the map of each chunk: product, constant, whether it is cleared."""
        new = self.scan.u.new_empty
        return (
            new(self.programs, self.columns, dtype=dtype),
            new(self.programs, self.columns, dtype=dtype),
            new(self.programs, 1 + self.scan.bidirectional, dtype=torch.uint8),
        )

    def combine(self, maps: tuple[Tensor, Tensor, Tensor], leaving: Tensor, backward: bool) -> Tensor:
        """What enters each chunk, (programs, H), given what enters the first one."""
        if self.flat:  # every sequence brings its own
            leaving = maps[0].new_zeros(1, self.columns)
        entering = torch.empty_like(maps[0])
        triton_kernels.combine[(self.lanes, self.blocks)](
            entering,
            leaving,
            *maps,
            self.chunks,
            self.width,
            BACKWARD=backward,
            TWO=self.scan.bidirectional,
            BLOCK=BLOCK,
            UNROLL=AHEAD["combine"][1],
            num_warps=1,
        )
        return entering


def _contiguous(scan: Scan) -> Scan:
    tensors: dict[str, Any] = {name: x.contiguous() for name, x in scan._asdict().items() if isinstance(x, Tensor)}
    return scan._replace(**tensors)
