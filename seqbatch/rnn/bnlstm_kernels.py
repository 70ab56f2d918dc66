"""The BN-LSTM step on CPU: statistics, gates and states of one group of rows in one pass, and its derivative.

Like :mod:`seqbatch.rnn.norm_kernels`, whose ``source`` this takes one group of at a time: some columns in each call.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from seqbatch.rnn.activations import compiled_fast, sigmoid, tanh

__all__ = ["step_backward", "step_forward"]

# Each inner loop writes one array: LLVM vectorises it where few pairs of arrays might overlap.

Array = NDArray[Any]
Index = NDArray[np.int64]
NEW, LAST = 2, 3  # the order of the gates is i, f, g, o, torch.nn.LSTM's: g, the candidate, is a tanh


@compiled_fast
def _moments(x: Array, lo: int, hi: int, columns: tuple[int, int], mean: Array, var: Array) -> None:
    """Mean and biased variance of some rows, columns by column."""
    j0, j1 = columns
    m, v = mean[j0:j1], var[j0:j1]
    share = x.dtype.type(1) / x.dtype.type(hi - lo)
    m[:] = 0
    v[:] = 0
    for r in range(lo, hi):
        row = x[r, j0:j1]
        for j in range(len(m)):
            m[j] += row[j]
    for j in range(len(m)):
        m[j] *= share
    for r in range(lo, hi):
        row = x[r, j0:j1]
        for j in range(len(m)):
            d = row[j] - m[j]
            v[j] += d * d
    for j in range(len(v)):
        v[j] *= share


@compiled_fast
def _statistics(
    x: Array,
    where: tuple[int, int, int, int],
    columns: tuple[int, int],
    mean: Array,
    var: Array,
    inv: Array,
    eps: float,
) -> None:
    """A group's own statistics, or those of its source; and 1 / sqrt(var + eps) for the columns."""
    lo, hi, g, source = where
    j0, j1 = columns
    if source == g:
        _moments(x, lo, hi, columns, mean[g], var[g])
    elif source >= 0:
        mean[g, j0:j1] = mean[source, j0:j1]
        var[g, j0:j1] = var[source, j0:j1]
    one, v = x.dtype.type(1), var[g, j0:j1]
    for j in range(len(v)):
        inv[j] = one / np.sqrt(v[j] + x.dtype.type(eps))


@compiled_fast
def _gate(a: Array, outside: Array, mean: Array, scale: Array, normalized: bool, squash: bool, out: Array) -> None:
    """One gate of one row: the sigmoid, or to ``squash`` the tanh, of BN(a) + outside."""
    if normalized:
        for j in range(len(out)):
            out[j] = (a[j] - mean[j]) * scale[j] + outside[j]
    else:
        for j in range(len(out)):
            out[j] = a[j] + outside[j]
    if squash:
        for j in range(len(out)):
            out[j] = tanh(out[j])
    else:
        for j in range(len(out)):
            out[j] = sigmoid(out[j])


@compiled_fast
def step_forward(
    a: Array,
    outside: Array,
    previous: Index,
    weights: tuple[Array, Array, Array],
    moments: tuple[Array, Array, Array, Array],
    where: tuple[int, int, int, int],
    entering: int,
    eps: float,
    columns: tuple[int, int],
    c: Array,
    h: Array,
) -> None:
    """One group of rows, some hidden units: statistics, gates, c and h.

    Shapes: a, outside (R, 4H); previous (R,); weights are gamma_h (4H,), gamma_c and beta_c (H,), without
    elements where a term is not normalized; moments mean_h, var_h (G, 4H), mean_c, var_c (G, H); c, h are tables
    (entering + R, H), in which row r stands at entering + r. ``where``: first row, end, group, source.
    """
    gamma_h, gamma_c, beta_c = weights
    mean_h, var_h, mean_c, var_c = moments
    lo, hi, g, _ = where
    j0, j1 = columns
    width, n = h.shape[1], j1 - j0
    of_h, of_c = len(gamma_h) > 0, len(gamma_c) > 0
    scale = np.empty((4, n), a.dtype)
    if of_h:
        for k in range(4):
            some = (k * width + j0, k * width + j1)
            _statistics(a, where, some, mean_h, var_h, scale[k], eps)
            gamma = gamma_h[some[0] : some[1]]
            for j in range(n):
                scale[k, j] *= gamma[j]
    gates = np.empty((3, n), a.dtype)
    for r in range(lo, hi):
        before, after, result = c[previous[r], j0:j1], c[entering + r, j0:j1], h[entering + r, j0:j1]
        for k in range(4):
            b0, b1 = k * width + j0, k * width + j1
            mean = mean_h[g, b0:b1] if of_h else scale[k]
            _gate(a[r, b0:b1], outside[r, b0:b1], mean, scale[k], of_h, k == NEW, result if k == LAST else gates[k])
        i, f, new = gates[0], gates[1], gates[NEW]
        for j in range(n):
            after[j] = f[j] * before[j] + i[j] * new[j]
        if not of_c:
            for j in range(n):
                result[j] *= tanh(after[j])
    if of_c:  # h holds o until c has statistics
        inv = np.empty(n, a.dtype)
        _statistics(c[entering:], where, columns, mean_c, var_c, inv, eps)
        mean, gamma, beta = mean_c[g, j0:j1], gamma_c[j0:j1], beta_c[j0:j1]
        for r in range(lo, hi):
            after, result = c[entering + r, j0:j1], h[entering + r, j0:j1]
            for j in range(n):
                result[j] *= tanh((after[j] - mean[j]) * inv[j] * gamma[j] + beta[j])


