"""The SRU recurrence on CPU: numba, no compiler needed at installation.

Both walks see one view of their data, whatever the form: lane n has ``length[n]`` steps, its step s
lies in row ``first[n] + s * stride``, and rows are (k, H) planes. The padded form has stride B, the
flat form has stride 1. Each call works on some lanes and some columns of one direction and touches
nothing else, so calls run side by side; interpreter lock released.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seqbatch.rnn.activations import compiled_fast, sigmoid, tanh

__all__ = ["backward", "forward"]

Kernel = Callable[..., None]
Array = NDArray[Any]


@compiled_fast
def _gate(gate: Array, u: Array, bias: Array, weight_c: Array, before: Array, peephole: bool) -> None:
    if peephole:
        for j in range(len(gate)):
            gate[j] = sigmoid(u[j] + bias[j] + weight_c[j] * before[j])
    else:
        for j in range(len(gate)):
            gate[j] = sigmoid(u[j] + bias[j])


@compiled_fast
def _activate(g: Array, c: Array, kind: int) -> None:
    if kind == 1:
        for j in range(len(g)):
            g[j] = tanh(c[j])
    else:
        for j in range(len(g)):
            g[j] = g.dtype.type(0) if c[j] < 0 else c[j]  # NaN stays


@compiled_fast
def forward(
    u: Array,
    skip: Array,
    weight_c: Array,
    bias: Array,
    initial: Array,
    dropout: Array,
    reset: NDArray[np.bool_],
    mask: NDArray[np.bool_],
    first: NDArray[np.int64],
    length: NDArray[np.int64],
    settings: tuple[int, int, float, bool, bool],
    lanes: tuple[int, int],
    columns: tuple[int, int],
    h: Array,
    c: Array,
    last: Array,
) -> None:
    """Walk some lanes and columns of one direction and fill h, c and last.

    Shapes: u (R, k, H); skip, h, c (R, H); weight_c, bias (2, H); initial, dropout, last (N, H); reset,
    mask (R,). An optional array without elements is absent, c too where it is not wanted. Settings: stride,
    kind of activation (0 identity, 1 tanh, 2 relu), scale of the skip, dropout inside, reverse.
    """
    stride, kind, scale, inside, reverse = settings
    lo, hi = columns
    peephole, four, one = len(weight_c) > 0, u.shape[1] == 4, u.dtype.type(1)
    alpha = one if four else u.dtype.type(scale)
    v_f, v_r = (weight_c[0, lo:hi], weight_c[1, lo:hi]) if peephole else (bias[0, lo:hi], bias[1, lo:hi])
    carry = np.empty(hi - lo, u.dtype)
    g = np.empty(hi - lo, u.dtype) if kind > 0 else carry
    f, r = np.empty(hi - lo, u.dtype), np.empty(hi - lo, u.dtype)
    s, m = np.zeros(hi - lo, u.dtype), np.ones(hi - lo, u.dtype)
    for n in range(lanes[0], lanes[1]):
        carry[:] = initial[n, lo:hi]
        if len(dropout):
            m = dropout[n, lo:hi]
        for step in range(length[n]):
            row = first[n] + (length[n] - 1 - step if reverse else step) * stride
            if len(reset) and ((not reverse and reset[row]) or (reverse and step > 0 and reset[row + stride])):
                carry[:] = 0
            out = h[row, lo:hi]
            if len(mask) and not mask[row]:
                out[:] = 0
                if len(c):
                    c[row, lo:hi] = carry
                continue
            if four:
                s = u[row, 3, lo:hi]
            elif len(skip):
                s = skip[row, lo:hi]
            z = u[row, 0, lo:hi]
            _gate(f, u[row, 1, lo:hi], bias[0, lo:hi], v_f, carry, peephole)
            _gate(r, u[row, 2, lo:hi], bias[1, lo:hi], v_r, carry, peephole)
            for j in range(hi - lo):
                carry[j] = carry[j] * f[j] + (one - f[j]) * z[j]
            if len(c):
                c[row, lo:hi] = carry
            if kind > 0:
                _activate(g, carry, kind)
            if inside:
                for j in range(hi - lo):
                    out[j] = (m[j] * g[j] - alpha * s[j]) * r[j] + alpha * s[j]
            else:
                for j in range(hi - lo):
                    out[j] = (g[j] - alpha * s[j]) * (m[j] * r[j]) + alpha * s[j]
        last[n, lo:hi] = carry


@compiled_fast
def _slope(slope: Array, g: Array, kind: int) -> None:
    one = g.dtype.type(1)
    if kind == 1:
        for j in range(len(g)):
            slope[j] = one - g[j] * g[j]
    elif kind == 2:
        for j in range(len(g)):
            slope[j] = g.dtype.type(0) if g[j] == 0 else one


@compiled_fast
def backward(
    u: Array,
    skip: Array,
    weight_c: Array,
    bias: Array,
    initial: Array,
    dropout: Array,
    reset: NDArray[np.bool_],
    mask: NDArray[np.bool_],
    first: NDArray[np.int64],
    length: NDArray[np.int64],
    settings: tuple[int, int, float, bool, bool],
    lanes: tuple[int, int],
    columns: tuple[int, int],
    c: Array,
    grad_h: Array,
    grad_last: Array,
    grad_u: Array,
    grad_skip: Array,
    grad_initial: Array,
    sums: Array,
) -> None:
    """Walk the other way and fill the gradients; those of b_f, b_r, v_f, v_r are added to sums (4, H).

    The other arguments are those of :func:`forward`; grad_h and grad_skip are (R, H), grad_last and
    grad_initial (N, H). Source: the equations of :func:`seqbatch.rnn.reference.sru_scan`, derived by hand.
    """
    stride, kind, scale, inside, reverse = settings
    lo, hi = columns
    peephole, four, one = len(weight_c) > 0, u.shape[1] == 4, u.dtype.type(1)
    alpha = one if four else u.dtype.type(scale)
    v_f, v_r = (weight_c[0, lo:hi], weight_c[1, lo:hi]) if peephole else (bias[0, lo:hi], bias[1, lo:hi])
    carry, zeros, scratch = np.empty(hi - lo, u.dtype), np.zeros(hi - lo, u.dtype), np.empty(hi - lo, u.dtype)
    f, r, slope = np.empty(hi - lo, u.dtype), np.empty(hi - lo, u.dtype), np.ones(hi - lo, u.dtype)
    s, m, unused = np.zeros(hi - lo, u.dtype), np.ones(hi - lo, u.dtype), np.empty(hi - lo, u.dtype)
    sum_bf, sum_br, sum_vf, sum_vr = sums[0, lo:hi], sums[1, lo:hi], sums[2, lo:hi], sums[3, lo:hi]
    for n in range(lanes[0], lanes[1]):
        carry[:] = grad_last[n, lo:hi]
        if len(dropout):
            m = dropout[n, lo:hi]
        for step in range(length[n] - 1, -1, -1):
            row = first[n] + (length[n] - 1 - step if reverse else step) * stride
            cut = len(reset) > 0 and ((not reverse and reset[row]) or (reverse and step > 0 and reset[row + stride]))
            d_x = grad_u[row, 3, lo:hi] if four else grad_skip[row, lo:hi] if len(skip) else unused
            d_z, d_f, d_r = grad_u[row, 0, lo:hi], grad_u[row, 1, lo:hi], grad_u[row, 2, lo:hi]
            if len(mask) and not mask[row]:
                grad_u[row, :, lo:hi] = 0
                d_x[:] = 0
                if cut:
                    carry[:] = 0
                continue
            before = initial[n, lo:hi]
            if cut:
                before = zeros
            elif step > 0:
                before = c[row + stride if reverse else row - stride, lo:hi]
            if four:
                s = u[row, 3, lo:hi]
            elif len(skip):
                s = skip[row, lo:hi]
            z, g, d_h = u[row, 0, lo:hi], c[row, lo:hi], grad_h[row, lo:hi]
            if kind > 0:
                _activate(scratch, g, kind)
                _slope(slope, scratch, kind)
                g = scratch
            _gate(f, u[row, 1, lo:hi], bias[0, lo:hi], v_f, before, peephole)
            _gate(r, u[row, 2, lo:hi], bias[1, lo:hi], v_r, before, peephole)
            if inside:
                for j in range(hi - lo):
                    d_r[j] = d_h[j] * (m[j] * g[j] - alpha * s[j]) * (r[j] * (one - r[j]))
                    d_x[j] = d_h[j] * (one - r[j]) * alpha
            else:
                for j in range(hi - lo):
                    d_r[j] = d_h[j] * (g[j] - alpha * s[j]) * m[j] * (r[j] * (one - r[j]))
                    d_x[j] = d_h[j] * (one - m[j] * r[j]) * alpha
            for j in range(hi - lo):
                carry[j] += d_h[j] * (m[j] * r[j]) * slope[j]
                d_z[j] = carry[j] * (one - f[j])
                d_f[j] = carry[j] * (before[j] - z[j]) * (f[j] * (one - f[j]))
                carry[j] *= f[j]
            for j in range(hi - lo):
                sum_bf[j] += d_f[j]
                sum_br[j] += d_r[j]
            if cut:
                carry[:] = 0
            elif peephole:
                for j in range(hi - lo):
                    sum_vf[j] += d_f[j] * before[j]
                    sum_vr[j] += d_r[j] * before[j]
                    carry[j] += d_f[j] * v_f[j] + d_r[j] * v_r[j]
        grad_initial[n, lo:hi] = carry
