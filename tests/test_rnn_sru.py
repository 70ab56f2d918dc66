"""SRU and its layer: one function, whatever the form of the batch; dropout, initial values, compiled and in half."""

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence, pad_sequence

from seqbatch.rnn import SRU, SRULayer, reference
from seqbatch.rnn.ops import sru_scan

EXACT = {"rtol": 1e-10, "atol": 1e-10}
LENGTHS = [4, 1, 3, 2, 6]
VARIANTS: list[dict[str, Any]] = [
    {},
    {"version": "v1"},
    {"bidirectional": True},
    {"version": "v1", "bidirectional": True, "activation": "relu", "hidden_size": 3},
    {"layer_norm": True, "projection_size": 2, "highway_bias": -1.0},
    {"layer_norm": True, "normalize_after": True, "bias": False},
    {"highway": False, "activation": "tanh"},
]


def make(seed: int = 0, **settings: Any) -> SRU:
    torch.manual_seed(seed)
    rnn = SRU(**{"input_size": 6, "hidden_size": 6, "num_layers": 3, "dtype": torch.float64} | settings)
    for parameter in rnn.parameters():  # biases and norms that are not what they start as
        parameter.data += 0.1 * torch.randn_like(parameter)
    return rnn


def pieces(seed: int = 1) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    return [torch.randn(n, 6, dtype=torch.float64) for n in LENGTHS]


def naive(rnn: SRU, x: torch.Tensor) -> torch.Tensor:
    """One sequence (T, D) through the stack, layer by layer from the published equations, without state."""
    for layer in rnn.layers:
        source = x if layer.layer_norm is None or layer.normalize_after else layer.layer_norm(x)
        source = source if layer.weight_proj is None else source @ layer.weight_proj.T
        u = (source @ layer.weight.T).view(len(x), 1, layer.planes, layer.output_size)
        skip = x[:, None] if layer.planes == 3 and layer.highway else None
        zero = x.new_zeros(1, layer.output_size)
        settings = (layer.activation, layer.bidirectional, layer.scale)
        h = reference.sru_scan(u, skip, layer.weight_c, layer.bias, zero, None, None, None, None, *settings)[0]
        x = layer.layer_norm(h[:, 0]) if layer.normalize_after else h[:, 0]
    return x


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_every_form_of_a_batch_gives_each_sequence_its_own_output(settings: dict[str, Any]) -> None:
    """Alone, padded, flat, spliced with resets, packed, batch first: outputs and input gradients agree."""
    rnn, xs = make(**settings), [x.requires_grad_() for x in pieces()]
    weigh = [torch.randn(n, rnn.layers[-1].output_size, dtype=torch.float64) for n in LENGTHS]

    def check(outputs: list[torch.Tensor]) -> None:
        grads = torch.autograd.grad(outputs, xs, weigh, retain_graph=True)  # the padded batch serves twice
        torch.testing.assert_close(outputs, expected, **EXACT)
        torch.testing.assert_close(grads, expected_grads, **EXACT)

    expected = [naive(rnn, x) for x in xs]
    expected_grads = torch.autograd.grad(expected, xs, weigh)
    check([rnn(x)[0] for x in xs])
    padded, mask = pad_sequence(xs), torch.arange(6)[:, None] < torch.tensor(LENGTHS)
    output = rnn(padded, mask=mask)[0]
    check([output[:n, i] for i, n in enumerate(LENGTHS)])
    assert output.detach()[~mask].abs().max() == 0
    flat = rnn(torch.cat(xs), cu_seqlens=torch.tensor([0, *LENGTHS]).cumsum(0).int())[0]
    check(list(flat.split(LENGTHS)))
    reset = torch.zeros(8, 2, dtype=torch.bool)
    reset[[0, 4, 5], 0] = reset[[0, 2], 1] = True
    spliced = rnn(torch.stack([torch.cat(xs[:3]), torch.cat(xs[3:])], 1), reset=reset)[0]
    check([*spliced[:, 0].split(LENGTHS[:3]), *spliced[:, 1].split(LENGTHS[3:])])
    packed = rnn(pack_sequence(xs, enforce_sorted=False))[0]
    output = pad_packed_sequence(packed)[0]
    check([output[:n, i] for i, n in enumerate(LENGTHS)])
    first = make(batch_first=True, **settings)
    output = first(padded.transpose(0, 1), mask=mask.T)[0]
    check([output[i, :n] for i, n in enumerate(LENGTHS)])


