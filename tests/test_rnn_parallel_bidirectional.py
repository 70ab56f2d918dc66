"""Two parallelized cells as the directions of one layer, against pieces that are cut out, flipped and flipped back."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from steps import EXACT, flags, loop
from torch import Tensor, nn

from seqbatch.rnn import cells
from seqbatch.rnn.parallel import Bidirectional, parallelize

F64 = torch.float64
KINDS = ["plain", "reset", "mask", "reset and mask"]
PAIRS = [("GRU", "GRU"), ("LSTM", "SRUv1"), ("MinGRU", "PeepholeLSTM")]


def make(names: tuple[str, str], widths: tuple[int, int] = (4, 2)) -> tuple[nn.Module, list[cells.Cell]]:
    torch.manual_seed(0)
    both = [getattr(cells, name)(3, width).double() for name, width in zip(names, widths, strict=True)]
    return Bidirectional(*(parallelize(cell, example=cell.example()) for cell in both)), both


def backward(
    cell: cells.Cell, x: Tensor, state: tuple[Tensor, ...], reset: Tensor | None = None, mask: Tensor | None = None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Each lane's pieces by themselves, the last one first: only that one starts from the state that is given."""
    lanes = []
    for b in range(x.shape[1]):
        cuts = [] if reset is None else [t for t in range(1, len(x)) if reset[t, b]]
        now, parts = tuple(part[b : b + 1] for part in state), []
        for start, end in reversed(list(pairwise([0, *cuts, len(x)]))):
            if end < len(x):
                now = tuple(torch.zeros_like(part) for part in now)
            real = None if mask is None else mask[start:end, b : b + 1].flip(0)
            y, now = loop(cell, x[start:end, b : b + 1].flip(0), now, mask=real)
            parts.append(y.flip(0))
        lanes.append((torch.cat(parts[::-1]), now))
    output = torch.cat([y for y, _ in lanes], 1)
    return output, tuple(torch.cat(parts) for parts in zip(*(now for _, now in lanes), strict=True))


def case(both: list[cells.Cell], lanes: int = 3) -> tuple[Tensor, tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]:
    x = torch.randn(7, lanes, 3, dtype=F64, requires_grad=True)
    first, second = (tuple(part.requires_grad_() for part in cell.example(lanes)[1:]) for cell in both)
    return x, (first, second)


@pytest.mark.parametrize("hx", [False, True], ids=["from 0", "from a state"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("names", PAIRS, ids=str)
def test_both_directions_equal_flipped_pieces(names: tuple[str, str], kind: str, hx: bool) -> None:
    """Outputs side by side, each direction's states as its layer gives them, and all gradients."""
    layer, both = make(names)
    x, states = case(both)
    given: dict[str, Any] = flags(7, 3, kind)
    start = states if hx else tuple(tuple(torch.zeros_like(part) for part in direction) for direction in states)
    output, last = layer(x, states if hx else None, **given)
    ahead, after = loop(both[0], x, start[0], **given)
    back, before = backward(both[1], x, start[1], **given)
    assert output.shape == (7, 3, 6)
    torch.testing.assert_close((output, last), (torch.cat([ahead, back], -1), (after, before)), **EXACT)
    wanted = [x, *layer.parameters(), *((*states[0], *states[1]) if hx else ())]
    draw = torch.Generator().manual_seed(1)
    weights = [torch.randn(part.shape, generator=draw, dtype=F64) for part in (output, *last[0], *last[1])]
    found = torch.autograd.grad([output, *last[0], *last[1]], wanted, weights, allow_unused=True)
    expected = torch.autograd.grad([torch.cat([ahead, back], -1), *after, *before], wanted, weights, allow_unused=True)
    for one, two, leaf in zip(found, expected, wanted, strict=True):
        zero = torch.zeros_like(leaf)
        torch.testing.assert_close(zero if one is None else one, zero if two is None else two, **EXACT)


def test_padding_after_the_end_changes_nothing() -> None:
    """The reverse direction starts at each sequence's own end; sequences one after another are as sequences alone."""
    layer, _both = make(("GRU", "LSTM"))
    xs = [torch.randn(n, 3, dtype=F64) for n in (5, 2, 4)]
    alone = [layer(x[:, None])[0][:, 0] for x in xs]
    padded = nn.utils.rnn.pad_sequence(xs, padding_value=float("nan"))
    output = layer(padded, mask=torch.arange(5)[:, None] < torch.tensor([5, 2, 4]))[0]
    for b, expected in enumerate(alone):
        torch.testing.assert_close(output[: len(expected), b], expected, **EXACT)
        assert not output[len(expected) :, b].any()
    reset = torch.zeros(11, 1, dtype=torch.bool)
    reset[[0, 5, 7]] = True
    spliced = layer(torch.cat(xs)[:, None], reset=reset)[0][:, 0]
    torch.testing.assert_close(spliced, torch.cat(alone), **EXACT)


def test_two_directions_are_one_module() -> None:
    """All parameters, once each, and modes that reach both."""
    layer, both = make(("GRU", "LSTM"))
    assert {id(p) for p in layer.parameters()} == {id(p) for cell in both for p in cell.parameters()}
    layer.eval()
    assert not any(module.training for module in layer.modules())
    other, _ = make(("GRU", "LSTM"))
    for parameter in other.parameters():
        nn.init.zeros_(parameter)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(5, 2, 3, dtype=F64)
    torch.testing.assert_close(other(x), layer(x), rtol=0, atol=0)


def test_two_directions_walk_alone_where_their_lanes_meet() -> None:
    """Without pieces and padding, the reverse direction is the layer on the flipped input, whatever the step."""
    layer, both = make(("BNLSTM", "BNLSTM"), (4, 4))
    x = torch.randn(5, 4, 3, dtype=F64)
    back = parallelize(both[1], example=both[1].example())(x.flip(0))
    output, last = layer(x)
    torch.testing.assert_close((output[..., 4:], last[1]), (back[0].flip(0), back[1]), **EXACT)
