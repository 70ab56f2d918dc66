"""Batch normalization of grouped rows on CPU: numba.

Every function works on some columns and touches no others, so that calls run side by side, without the
interpreter's lock. In a column rows are taken in their order: a result does not depend on the number of threads,
nor on rows that belong to no group.

Means and variances come in (G, D) arrays whose row g holds what group g is normalized with. ``source[g]`` says
where that comes from: g, its own rows; s < g, group s, since g has too few rows; -1, given by the caller.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from seqbatch.rnn.activations import compiled_fast

__all__ = ["normalize", "normalize_backward"]

Array = NDArray[Any]
Index = NDArray[np.int64]


@compiled_fast
def _by_group(group: Index, counts: Index) -> tuple[Index, Index]:
    """Rows in the order of their groups, those of no group left out, and where each group begins."""
    begins = np.zeros(len(counts) + 1, np.int64)
    for g in range(len(counts)):
        begins[g + 1] = begins[g] + counts[g]
    place, order = begins.copy(), np.empty(begins[-1], np.int64)
    for r in range(len(group)):
        g = group[r]
        if g >= 0:
            order[place[g]] = r
            place[g] += 1
    return order, begins


# The loops below take four rows at a time, so that sums are read and written a quarter as often, and write one array
# each, so that LLVM can tell that it overlaps none that is read.


@compiled_fast
def _deviations(x: Array, rows: Index, columns: tuple[int, int], pivot: Array, s: Array, q: Array) -> None:
    """Add up the differences of rows from a pivot, and their squares."""
    j0, j1 = columns
    full = len(rows) - len(rows) % 4
    for k in range(0, full, 4):
        a, b, c, d = x[rows[k], j0:j1], x[rows[k + 1], j0:j1], x[rows[k + 2], j0:j1], x[rows[k + 3], j0:j1]
        for j in range(len(s)):
            s[j] += ((a[j] - pivot[j]) + (b[j] - pivot[j])) + ((c[j] - pivot[j]) + (d[j] - pivot[j]))
        for j in range(len(q)):
            e, f, g, h = a[j] - pivot[j], b[j] - pivot[j], c[j] - pivot[j], d[j] - pivot[j]
            q[j] += (e * e + f * f) + (g * g + h * h)
    for k in range(full, len(rows)):
        a = x[rows[k], j0:j1]
        for j in range(len(s)):
            s[j] += a[j] - pivot[j]
        for j in range(len(q)):
            e = a[j] - pivot[j]
            q[j] += e * e


@compiled_fast
def _products(
    grad: Array, x: Array, rows: Index, columns: tuple[int, int], mean: Array, inv: Array, plain: Array, along: Array
) -> None:
    """Add up rows of grad, and their products with the normalized rows of x."""
    j0, j1 = columns
    full = len(rows) - len(rows) % 4
    for k in range(0, full, 4):
        a, b, c, d = grad[rows[k], j0:j1], grad[rows[k + 1], j0:j1], grad[rows[k + 2], j0:j1], grad[rows[k + 3], j0:j1]
        e, f, g, h = x[rows[k], j0:j1], x[rows[k + 1], j0:j1], x[rows[k + 2], j0:j1], x[rows[k + 3], j0:j1]
        for j in range(len(plain)):
            plain[j] += (a[j] + b[j]) + (c[j] + d[j])
        for j in range(len(along)):
            m = mean[j]
            product = (a[j] * (e[j] - m) + b[j] * (f[j] - m)) + (c[j] * (g[j] - m) + d[j] * (h[j] - m))
            along[j] += product * inv[j]
    for k in range(full, len(rows)):
        a, e = grad[rows[k], j0:j1], x[rows[k], j0:j1]
        for j in range(len(plain)):
            plain[j] += a[j]
        for j in range(len(along)):
            along[j] += a[j] * (e[j] - mean[j]) * inv[j]


@compiled_fast
def normalize(
    x: Array,
    group: Index,
    source: Index,
    counts: Index,
    mean: Array,
    var: Array,
    weight: Array,
    bias: Array,
    eps: float,
    columns: tuple[int, int],
    y: Array,
) -> None:
    """Fill mean and var of the groups that have their own, and y; rows of no group, -1, become 0.

    Shapes: x, y (R, D); group (R,); source, counts (G,), rows of each group; mean, var (G, D); weight, bias (D,).
    Sums are of differences from the group's first row, in float64: one pass, and no cancellation.
    """
    j0, j1 = columns
    groups, rows = len(source), len(x)
    order, begins = _by_group(group, counts)
    s, q = np.empty(j1 - j0), np.empty(j1 - j0)
    for g in range(groups):
        m, v = mean[g, j0:j1], var[g, j0:j1]
        if source[g] == g and counts[g]:
            own, n = order[begins[g] : begins[g + 1]], counts[g]
            pivot = x[own[0], j0:j1]
            s[:] = 0
            q[:] = 0
            _deviations(x, own, columns, pivot, s, q)
            for j in range(len(m)):
                shift = s[j] / n
                m[j] = pivot[j] + shift
                v[j] = max(q[j] / n - shift * shift, 0.0)
        elif source[g] >= 0:
            m[:], v[:] = mean[source[g], j0:j1], var[source[g], j0:j1]
    w, b, one = weight[j0:j1], bias[j0:j1], x.dtype.type(1)
    scale = np.empty((groups, j1 - j0), x.dtype)
    for g in range(groups):
        for j in range(j1 - j0):
            scale[g, j] = w[j] * (one / np.sqrt(var[g, j0 + j] + x.dtype.type(eps)))
    for r in range(rows):
        g, out = group[r], y[r, j0:j1]
        if g < 0:
            out[:] = 0
            continue
        row, m, s = x[r, j0:j1], mean[g, j0:j1], scale[g]
        for j in range(len(out)):
            out[j] = (row[j] - m[j]) * s[j] + b[j]


@compiled_fast
def normalize_backward(
    grad: Array,
    x: Array,
    group: Index,
    source: Index,
    counts: Index,
    mean: Array,
    var: Array,
    weight: Array,
    eps: float,
    columns: tuple[int, int],
    grad_x: Array,
    grad_weight: Array,
    grad_bias: Array,
) -> None:
    """Fill the gradients; shapes as in :func:`normalize`."""
    j0, j1 = columns
    groups, rows, width = len(source), len(x), j1 - j0
    one = x.dtype.type(1)
    inv = np.empty((groups, width), x.dtype)
    for g in range(groups):
        for j in range(width):
            inv[g, j] = one / np.sqrt(var[g, j0 + j] + x.dtype.type(eps))
    plain, along = np.zeros((groups, width)), np.zeros((groups, width))  # of grad, and of grad times what it scaled
    order, begins = _by_group(group, counts)
    for g in range(groups):
        own = order[begins[g] : begins[g + 1]]
        _products(grad, x, own, columns, mean[g, j0:j1], inv[g], plain[g], along[g])
    gw, gb = np.zeros(width), np.zeros(width)
    for g in range(groups):
        for j in range(width):
            gb[j] += plain[g, j]
            gw[j] += along[g, j]
    for j in range(width):
        grad_weight[j0 + j] = gw[j]
        grad_bias[j0 + j] = gb[j]
    for g in range(groups):
        if 0 <= source[g] < g:  # borrowed statistics: the derivative goes to the rows they come from
            plain[source[g]] += plain[g]
            along[source[g]] += along[g]
    p_mean, a_mean = np.zeros((groups, width), x.dtype), np.zeros((groups, width), x.dtype)
    for g in range(groups):
        if source[g] == g and counts[g]:
            for j in range(width):
                p_mean[g, j] = plain[g, j] / counts[g]
                a_mean[g, j] = along[g, j] / counts[g]
                if var[g, j0 + j] <= min(eps * eps, 1e-10):  # rows that are equal: see the reference
                    inv[g, j] = 0
    w = weight[j0:j1]
    for r in range(rows):
        g, dx = group[r], grad_x[r, j0:j1]
        if g < 0:
            dx[:] = 0
            continue
        row, out, m, i, p, a = x[r, j0:j1], grad[r, j0:j1], mean[g, j0:j1], inv[g], p_mean[g], a_mean[g]
        for j in range(width):
            dx[j] = w[j] * i[j] * (out[j] - p[j] - (row[j] - m[j]) * i[j] * a[j])
