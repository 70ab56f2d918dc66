"""Parallelized cells where it is easy to be wrong: gradients that meet, memory, dtypes, constants, what was changed."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from steps import EXACT, assert_same, flags, loop
from torch import Tensor, fx, nn

from seqbatch.rnn import cells, parallelize
from seqbatch.rnn.parallel import Parallel

F64 = torch.float64


def parallel(cell: Any, *widths: int) -> Parallel:
    return parallelize(cell, example=tuple(torch.randn(4, n, dtype=F64) for n in widths))


class Chain(nn.Module):
    """A product that feeds a product and, beside that, a root of its own stage."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(4, 4, dtype=F64) for _ in range(3))

    def forward(self, x, h):
        p = self.a(h)
        h = torch.tanh(self.b(p) + self.c(torch.tanh(p)) + x)
        return h, h


class Constant(nn.Module):
    """Tensors of the step, other ones in training, and a buffer that is computed with."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("g", torch.tensor(0.3, dtype=F64))

    def forward(self, x, h):
        scale = torch.tensor([0.1, 0.2, 0.3, 0.4] if self.training else [0.5] * 4, dtype=F64)
        h = torch.tanh(x * (1 - self.g) + h * scale)
        return h, h


class Keywords(nn.Module):
    def forward(self, x, h):
        parts = torch.chunk(input=h, chunks=2, dim=-1)
        h = torch.tanh(x + torch.cat(tensors=[parts[1], h.narrow(dim=1, start=0, length=2)], dim=-1))
        return h, h


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4, dtype=F64)
        self.b = self.a

    def forward(self, x, h):
        h = torch.tanh(self.a(x) + self.b(h))
        return h, h


class Casts(nn.Module):
    """To float32 whatever comes."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4))

    def forward(self, x, h):
        h = torch.tanh(x + h * torch.sigmoid(self.w).float())
        return h, h


@pytest.mark.parametrize("compile", [True, False], ids=["programs", "torch"])
@pytest.mark.parametrize("kind", [Chain, Constant, Keywords, Tied])
def test_a_hard_cell_equals_its_loop(kind: type[nn.Module], compile: bool, monkeypatch: Any) -> None:
    """In training and in evaluation."""
    cell = kind()
    layer = parallel(cell, 4, 4)
    if not compile:
        monkeypatch.setattr(layer, "_compiles", lambda *_: False)
    x, h = torch.randn(5, 3, 4, dtype=F64), torch.randn(3, 4, dtype=F64)
    for mode in (True, False, True):
        layer.train(mode)
        assert_same(layer, cell.train(mode), x, (h,), flags(5, 3, "reset and mask"))
    layer.load_state_dict(cell.state_dict())
    assert not [name for name in vars(cell) if "constant" in name]


def test_a_buffer_is_read_at_each_call() -> None:
    """What is loaded later counts."""
    cell = Constant()
    layer, x = parallel(cell, 4, 4), torch.randn(5, 3, 4, dtype=F64)
    layer.load_state_dict({"g": torch.tensor(0.9, dtype=F64)})
    torch.testing.assert_close(layer(x)[0], loop(cell, x, (torch.zeros(3, 4, dtype=F64),))[0], **EXACT)