@pytest.mark.parametrize("settings", [s for s in VARIANTS if not s.get("bidirectional")], ids=str)
def test_chunks_with_carried_state_equal_the_whole(settings: dict[str, Any]) -> None:
    """Outputs, last state and, with the state not detached, all gradients; to the bit in one lane order."""
    rnn = make(**settings)
    x, reset = torch.randn(9, 4, 6, dtype=torch.float64, requires_grad=True), torch.rand(9, 4) < 0.2
    mask = torch.rand(9, 4) < 0.9
    whole, after = rnn(x, reset=reset, mask=mask)
    state, outputs = None, []
    for part in (slice(0, 4), slice(4, 5), slice(5, 9)):
        output, state = rnn(x[part], state, reset=reset[part], mask=mask[part])
        outputs.append(output)
    torch.testing.assert_close((torch.cat(outputs), state), (whole, after), **EXACT)
    wanted, weigh = [x, *rnn.parameters()], torch.randn_like(whole)
    torch.testing.assert_close(
        torch.autograd.grad(torch.cat(outputs), wanted, weigh, retain_graph=True),
        torch.autograd.grad(whole, wanted, weigh, retain_graph=True),
        **EXACT,
    )


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
@pytest.mark.parametrize("flat", [False, True])
def test_layers_can_be_called_by_themselves(settings: dict[str, Any], flat: bool) -> None:
    """To the bit: pipelines depend on it."""
    rnn = make(**settings)
    shape, lanes = ((9, 6), 3) if flat else ((9, 4, 6), 4)
    x = torch.randn(*shape, dtype=torch.float64)
    flags: dict[str, Any] = {"cu_seqlens": torch.tensor([0, 4, 4, 9])}
    if not flat:
        flags = {"reset": torch.rand(9, 4) < 0.2, "mask": torch.rand(9, 4) < 0.9}
    hx = torch.randn(3 * (1 + rnn.bidirectional), lanes, rnn.hidden_size, dtype=torch.float64)
    output, after = rnn(x, hx, **flags)
    states = []
    for layer, state in zip(rnn.layers, hx.split(1 + rnn.bidirectional), strict=True):
        x, last = layer(x, state, **flags)
        states.append(last)
    assert torch.equal(x, output) and torch.equal(torch.cat(states), after)


@pytest.mark.parametrize("form", ["spliced", "flat", "padded"])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_document_does_not_move_another(form: str, bidirectional: bool, dtype: torch.dtype) -> None:
    """Change document A, to NaN too: outputs, states and input gradients of document B keep every bit."""
    rnn = make(bidirectional=bidirectional).to(dtype)
    results = []
    for change in (lambda a: a, lambda a: 100 * a, lambda a: torch.full_like(a, float("nan"))):
        a, b = (x.to(dtype) for x in pieces()[::4])
        a, b = change(a).requires_grad_(), b.requires_grad_()
        if form == "padded":
            mask = torch.arange(6)[:, None] < torch.tensor([4, 6])
            output, state = rnn(pad_sequence([a, b]), mask=mask)
            output, state = output[:, 1], state[:, 1]
        elif form == "flat":
            output, state = rnn(torch.cat([a, b]), cu_seqlens=torch.tensor([0, 4, 10]))
            output, state = output[4:], state[:, 1]
        else:
            reset = torch.zeros(10, 1, dtype=torch.bool)
            reset[[0, 4]] = True
            output, state = rnn(torch.cat([a, b])[:, None], reset=reset)
            output, state = output[4:, 0], state[:: 1 + bidirectional, 0]  # the reverse direction ends in A
        results.append((output, state, torch.autograd.grad(output.sum(), b)[0]))
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


