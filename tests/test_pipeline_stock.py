"""Torch's recurrent layers with flags: one packed call against a loop over steps, and against seqbatch's LSTM."""

import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from seqbatch.pipeline.stock import run_stock
from seqbatch.rnn import LSTM, SlowPathWarning

EXACT = {"rtol": 1e-10, "atol": 1e-10}
MODULES: list[tuple[type[nn.RNNBase], dict[str, Any]]] = [
    (nn.LSTM, {}),
    (nn.LSTM, {"num_layers": 2, "proj_size": 2}),
    (nn.GRU, {"bias": False}),
    (nn.GRU, {"num_layers": 2}),
    (nn.RNN, {"num_layers": 2}),
    (nn.RNN, {"nonlinearity": "relu"}),
]
every_module = pytest.mark.parametrize("which", range(len(MODULES)), ids=lambda i: f"{MODULES[i][0].__name__}{i}")


def make(which: int, dtype: torch.dtype = torch.float64) -> nn.RNNBase:
    torch.manual_seed(which)
    kind, settings = MODULES[which]
    return kind(3, 4, dtype=dtype, **settings)


def some_state(module: nn.RNNBase, lanes: int) -> Any:
    widths = [module.proj_size or module.hidden_size] + [module.hidden_size] * isinstance(module, nn.LSTM)
    dtype = module.weight_ih_l0.dtype
    parts = [torch.randn(module.num_layers, lanes, w, dtype=dtype, requires_grad=True) for w in widths]
    return tuple(parts) if len(parts) > 1 else parts[0]


def parts_of(state: Any) -> tuple[Tensor, ...]:
    return () if state is None else state if isinstance(state, tuple) else (state,)


def naive(module: nn.RNNBase, x: Tensor, state: Any, reset: Any, mask: Any) -> tuple[Tensor, ...]:
    """The output and each part of the state: the module on one step at a time, flags by selection."""
    reset = torch.zeros(x.shape[:2], dtype=torch.bool) if reset is None else reset
    mask = torch.ones(x.shape[:2], dtype=torch.bool) if mask is None else mask
    x = torch.where(mask[..., None], x, 0.0)
    if state is None:
        state = some_state(module, x.shape[1])
        reset = reset | (torch.arange(len(x)) == 0)[:, None]
    parts, outputs = parts_of(state), []
    for t in range(len(x)):
        parts = tuple(torch.where(reset[t, :, None], 0.0, part) for part in parts)
        output, after = module(x[t : t + 1], parts if len(parts) > 1 else parts[0])
        outputs.append(torch.where(mask[t, :, None], output, 0.0))
        parts = tuple(torch.where(mask[t, :, None], a, b) for a, b in zip(parts_of(after), parts, strict=True))
    return torch.cat(outputs), *parts


def compare(module: nn.RNNBase, x: Tensor, state: Any, reset: Any, mask: Any, expected: Any = naive) -> None:
    """Output, state after the last step and all gradients equal the twin's."""
    x = x.clone().requires_grad_()
    output, after = run_stock(module, x, state, reset, mask)
    assert isinstance(after, tuple) == isinstance(module, nn.LSTM)
    found, right = (output, *parts_of(after)), expected(module, x, state, reset, mask)
    torch.testing.assert_close(found, right, **EXACT)
    wanted, weigh = [x, *module.parameters(), *parts_of(state)], [torch.randn_like(part) for part in right]
    gradients = (torch.autograd.grad(out, wanted, weigh, materialize_grads=True) for out in (found, right))
    torch.testing.assert_close(*gradients, **EXACT)


def flags(data: st.DataObject, steps: int, lanes: int) -> Tensor | None:
    """Few, many or all true, or None."""
    if (chance := data.draw(st.sampled_from([None, 0.0, 0.2, 0.8, 1.0]))) is None:
        return None
    return torch.rand(steps, lanes, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 999)))) < chance


