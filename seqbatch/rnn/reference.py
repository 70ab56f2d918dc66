"""The recurrent layers in plain torch: the specification that every fast implementation is tested against.

Everything here is a loop over time steps of differentiable operations, on any device and in any
floating dtype, as slow as it is plain. The fast paths use it in two places only: for double backward
and for the LSTM calls that stock kernels cannot express.

What the flags mean, in both directions:

* ``reset[t, b]``: lane b starts a new piece at step t. The forward direction clears its state before
  step t; the reverse direction clears its state after step t, before it goes on to step t - 1.
  At step 0 a reset also discards the initial state of the forward direction.
* ``mask[t, b]`` false: the step is padding. The state is held, the output is 0, and no gradient flows.
* States are selected (``torch.where``), never multiplied by 0, so that NaN does not cross a reset.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

__all__ = ["ACTIVATIONS", "carry_dtype", "lstm_layer", "sru_scan"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"identity": lambda c: c, "tanh": torch.tanh, "relu": torch.relu}


def carry_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a state is carried through time: at least float32.

    >>> carry_dtype(torch.bfloat16), carry_dtype(torch.float64)
    (torch.float32, torch.float64)
    """
    return torch.promote_types(dtype, torch.float32)


def sru_scan(
    u: Tensor,
    skip: Tensor | None,
    weight_c: Tensor | None,
    bias: Tensor | None,
    initial: Tensor,
    dropout: Tensor | None = None,
    reset: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    activation: str = "identity",
    bidirectional: bool = False,
    scale: float = 1.0,
    dropout_inside: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The recurrence of SRU (Lei et al., arXiv 1709.02755): all of the layer but its matrix product.

    Per column, with c* the state before the step (0 after a reset)::

        f   = sigmoid(u_f + v_f c* + b_f)        r = sigmoid(u_r + v_r c* + b_r)
        c   = f c* + (1 - f) z
        h   = (m g(c) - s) r + s     with dropout_inside (code of 2017), else     h = (g(c) - s) m r + s

    Args:
        u: (T, B, k, H) or flat (S, k, H) planes z, u_f, u_r and for k = 4 the skip s. H counts the
            columns of all directions, the reverse direction in the upper half.
        skip: (T, B, H) or (S, H): the skip is ``scale * skip`` for k = 3; None with k = 3: no skip.
        weight_c: (2, H), v_f and v_r; None: 0, the form of 2017.
        bias: (2, H), b_f and b_r; None: 0.
        initial: (B, H) or (N, H), the state before the first step (reverse direction: after the last).
        dropout: (B, H) or (N, H), m, constant over time; None: 1.
        reset: (T, B) bool or None.
        mask: (T, B) bool or None.
        cu_seqlens: (N + 1,) integers that cut the flat form into sequences; None for the padded form.
        activation: g, a key of ``ACTIVATIONS``.
        bidirectional: Whether the upper half of the columns walks back in time.
        scale: alpha of the skip for k = 3.
        dropout_inside: Where the dropout mask stands, see above.

    Returns:
        h like u without its k axis and in its dtype; c, all states, and last, the state after the last
        step (like ``initial``), both in ``carry_dtype``.

    >>> u, zero = torch.zeros(3, 1, 3, 2), torch.zeros(1, 2)
    >>> u[:, :, 0] = 1.0  # z = 1, f = r = 1/2
    >>> sru_scan(u, None, None, None, zero)[1][:, 0, 0].tolist()
    [0.5, 0.75, 0.875]
    """
    carry, out = carry_dtype(u.dtype), u.dtype
    u, initial = u.to(carry), initial.to(carry)
    if u.shape[-2] == 4:
        skip = u[..., 3, :]
    elif skip is not None:
        skip = scale * skip.to(carry)
    if cu_seqlens is not None:
        offsets, pieces = cu_seqlens.tolist(), []
        for n, (start, end) in enumerate(pairwise(offsets)):
            pieces.append(
                _both_directions(
                    u[start:end, None],
                    None if skip is None else skip[start:end, None],
                    (weight_c, bias),
                    initial[n : n + 1],
                    None if dropout is None else dropout[n : n + 1],
                    (None, None),
                    (activation, bidirectional, dropout_inside),
                )
            )
        empty = u[:0, 0]
        h = torch.cat([empty, *(h[:, 0] for h, _, _ in pieces)])
        c = torch.cat([empty, *(c[:, 0] for _, c, _ in pieces)])
        return h.to(out), c, torch.cat([initial[:0], *(last for _, _, last in pieces)])
    h, c, last = _both_directions(
        u, skip, (weight_c, bias), initial, dropout, (reset, mask), (activation, bidirectional, dropout_inside)
    )
    return h.to(out), c, last


def _both_directions(
    u: Tensor,
    skip: Tensor | None,
    parameters: tuple[Tensor | None, Tensor | None],
    initial: Tensor,
    dropout: Tensor | None,
    flags: tuple[Tensor | None, Tensor | None],
    settings: tuple[str, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    activation, bidirectional, dropout_inside = settings
    weight_c, bias = parameters
    width = u.shape[-1] // (1 + bidirectional)
    results = []
    for reverse in range(1 + bidirectional):
        columns = slice(reverse * width, (reverse + 1) * width)

        def part(x: Tensor | None, columns: slice = columns) -> Tensor | None:
            return None if x is None else x[..., columns]

        results.append(
            _walk(
                u[..., columns],
                part(skip),
                (part(weight_c), part(bias)),
                initial[..., columns],
                part(dropout),
                flags,
                (activation, bool(reverse), dropout_inside),
            )
        )
    h, c, last = (torch.cat(parts, -1) for parts in zip(*results, strict=True))
    return h, c, last


def _walk(
    u: Tensor,
    skip: Tensor | None,
    parameters: tuple[Tensor | None, Tensor | None],
    c: Tensor,
    dropout: Tensor | None,
    flags: tuple[Tensor | None, Tensor | None],
    settings: tuple[str, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """One direction of the padded form: (T, B, k, d) -> h and c (T, B, d), last (B, d)."""
    activation, reverse, dropout_inside = settings
    g = ACTIVATIONS[activation]
    v_f, v_r = (0.0, 0.0) if parameters[0] is None else parameters[0].to(u.dtype).unbind()
    b_f, b_r = (0.0, 0.0) if parameters[1] is None else parameters[1].to(u.dtype).unbind()
    m = torch.ones_like(c) if dropout is None else dropout.to(u.dtype)
    clear, real = _steps(flags, reverse)
    if real is not None:  # what padding holds must not reach a derivative, not even as 0 * NaN
        u = torch.where(flags[1][..., None, None], u, 0.0)  # type: ignore[index]
        skip = None if skip is None else torch.where(flags[1][..., None], skip, 0.0)  # type: ignore[index]
    peephole = parameters[0] is not None
    states, outputs = {}, {}
    for t in reversed(range(len(u))) if reverse else range(len(u)):
        if clear is not None:
            c = torch.where(clear[t], 0.0, c)
        z, u_f, u_r = u[t, :, 0], u[t, :, 1], u[t, :, 2]
        f = torch.sigmoid(u_f + v_f * c + b_f if peephole else u_f + b_f)
        r = torch.sigmoid(u_r + v_r * c + b_r if peephole else u_r + b_r)
        new = f * c + (1 - f) * z
        s = torch.zeros_like(new) if skip is None else skip[t]
        h = (m * g(new) - s) * r + s if dropout_inside else (g(new) - s) * (m * r) + s
        c = new if real is None else torch.where(real[t], new, c)
        outputs[t] = h if real is None else torch.where(real[t], h, 0.0)
        states[t] = c
    steps = range(len(u))
    if not steps:
        return u[:, :, 0], u[:, :, 0], c
    return torch.stack([outputs[t] for t in steps]), torch.stack([states[t] for t in steps]), c


def _steps(flags: tuple[Tensor | None, Tensor | None], reverse: bool) -> tuple[Tensor | None, Tensor | None]:
    """Where a direction clears its state before a step, and which steps are real, (T, B, 1) each."""
    reset, mask = flags
    if reset is not None:
        if reverse:  # the piece that starts at t + 1 was walked before step t
            reset = torch.cat([reset[1:], torch.zeros_like(reset[:1])])
        reset = reset[..., None]
    return reset, None if mask is None else mask[..., None]


def lstm_layer(
    x: Tensor,
    h: Tensor,
    c: Tensor,
    weights: tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None],
    reset: Tensor | None = None,
    mask: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """One direction of one LSTM layer, with ``torch.nn.LSTM``'s equations and weight layout.

    Args:
        x: (T, B, D) input.
        h: (B, P) output before the first step; P is the hidden size, or the projection's.
        c: (B, H) state before the first step.
        weights: weight_ih (4H, D), weight_hh (4H, P), bias_ih and bias_hh (4H,) or None, and the
            projection weight_hr (P, H) or None.
        reset: (T, B) bool or None.
        mask: (T, B) bool or None.
        reverse: Walk back in time.

    Returns:
        The output (T, B, P), the last h (B, P) and the last c (B, H).

    >>> cell = torch.nn.LSTM(3, 2)
    >>> x, zero = torch.ones(4, 1, 3), torch.zeros(1, 2)
    >>> weights = (cell.weight_ih_l0, cell.weight_hh_l0, cell.bias_ih_l0, cell.bias_hh_l0, None)
    >>> torch.allclose(lstm_layer(x, zero, zero, weights)[0], cell(x)[0], atol=1e-6)
    True
    """
    w_ih, w_hh, b_ih, b_hh, w_hr = weights
    clear, real = _steps((reset, mask), reverse)
    if real is not None:
        x = torch.where(real, x, 0.0)
    inputs = torch.nn.functional.linear(x, w_ih, b_ih)
    outputs = {}
    for t in reversed(range(len(x))) if reverse else range(len(x)):
        if clear is not None:
            h, c = torch.where(clear[t], 0.0, h), torch.where(clear[t], 0.0, c)
        i, f, g, o = (inputs[t] + torch.nn.functional.linear(h, w_hh, b_hh)).chunk(4, -1)
        new_c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        new_h = torch.sigmoid(o) * torch.tanh(new_c)
        new_h = new_h if w_hr is None else torch.nn.functional.linear(new_h, w_hr)
        outputs[t] = new_h if real is None else torch.where(real[t], new_h, 0.0)
        h = new_h if real is None else torch.where(real[t], new_h, h)
        c = new_c if real is None else torch.where(real[t], new_c, c)
    return torch.stack([outputs[t] for t in range(len(x))]), h, c
