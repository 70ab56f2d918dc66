"""``torch.nn.LSTM`` with resets, padding and flat input, on the stock kernels.

A reset becomes an inserted step whose one extra input feature closes the gates i, f and o, and padding
becomes steps that hold c (:mod:`seqbatch.rnn.flush`), so that cuDNN and oneDNN run lanes of equal length.
What they cannot express takes the reference path, a loop over steps, and says so.
"""

import sys
import warnings
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from seqbatch.rnn import reference
from seqbatch.rnn.calls import Call
from seqbatch.rnn.checks import check_offsets
from seqbatch.rnn.flush import Layout, holes, move

__all__ = ["LSTM", "SAVED_AT_LEAST", "SlowPathWarning", "ragged_ends"]

State = tuple[Tensor, Tensor]
Weights = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]
_SEGMENTS = 4  # pieces of time, each up to where another quarter of the lanes ends
SAVED_AT_LEAST = 2**18  # cells times units that must be saved: each piece more costs about a quarter of this
_CLOSED = 1e4  # closes gates exactly while |bias + W_hh h| stays below about 9,900; float16 can hold it


class SlowPathWarning(UserWarning):
    """An LSTM call ran as a loop over time steps, because stock kernels cannot express it."""


class LSTM(nn.LSTM):
    """``torch.nn.LSTM``: its constructor, shapes, parameters and state dict; its forward takes flags too.

    Without flags a call is ``torch.nn.LSTM``'s. The cost of resets is the inserted steps, as many as the
    largest number of resets after step 0 in any lane, and a few waits for the device: for that number, and
    to see that all is finite. ``cu_seqlens`` and ``PackedSequence`` run as padded lanes. A NaN in the data stays
    in its piece; a NaN in the *gradient* of an output reaches the pieces before it in the lane, since the stock
    backward multiplies by 0.

    >>> rnn = LSTM(3, 4, bidirectional=True)
    >>> reset = torch.zeros(5, 2, dtype=torch.bool)
    >>> reset[3, 0] = True  # lane 0 goes on with another sequence
    >>> output, (h, c) = rnn(torch.randn(5, 2, 3), reset=reset)
    >>> output.shape, h.shape
    (torch.Size([5, 2, 8]), torch.Size([2, 2, 4]))
    """

    def forward(  # type: ignore[override]
        self,
        input: Tensor | PackedSequence,
        hx: State | None = None,
        *,
        reset: Tensor | None = None,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor | PackedSequence, State]:
        """Run the layers.

        Args:
            input: What ``torch.nn.LSTM`` takes: (T, B, input_size), (B, T, input_size) with batch_first,
                (T, input_size) or a PackedSequence; or flat (S, input_size) with cu_seqlens.
            hx: (h, c), each (num_layers * directions, B, size), the state before the first step; N in place
                of B with cu_seqlens. None: 0. float32 states are converted to the layer's dtype.
            reset: (T, B) bool - (B, T) with batch_first, (T,) unbatched -, true at the first step of every
                piece: the state is cleared before it, in the reverse direction after it (at step 0 too late
                to change the state that the reverse direction returns).
            mask: Of the same shape, true on real tokens: elsewhere the state is held and the output is 0.
            cu_seqlens: (N + 1,) int32, from 0 to S: the sequences of a flat input.

        Returns:
            The output and (h, c) after the last step, as ``torch.nn.LSTM`` returns them, in its dtype (under
            autocast in autocast's).

        Raises:
            RuntimeError: Sizes or devices do not fit.
            ValueError: Dtypes, dimensions or flags do not fit.

        Warns:
            SlowPathWarning: Padding stands between real steps of one piece, or before the reverse
                direction's start while that has an initial h.
        """
        # Of packed lanes an initial h of the reverse direction is what only the stock kernels can start from.
        stock = not isinstance(input, PackedSequence) or (self.bidirectional and hx is not None)
        if stock and reset is None and mask is None and cu_seqlens is None:
            return super().forward(input, self._as_rows(input, hx))
        call = Call.of(
            "LSTM",
            input,
            reset,
            mask,
            cu_seqlens,
            weight=self.weight_ih_l0,  # type: ignore[arg-type]
            input_size=self.input_size,
            batch_first=self.batch_first,
        )
        state = self._initial(call, hx)
        if cu_seqlens is not None:
            output, state = self._run_flat(call.rows, cu_seqlens, state)
        else:
            output, state = self._run(call.rows, call.reset, call.mask, state)
        output, h, c = (x.to(call.result_dtype) for x in (output, *state))
        return call.close(output), (call.close_state(h), call.close_state(c))

    def _as_rows(self, input: Tensor | PackedSequence, hx: State | None) -> State | None:
        """A float32 state in the dtype of the input, which the stock kernels ask for outside autocast."""
        dtype = input.data.dtype
        if not isinstance(hx, tuple | list) or not all(isinstance(x, Tensor) and x.dtype == torch.float32 for x in hx):
            return hx
        return tuple(x.to(dtype) for x in hx) if dtype in (torch.float16, torch.bfloat16) else hx  # type: ignore[return-value]

    def _initial(self, call: Call, hx: State | None) -> State:
        layers, dtype = self.num_layers * (1 + self.bidirectional), call.rows.dtype
        shapes = [(layers, call.lanes, self.proj_size or self.hidden_size), (layers, call.lanes, self.hidden_size)]
        if hx is None:
            return call.rows.new_zeros(shapes[0]), call.rows.new_zeros(shapes[1])
        if not isinstance(hx, tuple | list) or len(hx) != 2:
            raise TypeError(f"hx must be (h, c), got {type(hx).__name__}")
        carry = reference.carry_dtype(dtype)
        h, c = (call.state(f"hx[{i}]", x, shape, carry) for i, (x, shape) in enumerate(zip(hx, shapes, strict=True)))
        return h.to(dtype), c.to(dtype)

    def _run_flat(self, rows: Tensor, cu_seqlens: Tensor, state: State) -> tuple[Tensor, State]:
        """Sequences as lanes, padded to the longest."""
        check_offsets(cu_seqlens, len(rows))
        offsets = cu_seqlens.long()
        lengths, lanes, width = offsets.diff(), len(offsets) - 1, self._output_size()
        if not len(rows):
            return rows.new_zeros(0, width), state
        steps = torch.arange(int(lengths.max()), device=rows.device)[:, None]
        mask = steps < lengths
        take = torch.where(mask, offsets[:-1] + steps, 0).flatten()
        tokens = torch.arange(len(rows), device=rows.device)
        lane = torch.searchsorted(offsets, tokens, right=True) - 1
        back, all_stay = (tokens - offsets[lane]) * lanes + lane, torch.ones_like(tokens, dtype=torch.bool)
        padded = move(rows, take, mask.flatten(), back, all_stay).view(len(steps), lanes, -1)
        output, state = self._run(padded, None, mask, state)
        flat = move(output.flatten(0, 1), back, all_stay, take, mask.flatten())
        return flat, state

    def _run(self, x: Tensor, reset: Tensor | None, mask: Tensor | None, state: State) -> tuple[Tensor, State]:
        if not x.shape[1]:
            return x.new_zeros(*x.shape[:2], self._output_size()), state
        may_be_ragged = not x.is_cuda and not self.bidirectional
        if mask is not None and may_be_ragged and (reset is None or not bool(reset[1:].any())):  # one sequence a lane
            lengths = mask.sum(0)
            worth = len(ragged_ends(lengths, len(x), self.hidden_size)) > 2
            if worth and bool((mask == (torch.arange(len(x), device=x.device)[:, None] < lengths)).all()):
                return self._run_ragged(x, mask, lengths, _cleared(state, reset))
        if mask is not None:  # padding may hold anything
            x = torch.where(mask[..., None], x, 0.0)
        return self._run_together(x, reset, mask, state)

    def _run_ragged(self, x: Tensor, mask: Tensor, lengths: Tensor, state: State) -> tuple[Tensor, State]:
        """Some steps at a time, the longest lanes first, without the lanes that have ended.

        On CPU a step costs what its lanes cost; on CUDA it is the number of steps that counts.
        """
        steps, lanes = mask.shape
        order = lengths.argsort(descending=True, stable=True)
        rank, row = order.argsort(), torch.arange(steps, device=x.device)[:, None] * lanes
        kept, real = mask[:, order], mask.flatten()
        x = move(x.flatten(0, 1), (row + order).flatten(), kept.flatten(), (row + rank).flatten(), real)
        x, h, c = x.view(steps, lanes, -1), state[0][:, order], state[1][:, order]
        ends = ragged_ends(lengths, steps, self.hidden_size)
        active, outputs = lengths.new_zeros(steps), []
        for begin, end in pairwise(ends):
            n = int((lengths > begin).sum())
            active[begin:end] = n
            part, first = (slice(begin, end), slice(n)), (h[:, :n], c[:, :n])
            output, (h_part, c_part) = self._run_together(x[part], None, kept[part], first)
            h, c = torch.cat([h_part, h[:, n:]], 1), torch.cat([c_part, c[:, n:]], 1)
            outputs.append(output.flatten(0, 1))
        rows, before = torch.cat(outputs), active.cumsum(0) - active
        take = (before[:, None] + rank).clamp(max=len(rows) - 1).flatten()
        step = torch.arange(steps, device=x.device).repeat_interleave(active)
        back = step * lanes + order[torch.arange(len(rows), device=x.device) - before[step]]
        return move(rows, take, real, back, real[back]).view(steps, lanes, -1), (h[:, rank], c[:, rank])

    def _run_together(self, x: Tensor, reset: Tensor | None, mask: Tensor | None, state: State) -> tuple[Tensor, State]:
        layout = Layout.of(x.shape[0], x.shape[1], reset, mask, x.device)
        why = self._too_hard(layout, reset, mask, state)
        if why is None:
            output, after, finite = self._run_stock(x, reset, layout, state)
            if finite:
                return output, after
        else:
            warnings.warn(f"{why}; this call runs as a slow loop over steps", SlowPathWarning, stacklevel=_outside())
        # Where something is NaN or infinite only selection stops it at a reset: closed gates do not.
        return self._run_reference(x, reset, mask, state)

    def _too_hard(self, layout: Layout, reset: Tensor | None, mask: Tensor | None, state: State) -> str | None:
        """Why stock kernels cannot express a call, if so."""
        if mask is None and not (self.bidirectional and layout.inserted):
            return None
        needed = (state[0] != 0) | state[0].requires_grad  # a learned h of 0 needs its gradient
        by_direction = needed.any(-1).unflatten(0, (self.num_layers, -1)).any(0)  # type: ignore[no-untyped-call]
        forward_given = by_direction[0] if reset is None else by_direction[0] & ~reset[0]
        if holes(layout, forward_given, reverse=False):
            return "padding between real steps of one piece, or between an initial h and its piece: put it at the end"
        if self.bidirectional and holes(layout, by_direction[1], reverse=True):
            return "padding, or more resets in another lane, before the reverse direction's start with an initial h"
        return None

    def _run_stock(self, x: Tensor, reset: Tensor | None, layout: Layout, state: State) -> tuple[Tensor, State, bool]:
        directions, (steps, lanes) = 1 + self.bidirectional, layout.real.shape
        if layout.inserted:
            lane = torch.arange(lanes, device=x.device)
            there, here = (layout.source * lanes + lane).flatten(), (layout.place * lanes + lane).flatten()
            kept = layout.real.flatten()
            x = move(x.flatten(0, 1), there, kept, here, kept[here]).view(steps, lanes, -1)
        hs, cs = [], []
        for layer, weights in enumerate(self._layers()):
            if layer:
                x = nn.functional.dropout(x, self.dropout, self.training)
            h, c = (part[layer * directions : (layer + 1) * directions] for part in state)
            h, c = _clear_first(h, reset), _clear_first(c, reset)
            x = _with_flags(x, layout)
            flat = [w for group in weights for w in self._extended(group, x.shape[-1])]
            x, _, c = _stock(x, (h, c), flat, self)
            hs.append(_last_h(x, h, layout))
            cs.append(c)
        after = torch.cat(hs), torch.cat(cs)
        total = x.sum(dtype=torch.float32) + sum(part.sum(dtype=torch.float32) for part in (*hs, *cs))
        if layout.inserted:
            x = move(x.flatten(0, 1), here, kept[here], there, kept).view(*layout.place.shape, -1)
        return x, after, bool(torch.isfinite(total))

    def _run_reference(
        self, x: Tensor, reset: Tensor | None, mask: Tensor | None, state: State
    ) -> tuple[Tensor, State]:
        directions, hs, cs = 1 + self.bidirectional, [], []
        for layer, weights in enumerate(self._layers()):
            if layer:
                x = nn.functional.dropout(x, self.dropout, self.training)
            outputs = []
            for direction, group in enumerate(weights):
                i = layer * directions + direction
                output, h, c = reference.lstm_layer(
                    x, state[0][i], state[1][i], group, reset, mask, reverse=direction == 1
                )
                outputs.append(output)
                hs.append(h)
                cs.append(c)
            x = torch.cat(outputs, -1)
        return x, (torch.stack(hs), torch.stack(cs))

    def _output_size(self) -> int:
        return (1 + self.bidirectional) * (self.proj_size or self.hidden_size)

    def _layers(self) -> Iterator[list[Weights]]:
        """Each layer's (weight_ih, weight_hh, bias_ih, bias_hh, weight_hr) per direction."""
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
        for layer in range(self.num_layers):
            ends = [f"_l{layer}", f"_l{layer}_reverse"][: 1 + self.bidirectional]
            yield [tuple(getattr(self, name + end, None) for name in names) for end in ends]  # type: ignore[misc]

    def _extended(self, weights: Weights, size: int) -> list[Tensor]:
        """The weights of a direction for an input of that size: columns for flush and hold, then empty ones."""
        columns = weights[0].new_zeros(4, self.hidden_size, size - weights[0].shape[1])  # gates i, f, g, o
        columns[:2, :, 0] = columns[3, :, 0] = columns[0, :, 1] = columns[3, :, 1] = -_CLOSED
        columns[1, :, 1] = _CLOSED
        return [torch.cat([weights[0], columns.flatten(0, 1)], 1), *(w for w in weights[1:] if w is not None)]


