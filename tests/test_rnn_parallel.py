"""A cell written as one step, parallelized, against its step in a loop: the cells of the library and odd ones."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import networkx as nx
import pytest
import torch
from steps import EXACT, assert_same, flags, loop, zeros
from torch import Tensor, fx, nn
from torch.nn.utils import prune

from seqbatch.rnn import SRU, cells
from seqbatch.rnn.graph import StepGraph
from seqbatch.rnn.parallel import parallelize

F64 = torch.float64
KINDS = ["plain", "reset", "mask", "reset and mask"]
SHIPPED = {name: getattr(cells, name) for name in cells.__all__ if name != "Cell"}
SHIPPED["QRNN, f"] = lambda *sizes: cells.QRNN(*sizes, pooling="f")


class SRUOverLSTM(cells.TwoLayer):
    """A scan over a walk."""

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__(input_size, hidden_size)
        self.upper = cells.SRUv1(hidden_size, hidden_size)


class LSTMOverSRU(cells.TwoLayer):
    """A walk over a scan."""

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__(input_size, hidden_size)
        self.lower, self.upper = cells.SRUv2(input_size, hidden_size), cells.LSTM(hidden_size, hidden_size)

    def forward(self, x, c, h, g):
        below, c = self.lower(x, c)
        return self.upper(below, h, g)[0], c, *self.upper(below, h, g)[1:]


class FastWeights(cells.Cell):
    """A matrix as the state: S' = f S + v k^T, y = S' q."""

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__(input_size, hidden_size)
        self.linear = nn.Linear(input_size, 4 * hidden_size)

    def example(self, lanes: int = 4) -> tuple[Tensor, ...]:
        x, c = super().example(lanes)
        return x, torch.einsum("bi,bj->bij", c, c)

    def forward(self, x, s):
        q, k, v, f = self.linear(x).chunk(4, -1)
        s = torch.sigmoid(f).unsqueeze(-1) * s + v.unsqueeze(-1) * k.unsqueeze(1)
        return torch.einsum("bij,bj->bi", s, q), s


class Shared(cells.Cell):
    """One matrix for the input and for the state."""

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__(hidden_size, hidden_size)
        self.linear = nn.Linear(hidden_size, hidden_size)

    def forward(self, x, h):
        h = torch.tanh(self.linear(x) - 0.5 * self.linear(h))
        return h, h


class Step(cells.Cell):
    """A function of two parameters, x and states as a cell."""

    def __init__(self, step: Callable[..., Any], states: int) -> None:
        super().__init__(4, 4)
        self.states = states
        self.p = nn.Parameter(torch.randn(4))
        self.w = nn.Parameter(torch.randn(4, 4) / 3)
        self.step = step

    def forward(self, x, a):
        return self.step(self, x, a)


class Step2(Step):
    """With two states."""

    def forward(self, x, a, b):
        return self.step(self, x, a, b)


def _one(step: Callable[..., Any]) -> Callable[..., cells.Cell]:
    return lambda *sizes: Step(step, 1)


def _two(step: Callable[..., Any]) -> Callable[..., cells.Cell]:
    return lambda *sizes: Step2(step, 2)


def _lanes(cell, x, h):
    h = torch.tanh(x + (h - h.mean(0)) @ cell.w)
    return h, h


def _counts(cell, x, n):
    return x * n, n + 1


ODD = {
    "SRU over LSTM": SRUOverLSTM,
    "LSTM over SRU": LSTMOverSRU,
    "fast weights": FastWeights,
    "one matrix twice": Shared,
    "the input before": _one(lambda cell, x, a: (x * cell.p + a, x)),
    "two inputs before": _two(lambda cell, x, a, b: (x + a * b, x, a)),
    "two states change places": _two(lambda cell, x, a, b: (x * a + b, b, a)),
    "two states change places once": _two(lambda cell, x, a, b: (x * a + b, b * cell.p + x, a)),
    "a ring of two sums": _two(lambda cell, x, a, b: (a + b, 0.5 * b + x, 0.3 * a - x)),
    "the state before as output": _one(lambda cell, x, a: (a + 0 * x, torch.tanh(a @ cell.w + x))),
    "the input as output": _one(lambda cell, x, a: (x, torch.tanh(a @ cell.w + x))),
    "one value, two states": _two(lambda cell, x, a, b: (a, *[torch.tanh(a @ cell.w + b + x)] * 2)),
    "lanes meet in the state": _one(_lanes),
    "lanes meet in the input": _one(lambda cell, x, a: (a, 0.5 * a + x.softmax(0))),
    "lanes meet in the output": _one(lambda cell, x, a: ((0.5 * a + x).roll(1, 0), 0.5 * a + x)),
    "lanes meet and part": _one(lambda cell, x, a: (a, 0.5 * a + cell.p * x.mean(0) + x)),
    "the first lane for all": _one(lambda cell, x, a: (a + x, 0.5 * a + x[:1] * x)),
    "a count": _one(_counts),
    "decay alone": _one(lambda cell, x, a: (x + a, a * torch.sigmoid(cell.p))),
    "no input in the state": _one(lambda cell, x, a: (x + a, torch.tanh(a @ cell.w + cell.p))),
    "minus": _one(lambda cell, x, a: (a, x - a * torch.sigmoid(x))),
    "a sum of three": _one(lambda cell, x, a: (a, a * x.sigmoid() - a / (2 + cell.p**2) + 0.1 * a - (-x))),
    "scaled sums": _one(lambda cell, x, a: (a, torch.add(x, torch.sub(a, x, alpha=2), alpha=0.25))),
    "addcmul": _one(lambda cell, x, a: (a, torch.addcmul(x, a, cell.p.tanh(), value=0.5))),
    "lerp to the state": _one(lambda cell, x, a: (a, torch.lerp(x, a, 0.3))),
    "halves": _one(lambda cell, x, a: (a, torch.cat([0.5 * a[:, 2:] + x[:, :2], a[..., :2] - x[:, 2:]], dim=-1))),
    "a detached state": _one(lambda cell, x, a: (a, 0.5 * a.detach() * x + 0.3 * a + x)),
    "kept in bounds": _one(lambda cell, x, a: (a, torch.clamp(a + x, min=-0.7, max=0.8))),
    "chosen": _one(lambda cell, x, a: (a, torch.where(x > 0, 0.5 * a, x))),
    "a list": _one(lambda cell, x, a: [x + a, 0.5 * a + x]),
    "heads": _one(lambda cell, x, a: (a, (0.5 * a.view(a.size(0), 2, -1) + x.view(x.shape[0], 2, 2)).flatten(1))),
    "divided by the lanes": _one(lambda cell, x, a: (a, 0.5 * a + x / x.size(0))),
    "the state divided by the lanes": _one(lambda cell, x, a: (a / a.shape[0], torch.tanh(a / a.shape[0] + x))),
    "a sum over lanes": _one(lambda cell, x, a: (a, 0.5 * a + x - x.sum(0, keepdim=True) / x.size(0))),
    "zeros like the state": _one(lambda cell, x, a: (torch.zeros_like(a) + x, torch.tanh(a + x))),
    "new zeros": _one(lambda cell, x, a: (torch.cat([a, a.new_zeros(a.size(0), 1)], -1), torch.tanh(a + x))),
}


def make(name: str, seed: int = 0, dtype: torch.dtype = F64, sizes: tuple[int, int] = (3, 4)) -> cells.Cell:
    """A cell with biases and gains that are not what they start as."""
    torch.manual_seed(seed)
    cell = (SHIPPED | ODD)[name](*sizes).to(dtype)
    for parameter in cell.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return cell


def case(cell: cells.Cell, steps: int = 6, lanes: int = 3) -> tuple[Tensor, tuple[Tensor, ...]]:
    """An input (T, B, ...) and states that are not 0."""
    rows, *states = cell.example(steps * lanes)
    return rows.view(steps, lanes, *rows.shape[1:]), tuple(state[:lanes] for state in states)


@pytest.mark.parametrize("hx", [False, True], ids=["from 0", "from a state"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SHIPPED)
def test_a_cell_of_the_library_equals_its_loop(name: str, kind: str, hx: bool) -> None:
    """Outputs, last states, and the gradients of input, first states and parameters."""
    cell = make(name)
    layer, (x, state) = parallelize(cell, example=cell.example()), case(cell)
    start = state if hx else zeros(cell.example(), 3)
    assert_same(layer, cell, x, start, flags(6, 3, kind), pass_state=hx)


@pytest.mark.parametrize("kind", ["plain", "reset and mask"])
@pytest.mark.parametrize("name", ODD)
def test_an_odd_cell_equals_its_loop(name: str, kind: str) -> None:
    """On numbers of lanes that are not the example's."""
    cell = make(name)
    layer = parallelize(cell, example=cell.example())
    for lanes in (3, 5):
        x, state = case(cell, 6, lanes)
        assert_same(layer, cell, x, state, flags(6, lanes, kind))