def test_many_registers() -> None:
    """More than fit into memory that was given back by chance."""

    def step(x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        gates = [torch.sigmoid(h + k * x) for k in range(300)]
        h = torch.tanh(sum(gate * (other - h) for gate, other in zip(gates, gates[::-1], strict=True)) / 300)
        return h, h

    assert_same(parallel(step, 8, 8), step, torch.randn(3, 2, 8, dtype=F64), (torch.randn(2, 8, dtype=F64),), {})


def test_a_long_step() -> None:
    """Deeper than Python's stack."""

    def step(x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        for _ in range(1200):
            h = 0.999 * h + x
        return h, h

    x, h = torch.randn(2, 2, 3, dtype=F64), torch.randn(2, 3, dtype=F64)
    torch.testing.assert_close(parallel(step, 3, 3)(x, (h,)), loop(step, x, (h,)), **EXACT)


def test_gradients_of_one_lane_and_column() -> None:
    """Their strides say nothing."""

    def step(x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        return (torch.tanh(x + h),) * 2

    x, weight = torch.randn(20, 1, 1, dtype=F64, requires_grad=True), torch.randn(1, 1, 20, dtype=F64)
    found = torch.autograd.grad((parallel(step, 1, 1)(x)[0].permute(1, 2, 0) * weight).sum(), x)
    expected = torch.autograd.grad((loop(step, x, (x.new_zeros(1, 1),))[0].permute(1, 2, 0) * weight).sum(), x)
    torch.testing.assert_close(found, expected, **EXACT)


def test_a_cell_that_casts() -> None:
    """After .double() a float32 value is none of the program's."""
    cell = Casts()
    layer = parallelize(cell, example=(torch.randn(4, 4), torch.randn(4, 4)))
    layer.double()
    x = torch.randn(5, 3, 4, dtype=F64)
    torch.testing.assert_close(layer(x)[0], loop(cell, x, (torch.zeros(3, 4, dtype=F64),))[0], **EXACT)


def test_other_sizes_are_refused() -> None:
    """Before the kernel goes by address: a weight that was replaced, and a step that cuts rows at some number."""
    cell = cells.Elman(4, 4).double()
    layer = parallelize(cell, example=cell.example())
    layer.hh.weight = nn.Parameter(torch.randn(8, 4, dtype=F64))
    with pytest.raises(RuntimeError, match=r"weight of hh must be \(4, 4\).*got \(8, 4\)"):
        layer(torch.randn(5, 3, 4, dtype=F64))

    def step(x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        return (torch.tanh(x[:16] + h),) * 2

    with pytest.raises(RuntimeError, match=r"gives 16 rows for 150.*more lanes"):
        parallel(step, 4, 4)(torch.randn(50, 3, 4, dtype=F64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_counts_in_a_decay(dtype: torch.dtype) -> None:
    """The number of lanes is that of a step, in scans too."""

    def step(x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        return h + x, 0.5 * h / x.size(0) + x

    def mean(x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        return h + x, 0.5 * h + x.mean(0) + x

    near = EXACT if dtype == F64 else {"rtol": 0.02, "atol": 0.02}  # bfloat16 keeps eight bits
    for one in (step, mean):
        layer = parallelize(one, example=(torch.randn(4, 3).to(dtype), torch.randn(4, 3).to(dtype)))
        x = torch.randn(6, 5, 3).to(dtype)
        torch.testing.assert_close(layer(x)[0], loop(one, x, (x.new_zeros(5, 3),))[0], **near)


@pytest.mark.parametrize("compile", [True, False], ids=["programs", "torch"])
@pytest.mark.parametrize("kind", [cells.IndRNN, cells.Elman])
def test_second_derivatives_are_refused(kind: type[cells.Cell], compile: bool, monkeypatch: Any) -> None:
    """They would be left out without a word."""
    cell = kind(3, 4).double()
    layer = parallelize(cell, example=cell.example())
    if not compile and kind is cells.IndRNN:
        pytest.skip("plain torch, which has them")
    if not compile:
        monkeypatch.setattr(layer, "_compiles", lambda *_: False)
    x = torch.randn(5, 2, 3, dtype=F64, requires_grad=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(layer(x)[0].sum(), x, create_graph=True)


@pytest.mark.parametrize("compile", [True, False], ids=["programs", "torch"])
def test_a_state_changed_before_backward_is_refused(compile: bool, monkeypatch: Any) -> None:
    """Never wrong weight gradients; the state handed in is copied by programs."""
    cell = cells.Elman(3, 4).double()
    layer = parallelize(cell, example=cell.example())
    if not compile:
        monkeypatch.setattr(layer, "_compiles", lambda *_: False)
    x, hx = torch.randn(5, 2, 3, dtype=F64), torch.randn(2, 4, dtype=F64)
    expected = torch.autograd.grad(layer(x, (hx,))[0].sum(), cell.hh.weight)
    output, _ = layer(x, (hx,))
    hx.zero_()
    try:
        found = torch.autograd.grad(output.sum(), cell.hh.weight)
    except RuntimeError as error:
        assert "in place" in str(error) or "inplace" in str(error)  # noqa: PT017
    else:
        torch.testing.assert_close(found, expected)


DRAWS = {
    "normal": lambda p: torch.normal(p, 1.0),
    "gumbel": lambda p: F.gumbel_softmax(p, dim=-1),
    "integers": lambda p: torch.randint_like(p, 9),
}


@pytest.mark.parametrize("name", DRAWS)
def test_draws_from_a_parameter_are_new_at_each_step(name: str) -> None:
    """Whatever the operation is called."""

    class Draws(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p = nn.Parameter(torch.randn(40))

        def forward(self, x, h):
            return x * DRAWS[name](self.p), 0.5 * h + x

    torch.manual_seed(0)
    layer = parallelize(Draws(), example=(torch.ones(3, 40), torch.ones(3, 40)))
    output = layer(torch.ones(20, 3, 40))[0]
    assert len(output[:, 0].unique(dim=0)) == 20


def test_whole_numbers_as_a_state() -> None:
    """The token before, through resets and padding; and a count of steps."""

    def step(x: Tensor, token: Tensor, n: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return token + 10 * n, x, n + 1

    example = (torch.randint(9, (4,)), torch.randint(9, (4,)), torch.randint(9, (4,)))
    x, given = torch.randint(9, (7, 3)), flags(7, 3, "reset and mask")
    output, states = parallelize(step, example=example)(x, **given)
    zero = torch.zeros(3, dtype=torch.int64)
    expected, last = loop(step, x, (zero, zero), **given)
    assert torch.equal(output, expected.long()) and all(map(torch.equal, states, last))
    assert all(state.dtype == torch.int64 for state in states)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [cells.Elman, cells.SRUv2])
def test_torch_compile_leaves_the_layer_as_it_is(kind: type[cells.Cell]) -> None:
    """Around it torch compiles."""
    cell = kind(3, 4)
    layer, x = parallelize(cell, example=cell.example()), torch.randn(5, 2, 3, requires_grad=True)

    def both(x: Tensor) -> Tensor:
        return torch.tanh(layer(2 * x)[0]).sum()

    torch._dynamo.reset()
    found = torch.autograd.grad(torch.compile(both, backend="eager")(x), x)
    torch.testing.assert_close(found, torch.autograd.grad(both(x), x))


def test_functional_call() -> None:
    """Parameters that are given for one call."""
    cell = cells.GRU(3, 4).double()
    layer, x = parallelize(cell, example=cell.example()), torch.randn(5, 2, 3, dtype=F64)
    other = {name: 2 * p.detach() for name, p in layer.named_parameters()}
    found = torch.func.functional_call(layer, other, (x,))[0]
    layer.load_state_dict(other)
    torch.testing.assert_close(found, layer(x)[0], **EXACT)


def test_a_cell_with_hooks_is_refused() -> None:
    """They would not run."""
    cell = cells.GRU(3, 4)
    cell.register_forward_hook(lambda module, given, output: output)
    with pytest.raises(ValueError, match="hooks"):
        parallelize(cell, example=cell.example())


def test_a_tensor_that_learns_must_be_a_parameter() -> None:
    """Its graph would be used up by the first backward."""
    weight = 2 * torch.randn(3, requires_grad=True)
    with pytest.raises(ValueError, match=r"requires a gradient.*nn\.Parameter"):
        parallelize(lambda x, h: (torch.tanh(h * weight + x),) * 2, example=(torch.randn(4, 3), torch.randn(4, 3)))


def test_functions_in_place_are_refused() -> None:
    """As methods are."""
    with pytest.raises(ValueError, match=r"in place.*relu_"):
        parallelize(lambda x, h: (torch.relu_(h + x),) * 2, example=(torch.randn(4, 3), torch.randn(4, 3)))


@fx.wrap
def relu(x: Tensor) -> Tensor:
    """Of the same name as torch's."""
    return torch.where(x > 0, x, 0.1 * x)


def test_a_function_of_the_name_of_torch_s() -> None:
    """Is what it is."""

    def step(x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = relu(0.5 * h + x)
        return h, h

    x, h = torch.randn(5, 3, 4, dtype=F64), torch.randn(3, 4, dtype=F64)
    assert_same(parallel(step, 4, 4), step, x, (h,), {})


def test_a_bias_for_all_columns() -> None:
    """One number, widened by the product."""

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.b = nn.Parameter(torch.randn(4, 4, dtype=F64)), nn.Parameter(torch.randn(1, dtype=F64))

        def forward(self, x, h):
            h = torch.tanh(F.linear(h, self.w, self.b) + x)
            return h, h

    cell = Shared()
    x, h = torch.randn(5, 3, 4, dtype=F64), torch.randn(3, 4, dtype=F64)
    assert_same(parallel(cell, 4, 4), cell, x, (h,), {})


def test_buffers_that_a_trial_does_not_write_keep_their_version() -> None:
    """A trace in another mode must not undo what autograd has kept."""
    cell = Constant()
    layer, before = parallel(cell, 4, 4), cell.g._version
    layer.eval()
    layer(torch.randn(2, 2, 4, dtype=F64))
    assert cell.g._version == before
