"""The BN-LSTM step on CUDA, in Triton: one program for some hidden units and all rows of a group.

A unit's statistics are over rows, so a program that has all rows of its units needs no other: there is no atomic
addition and no wait between programs. Rows are taken ``ROWS`` at a time; a group of as many rows or fewer is read once
from memory and then from cache. Numbers are float32, or float64 for float64 input.

Shapes as in :mod:`seqbatch.rnn.norm_kernels`; ``lo``, ``hi`` and ``g`` say which rows and which group.
"""

import triton
import triton.language as tl

__all__ = ["step_backward", "step_forward"]

_SIZES = ["lo", "hi", "g", "entering"]  # differ from step to step: no cases of their own


@triton.jit
def _tanh(x):
    return 2 * tl.sigmoid(2 * x) - 1


@triton.jit
def _moments(x, at, stride, lo, hi, j, live, ROWS: tl.constexpr):
    """Mean and biased variance of the columns of rows lo..hi, in two passes; ``at`` is the first row's place in x."""
    rows = tl.arange(0, ROWS)
    n = (hi - lo).to(x.dtype.element_ty)
    total = tl.zeros_like(tl.load(x + j, mask=live, other=0))
    start = lo
    while start < hi:
        r = start + rows
        some = (r < hi)[:, None] & live[None, :]
        total += tl.sum(tl.load(x + (at + r)[:, None].to(tl.int64) * stride + j[None, :], mask=some, other=0), 0)
        start += ROWS
    mean = total / n
    total = tl.zeros_like(mean)
    start = lo
    while start < hi:
        r = start + rows
        some = (r < hi)[:, None] & live[None, :]
        value = tl.load(x + (at + r)[:, None].to(tl.int64) * stride + j[None, :], mask=some, other=0)
        d = tl.where(some, value - mean[None, :], 0)
        total += tl.sum(d * d, 0)
        start += ROWS
    return mean, total / n


@triton.jit
def _statistics(x, at, stride, lo, hi, g, source, mean, var, k, width, j, live, eps, ROWS: tl.constexpr):
    """A group's own statistics or its source's, stored for g where they are not given; mean and 1 / sqrt(var + eps)."""
    column = k * width + j
    if source == g:
        m, v = _moments(x + k * width, at, stride, lo, hi, j, live, ROWS)
    else:
        from_ = tl.where(source >= 0, source, g).to(tl.int64)
        m = tl.load(mean + from_ * stride + column, mask=live, other=0)
        v = tl.load(var + from_ * stride + column, mask=live, other=1)
    tl.store(mean + g.to(tl.int64) * stride + column, m, mask=live)
    tl.store(var + g.to(tl.int64) * stride + column, v, mask=live)
    return m, 1 / tl.sqrt(v + eps)


@triton.jit
def _load(x, at, j, some):
    return tl.load(x + at[:, None] + j[None, :], mask=some, other=0)