@pytest.mark.parametrize("name", SHIPPED)
def test_float32(name: str) -> None:
    """To what float32 allows.

    Sigmoid and tanh may be rational functions, which are off by 2e-7; a gradient sums some of these over 18 rows. Batch
    normalization of a state that is 0 in all lanes multiplies them by gamma / sqrt(eps), some 60, more than once.
    """
    cell = make(name, dtype=torch.float32)
    near = {"rtol": 1e-5, "atol": 5e-3 if name == "BNLSTM" else 2e-5}
    layer, (x, state) = parallelize(cell, example=cell.example()), case(cell)
    assert_same(layer, cell, x, state, flags(6, 3, "reset and mask"), near=near)


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize(("steps", "lanes"), [(1, 3), (6, 1), (1, 1), (40, 2), (6, 0)], ids=str)
def test_few_steps_and_lanes(name: str, steps: int, lanes: int) -> None:
    """One of each is enough, and no lane gives no rows, where the step itself can do with that."""
    if name == "BNLSTM" and lanes < 2:
        pytest.skip("batch statistics need two lanes")
    cell = make(name)
    layer, (x, state) = parallelize(cell, example=cell.example()), case(cell, steps, lanes)
    assert_same(layer, cell, x, state, flags(steps, lanes, "reset and mask", seed=steps))