def test_nan_in_padding_spoils_no_gradient() -> None:
    """Not those of the weights either, which are products over all rows."""
    rnn, mask = make(layer_norm=True), torch.arange(6)[:, None] < torch.tensor([6, 3])
    grads = []
    for filler in (0.0, float("nan")):
        x = torch.where(mask[..., None], torch.ones(6, 2, 6, dtype=torch.float64), filler)
        grads.append(torch.autograd.grad(rnn(x, mask=mask)[0].sum(), list(rnn.parameters())))
    assert all(torch.equal(one, two) for one, two in zip(*grads, strict=True))


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("flat", [False, True])
def test_dropout_is_constant_over_time_and_where_the_papers_put_it(version: Any, flat: bool) -> None:
    """v1: m r g(c) + (1 - r) x. v2: x + m r (g(c) - x). A dropped unit shows what is left."""
    layer = SRULayer(64, 64, dropout=0.5, version=version, rescale=False, dtype=torch.float64)
    x = torch.randn(5, 64, dtype=torch.float64) if flat else torch.randn(5, 3, 64, dtype=torch.float64)
    flags = {"cu_seqlens": torch.tensor([0, 5])} if flat else {}
    dropped, kept = layer(x, **flags)[0], layer.eval()(x, **flags)[0]
    u = (x @ layer.weight.T).unflatten(-1, (3, 64))
    c = reference.sru_scan(u, None, layer.weight_c, layer.bias, x.new_zeros(1 if flat else 3, 64), **flags)[1]
    before = torch.cat([torch.zeros_like(c[:1]), c[:-1]])
    r = torch.sigmoid(u[..., 2, :] + layer.bias[1] + (0 if layer.weight_c is None else layer.weight_c[1] * before))
    gone = (1 - r) * x if version == "v1" else x
    doubled = 2 * kept - gone  # the other half is scaled by 2
    is_gone = torch.isclose(dropped, gone, atol=1e-9)
    torch.testing.assert_close(dropped, torch.where(is_gone, gone, doubled), **EXACT)
    assert torch.equal(is_gone.all(0), is_gone.any(0)) and 0.2 < is_gone.double().mean() < 0.8


def test_the_last_layer_has_no_dropout_and_variational_dropout_spares_the_highway() -> None:
    assert [layer.dropout for layer in SRU(4, 4, 3, dropout=0.3).layers] == [0.3, 0.3, 0.0]
    layer = SRULayer(4, 4, variational_dropout=0.999999, rescale=False, dtype=torch.float64)
    layer.weight.data *= 1e-9
    x = torch.randn(5, 2, 4, dtype=torch.float64)
    torch.testing.assert_close(layer(x)[0], x / 2, rtol=0, atol=1e-2)  # r = 1/2 and c = 0: half the input is left
    flat = layer(x[:, 0], cu_seqlens=torch.tensor([0, 2, 5]))[0]
    torch.testing.assert_close(flat, x[:, 0] / 2, rtol=0, atol=1e-2)


def test_initial_values_have_the_published_variances() -> None:
    torch.manual_seed(0)
    v1, v2 = SRULayer(500, 400, version="v1"), SRULayer(500, 400, highway_bias=-2.0, dropout=0.5)
    for layer, wanted in ((v1, [1, 1, 1, 1]), (v2, [0.5, 0.5, 0.5, v2.scale**2])):
        planes = layer.weight.view(4, 400, 500)
        assert [float(p.detach().var() * 500) for p in planes] == pytest.approx(wanted, rel=0.02)
    assert v2.scale == pytest.approx(math.sqrt(1 + 2 * math.exp(-2))) == pytest.approx(1.1272, abs=1e-4)
    assert v1.scale == 1 and v1.weight_c is None and v1.activation == "tanh"
    assert v2.bias.unique().tolist() == [-2, 0] and float(v2.weight_c.detach().std()) == pytest.approx(0.7071, rel=0.05)


def test_state_is_float32_and_autocast_computes_in_half() -> None:
    rnn = SRU(6, 6, 2).eval()
    x = torch.randn(5, 3, 6)
    exact, _ = rnn(x)
    with torch.autocast("cpu", torch.bfloat16):
        output, state = rnn(x)
    assert (output.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(output.float(), exact, rtol=0.05, atol=0.05)
    output.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in rnn.parameters())
    half, state = rnn.bfloat16()(x.bfloat16(), state)
    assert (half.dtype, state.dtype) == (torch.bfloat16, torch.float32)


class LanguageModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.rnn, self.head = nn.Embedding(11, 8), SRU(8, 8, 2), nn.Linear(8, 11)

    def forward(self, tokens: torch.Tensor, state: torch.Tensor, reset: Any, mask: Any) -> tuple[torch.Tensor, ...]:
        output, state = self.rnn(self.embed(tokens), state, reset=reset, mask=mask)
        return self.head(output), state


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # of torch's compiler, about torch.jit
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph(dynamic: bool) -> None:
    """A language model of two layers, forward and backward, equals eager; other sizes too."""
    torch.manual_seed(0)
    model = LanguageModel()
    compiled = torch.compile(model, fullgraph=True, backend="inductor" if not dynamic else "aot_eager", dynamic=dynamic)
    for steps, lanes in ((7, 3), (9, 2)) if dynamic else ((7, 3),):
        tokens, reset = torch.randint(11, (steps, lanes)), torch.rand(steps, lanes) < 0.2
        results = []
        for call in (model, compiled):
            state = torch.ones(2, lanes, 8, requires_grad=True)
            logits, after = call(tokens, state, reset, torch.rand(steps, lanes) < 2)
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten()) + after.square().sum()
            results.append((logits, after, *torch.autograd.grad(loss, [state, *model.parameters()])))
        torch.testing.assert_close(*results)