def _outside() -> int:
    """The stacklevel of the line that called the module, past torch's and the layers' own frames."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(("seqbatch.rnn", "torch.nn")):
        frame, level = frame.f_back, level + 1
    return level


def _with_flags(x: Tensor, layout: Layout) -> Tensor:
    """The input with a feature each for flush and hold; on CUDA with empty ones, up to a multiple of 8."""
    extra = 2 + (-(x.shape[-1] + 2) % 8 if x.is_cuda else 0)
    flags = x.new_zeros(*x.shape[:2], extra)
    flags[..., 0], flags[..., 1] = layout.flush, layout.hold
    return torch.cat([x, flags], -1)


def _stock(x: Tensor, state: State, weights: list[Tensor], module: LSTM) -> tuple[Tensor, Tensor, Tensor]:
    with warnings.catch_warnings():
        if x.is_cuda:  # the extended weights are new at each call, so they lie in several pieces of memory
            warnings.filterwarnings("ignore", "RNN module weights are not part of single contiguous chunk")
        return torch._VF.lstm(x, state, weights, module.bias, 1, 0.0, module.training, module.bidirectional, False)


def ragged_ends(lengths: Tensor, steps: int, hidden_size: int) -> list[int]:
    """Steps at which lanes that have ended are left out, from 0 on: where another quarter of the lanes ends.

    ``[0, steps]`` where that would save less than what the calls for more pieces cost.

    >>> ragged_ends(torch.tensor([900, 200, 400, 400]), 900, hidden_size=512)
    [0, 200, 400, 900]
    >>> ragged_ends(torch.tensor([9, 2, 4, 4]), 9, hidden_size=512)
    [0, 9]
    """
    quarters = [-(-len(lengths) * i // _SEGMENTS) - 1 for i in range(1, _SEGMENTS + 1)]
    ends = list(dict.fromkeys([0, *lengths.sort().values[quarters].tolist()]))
    run = sum((end - begin) * int((lengths > begin).sum()) for begin, end in pairwise(ends))
    return ends if (steps * len(lengths) - run) * hidden_size >= SAVED_AT_LEAST and run else [0, steps]


def _cleared(state: State, reset: Tensor | None) -> State:
    """The state, selected to 0 in the lanes that begin with a reset."""
    if reset is None:
        return state
    h, c = (torch.where(reset[0][:, None], 0.0, part) for part in state)
    return h, c


def _clear_first(state: Tensor, reset: Tensor | None) -> Tensor:
    """The forward direction's initial state, selected to 0 where a lane begins with a reset."""
    if reset is None:
        return state
    return torch.cat([torch.where(reset[0][:, None], 0.0, state[:1]), state[1:]])


def _last_h(output: Tensor, initial: Tensor, layout: Layout) -> Tensor:
    """Each direction's h after its last step, (directions, B, P); c is right already, but hold steps zero h."""
    steps, lanes = layout.real.shape
    at = torch.arange(1, steps + 1, device=output.device)[:, None]
    found = []
    for direction, (h, half) in enumerate(zip(initial, output.chunk(len(initial), -1), strict=True)):
        order = at.flip(0) if direction else at
        real = torch.where(layout.real, order, 0).amax(0)
        flush = torch.where(layout.flush, order, 0).amax(0)
        row = (steps - real if direction else real - 1).clamp(0, steps - 1)
        last = half.gather(0, row[None, :, None].expand(1, lanes, half.shape[-1]))[0]
        last = torch.where((real > flush)[:, None], last, torch.where((flush > 0)[:, None], 0.0, h))
        found.append(last)
    return torch.stack(found)