@pytest.mark.parametrize("name", SHIPPED)
def test_memory_in_any_order(name: str) -> None:
    """Input, states and flags that are views."""
    cell = make(name)
    layer, (x, state) = parallelize(cell, example=cell.example()), case(cell)
    x = x.transpose(0, 2).contiguous().transpose(0, 2)
    assert not x.is_contiguous()
    state = tuple(part.T.contiguous().T for part in state)
    given = {name: flag.T.contiguous().T for name, flag in flags(6, 3, "reset and mask").items()}
    assert_same(layer, cell, x, state, given)
    wide = torch.stack([x, x], -1)[..., 0]  # with gaps
    torch.testing.assert_close(layer(wide, state, **given), layer(x, state, **given), **EXACT)


@pytest.mark.parametrize("name", SHIPPED)
def test_two_halves_with_carried_state_are_the_whole(name: str) -> None:
    """Gradients too, since the state is not detached."""
    cell = make(name)
    layer, (x, state) = parallelize(cell, example=cell.example()), case(cell, 7)
    x, given = x.requires_grad_(), flags(7, 3, "reset and mask")
    given["reset"][4:6, 0], given["mask"][4, 0] = False, True  # one lane goes on from what was carried
    whole, last = layer(x, state, **given)
    first, middle = layer(x[:4], state, **{name: flag[:4] for name, flag in given.items()})
    second, end = layer(x[4:], middle, **{name: flag[4:] for name, flag in given.items()})
    torch.testing.assert_close((torch.cat([first, second]), end), (whole, last), **EXACT)
    weigh = torch.randn_like(whole)
    wanted = [x, *cell.parameters()]
    torch.testing.assert_close(
        torch.autograd.grad(torch.cat([first, second]), wanted, weigh),
        torch.autograd.grad(whole, wanted, weigh),
        **EXACT,
    )


