"""The SRU recurrence on CUDA: two walks and a combination, in Triton.

Every program walks some columns of one direction through time. What it walks is either a whole lane
(or a whole sequence of the flat form), or, where there are too few columns to fill the device, one
chunk of a lane (or of the whole flat stream): then a first launch with ``SUMMARY`` finds the affine map
that each chunk applies to the state that enters it, :func:`combine` composes the maps, and a second
launch walks all chunks side by side. The backward is affine in the gradient that enters for every cell;
the forward only where the gates do not see the state (v1).

The loads of ``UNROLL`` steps are issued before any of them is used: they do not depend on the carried
value, so that enough bytes are in flight to use the memory's bandwidth. States are selected at resets,
not multiplied by 0. Row numbers are 64-bit. Nothing is added atomically: results are deterministic.

Shapes: u (R, k, H); skip, h, c (R, H); weight_c, bias (2, H); initial, dropout, last (N, H); reset, mask
(R,) bytes; offsets (N + 1,); segment (R,) int32, the sequence of each row of the flat form.
"""

import triton
import triton.language as tl

__all__ = ["backward", "combine", "forward"]

_SIZES = ["steps", "lanes", "chunk"]  # 1 and multiples of 16 are no cases of their own


@triton.jit
def _span(offsets, steps, lanes, chunk, reverse, FLAT: tl.constexpr, CHUNKED: tl.constexpr):
    """Which rows a program walks: the row of position 0, the rows from step to step, first and last position."""
    program = tl.program_id(0).to(tl.int64)
    steps = tl.cast(steps, tl.int64)
    lanes = tl.cast(lanes, tl.int64)
    first = program
    stride = lanes
    length = steps
    begin = program * 0
    end = steps
    if CHUNKED:
        chunks = tl.cdiv(steps, chunk)
        first = program // chunks
        begin = (program % chunks) * chunk
        end = tl.minimum(begin + chunk, steps)
        if FLAT:
            stride = first * 0 + 1
    elif FLAT:
        first = tl.load(offsets + program).to(tl.int64)
        length = tl.load(offsets + program + 1).to(tl.int64) - first
        stride = first * 0 + 1
        end = length
    row = tl.where(reverse, first + (length - 1) * stride, first)
    return row, tl.where(reverse, -stride, stride), begin, end, length


@triton.jit
def _activate(c, KIND: tl.constexpr):
    if KIND == 1:
        c = 2 * tl.sigmoid(2 * c) - 1
    elif KIND == 2:
        c = tl.where(c < 0, 0.0, c)  # NaN stays
    return c


@triton.jit
def _slope(g, KIND: tl.constexpr):
    slope = g * 0 + 1
    if KIND == 1:
        slope = 1 - g * g
    elif KIND == 2:
        slope = tl.where(g == 0, 0.0, 1.0).to(g.dtype)
    return slope


@triton.jit
def _flag(flags, at, live, HAS: tl.constexpr):
    found = live & False
    if HAS:
        found = tl.load(flags + at, mask=live, other=0) != 0
    return found


