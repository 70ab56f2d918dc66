"""``torch.nn.LSTM``, ``GRU`` and ``RNN`` with seqbatch's flags, which torch's own classes do not know.

The real tokens of a lane between two resets are a *run*. A recurrent layer computes runs independently, but for
the first one of a lane, which may go on from the lane's state. So all runs of the grid go into one
``PackedSequence``, the module runs once on nothing but real tokens, and its outputs go back to their cells.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from seqbatch.rnn.checks import check_flags

__all__ = ["run_stock"]

State = Tensor | tuple[Tensor, ...]
Pairs = tuple[Tensor, Tensor]  # lanes, none twice, and a run of each


class _Runs(NamedTuple):
    """The runs of a grid, longest first, as ``PackedSequence`` wants them."""

    cells: Tensor  # (S,) in packed order: step * lanes + lane of every real token
    batch_sizes: Tensor  # (longest,) on CPU: how many runs reach that position
    number: int
    carried: Pairs  # the runs that start from their lane's state; all others start from 0
    last: tuple[Pairs, ...]  # the runs whose state a direction returns: forward, reverse
    cleared: Tensor  # (B,) the lanes that were reset anywhere

    @classmethod
    def of(cls, reset: Tensor, mask: Tensor) -> "_Runs":
        """From flags (T, B) on CPU."""
        steps, lanes = mask.shape
        resets = reset.t().long().cumsum(1)  # (B, T): how often the lane was reset so far
        lane, step = mask.t().nonzero(as_tuple=True)
        piece = resets[lane, step]
        _, run, lengths = torch.unique_consecutive(lane * (steps + 1) + piece, return_inverse=True, return_counts=True)
        first = lengths.cumsum(0) - lengths
        rank = lengths.argsort(descending=True, stable=True).argsort()
        position = torch.arange(len(lane)) - first[run]
        batch_sizes = position.bincount()
        cells = torch.empty_like(lane)
        cells[(batch_sizes.cumsum(0) - batch_sizes)[position] + rank[run]] = step * lanes + lane
        lane, piece = lane[first], piece[first]  # of every run; a piece without real tokens has none

        def where(chosen: Tensor) -> Pairs:
            return lane[chosen], rank[chosen]

        # Walking back, a reset clears after its step: at step 0 that is too late to matter.
        last = where(piece == resets[lane, -1]), where(piece == resets[lane, 0])
        return cls(cells, batch_sizes, len(lengths), where(piece == 0), last, resets[:, -1] > 0)

    def to(self, device: torch.device) -> "_Runs":
        carried, *last = ((a.to(device), b.to(device)) for a, b in (self.carried, *self.last))
        cells, cleared = self.cells.to(device), self.cleared.to(device)
        return self._replace(cells=cells, carried=carried, last=tuple(last), cleared=cleared)


def run_stock(
    module: nn.RNNBase, x: Tensor, state: State | None, reset: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, State]:
    """Run torch's ``nn.LSTM``, ``nn.GRU`` or ``nn.RNN`` on a grid with resets and padding.

    Gradients flow to ``x``, ``state`` and the parameters; what padding holds, NaN too, reaches nothing. Flags on
    CUDA are copied to the CPU, which waits for the device.

    Args:
        module: Time-major. With ``bidirectional`` every lane starts afresh: the state must be None.
        x: (T, B, input_size), at least one step and one lane.
        state: Before the first step, as the module takes it: (num_layers, B, size), of an LSTM (h, c); None: 0.
        reset: (T, B) bool, true where a lane's state is cleared before the step, be it real or padding; or None.
        mask: (T, B) bool, true on real tokens: elsewhere the state is held and the output is 0; None: all real.
            Both flags may be on the CPU whatever the device of ``x``.

    Returns:
        The output (T, B, size) and the state after the last step, in the form that the module returns.

    Raises:
        RuntimeError: Sizes do not fit.
        TypeError, ValueError: The module, its settings, or what was given in place of a tensor, do not fit.

    >>> reset, mask = torch.zeros(2, 5, 2, dtype=torch.bool)
    >>> reset[3, 0], mask[:4, 0] = True, True  # lane 0: three tokens, then one of another sequence; lane 1: none
    >>> output, state = run_stock(nn.GRU(3, 4), torch.randn(5, 2, 3), torch.ones(1, 2, 4), reset, mask)
    >>> output.shape, state[0, 1].tolist()
    (torch.Size([5, 2, 4]), [1.0, 1.0, 1.0, 1.0])
    """
    parts = _checked(module, x, state)
    reset, mask = (flags.cpu() if isinstance(flags, Tensor) else flags for flags in (reset, mask))
    check_flags(torch.empty(*x.shape[:2], 0), reset, mask, None)
    later = reset is not None and bool(reset[1:].any())
    if not later and (mask is None or bool(mask.all())):
        if reset is not None:
            clear = reset[0, :, None].to(x.device)
            parts = tuple(torch.where(clear, 0.0, part) for part in parts)
        return module(x, _form(parts))  # type: ignore[no-any-return]
    none = torch.zeros(x.shape[:2], dtype=torch.bool)
    runs = _Runs.of(none if reset is None else reset, ~none if mask is None else mask).to(x.device)
    rows, sizes, count = x.flatten(0, 1).index_select(0, runs.cells), runs.batch_sizes, runs.number
    if not count:  # one step of zeros, of which nothing is taken, keeps results in the graph: gradients are 0
        rows, sizes, count = nn.functional.pad(rows, (0, 0, 0, 1)), torch.ones(1, dtype=torch.int64), 1
    lanes, ranks = runs.carried
    before = tuple(
        part.new_zeros(len(part), count, part.shape[2]).index_copy(1, ranks, part.index_select(1, lanes))
        for part in parts
    )
    packed, after = module(PackedSequence(rows, sizes), _form(before))
    tokens = packed.data[: len(runs.cells)]
    output = tokens.new_zeros(x.shape[0] * x.shape[1], tokens.shape[1]).index_copy(0, runs.cells, tokens)
    ends = after if isinstance(after, tuple) else (after,)
    starts = (torch.where(runs.cleared[:, None], 0.0, part) for part in parts) if parts else [None] * len(ends)
    final = tuple(_final(start, end, runs, 1 + module.bidirectional) for start, end in zip(starts, ends, strict=True))
    return output.view(*x.shape[:2], -1), final if isinstance(after, tuple) else final[0]


def _final(start: Tensor | None, end: Tensor, runs: _Runs, directions: int) -> Tensor:
    """A state after the last step: of the run that a lane ends in, or where there is none what it started from."""
    start = end.new_zeros(len(end), len(runs.cleared), end.shape[2]) if start is None else start.to(end.dtype)
    found = [
        start[d::directions].index_copy(1, lane, end[d::directions].index_select(1, rank))
        for d, (lane, rank) in enumerate(runs.last[:directions])
    ]
    return torch.stack(found, 1).flatten(0, 1)


def _form(parts: tuple[Tensor, ...]) -> State | None:
    return parts if len(parts) > 1 else next(iter(parts), None)


def _checked(module: nn.RNNBase, x: Tensor, state: State | None) -> tuple[Tensor, ...]:
    """The parts of the state, none where it is None."""
    if not isinstance(module, nn.LSTM | nn.GRU | nn.RNN):
        raise TypeError(f"module must be torch's nn.LSTM, nn.GRU or nn.RNN, got {type(module).__name__}")
    if module.batch_first:
        raise ValueError("module must be time-major, got batch_first=True; make it without and transpose its input")
    if module.bidirectional and state is not None:
        raise ValueError("a bidirectional module needs whole sequences, got a state to go on from; pass None")
    if x.dim() != 3 or not x.shape[0] * x.shape[1] or x.shape[2] != module.input_size:
        raise RuntimeError(f"x must be (T, B, {module.input_size}), T and B at least 1, got {tuple(x.shape)}")
    widths = [module.proj_size or module.hidden_size] + [module.hidden_size] * isinstance(module, nn.LSTM)
    if state is None:
        return ()
    parts = tuple(state) if isinstance(state, tuple | list) else (state,)
    wanted, got = [(module.num_layers, x.shape[1], width) for width in widths], [tuple(part.shape) for part in parts]
    if got != wanted:
        raise RuntimeError(f"state must have shape {' and '.join(map(str, wanted))}, got {' and '.join(map(str, got))}")
    return parts