@every_module
@settings(max_examples=30)
@given(data=st.data(), steps=st.integers(1, 7), lanes=st.integers(1, 4), with_state=st.booleans())
def test_any_flags(which: int, data: st.DataObject, steps: int, lanes: int, with_state: bool) -> None:
    """With NaN in the padding."""
    module, reset, mask = make(which), flags(data, steps, lanes), flags(data, steps, lanes)
    x = torch.randn(steps, lanes, 3, dtype=torch.float64)
    if mask is not None:
        x = torch.where(mask[..., None], x, float("nan"))
    compare(module, x, some_state(module, lanes) if with_state else None, reset, mask)


def corner(name: str, steps: int, lanes: int) -> tuple[Tensor | None, Tensor | None]:
    reset, mask = torch.zeros(steps, lanes, dtype=torch.bool), torch.ones(steps, lanes, dtype=torch.bool)
    match name:
        case "no flags":
            return None, None
        case "nothing real":
            mask[:] = False
        case "nothing real, one lane reset":
            mask[:], reset[-1, 0] = False, True
        case "reset on every step":
            reset[:] = True
        case "reset at the start":
            reset[0, -1] = True
        case "one lane of padding":
            mask[:, 0] = False
        case "reset in the padding at the end":
            mask[-1], reset[-1] = False, True
        case "reset in the padding at the start":
            mask[0], reset[0] = False, True
    return reset, mask


CORNERS = ["no flags", "nothing real", "nothing real, one lane reset", "reset on every step", "reset at the start"]
CORNERS += ["one lane of padding", "reset in the padding at the end", "reset in the padding at the start"]


@pytest.mark.parametrize("name", CORNERS)
@pytest.mark.parametrize("with_state", [False, True], ids=["fresh", "state"])
def test_corners(name: str, with_state: bool) -> None:
    """Each on a grid, on one lane, on one step and on one cell."""
    for which in (0, 3):
        module = make(which)
        for steps, lanes in ((5, 3), (5, 1), (1, 3), (1, 1)):
            state = some_state(module, lanes) if with_state else None
            compare(module, torch.randn(steps, lanes, 3, dtype=torch.float64), state, *corner(name, steps, lanes))


@every_module
def test_lanes_do_not_meet(which: int) -> None:
    """Other data and flags in one lane, NaN among them, move no other lane's results and gradients."""
    module, results = make(which), []
    reset, mask = torch.rand(9, 4) < 0.2, torch.rand(9, 4) < 0.8
    x, state = torch.randn(9, 4, 3, dtype=torch.float64), some_state(module, 4)
    for changed in (False, True):
        if changed:
            x, reset, mask = x.detach().clone(), reset.clone(), mask.clone()
            x[:, 1], reset[:, 1], mask[:, 1] = float("nan"), ~reset[:, 1], ~mask[:, 1]
        x.requires_grad_()
        output, after = run_stock(module, x, state, reset, mask)
        out = output, *parts_of(after)
        found = *out, *torch.autograd.grad([part[:, [0, 2, 3]].sum() for part in out], [x, *parts_of(state)])
        results.append([part[:, [0, 2, 3]] for part in found])
    torch.testing.assert_close(*results, **EXACT)


def test_nan_stops_at_a_reset() -> None:
    """In a state that is cleared, and in the piece before."""
    module, reset = make(0), torch.zeros(4, 2, dtype=torch.bool)
    reset[0, 0] = reset[2, 1] = True
    x, state = torch.randn(4, 2, 3, dtype=torch.float64), tuple(torch.zeros(1, 2, 4).double() for _ in range(2))
    state[0][:, 0], x[1, 1] = float("nan"), float("nan")
    for flags in (reset, torch.cat([reset[:1], torch.zeros_like(reset[1:])])):
        output, after = run_stock(module, x, state, flags, None)
        assert torch.isfinite(output[:, 0]).all()
        assert torch.isfinite(after[1][:, 0]).all()
        assert torch.isfinite(after[1][:, 1]).all() == flags[2, 1]


