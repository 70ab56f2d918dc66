"""Scans to test with, and the SRU recurrence as a loop over single numbers."""

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from seqbatch.rnn.checks import Scan

FORMS = ("plain", "flags", "flat")
OFFSETS = [0, 2, 2, 5, 6, 9]  # an empty sequence and a sequence of one step among them


def some_scan(
    form: str = "flags",
    planes: int = 3,
    version: str = "v2",
    activation: str = "tanh",
    bidirectional: bool = False,
    dropout_inside: bool = False,
    steps: int = 9,
    lanes: int = 3,
    width: int = 6,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Scan:
    """A scan of random numbers with everything on: skip, bias, dropout, and resets at the first and last step."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    rows = (OFFSETS[-1],) if form == "flat" else (steps, lanes)
    states = len(OFFSETS) - 1 if form == "flat" else lanes
    reset = mask = None
    if form == "flags":
        reset, mask = torch.rand(rows, generator=g) < 0.3, torch.rand(rows, generator=g) < 0.8
        if lanes:
            reset[0, 0] = reset[-1, -1] = True
    return Scan(
        u=normal(*rows, planes, width),
        skip=normal(*rows, width) if planes == 3 else None,
        weight_c=normal(2, width) if version == "v2" else None,
        bias=normal(2, width),
        initial=normal(states, width).to(torch.promote_types(dtype, torch.float32)),
        dropout=2 * (torch.rand(states, width, generator=g) < 0.5).to(dtype),
        reset=reset,
        mask=mask,
        cu_seqlens=torch.tensor(OFFSETS, dtype=torch.int32) if form == "flat" else None,
        activation=activation,
        bidirectional=bidirectional,
        scale=1.3,
        dropout_inside=dropout_inside,
    )


def learning(scan: Scan) -> Scan:
    """The same scan with gradients wanted for all that can have one."""
    return Scan(*(None if x is None else x.detach().clone().requires_grad_() for x in scan[:5]), *scan[5:])


def gradients(scan: Scan, h: Tensor, last: Tensor) -> tuple[Tensor, ...]:
    """The gradients of a fixed random weighing of the outputs."""
    g = torch.Generator().manual_seed(7)
    weigh = [torch.randn(x.shape, generator=g, dtype=torch.float64).to(x.dtype) for x in (h, last)]
    wanted = [x for x in scan[:5] if x is not None]
    return torch.autograd.grad((h, last), wanted, weigh, materialize_grads=True)


def naive_scan(scan: Scan) -> tuple[Tensor, Tensor]:
    """h and the last state, one number at a time, straight from the equations (padded form: one lane, one column)."""
    if scan.cu_seqlens is not None:
        h, last = torch.zeros_like(scan.u[:, 0]), scan.initial.clone()
        for n, (a, b) in enumerate(pairwise(scan.cu_seqlens.tolist())):
            part = scan._replace(
                u=scan.u[a:b, None],
                skip=None if scan.skip is None else scan.skip[a:b, None],
                initial=scan.initial[n : n + 1],
                dropout=None if scan.dropout is None else scan.dropout[n : n + 1],
                cu_seqlens=None,
            )
            if b > a:
                h_n, last[n : n + 1] = naive_scan(part)
                h[a:b] = h_n[:, 0]
        return h, last
    steps, lanes, _, width = scan.u.shape
    h, last = torch.zeros(steps, lanes, width, dtype=scan.u.dtype), scan.initial.clone()
    for b in range(lanes):
        for j in range(width):
            back = scan.bidirectional and j >= width // 2
            c = float(scan.initial[b, j])
            for t in reversed(range(steps)) if back else range(steps):
                boundary = t + 1 if back else t
                if scan.reset is not None and boundary < steps and scan.reset[boundary, b]:
                    c = 0.0
                if scan.mask is None or scan.mask[t, b]:
                    h[t, b, j], c = _one_step(scan, t, b, j, c)
            last[b, j] = c
    return h, last


def _one_step(scan: Scan, t: int, b: int, j: int, c: float) -> tuple[float, float]:
    def at(x: Any, *place: int) -> float:
        return 0.0 if x is None else float(x[place])

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    z, u_f, u_r = (at(scan.u, t, b, k, j) for k in range(3))
    s = at(scan.u, t, b, 3, j) if scan.u.shape[2] == 4 else scan.scale * at(scan.skip, t, b, j)
    f = sigmoid(u_f + at(scan.weight_c, 0, j) * c + at(scan.bias, 0, j))
    r = sigmoid(u_r + at(scan.weight_c, 1, j) * c + at(scan.bias, 1, j))
    c = f * c + (1 - f) * z
    g = {"identity": c, "tanh": math.tanh(c), "relu": max(c, 0.0)}[scan.activation]
    m = 1.0 if scan.dropout is None else at(scan.dropout, b, j)
    return (r * m * g + (1 - r) * s if scan.dropout_inside else s + m * r * (g - s)), c


def some_linear(
    steps: int = 9,
    lanes: int = 3,
    width: int = 6,
    dtype: torch.dtype = torch.float64,
    reset: bool = True,
    mask: bool = True,
    seed: int = 0,
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """a, b and initial of a linear scan, which learn, and its flags; states stay near 1, and |a| reaches 1."""
    g = torch.Generator().manual_seed(seed)
    a = 2 * torch.rand(steps, lanes, width, generator=g, dtype=torch.float64) - 1
    b, initial = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in (a.shape, a.shape[1:]))
    flags = {"reset": torch.rand(steps, lanes, generator=g) < 0.3, "mask": torch.rand(steps, lanes, generator=g) < 0.8}
    wanted = {"reset": reset, "mask": mask}
    return [x.to(dtype).requires_grad_() for x in (a, b, initial)], {k: v for k, v in flags.items() if wanted[k]}


def linear_gradients(tensors: list[Tensor] | None, before: Tensor, last: Tensor) -> tuple[Tensor, ...]:
    """The gradients of a fixed random weighing of a linear scan's outputs; without tensors the weights."""
    g = torch.Generator().manual_seed(7)
    weigh = [torch.randn(x.shape, generator=g, dtype=torch.float64).to(x) for x in (before, last)]
    return (
        tuple(weigh) if tensors is None else torch.autograd.grad((before, last), tensors, weigh, materialize_grads=True)
    )