@pytest.mark.parametrize("name", [name for name in SHIPPED if name != "BNLSTM"])
def test_nan_crosses_neither_padding_nor_resets(name: str) -> None:
    """NaN on padding, and in a state that a reset clears: outputs and gradients are what other numbers give."""
    cell = make(name)
    layer, (x, state) = parallelize(cell, example=cell.example()), case(cell)
    given = flags(6, 3, "reset and mask")
    given["reset"][0, 0] = True
    spoiled = torch.where(given["mask"][..., None], x, float("nan")).requires_grad_()
    bad = tuple(torch.where(torch.tensor([[True], [False], [False]]), float("nan"), part) for part in state)
    output, last = layer(spoiled, bad, **given)
    torch.testing.assert_close((output, last), layer(x, state, **given), **EXACT)
    grads = torch.autograd.grad(output.sum(), [spoiled, *cell.parameters()], allow_unused=True)
    assert all(grad is None or grad.isfinite().all() for grad in grads)
    assert not grads[0][~given["mask"]].any()


def test_gru_and_lstm_are_torch_s() -> None:
    """With the weights copied."""
    for name in ("GRU", "LSTM", "Elman"):
        cell, x = make(name), torch.randn(7, 3, 3, dtype=F64)
        stock = getattr(nn, {"Elman": "RNN"}.get(name, name))(3, 4, dtype=F64)
        with torch.no_grad():
            stock.weight_ih_l0.copy_(cell.ih.weight)
            stock.bias_ih_l0.copy_(cell.ih.bias)
            stock.weight_hh_l0.copy_(cell.hh.weight)
            stock.bias_hh_l0.copy_(0 * stock.bias_hh_l0 if cell.hh.bias is None else cell.hh.bias)
        output, states = parallelize(cell, example=cell.example())(x)
        expected, last = stock(x)
        torch.testing.assert_close(output, expected, **EXACT)
        last = last if isinstance(last, tuple) else (last,)
        torch.testing.assert_close(states, tuple(part[0] for part in last), **EXACT)


@pytest.mark.parametrize("size", [3, 4], ids=["projected", "as wide"])
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_sru_is_the_library_s(version: str, size: int) -> None:
    """With the weights mapped, resets and padding; the highway projected where sizes differ, and not rescaled."""
    cell, x = make(f"SRU{version}", sizes=(size, 4)), torch.randn(7, 3, size, dtype=F64)
    rnn = SRU(size, 4, version=version, rescale=False, dtype=F64)
    with torch.no_grad():
        rnn.layers[0].weight.copy_(cell.linear.weight)
        rnn.layers[0].bias.copy_(cell.bias)
        if version == "v2":
            rnn.layers[0].weight_c.copy_(cell.weight_c)
    given = flags(7, 3, "reset and mask")
    output, (c,) = parallelize(cell, example=cell.example())(x, **given)
    expected, last = rnn(x, **given)
    torch.testing.assert_close((output, c), (expected, last[0]), **EXACT)


def test_bnlstm_is_the_paper_s() -> None:
    """Statistics by hand, step by step."""
    cell, x = make("BNLSTM"), torch.randn(5, 6, 3, dtype=F64)

    def bn(v: Tensor) -> Tensor:
        return (v - v.mean(0)) / (v.var(0, unbiased=False) + 1e-5).sqrt()

    h = c = x.new_zeros(6, 4)
    output = parallelize(cell, example=cell.example())(x)[0]
    for t in range(5):
        gates = cell.gamma_x * bn(cell.ih(x[t])) + cell.gamma_h * bn(cell.hh(h)) + cell.bias
        i, f, g, o = gates.chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * (cell.gamma_c * bn(c) + cell.beta_c).tanh()
        torch.testing.assert_close(output[t], h, **EXACT)


def strong_components(cell: nn.Module) -> tuple[nx.DiGraph, set[frozenset[str]]]:
    """The step's graph with edges of delay 1 from new states to states, and its components, by networkx."""
    nodes = list(fx.symbolic_trace(cell).graph.nodes)
    x, *states = (node for node in nodes if node.op == "placeholder")
    graph, fed = nx.DiGraph(), {x, *states}
    graph.add_nodes_from(state.name for state in states)
    for node in nodes:
        if node.op != "output" and fed.intersection(node.all_input_nodes):
            fed.add(node)
            graph.add_node(node.name)
            graph.add_edges_from((source.name, node.name) for source in node.all_input_nodes if source in fed - {x})
    for new, state in zip(nodes[-1].args[0][1:], states, strict=True):
        if new is not x:
            graph.add_edge(new.name, state.name)
    return graph, {frozenset(part) for part in nx.strongly_connected_components(graph)}