@compiled_fast
def _through_statistics(
    grad: Array,
    x: Array,
    at: int,
    gamma: Array,
    mean: Array,
    var: Array,
    inv: Array,
    flat: float,
    where: tuple[int, int, int, int],
    columns: tuple[int, int],
    owed: Array,
    grad_gamma: Array,
    grad_beta: Array,
    out: Array,
    add: bool,
) -> None:
    """Rows of ``grad`` back through a normalization of the rows of x, which begin at row ``at`` of x.

    ``owed`` (2, width) are the sums over rows of later groups that borrowed these statistics; a group that
    borrows adds to it, one with its own takes it. The result is added to ``out``, or written there. ``inv`` is
    changed: 0 where the variance is no more than ``flat``.
    """
    lo, hi, g, source = where
    j0, j1 = columns
    width = j1 - j0
    plain, along = np.zeros(width, x.dtype), np.zeros(width, x.dtype)
    for r in range(lo, hi):
        d, row = grad[r, j0:j1], x[at + r, j0:j1]
        for j in range(width):
            plain[j] += d[j]
        for j in range(width):
            along[j] += d[j] * ((row[j] - mean[j]) * inv[j])
    gb, gg, share = grad_beta[j0:j1], grad_gamma[j0:j1], x.dtype.type(1) / x.dtype.type(hi - lo)
    owed_plain, owed_along = owed[0, j0:j1], owed[1, j0:j1]
    for j in range(width):
        gb[j] += plain[j]
        gg[j] += along[j]
    if source >= 0:
        for j in range(width):
            owed_plain[j] += plain[j]
            owed_along[j] += along[j]
    if source == g:
        for j in range(width):
            plain[j], along[j] = owed_plain[j] * share, owed_along[j] * share
            owed_plain[j] = owed_along[j] = 0
        for j in range(width):  # rows that are equal: see the reference
            inv[j] = inv[j] if var[j] > flat else 0
    else:
        plain[:] = 0
        along[:] = 0
    for r in range(lo, hi):
        d, row, dx = grad[r, j0:j1], x[at + r, j0:j1], out[at + r, j0:j1]
        if add:
            for j in range(width):
                dx[j] += gamma[j] * inv[j] * (d[j] - plain[j] - (row[j] - mean[j]) * inv[j] * along[j])
        else:
            for j in range(width):
                dx[j] = gamma[j] * inv[j] * (d[j] - plain[j] - (row[j] - mean[j]) * inv[j] * along[j])