def test_double_backward_through_the_stack() -> None:
    """A gradient penalty: the gradient of a gradient's norm, against finite differences."""
    rnn = make(num_layers=2, bidirectional=True, hidden_size=2, input_size=3)
    x = torch.randn(3, 2, 3, dtype=torch.float64, requires_grad=True)

    def penalty(x: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(rnn(x)[0].square().sum(), x, create_graph=True)[0].square().sum()

    assert torch.autograd.gradcheck(penalty, x)


def test_what_backward_keeps() -> None:
    """u, c and the layer's input, which is the skip; beyond them nothing that grows with time."""
    rnn, kept = SRU(32, 32), {}
    x = torch.randn(50, 4, 32, requires_grad=True)

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        rnn(x)
    rows = 50 * 4 * 32 * 4
    assert rows * (3 + 1 + 1) <= sum(kept.values()) < rows * (3 + 1 + 1) + 40_000  # parameters and states


def test_packed_sequence_and_unbatched_input() -> None:
    rnn = make()
    x = torch.randn(5, 3, 6, dtype=torch.float64)
    lengths = torch.tensor([5, 3, 1])
    for enforce_sorted in (True, False):
        packed = pack_padded_sequence(x, lengths, enforce_sorted=enforce_sorted)
        output, state = rnn(packed)
        assert torch.equal(output.batch_sizes, packed.batch_sizes)
        torch.testing.assert_close(output.data, pack_padded_sequence(rnn(x)[0], lengths).data, **EXACT)
        torch.testing.assert_close(state[:, 1], rnn(x[:3, 1])[1], **EXACT)
    reset = torch.tensor([False, False, True, False, False])
    output, state = rnn(x[:, 0], torch.zeros(3, 6, dtype=torch.float64), reset=reset)
    expected, after = rnn(x[:, :1], reset=reset[:, None])
    assert output.shape == (5, 6) and state.shape == (3, 6)
    assert torch.equal(output, expected[:, 0]) and torch.equal(state, after[:, 0])
    output, state = SRULayer(6, 6, dtype=torch.float64)(x[:, 0], reset=reset)
    assert output.shape == (5, 6) and state.shape == (1, 6)


def test_no_lanes_and_no_tokens() -> None:
    rnn = make()
    assert rnn(torch.zeros(5, 0, 6).double())[0].shape == (5, 0, 6)
    hx = torch.randn(3, 2, 6, dtype=torch.float64)
    output, state = rnn(torch.zeros(0, 6).double(), hx, cu_seqlens=torch.tensor([0, 0, 0]))
    assert output.shape == (0, 6) and torch.equal(state, hx)


X = torch.zeros(5, 2, 6)
FLAG = torch.zeros(5, 2, dtype=torch.bool)
BAD_CALLS: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
    (torch.zeros(5, 2, 4), {}, RuntimeError, "input.size.-1. must be input_size, 6, got 4"),
    (torch.zeros(1, 5, 2, 6), {}, ValueError, "expected input to be 2-D or 3-D, got 4-D"),
    (X.double(), {}, ValueError, "parameters' dtype, torch.float32, got torch.float64; convert it: input.to"),
    (X.long(), {}, ValueError, "parameters' dtype, torch.float32, got torch.int64"),
    (X.to("meta"), {}, RuntimeError, "input on meta and parameters on cpu; move one"),
    (X[:0], {}, RuntimeError, "at least one time step, got an input of 0 steps"),
    ("x", {}, TypeError, "must be a tensor or a PackedSequence, got str"),
    (X, {"hx": torch.zeros(2, 2, 5)}, RuntimeError, r"hx must have shape \(2, 2, 6\), got \(2, 2, 5\)"),
    (X, {"hx": (torch.zeros(2, 2, 6),)}, TypeError, "hx must be a tensor of shape .* got tuple"),
    (X, {"hx": torch.zeros(2, 2, 6).double()}, ValueError, "hx must have dtype torch.float32, got torch.float64"),
    (X, {"hx": torch.zeros(2, 2, 6, device="meta")}, RuntimeError, "hx must be on the input's device, cpu, got meta"),
    (X[:, 0], {"hx": torch.zeros(2, 1, 6)}, RuntimeError, r"hx must have shape \(2, 6\), got \(2, 1, 6\)"),
    (X, {"reset": FLAG.T}, RuntimeError, r"reset must have shape \(5, 2\), one flag for each step and lane"),
    (X, {"mask": FLAG.int()}, ValueError, "mask must be bool, got torch.int32"),
    (X, {"cu_seqlens": torch.tensor([0, 5])}, ValueError, r"the input must be flat, \(S, 6\), got 3-D"),
    (X[:, 0], {"cu_seqlens": torch.tensor([0, 4])}, ValueError, "must end at the number of rows, 5, got 4"),
    (X[:, 0], {"cu_seqlens": torch.tensor([0, 5]), "mask": FLAG}, ValueError, "mask and cu_seqlens exclude"),
    (pack_sequence([X[:, 0]]), {"reset": FLAG}, ValueError, "leave reset, mask and cu_seqlens out"),
]


@pytest.mark.parametrize(("x", "arguments", "error", "message"), BAD_CALLS)
def test_bad_calls(x: Any, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SRU(6, 6, 2)(x, **arguments)


BAD_SETTINGS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"hidden_size": 0}, ValueError, "hidden_size must be at least 1, got 0"),
    ({"num_layers": 1.5}, TypeError, "num_layers must be an int, got float"),
    ({"version": "v3"}, ValueError, "version must be 'v1' or 'v2', got 'v3'"),
    ({"activation": "selu"}, ValueError, "activation must be one of identity, tanh, relu, got 'selu'"),
    ({"dropout": 1.0, "num_layers": 2}, ValueError, r"dropout must be a probability in \[0, 1\), got 1.0"),
    ({"variational_dropout": -0.1}, ValueError, "variational_dropout must be a probability"),
    ({"highway_bias": -1.0, "bias": False}, ValueError, "highway_bias needs a bias"),
    ({"normalize_after": True}, ValueError, "set layer_norm=True too"),
    ({"projection_size": 6}, ValueError, "projection_size must be smaller .* got 6 for 6 and 6; 0 means none"),
]