@pytest.mark.parametrize("name", [*SHIPPED, *ODD])
def test_components_are_networkx_s(name: str) -> None:
    """The same sets, recurrent ones told apart, none before what it needs."""
    cell = make(name)
    graph, expected = strong_components(cell)
    components = StepGraph(cell, cell.example()).components
    found = [frozenset(node.name for node in component.nodes) for component in components]
    assert len(found) == len(set(found)) and set(found) == expected
    for component, names in zip(components, found, strict=True):
        loops = len(names) > 1 or graph.has_edge(*names, *names)
        assert component.recurrent == loops
    place = {name: k for k, names in enumerate(found) for name in names}
    assert all(place[a] <= place[b] for a, b in graph.edges)


def recurrent(name: str) -> list[set[str]]:
    """The operations of each recurrent component, by what they call."""
    cell = make(name)
    found = [part.nodes for part in StepGraph(cell, cell.example()).components if part.recurrent]
    return [
        {str(getattr(node.target, "__name__", node.target)).rstrip("_0123456789") for node in part} for part in found
    ]


def test_what_must_stay_in_time() -> None:
    """In LSTM and GRU the product with h, not that with x; in SRU v1 the sum alone; in two layers each layer's own."""
    for name in ("LSTM", "GRU"):
        (part,) = recurrent(name)
        assert "hh" in part and "ih" not in part
    assert recurrent("SRUv1") == recurrent("QRNN") == [{"c", "mul", "add"}]
    (part,) = recurrent("SRUv2")
    assert "sigmoid" in part and "linear" not in part
    (part,) = recurrent("BNLSTM")
    assert {"batch_norm", "hh"} <= part and "ih" not in part
    lower, upper = recurrent("TwoLayer")
    assert "lower.hh" in lower and "upper.hh" in upper
    assert not {"upper.hh", "upper.ih", "lower.ih"} & lower and not {"lower.hh", "upper.ih"} & upper