@triton.jit(do_not_specialize=_SIZES)
def forward(
    u, skip, weight_c, bias, initial, dropout, reset, mask, offsets, segment, entering, h, c, last, product, cleared,
    steps, lanes, chunk, width,
    SCALE: tl.constexpr, PLANES: tl.constexpr, HAS_SKIP: tl.constexpr, PEEPHOLE: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, HAS_RESET: tl.constexpr, HAS_MASK: tl.constexpr, FLAT: tl.constexpr,
    CHUNKED: tl.constexpr, SUMMARY: tl.constexpr, KIND: tl.constexpr, INSIDE: tl.constexpr, TWO: tl.constexpr,
    KEEP: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Walk through time and fill h, c and last; with SUMMARY only last, product and cleared.

    A chunk's map is c_out = product * c_in + last, or last where ``cleared``; each has a row per program.
    """
    CARRY: tl.constexpr = c.dtype.element_ty
    blocks = tl.cdiv(width, BLOCK)
    reverse = (tl.program_id(1) // blocks) == 1
    column = (tl.program_id(1) % blocks) * BLOCK + tl.arange(0, BLOCK)
    real_column = column < width
    column += tl.where(reverse, width, 0)
    total = width * (2 if TWO else 1)
    row0, stride, begin, end, length = _span(offsets, steps, lanes, chunk, reverse, FLAT, CHUNKED)
    program = tl.program_id(0).to(tl.int64)
    lane = program
    if CHUNKED:
        lane = program // tl.cdiv(steps, chunk)

    b_f = tl.zeros([BLOCK], CARRY)
    b_r = b_f
    v_f = b_f
    v_r = b_f
    m = b_f + 1
    carry = b_f
    a = b_f + 1
    any_cut = begin < 0
    if HAS_BIAS:
        b_f = tl.load(bias + column, real_column, 0).to(CARRY)
        b_r = tl.load(bias + total + column, real_column, 0).to(CARRY)
    if PEEPHOLE:
        v_f = tl.load(weight_c + column, real_column, 0).to(CARRY)
        v_r = tl.load(weight_c + total + column, real_column, 0).to(CARRY)
    if HAS_DROPOUT and not (FLAT and CHUNKED):
        m = tl.load(dropout + lane * total + column, real_column, 0).to(CARRY)
    if not SUMMARY:
        carry = tl.load(entering + program * total + column, real_column, 0).to(CARRY)

    at = begin
    while at < end:
        zs = ()
        fs = ()
        rs = ()
        ss = ()
        for i in tl.static_range(UNROLL):
            row = row0 + (at + i) * stride
            live = real_column & (at + i < end)
            planes = u + row * PLANES * total + column
            zs += (tl.load(planes, live, 0),)
            fs += (tl.load(planes + total, live, 0),)
            rs += (tl.load(planes + 2 * total, live, 0),)
            if PLANES == 4:
                ss += (tl.load(planes + 3 * total, live, 0),)
            elif HAS_SKIP:
                ss += (tl.load(skip + row * total + column, live, 0),)
            else:
                ss += (b_f,)
        for i in tl.static_range(UNROLL):
            position = at + i
            row = row0 + position * stride
            live = position < end
            marked = tl.where(reverse, row - stride, row)  # a reset is at the first step of a piece
            cut = _flag(reset, marked, live & ((position > 0) | (reverse == 0)), HAS_RESET)
            real = live & (_flag(mask, row, live, HAS_MASK) | (HAS_MASK == 0))
            before = tl.where(cut, 0.0, carry)
            if FLAT and CHUNKED:
                here = tl.load(segment + row, live, 0).to(tl.int64)
                previous = tl.load(segment + row - stride, live & (position > 0), -1).to(tl.int64)
                following = tl.load(segment + row + stride, live & (position + 1 < length), -1).to(tl.int64)
                start = live & (here != previous)
                before = tl.load(initial + here * total + column, real_column & start, 0).to(CARRY) + tl.where(
                    start, 0.0, before
                )
                cut = start
                if HAS_DROPOUT:
                    fresh = start | (position == begin)
                    m = tl.where(fresh, tl.load(dropout + here * total + column, real_column & fresh, 0).to(CARRY), m)
            z = zs[i].to(CARRY)
            f = tl.sigmoid(fs[i].to(CARRY) + b_f + v_f * before if PEEPHOLE else fs[i].to(CARRY) + b_f)
            now = f * before + (1 - f) * z
            now = tl.where(real, now, before)
            if SUMMARY:
                a = tl.where(cut, 0.0, tl.where(real, a * f, a))
                any_cut = any_cut | cut
            else:
                r = tl.sigmoid(rs[i].to(CARRY) + b_r + v_r * before if PEEPHOLE else rs[i].to(CARRY) + b_r)
                s = ss[i].to(CARRY)
                if PLANES == 3:
                    s = s * SCALE
                if PLANES == 3 and not HAS_SKIP:
                    s = tl.zeros([BLOCK], CARRY)
                g = _activate(now, KIND)
                out = (m * g - s) * r + s if INSIDE else (g - s) * (m * r) + s
                out = tl.where(real, out, 0.0)
                tl.store(h + row * total + column, out.to(h.dtype.element_ty), real_column & live)
                if KEEP:
                    tl.store(c + row * total + column, now, real_column & live)
                if FLAT and CHUNKED:
                    tl.store(last + here * total + column, now, real_column & live & (here != following))
            carry = tl.where(live, now, carry)
        at += UNROLL

    if SUMMARY:
        tl.store(product + program * total + column, a, real_column)
        tl.store(last + program * total + column, carry, real_column)
        tl.store(cleared + program * (2 if TWO else 1) + reverse.to(tl.int64), any_cut.to(tl.int8))
    elif not CHUNKED:
        tl.store(last + program * total + column, carry, real_column)
    elif not FLAT:
        tl.store(last + lane * total + column, carry, real_column & (end == length))


@triton.jit(do_not_specialize=["chunks"])
def combine(entering, leaving, product, constant, cleared, chunks, width,
            BACKWARD: tl.constexpr, TWO: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr):  # fmt: skip
    """Compose the maps of a lane's chunks: what enters each of them.

    entering, product, constant: (lanes * chunks, H); leaving: (lanes, H), what enters the first chunk (the
    last one with BACKWARD); cleared: (lanes * chunks, directions) bytes.
    """
    lane = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(width, BLOCK)
    reverse = tl.program_id(1) // blocks
    column = (tl.program_id(1) % blocks) * BLOCK + tl.arange(0, BLOCK)
    real = column < width
    column += reverse * width
    DIRECTIONS: tl.constexpr = 2 if TWO else 1
    total = width * DIRECTIONS
    carry = tl.load(leaving + lane * total + column, real, 0)
    at = lane * 0
    while at < chunks:
        factors = ()
        terms = ()
        flags = ()
        for i in tl.static_range(UNROLL):
            place = lane * chunks + (chunks - 1 - at - i if BACKWARD else at + i)
            live = at + i < chunks
            factors += (tl.load(product + place * total + column, real & live, 0),)
            terms += (tl.load(constant + place * total + column, real & live, 0),)
            flags += (tl.load(cleared + place * DIRECTIONS + reverse, live, 0) != 0,)
        for i in tl.static_range(UNROLL):
            place = lane * chunks + (chunks - 1 - at - i if BACKWARD else at + i)
            tl.store(entering + place * total + column, carry, real & (at + i < chunks))
            # A product of v2's slopes may overflow; times the 0 of steps without loss it must not be NaN.
            carry = tl.where(flags[i] | (carry == 0), terms[i], factors[i] * carry + terms[i])
        at += UNROLL


@triton.jit(do_not_specialize=_SIZES)
def backward(
    u, skip, weight_c, bias, initial, dropout, reset, mask, offsets, segment, c, grad_h, grad_last, entering,
    grad_u, grad_skip, grad_initial, sums, product, constant, cleared,
    steps, lanes, chunk, width,
    SCALE: tl.constexpr, PLANES: tl.constexpr, HAS_SKIP: tl.constexpr, PEEPHOLE: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, HAS_RESET: tl.constexpr, HAS_MASK: tl.constexpr, FLAT: tl.constexpr,
    CHUNKED: tl.constexpr, SUMMARY: tl.constexpr, KIND: tl.constexpr, INSIDE: tl.constexpr, TWO: tl.constexpr,
    BLOCK: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Walk the other way and fill the gradients; sums has (b_f, b_r and with PEEPHOLE v_f, v_r) per program."""
    CARRY: tl.constexpr = c.dtype.element_ty
    blocks = tl.cdiv(width, BLOCK)
    reverse = (tl.program_id(1) // blocks) == 1
    column = (tl.program_id(1) % blocks) * BLOCK + tl.arange(0, BLOCK)
    real_column = column < width
    column += tl.where(reverse, width, 0)
    total = width * (2 if TWO else 1)
    row0, stride, begin, end, length = _span(offsets, steps, lanes, chunk, reverse, FLAT, CHUNKED)
    program = tl.program_id(0).to(tl.int64)
    lane = program
    if CHUNKED:
        lane = program // tl.cdiv(steps, chunk)

    b_f = tl.zeros([BLOCK], CARRY)
    b_r = b_f
    v_f = b_f
    v_r = b_f
    sum_bf = b_f
    sum_br = b_f
    sum_vf = b_f
    sum_vr = b_f
    m = b_f + 1
    carry = b_f
    a = b_f + 1
    any_cut = begin < 0
    if HAS_BIAS:
        b_f = tl.load(bias + column, real_column, 0).to(CARRY)
        b_r = tl.load(bias + total + column, real_column, 0).to(CARRY)
    if PEEPHOLE:
        v_f = tl.load(weight_c + column, real_column, 0).to(CARRY)
        v_r = tl.load(weight_c + total + column, real_column, 0).to(CARRY)
    if HAS_DROPOUT and not (FLAT and CHUNKED):
        m = tl.load(dropout + lane * total + column, real_column, 0).to(CARRY)
    if not SUMMARY:
        carry = tl.load(entering + program * total + column, real_column, 0).to(CARRY)
    now = tl.load(c + (row0 + (end - 1) * stride) * total + column, real_column & (end > begin), 0)

    at = end - 1
    while at >= begin:
        zs = ()
        fs = ()
        rs = ()
        ss = ()
        ds = ()
        cs = ()
        for i in tl.static_range(UNROLL):
            position = at - i
            row = row0 + position * stride
            live = real_column & (position >= begin)
            planes = u + row * PLANES * total + column
            zs += (tl.load(planes, live, 0),)
            fs += (tl.load(planes + total, live, 0),)
            rs += (tl.load(planes + 2 * total, live, 0),)
            ds += (tl.load(grad_h + row * total + column, live, 0),)
            cs += (tl.load(c + (row - stride) * total + column, live & (position > 0), 0),)
            if PLANES == 4:
                ss += (tl.load(planes + 3 * total, live, 0),)
            elif HAS_SKIP:
                ss += (tl.load(skip + row * total + column, live, 0),)
            else:
                ss += (b_f,)
        for i in tl.static_range(UNROLL):
            position = at - i
            row = row0 + position * stride
            live = position >= begin
            marked = tl.where(reverse, row - stride, row)  # a reset is at the first step of a piece
            cut = _flag(reset, marked, live & ((position > 0) | (reverse == 0)), HAS_RESET)
            real = live & (_flag(mask, row, live, HAS_MASK) | (HAS_MASK == 0))
            start = live & (position == 0)
            here = lane
            if FLAT and CHUNKED:
                here = tl.load(segment + row, live, 0).to(tl.int64)
                previous = tl.load(segment + row - stride, live & (position > 0), -1).to(tl.int64)
                following = tl.load(segment + row + stride, live & (position + 1 < length), -1).to(tl.int64)
                start = live & (here != previous)
                final = live & (here != following)
                carry = tl.where(
                    final, tl.load(grad_last + here * total + column, real_column & final, 0).to(CARRY), carry
                )
                a = tl.where(final, 0.0, a)
                any_cut = any_cut | final
                if HAS_DROPOUT:
                    fresh = final | (position == end - 1)
                    m = tl.where(fresh, tl.load(dropout + here * total + column, real_column & fresh, 0).to(CARRY), m)
            raw = tl.where(start, 0.0, cs[i])
            raw += tl.load(initial + here * total + column, real_column & start, 0).to(CARRY)
            before = tl.where(cut, 0.0, raw)
            z = zs[i].to(CARRY)
            d_h = ds[i].to(CARRY)
            f = tl.sigmoid(fs[i].to(CARRY) + b_f + v_f * before if PEEPHOLE else fs[i].to(CARRY) + b_f)
            r = tl.sigmoid(rs[i].to(CARRY) + b_r + v_r * before if PEEPHOLE else rs[i].to(CARRY) + b_r)
            s = ss[i].to(CARRY)
            if PLANES == 3:
                s = s * SCALE
            if PLANES == 3 and not HAS_SKIP:
                s = tl.zeros([BLOCK], CARRY)
            g = _activate(now, KIND)
            d_r = d_h * ((m * g - s) if INSIDE else (g - s) * m) * (r * (1 - r))
            into = carry + d_h * (m * r) * _slope(g, KIND)
            inner = (before - z) * (f * (1 - f))
            d_f = into * inner
            out = into * f
            slope = f
            if PEEPHOLE:
                out += d_f * v_f + d_r * v_r
                slope += inner * v_f
            out = tl.where(cut, 0.0, tl.where(real, out, carry))
            if SUMMARY:
                a = tl.where(cut, 0.0, tl.where(real, a * slope, a))
                any_cut = any_cut | cut
            else:
                grads = grad_u + row * PLANES * total + column
                kind = grad_u.dtype.element_ty
                d_s = d_h * ((1 - r) if INSIDE else (1 - m * r))
                d_f = tl.where(real, d_f, 0.0)
                d_r = tl.where(real, d_r, 0.0)
                d_s = tl.where(real, d_s, 0.0)
                stored = real_column & live
                tl.store(grads, tl.where(real, into * (1 - f), 0.0).to(kind), stored)
                tl.store(grads + total, d_f.to(kind), stored)
                tl.store(grads + 2 * total, d_r.to(kind), stored)
                if PLANES == 4:
                    tl.store(grads + 3 * total, d_s.to(kind), stored)
                elif HAS_SKIP:
                    tl.store(grad_skip + row * total + column, (d_s * SCALE).to(grad_skip.dtype.element_ty), stored)
                sum_bf += d_f
                sum_br += d_r
                if PEEPHOLE:
                    sum_vf += tl.where(real, d_f * before, 0.0)
                    sum_vr += tl.where(real, d_r * before, 0.0)
                if CHUNKED:
                    tl.store(grad_initial + here * total + column, out, real_column & start)
            now = tl.where(live, cs[i], now)
            carry = tl.where(live, out, carry)
        at -= UNROLL

    if SUMMARY:
        tl.store(product + program * total + column, a, real_column)
        tl.store(constant + program * total + column, carry, real_column)
        tl.store(cleared + program * (2 if TWO else 1) + reverse.to(tl.int64), any_cut.to(tl.int8))
    else:
        if not CHUNKED:
            tl.store(grad_initial + program * total + column, carry, real_column)
        place = sums + program * (4 if PEEPHOLE else 2) * total + column
        tl.store(place, sum_bf, real_column)
        tl.store(place + total, sum_br, real_column)
        if PEEPHOLE:
            tl.store(place + 2 * total, sum_vf, real_column)
            tl.store(place + 3 * total, sum_vr, real_column)
