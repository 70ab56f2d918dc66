"""Parallelized cells that draw random numbers or keep running statistics, and that behave otherwise in evaluation."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from steps import EXACT, assert_same, flags, loop
from torch import Tensor, nn

from seqbatch.rnn.parallel import parallelize

STEPS, LANES, WIDTH = 50, 8, 40


class Module(nn.Module):
    """nn.Dropout on the way in: outside of time."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x, h):
        return self.drop(x), 0.5 * h + x


class Inside(Module):
    """nn.Dropout that feeds back into itself: what comes back is times 0, so that only its own draw is seen."""

    def forward(self, x, h):
        y = self.drop(x + 0.0 * h)
        return y, 0.0 * y


class Shifted(Module):
    """nn.Dropout on what was the input before."""

    def forward(self, x, h):
        return self.drop(h) + 0 * x, x + 0 * h


class Function(nn.Module):
    """F.dropout that asks the cell whether it trains, in a gate of the state."""

    def forward(self, x, h):
        return F.dropout(x, 0.5, training=self.training), 0.5 * h + F.dropout(x, 0.5, self.training)


class FunctionInside(nn.Module):
    """The same in the cycle."""

    def forward(self, x, h):
        y = F.dropout(x + 0.0 * h, 0.5, self.training)
        return y, 0.0 * y


class Branch(nn.Module):
    """A plain if on the mode."""

    def forward(self, x, h):
        if self.training:
            x = 2 * x * torch.bernoulli(torch.full_like(x, 0.5))
        return x + 0.0 * h, torch.tanh(0.5 * h + x)


class Noise(nn.Module):
    """Random numbers of the input's shape."""

    def forward(self, x, h):
        y = x * (torch.rand_like(x) < 0.5) * 2 if self.training else x
        return y, 0.5 * h + x


class Alpha(nn.Module):
    """A submodule that asks for its own mode."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Branch()

    def forward(self, x, h):
        return self.inner(x, h)


DROPPING = [Module, Inside, Shifted, Function, FunctionInside, Branch, Noise, Alpha]


def parallel(cell: nn.Module) -> Any:
    return parallelize(cell, example=(torch.randn(3, WIDTH), torch.randn(3, WIDTH)))


@pytest.mark.parametrize("kind", DROPPING)
def test_each_step_and_lane_draws_anew(kind: type[nn.Module]) -> None:
    """Wherever the operation runs, and again in the next call."""
    torch.manual_seed(0)
    layer, x = parallel(kind()), torch.ones(STEPS, LANES, WIDTH)
    kept, again = (layer(x)[0][1:] != 0 for _ in range(2))
    rows = kept.flatten(0, 1)
    assert 0.45 < kept.float().mean() < 0.55
    assert len(rows.unique(dim=0)) == len(rows)  # 2**40 patterns
    assert not torch.equal(kept, again)
    values = layer(x)[0][1:].unique()
    assert values.tolist() == [0.0, 2.0]


def test_a_matrix_that_drops_weights_drops_others_at_each_step() -> None:
    """A draw that depends on no row is still the step's, one for all lanes."""

    class DropConnect(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(WIDTH))

        def forward(self, x, h):
            return x * F.dropout(self.weight, 0.5, self.training), 0.5 * h + x

    torch.manual_seed(0)
    kept = parallel(DropConnect())(torch.ones(STEPS, LANES, WIDTH))[0] != 0
    assert len(kept[:, 0].unique(dim=0)) == STEPS
    assert torch.equal(kept, kept[:, :1].expand_as(kept))


@pytest.mark.parametrize("first", [True, False], ids=["made in training", "made in evaluation"])
@pytest.mark.parametrize("kind", DROPPING)
def test_evaluation_draws_nothing(kind: type[nn.Module], first: bool) -> None:
    """Whatever the mode was when the layer was made, train() and eval() switch it, there and back."""
    torch.manual_seed(0)
    layer, x = parallel(kind().train(first)), torch.randn(6, 3, WIDTH)
    evaluated, given = kind().eval(), flags(6, 3, "reset and mask")
    for _ in range(2):
        layer.eval()
        state = torch.get_rng_state()
        output, last = layer(x, **given)
        assert torch.equal(state, torch.get_rng_state())
        torch.testing.assert_close((output, last), loop(evaluated, x, (torch.zeros(3, WIDTH),), **given))
        layer.train()
        assert not torch.equal(layer(x)[0], layer(x)[0])


def test_gradients_pass_where_the_output_was_kept() -> None:
    """The same draw forward and backward."""
    torch.manual_seed(0)
    for kind in (Module, Inside, Function, FunctionInside):
        layer, x = parallel(kind()), torch.ones(9, 3, WIDTH, requires_grad=True)
        output, _ = layer(x)
        (grad,) = torch.autograd.grad(output.sum(), x)
        torch.testing.assert_close(grad, output.detach())


class Normalized(nn.Module):
    """nn.BatchNorm1d on the way in and in the cycle."""

    def __init__(self) -> None:
        super().__init__()
        self.ih, self.hh = nn.Linear(3, 4), nn.Linear(4, 4)
        self.norm_x, self.norm_h = nn.BatchNorm1d(4), nn.BatchNorm1d(4)

    def forward(self, x, h):
        h = torch.tanh(self.norm_x(self.ih(x)) + self.norm_h(self.hh(h)))
        return h, h


class Outside(Normalized):
    """nn.BatchNorm1d on the way in alone: the rest is a scan."""

    def forward(self, x, h):
        h = 0.5 * h + self.norm_x(self.ih(x))
        return h, h


def normalized(kind: type[Normalized]) -> tuple[Normalized, Tensor, Tensor]:
    torch.manual_seed(0)
    cell = kind().double()
    cell.norm_x.running_mean += 0.3
    return cell, torch.randn(5, 6, 3).double(), torch.randn(6, 4).double()


@pytest.mark.parametrize("kind", [Normalized, Outside])
def test_trying_a_cell_out_leaves_its_running_statistics(kind: type[Normalized]) -> None:
    """Buffers are what they were."""
    cell, x, h = normalized(kind)
    before = copy.deepcopy(cell.state_dict())
    parallelize(cell, example=(x[0], h))
    torch.testing.assert_close(cell.state_dict(), before, rtol=0, atol=0)
    assert cell.training and cell.norm_x.training


@pytest.mark.parametrize("first", [True, False], ids=["made in training", "made in evaluation"])
@pytest.mark.parametrize("kind", [Normalized, Outside])
def test_running_statistics_are_the_loop_s(kind: type[Normalized], first: bool) -> None:
    """After a call in training, one update for each step; and outputs and gradients in both modes."""
    cell, x, h = normalized(kind)
    twin = copy.deepcopy(cell)
    layer = parallelize(cell.train(first), example=(x[0], h))
    layer.train()
    output, last = layer(x, (h,))
    expected, state = loop(twin.train(), x, (h,))
    torch.testing.assert_close((output, last), (expected, state), **EXACT)
    torch.testing.assert_close(layer.state_dict(), twin.state_dict(), **EXACT)
    torch.testing.assert_close(cell.state_dict(), twin.state_dict(), **EXACT)
    assert_same(layer, cell.train(), x, (h,), flags(5, 6, "reset and mask"))
    twin.load_state_dict(layer.state_dict())
    layer.eval()
    torch.testing.assert_close(layer(x, (h,)), loop(twin.eval(), x, (h,)), **EXACT)
    torch.testing.assert_close(layer.state_dict(), twin.state_dict(), rtol=0, atol=0)