class Copied(nn.Module):
    """With a parameter, a buffer and a submodule of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.gain = nn.Parameter(torch.rand(4))
        self.register_buffer("scale", torch.rand(4, 4))

    def forward(self, x, h):
        h = torch.tanh(self.linear(x) + self.gain * (h @ self.scale))
        return h, h


def copied(dtype: torch.dtype = F64) -> tuple[Copied, Any, Tensor, Tensor]:
    """A cell, its layer, an input and a state."""
    torch.manual_seed(0)
    cell = Copied().to(dtype)
    x, h = torch.randn(5, 3, 4, dtype=dtype), torch.randn(3, 4, dtype=dtype)
    return cell, parallelize(cell, example=(x[0], h)), x, h


def test_the_layer_has_the_cell_s_parameters() -> None:
    """The same tensors under the same names; an optimizer over the layer's moves the cell's."""
    cell, layer, x, h = copied()
    assert list(layer.state_dict()) == list(cell.state_dict())
    mine, yours = dict(layer.named_parameters()), dict(cell.named_parameters())
    assert mine.keys() == yours.keys() and all(mine[name] is yours[name] for name in mine)
    before, _ = layer(x, (h,))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    before.square().sum().backward()
    optimizer.step()
    after, _ = layer(x, (h,))
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, loop(cell, x, (h,))[0], **EXACT)


def test_a_state_dict_goes_from_one_to_another(tmp_path: Any) -> None:
    """Through a file, into a layer and into a cell; and on after .double()."""
    _cell, layer, x, h = copied()
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    saved = torch.load(tmp_path / "layer.pt")
    torch.manual_seed(1)
    other = Copied()
    copy_of = parallelize(other, example=(x[0].float(), h.float())).double()
    copy_of.load_state_dict(saved)
    torch.testing.assert_close(copy_of(x, (h,)), layer(x, (h,)), **EXACT)
    fresh = Copied().double()
    fresh.load_state_dict(layer.state_dict())
    torch.testing.assert_close(loop(fresh, x, (h,)), layer(x, (h,)), **EXACT)


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["copy", "pickle"]
)
def test_a_copy_stands_alone(how: Callable[[Any], Any]) -> None:
    """It computes the same, and goes its own way when its parameters and buffers change."""
    _cell, layer, x, h = copied()
    expected = layer(x, (h,))
    other = how(layer)
    torch.testing.assert_close(other(x, (h,)), expected, **EXACT)
    with torch.no_grad():
        for part in (*other.parameters(), *other.buffers()):
            part.mul_(0.5)
    torch.testing.assert_close(layer(x, (h,)), expected, **EXACT)
    alone = Copied().double()
    alone.load_state_dict(other.state_dict())
    torch.testing.assert_close(other(x, (h,)), loop(alone, x, (h,)), **EXACT)


@pytest.mark.parametrize(
    "how", [lambda layer: layer.double(), lambda layer: layer.to(torch.float64)], ids=["double", "to"]
)
def test_a_layer_changes_its_dtype(how: Callable[[Any], Any]) -> None:
    """Parameters and buffers; the states that it starts from follow the input."""
    _cell, layer, x, _h = copied(torch.float32)
    layer = how(layer)
    expected = Copied().double()
    expected.load_state_dict(layer.state_dict())
    output, (last,) = layer(x.double())
    assert output.dtype == last.dtype == F64
    torch.testing.assert_close(output, loop(expected, x.double(), (x.new_zeros(3, 4).double(),))[0], **EXACT)


@pytest.mark.parametrize("kind", [cells.SRUv2, cells.LSTM])
def test_threads_change_no_bit(kind: type[cells.Cell]) -> None:
    """Work that is shared out, in more columns than one register holds and more lanes than one sum takes."""
    cell = kind(24, 1100)
    layer, x = parallelize(cell, example=cell.example()), torch.randn(3, 37, 24)
    given, threads, results = flags(3, 37, "reset and mask"), torch.get_num_threads(), []
    for count in (1, 2):
        torch.set_num_threads(count)
        try:
            leaf = x.clone().requires_grad_()
            output, states = layer(leaf, **given)
            own = [p for name, p in layer.named_parameters() if "weight" not in name]  # no matrix product's
            grads = torch.autograd.grad(output.square().sum(), own)
        finally:
            torch.set_num_threads(threads)
        results.append([output, *states, *grads])
    near = {"rtol": 0, "atol": 0} if kind is cells.SRUv2 else {"rtol": 1e-4, "atol": 1e-5}  # products in the loop
    torch.testing.assert_close(*results, **near)


class Convolutional(nn.Module):
    """Shi et al. 2015 without gates: states with more than one axis."""

    def __init__(self) -> None:
        super().__init__()
        self.ih, self.hh = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x, h):
        h = torch.tanh(self.ih(x) + self.hh(h))
        return h, h


class Embedding(nn.Module):
    """Whole numbers as input."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.hh = nn.Embedding(7, 3), nn.Linear(3, 3)

    def forward(self, x, h):
        h = torch.tanh(self.embed(x) + self.hh(h))
        return h, h


def test_images_and_words() -> None:
    """Rows of any shape and dtype; what does not feed back leaves the loop there too."""
    torch.manual_seed(0)
    image, word = Convolutional().double(), Embedding().double()
    h = torch.randn(4, 3, 5, 6).double()
    layer = parallelize(image, example=(torch.randn(4, 2, 5, 6).double(), h))
    assert "ih" in {node.name for node in layer.passes(True)[0].nodes}
    assert_same(layer, image, torch.randn(5, 4, 2, 5, 6).double(), (h,), flags(5, 4, "reset and mask"))
    layer = parallelize(word, example=(torch.randint(7, (4,)), torch.randn(4, 3).double()))
    x, given = torch.randint(7, (5, 2)), flags(5, 2, "reset and mask")
    found, expected = layer(x, **given)[0], loop(word, x, (torch.zeros(2, 3).double(),), **given)[0]
    torch.testing.assert_close(found, expected, **EXACT)


def test_hooks_on_a_layer_of_the_cell_run() -> None:
    """A weight that a hook computes, such as a pruned one, is the one that is used, even if it comes later."""
    torch.manual_seed(0)
    cell = cells.GRU(3, 4).double()
    layer, x = parallelize(cell, example=cell.example()), torch.randn(5, 2, 3).double()
    prune.l1_unstructured(cell.hh, "weight", amount=0.5)
    expected, _ = loop(cell, x, (torch.zeros(2, 4).double(),))
    torch.testing.assert_close(layer(x)[0], expected, **EXACT)