@compiled_fast
def step_backward(
    a: Array,
    outside: Array,
    c: Array,
    previous: Index,
    weights: tuple[Array, Array, Array],
    moments: tuple[Array, Array, Array, Array],
    where: tuple[int, int, int, int],
    entering: int,
    eps: float,
    columns: tuple[int, int],
    owed: tuple[Array, Array],
    sums: tuple[Array, Array, Array, Array],
    grad_h: Array,
    grad_c: Array,
    grad_outside: Array,
    grad_a: Array,
) -> None:
    """One group back: from the gradients of its h and c to those of outside, a and the c before.

    Gates are computed again. ``grad_h`` and ``grad_c`` are tables like h and c, in which later groups have added up;
    ``sums`` those of gamma_h, gamma_c and beta_c, and room for that of a beta_h; ``owed`` see
    :func:`_through_statistics`, for a (2, 4H) and for c (2, H).
    """
    gamma_h, gamma_c, beta_c = weights
    mean_h, var_h, mean_c, var_c = moments
    lo, hi, g, _ = where
    j0, j1 = columns
    width, n = c.shape[1], j1 - j0
    of_h, of_c = len(gamma_h) > 0, len(gamma_c) > 0
    one, small, flat = a.dtype.type(1), a.dtype.type(eps), min(eps * eps, 1e-10)
    inv, scale, gates = np.empty((5, n), a.dtype), np.empty((4, n), a.dtype), np.empty((4, n), a.dtype)
    o, squashed, inv_c = gates[0], gates[1], inv[LAST + 1]
    if of_c:
        var = var_c[g, j0:j1]
        for j in range(n):
            inv_c[j] = one / np.sqrt(var[j] + small)
    if of_h:
        for k in range(4):
            var, gamma = var_h[g, k * width + j0 : k * width + j1], gamma_h[k * width + j0 : k * width + j1]
            inv_k, scale_k = inv[k], scale[k]
            for j in range(n):
                inv_k[j] = one / np.sqrt(var[j] + small)
            for j in range(n):
                scale_k[j] = gamma[j] * inv_k[j]
    b0, b1 = LAST * width + j0, LAST * width + j1
    for r in range(lo, hi):  # through h = o * tanh(...)
        after, d_h, d_c, d_o = (
            c[entering + r, j0:j1], grad_h[entering + r, j0:j1], grad_c[entering + r, j0:j1], grad_outside[r, b0:b1]
        )  # fmt: skip
        _gate(a[r, b0:b1], outside[r, b0:b1], mean_h[g, b0:b1] if of_h else o, scale[LAST], of_h, False, o)
        if of_c:
            mean, gamma, beta = mean_c[g, j0:j1], gamma_c[j0:j1], beta_c[j0:j1]
            for j in range(n):
                squashed[j] = tanh((after[j] - mean[j]) * inv_c[j] * gamma[j] + beta[j])
        else:
            for j in range(n):
                squashed[j] = tanh(after[j])
        for j in range(n):
            d_o[j] = d_h[j] * squashed[j] * o[j] * (one - o[j])
        for j in range(n):
            d_h[j] *= o[j] * (one - squashed[j] * squashed[j])
        if not of_c:
            for j in range(n):
                d_c[j] += d_h[j]
    if of_c:
        _through_statistics(
            grad_h[entering:], c, entering, gamma_c[j0:j1], mean_c[g, j0:j1], var_c[g, j0:j1], inv_c, flat, where,
            columns, owed[1], sums[1], sums[2], grad_c, True,
        )  # fmt: skip
    i, f, new = gates[0], gates[1], gates[NEW]
    for r in range(lo, hi):
        d_c, d_before, before = grad_c[entering + r, j0:j1], grad_c[previous[r], j0:j1], c[previous[r], j0:j1]
        for k in range(LAST):
            b0, b1 = k * width + j0, k * width + j1
            mean = mean_h[g, b0:b1] if of_h else scale[k]
            _gate(a[r, b0:b1], outside[r, b0:b1], mean, scale[k], of_h, k == NEW, gates[k])
        d_i, d_f = grad_outside[r, j0:j1], grad_outside[r, width + j0 : width + j1]
        d_new = grad_outside[r, NEW * width + j0 : NEW * width + j1]
        for j in range(n):
            d_i[j] = d_c[j] * new[j] * i[j] * (one - i[j])
        for j in range(n):
            d_f[j] = d_c[j] * before[j] * f[j] * (one - f[j])
        for j in range(n):
            d_new[j] = d_c[j] * i[j] * (one - new[j] * new[j])
        for j in range(n):
            d_before[j] += d_c[j] * f[j]
    if of_h:
        for k in range(4):
            some = (k * width + j0, k * width + j1)
            _through_statistics(
                grad_outside, a, 0, gamma_h[some[0] : some[1]], mean_h[g, some[0] : some[1]],
                var_h[g, some[0] : some[1]], inv[k], flat, where, some,
                owed[0], sums[0], sums[3], grad_a, False,
            )  # fmt: skip