def ours(module: nn.RNNBase, x: Tensor, state: Any, reset: Any, mask: Any) -> tuple[Tensor, ...]:
    """The same weights in seqbatch's LSTM."""
    settings = {name: getattr(module, name) for name in ("num_layers", "bias", "bidirectional", "proj_size")}
    rnn = LSTM(3, 4, dtype=x.dtype, **settings)
    for name, parameter in module.named_parameters():
        setattr(rnn, name, parameter)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SlowPathWarning)
        output, after = rnn(x, state, reset=reset, mask=mask)
    return output, *after


@pytest.mark.parametrize("bidirectional", [False, True], ids=["forward", "both ways"])
@settings(max_examples=40)
@given(data=st.data(), steps=st.integers(1, 7), lanes=st.integers(1, 4), proj_size=st.sampled_from([0, 2]))
def test_the_same_as_our_lstm(bidirectional: bool, data: st.DataObject, steps: int, lanes: int, proj_size: int) -> None:
    """In both directions too, where every piece is a sequence of its own and the state that returns is the same."""
    module = nn.LSTM(3, 4, 2, bidirectional=bidirectional, proj_size=proj_size, dtype=torch.float64)
    x, reset, mask = torch.randn(steps, lanes, 3).double(), flags(data, steps, lanes), flags(data, steps, lanes)
    compare(module, x, None if bidirectional else some_state(module, lanes), reset, mask, ours)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@every_module
def test_bfloat16(which: int) -> None:
    """Every dtype stays itself; rounding grows over the steps."""
    module, reset, mask = make(which, torch.bfloat16), torch.rand(6, 3) < 0.2, torch.rand(6, 3) < 0.8
    x, state = torch.randn(6, 3, 3, dtype=torch.bfloat16), some_state(module, 3)
    output, after = run_stock(module, x, state, reset, mask)
    torch.testing.assert_close((output, *parts_of(after)), naive(module, x, state, reset, mask), rtol=0.05, atol=0.05)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@every_module
def test_on_cuda_with_flags_on_the_cpu(which: int) -> None:
    """The same as on the CPU."""
    module, reset, mask = make(which), torch.rand(9, 4) < 0.2, torch.rand(9, 4) < 0.8
    x, state = torch.randn(9, 4, 3, dtype=torch.float64), some_state(module, 4)
    output, after = run_stock(module, x, state, reset, mask)
    there = tuple(part.cuda() for part in parts_of(state))
    found, last = run_stock(module.cuda(), x.cuda(), there if len(there) > 1 else there[0], reset, mask.cuda())
    torch.testing.assert_close((found, *parts_of(last)), (output, *parts_of(after)), check_device=False, **EXACT)


def test_refused() -> None:
    """What it does not take is named, and so is what it takes."""
    x, state = torch.zeros(5, 2, 3), torch.zeros(1, 2, 4)
    wrong: list[tuple[type[Exception], str, tuple[Any, ...]]] = [
        (TypeError, "nn.LSTM, nn.GRU or nn.RNN, got Linear", (nn.Linear(3, 4), x, None, None, None)),
        (ValueError, "time-major", (nn.GRU(3, 4, batch_first=True), x, None, None, None)),
        (ValueError, "pass None", (nn.GRU(3, 4, bidirectional=True), x, torch.zeros(2, 2, 4), None, None)),
        (RuntimeError, "at least 1, got \\(0, 2, 3\\)", (nn.GRU(3, 4), x[:0], None, None, None)),
        (RuntimeError, "x must be", (nn.GRU(3, 4), x[:, 0], None, None, None)),
        (RuntimeError, "\\(1, 2, 4\\), got \\(1, 1, 4\\)", (nn.GRU(3, 4), x, state[:, :1], None, None)),
        (RuntimeError, "\\(1, 2, 4\\) and \\(1, 2, 4\\), got \\(1, 2, 4\\)", (nn.LSTM(3, 4), x, state, None, None)),
        (ValueError, "mask must be bool", (nn.GRU(3, 4), x, None, None, torch.zeros(5, 2))),
        (RuntimeError, "reset must have shape", (nn.GRU(3, 4), x, None, torch.zeros(2, 5, dtype=torch.bool), None)),
    ]
    for error, message, arguments in wrong:
        with pytest.raises(error, match=message):
            run_stock(*arguments)