@pytest.mark.parametrize(("settings", "error", "message"), BAD_SETTINGS)
def test_bad_settings(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SRU(**{"input_size": 6, "hidden_size": 6} | settings)


def test_layers_are_called_as_modules() -> None:
    """Hooks, weight norm and wrappers around a layer of a stack work."""
    rnn, seen = SRU(3, 4, num_layers=2), []
    rnn.layers[1].register_forward_hook(lambda module, inputs, output: seen.append(output[0].shape))
    x = torch.randn(5, 2, 3)
    before = rnn(x)[0]
    torch.nn.utils.parametrizations.weight_norm(rnn.layers[0], "weight")
    assert seen == [(5, 2, 4)]
    torch.testing.assert_close(rnn(x)[0], before)
    with torch.no_grad():
        rnn.layers[0].parametrizations.weight.original0.mul_(3)
    assert not torch.allclose(rnn(x)[0], before)


def test_ensembles_by_vmap() -> None:
    """stack_module_state, vmap, backward: the gradients of each model by itself."""
    from torch.func import functional_call, stack_module_state

    torch.manual_seed(0)
    models, x = [SRU(4, 4).double() for _ in range(3)], torch.randn(5, 2, 4, dtype=torch.float64)
    parameters, buffers = stack_module_state(models)
    outputs = torch.vmap(lambda p, b: functional_call(models[0], (p, b), (x,))[0])(parameters, buffers)
    outputs.square().sum().backward()
    for i, model in enumerate(models):
        expected = torch.autograd.grad(model(x)[0].square().sum(), list(model.parameters()))
        for (name, _), wanted in zip(model.named_parameters(), expected, strict=True):
            torch.testing.assert_close(parameters[name].grad[i], wanted)


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")  # torch itself, on first use of duals
def test_derivatives_that_are_not_there_are_errors() -> None:
    """Forward mode would silently be 0, and a dropout mask has no gradient."""
    u, zero = torch.randn(5, 2, 3, 4), torch.zeros(2, 4)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(u, u)
        with pytest.raises(RuntimeError, match="no forward-mode derivative"):
            sru_scan(dual, None, None, None, zero)
    with pytest.raises(ValueError, match="dropout is a mask"):
        sru_scan(u, None, None, None, zero, dropout=torch.ones(2, 4, requires_grad=True))


def test_dropout_is_checked_and_may_change() -> None:
    """One layer has nowhere to drop; a stack takes a new probability at any time."""
    with pytest.warns(UserWarning, match="there is one"):
        SRU(3, 4, dropout=0.5)
    with pytest.raises(ValueError, match="probability"):
        SRU(3, 4, dropout=2.0)
    rnn = SRU(3, 4, num_layers=2)
    x = torch.randn(5, 2, 3)
    rnn.dropout = 0.5
    assert not torch.equal(rnn(x)[0], rnn(x)[0])
    assert [layer.dropout for layer in rnn.layers] == [0.5, 0.0]


def test_scale_of_a_projected_highway_in_v1() -> None:
    """rescale is in the weights there, as in v2."""
    torch.manual_seed(0)
    plain = SRULayer(3, 4, version="v1")
    torch.manual_seed(0)
    scaled = SRULayer(3, 4, version="v1", rescale=True)
    torch.testing.assert_close(scaled.weight[12:], plain.weight[12:] * 3**0.5)
    assert torch.equal(scaled.weight[:12], plain.weight[:12])
    assert SRULayer(4, 4, rescale=0.0).scale == 0.0


def test_meta_device_and_forms_of_a_layer() -> None:
    """Shapes without data; a layer takes packed and unbatched input as the stack does."""
    assert SRU(3, 4, device="meta")(torch.zeros(5, 2, 3, device="meta"))[0].shape == (5, 2, 4)
    layer, x = SRULayer(3, 4), torch.randn(5, 2, 3)
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, torch.tensor([5, 3]))
    mask = torch.arange(5)[:, None] < torch.tensor([5, 3])
    output, _ = torch.nn.utils.rnn.pad_packed_sequence(layer(packed)[0])
    torch.testing.assert_close(output, layer(x, mask=mask)[0])


def test_closed_gates_hold_beside_any_input() -> None:
    """c is kept to the bit where f is 1, however large z is."""
    u = torch.zeros(50, 1, 3, 8)
    u[:, :, 0], u[:, :, 1] = 1e5, 80.0
    c = torch.full((1, 8), 1e-3)
    assert torch.equal(sru_scan(u, None, None, None, c)[1], c)