@triton.jit(do_not_specialize=_SIZES)
def step_forward(
    a,
    outside,
    previous,
    sources,
    gamma_h,
    gamma_c,
    beta_c,
    mean_h,
    var_h,
    mean_c,
    var_c,
    c,
    h,
    lo,
    hi,
    g,
    entering,
    width,
    eps,
    OF_H: tl.constexpr,
    OF_C: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Statistics, gates, c and h of rows lo..hi, for ``BLOCK`` hidden units."""
    j = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = j < width
    lo, hi, g = tl.cast(lo, tl.int32), tl.cast(hi, tl.int32), tl.cast(g, tl.int32)
    source = tl.load(sources + g).to(tl.int32)
    four = 4 * width
    zero = tl.zeros_like(tl.load(a + j, mask=live, other=0))
    m_i, m_f, m_g, m_o = zero, zero, zero, zero
    s_i, s_f, s_g, s_o = zero + 1, zero + 1, zero + 1, zero + 1
    if OF_H:
        m_i, s_i = _statistics(a, 0, four, lo, hi, g, source, mean_h, var_h, 0, width, j, live, eps, ROWS)
        m_f, s_f = _statistics(a, 0, four, lo, hi, g, source, mean_h, var_h, 1, width, j, live, eps, ROWS)
        m_g, s_g = _statistics(a, 0, four, lo, hi, g, source, mean_h, var_h, 2, width, j, live, eps, ROWS)
        m_o, s_o = _statistics(a, 0, four, lo, hi, g, source, mean_h, var_h, 3, width, j, live, eps, ROWS)
        s_i *= tl.load(gamma_h + j, mask=live, other=0)
        s_f *= tl.load(gamma_h + width + j, mask=live, other=0)
        s_g *= tl.load(gamma_h + 2 * width + j, mask=live, other=0)
        s_o *= tl.load(gamma_h + 3 * width + j, mask=live, other=0)
    rows = tl.arange(0, ROWS)
    start = lo
    while start < hi:
        r = (start + rows).to(tl.int64)
        some = (r < hi)[:, None] & live[None, :]
        at = r * four
        i = tl.sigmoid((_load(a, at, j, some) - m_i[None, :]) * s_i[None, :] + _load(outside, at, j, some))
        at += width
        f = tl.sigmoid((_load(a, at, j, some) - m_f[None, :]) * s_f[None, :] + _load(outside, at, j, some))
        at += width
        new = _tanh((_load(a, at, j, some) - m_g[None, :]) * s_g[None, :] + _load(outside, at, j, some))
        at += width
        o = tl.sigmoid((_load(a, at, j, some) - m_o[None, :]) * s_o[None, :] + _load(outside, at, j, some))
        before = tl.load(previous + r, mask=r < hi, other=0) * width
        after = f * _load(c, before, j, some) + i * new
        place = (entering + r) * width
        tl.store(c + place[:, None] + j[None, :], after, mask=some)
        if not OF_C:
            o *= _tanh(after)
        tl.store(h + place[:, None] + j[None, :], o, mask=some)  # o alone until c has statistics
        start += ROWS
    if OF_C:
        tl.debug_barrier()  # rows of c and h are read again by other threads
        mean, scale = _statistics(c, entering, width, lo, hi, g, source, mean_c, var_c, 0, width, j, live, eps, ROWS)
        scale *= tl.load(gamma_c + j, mask=live, other=0)
        beta = tl.load(beta_c + j, mask=live, other=0)
        start = lo
        while start < hi:
            r = (start + rows).to(tl.int64)
            some = (r < hi)[:, None] & live[None, :]
            place = (entering + r) * width
            squashed = _tanh((_load(c, place, j, some) - mean[None, :]) * scale[None, :] + beta[None, :])
            tl.store(h + place[:, None] + j[None, :], _load(h, place, j, some) * squashed, mask=some)
            start += ROWS


@triton.jit
def _through_statistics(
    grad,
    grad_at,
    grad_stride,
    x,
    x_at,
    lo,
    hi,
    g,
    source,
    gamma,
    mean,
    var,
    inv,
    eps,
    owed,
    total_gamma,
    total_beta,
    out,
    k,
    stride,
    width,
    j,
    live,
    ADD: tl.constexpr,
    HAS_BETA: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Rows of grad back through a normalization of the rows of x; see :mod:`seqbatch.rnn.norm_kernels`."""
    rows = tl.arange(0, ROWS)
    column = k * width + j
    plain, along = tl.zeros_like(mean), tl.zeros_like(mean)
    start = lo
    while start < hi:
        r = (start + rows).to(tl.int64)
        some = (r < hi)[:, None] & live[None, :]
        d = _load(grad, (grad_at + r) * grad_stride + k * width, j, some)
        value = (_load(x, (x_at + r) * stride + k * width, j, some) - mean[None, :]) * inv[None, :]
        plain += tl.sum(d, 0)
        along += tl.sum(tl.where(some, d * value, 0), 0)
        start += ROWS
    so_far = tl.load(total_gamma + column, mask=live, other=0)
    tl.store(total_gamma + column, so_far + along, mask=live)
    if HAS_BETA:
        so_far = tl.load(total_beta + column, mask=live, other=0)
        tl.store(total_beta + column, so_far + plain, mask=live)
    if source >= 0:
        plain += tl.load(owed + column, mask=live, other=0)
        along += tl.load(owed + stride + column, mask=live, other=0)
        taken = source == g
        tl.store(owed + column, tl.where(taken, 0, plain), mask=live)
        tl.store(owed + stride + column, tl.where(taken, 0, along), mask=live)
    n = (hi - lo).to(mean.dtype)
    own = tl.where(source == g, 1 / n, 0)
    plain *= own
    along *= own
    flat = tl.minimum(eps * eps, 1e-10)
    inv = tl.where((source == g) & (var <= flat), 0, inv)  # rows that are equal: see the reference
    start = lo
    while start < hi:
        r = (start + rows).to(tl.int64)
        some = (r < hi)[:, None] & live[None, :]
        d = _load(grad, (grad_at + r) * grad_stride + k * width, j, some)
        place = (x_at + r) * stride + k * width
        value = (_load(x, place, j, some) - mean[None, :]) * inv[None, :]
        found = gamma[None, :] * inv[None, :] * (d - plain[None, :] - value * along[None, :])
        if ADD:
            found += _load(out, place, j, some)
        tl.store(out + place[:, None] + j[None, :], found, mask=some)
        start += ROWS


@triton.jit
def _gate_back(
    a,
    grad_outside,
    gamma_h,
    mean_h,
    var_h,
    owed_h,
    total_h,
    grad_a,
    lo,
    hi,
    g,
    source,
    k,
    width,
    j,
    live,
    eps,
    ROWS: tl.constexpr,
):
    four = 4 * width
    column = k * width + j
    mean = tl.load(mean_h + g.to(tl.int64) * four + column, mask=live, other=0)
    var = tl.load(var_h + g.to(tl.int64) * four + column, mask=live, other=1)
    inv = 1 / tl.sqrt(var + eps)
    gamma = tl.load(gamma_h + column, mask=live, other=0)
    _through_statistics(
        grad_outside, 0, four, a, 0, lo, hi, g, source, gamma, mean, var, inv, eps, owed_h, total_h, total_h, grad_a,
        k, four, width, j, live, False, False, ROWS,
    )  # fmt: skip


@triton.jit
def _pre(a, outside, gamma_h, mean_h, var_h, r, g, k, width, j, live, some, eps, OF_H: tl.constexpr):
    """What gate k of rows r is the sigmoid or tanh of, computed again."""
    four = 4 * width
    column = k * width + j
    value = _load(a, r * four + k * width, j, some)
    if OF_H:
        at = g.to(tl.int64) * four + column
        scale = tl.load(gamma_h + column, mask=live, other=0) / tl.sqrt(tl.load(var_h + at, mask=live, other=1) + eps)
        value = (value - tl.load(mean_h + at, mask=live, other=0)[None, :]) * scale[None, :]
    return value + _load(outside, r * four + k * width, j, some)


@triton.jit(do_not_specialize=_SIZES)
def step_backward(
    a,
    outside,
    c,
    previous,
    sources,
    gamma_h,
    gamma_c,
    beta_c,
    mean_h,
    var_h,
    mean_c,
    var_c,
    owed_h,
    owed_c,
    total_h,
    total_c,
    total_beta,
    grad_h,
    grad_c,
    grad_outside,
    grad_a,
    lo,
    hi,
    g,
    entering,
    width,
    eps,
    OF_H: tl.constexpr,
    OF_C: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """From the gradients of h and c of rows lo..hi to those of outside, a and the c before, for some units."""
    j = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = j < width
    lo, hi, g = tl.cast(lo, tl.int32), tl.cast(hi, tl.int32), tl.cast(g, tl.int32)
    source = tl.load(sources + g).to(tl.int32)
    four = 4 * width
    rows = tl.arange(0, ROWS)
    mean = tl.zeros_like(tl.load(c + j, mask=live, other=0))
    inv, var, gamma, beta = mean + 1, mean + 1, mean + 1, mean
    if OF_C:
        mean = tl.load(mean_c + g.to(tl.int64) * width + j, mask=live, other=0)
        var = tl.load(var_c + g.to(tl.int64) * width + j, mask=live, other=1)
        inv = 1 / tl.sqrt(var + eps)
        gamma = tl.load(gamma_c + j, mask=live, other=0)
        beta = tl.load(beta_c + j, mask=live, other=0)
    start = lo
    while start < hi:
        r = (start + rows).to(tl.int64)
        some = (r < hi)[:, None] & live[None, :]
        place = (entering + r) * width
        value = _load(c, place, j, some)
        if OF_C:
            value = (value - mean[None, :]) * inv[None, :] * gamma[None, :] + beta[None, :]
        squashed = _tanh(value)
        d_h = _load(grad_h, place, j, some)
        o = tl.sigmoid(_pre(a, outside, gamma_h, mean_h, var_h, r, g, 3, width, j, live, some, eps, OF_H))
        tl.store(grad_outside + (r * four + 3 * width)[:, None] + j[None, :], d_h * squashed * o * (1 - o), mask=some)
        d_h = d_h * o * (1 - squashed * squashed)
        if OF_C:
            tl.store(grad_h + place[:, None] + j[None, :], d_h, mask=some)
        else:
            tl.store(grad_c + place[:, None] + j[None, :], _load(grad_c, place, j, some) + d_h, mask=some)
        start += ROWS
    tl.debug_barrier()
    if OF_C:
        _through_statistics(
            grad_h, entering, width, c, entering, lo, hi, g, source, gamma, mean, var, inv, eps, owed_c, total_c,
            total_beta, grad_c, 0, width, width, j, live, True, True, ROWS,
        )  # fmt: skip
        tl.debug_barrier()
    start = lo
    while start < hi:
        r = (start + rows).to(tl.int64)
        some = (r < hi)[:, None] & live[None, :]
        at = r * four
        d_c = _load(grad_c, (entering + r) * width, j, some)
        before = tl.load(previous + r, mask=r < hi, other=0) * width
        i = tl.sigmoid(_pre(a, outside, gamma_h, mean_h, var_h, r, g, 0, width, j, live, some, eps, OF_H))
        f = tl.sigmoid(_pre(a, outside, gamma_h, mean_h, var_h, r, g, 1, width, j, live, some, eps, OF_H))
        new = _tanh(_pre(a, outside, gamma_h, mean_h, var_h, r, g, 2, width, j, live, some, eps, OF_H))
        out = grad_outside + at[:, None] + j[None, :]
        tl.store(out, d_c * new * i * (1 - i), mask=some)
        tl.store(out + width, d_c * _load(c, before, j, some) * f * (1 - f), mask=some)
        tl.store(out + 2 * width, d_c * i * (1 - new * new), mask=some)
        onto = grad_c + before[:, None] + j[None, :]  # rows of a group have different predecessors
        tl.store(onto, tl.load(onto, mask=some, other=0) + d_c * f, mask=some)
        start += ROWS
    if OF_H:
        tl.debug_barrier()
        for k in tl.static_range(4):
            _gate_back(
                a, grad_outside, gamma_h, mean_h, var_h, owed_h, total_h, grad_a,
                lo, hi, g, source, k, width, j, live, eps, ROWS,
            )  # fmt: skip
