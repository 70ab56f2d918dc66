"""LSTM: the flush and hold steps against a loop over steps, and against nn.LSTM on each piece alone."""

import warnings
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence

from seqbatch.rnn import LSTM, SlowPathWarning, reference

pytestmark = pytest.mark.usefixtures("pieces_of_time")

EXACT = {"rtol": 1e-11, "atol": 1e-11}


def make(seed: int = 0, **settings: Any) -> LSTM:
    torch.manual_seed(seed)
    return LSTM(3, 4, dtype=torch.float64, **settings)


def naive(rnn: LSTM, x: torch.Tensor, hx: Any, reset: Any, mask: Any) -> tuple[torch.Tensor, ...]:
    """Output, h and c by the reference, layer by layer and direction by direction."""
    directions, hs, cs = 1 + rnn.bidirectional, [], []
    size = (x.shape[1], rnn.proj_size or rnn.hidden_size), (x.shape[1], rnn.hidden_size)
    for layer in range(rnn.num_layers):
        outputs = []
        for d in range(directions):
            end = f"_l{layer}" + ("_reverse" if d else "")
            weights = tuple(
                getattr(rnn, n + end, None) for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
            )
            i = layer * directions + d
            h, c = (x.new_zeros(s) if hx is None else hx[k][i] for k, s in enumerate(size))
            out, h, c = reference.lstm_layer(x, h, c, weights, reset, mask, bool(d))
            outputs.append(out)
            hs.append(h)
            cs.append(c)
        x = torch.cat(outputs, -1)
    return x, torch.stack(hs), torch.stack(cs)


def state(rnn: LSTM, lanes: int) -> tuple[torch.Tensor, torch.Tensor]:
    n = rnn.num_layers * (1 + rnn.bidirectional)
    sizes = (rnn.proj_size or rnn.hidden_size), rnn.hidden_size
    h, c = (torch.randn(n, lanes, s, dtype=torch.float64, requires_grad=True) for s in sizes)
    return h, c


def compare(rnn: LSTM, x: torch.Tensor, hx: Any, reset: Any, mask: Any, near: Any = EXACT) -> None:
    """Outputs, states and all gradients equal the loop's."""
    x = x.clone().requires_grad_()
    output, (h, c) = rnn(x, hx, reset=reset, mask=mask)
    expected = naive(rnn, x, hx, reset, mask)
    torch.testing.assert_close((output, h, c), expected, **near)
    wanted = [x, *rnn.parameters(), *(part for part in hx or () if part.requires_grad)]
    weigh = [torch.randn_like(e) for e in expected]
    found, right = (
        torch.autograd.grad(out, wanted, weigh, materialize_grads=True, allow_unused=True)
        for out in ((output, h, c), expected)
    )
    torch.testing.assert_close(found, right, **near)


SETTINGS: list[dict[str, Any]] = [
    {},
    {"bidirectional": True},
    {"num_layers": 2, "bias": False},
    {"num_layers": 2, "bidirectional": True},
    {"num_layers": 2, "bidirectional": True, "proj_size": 2},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("with_state", [False, True])
def test_resets(settings: dict[str, Any], with_state: bool) -> None:
    """At step 0, at the last step, twice running; lanes with several, with one, and in one direction with none."""
    rnn = make(**settings)
    reset = torch.zeros(7, 4, dtype=torch.bool)
    reset[0, 0] = reset[3, 0] = reset[4, 0] = reset[6, 1] = reset[2, 2] = True
    if rnn.bidirectional and with_state:  # a lane without a reset would have filler before its reverse start
        reset[5, 3] = True
    compare(rnn, torch.randn(7, 4, 3, dtype=torch.float64), state(rnn, 4) if with_state else None, reset, None)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("with_reset", [False, True])
def test_padding(settings: dict[str, Any], with_reset: bool) -> None:
    """Trailing padding, a lane of nothing else, holes before and after a reset, and NaN in all of it."""
    rnn = make(**settings)
    mask = torch.arange(7)[:, None] < torch.tensor([7, 4, 0, 6])
    reset = None
    if with_reset:
        mask[2, 0] = mask[3, 3] = False
        reset = torch.zeros(7, 4, dtype=torch.bool)
        reset[3, 0] = reset[3, 3] = reset[6, 1] = reset[2, 1] = True
    x = torch.where(mask[..., None], torch.randn(7, 4, 3, dtype=torch.float64), float("nan"))
    compare(rnn, x, None, reset, mask)
    if not rnn.bidirectional and not with_reset:
        compare(rnn, x, state(rnn, 4), reset, mask)


@given(data=st.data(), bidirectional=st.booleans(), with_state=st.booleans(), seed=st.integers(0, 99))
def test_any_flags(data: st.DataObject, bidirectional: bool, with_state: bool, seed: int) -> None:
    """Whatever the flags, by the stock kernels or by the loop."""
    rnn = make(seed, bidirectional=bidirectional)
    steps, lanes = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 3))
    flags = st.lists(st.booleans(), min_size=steps * lanes, max_size=steps * lanes)
    reset, mask = (torch.tensor(data.draw(flags)).view(steps, lanes) for _ in range(2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SlowPathWarning)
        hx = state(rnn, lanes) if with_state else None
        compare(rnn, torch.randn(steps, lanes, 3, dtype=torch.float64), hx, reset, mask)


def test_the_loop_is_taken_only_where_it_must() -> None:
    """And it says so; the message tells what to change."""
    rnn, two = make(), make(bidirectional=True)
    x, all_real = torch.randn(5, 2, 3, dtype=torch.float64), torch.ones(5, 2, dtype=torch.bool)
    hole, tail = all_real.clone(), all_real.clone()
    hole[2, 0] = tail[4, 0] = False
    with pytest.warns(SlowPathWarning, match="padding between real steps of one piece.*put it at the end"):
        compare(rnn, x, None, None, hole)
    with pytest.warns(SlowPathWarning, match="before the reverse direction's start with an initial h"):
        compare(two, x, state(two, 2), None, tail)
    reset = torch.zeros(5, 2, dtype=torch.bool)
    reset[2, 0] = True
    with pytest.warns(SlowPathWarning, match="more resets in another lane"):
        compare(two, x, state(two, 2), reset, None)
    compare(rnn, x, state(rnn, 2), None, tail)
    compare(two, x, (torch.zeros(2, 2, 4).double(), state(two, 2)[1]), None, tail)
    with pytest.warns(SlowPathWarning, match="before the reverse direction's start"):  # a learned h, still 0
        compare(two, x, (torch.zeros(2, 2, 4).double().requires_grad_(), state(two, 2)[1]), None, tail)
    leading = all_real.clone()
    leading[0, 0] = False
    compare(rnn, x, None, None, leading)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_pieces_equal_themselves_alone(bidirectional: bool) -> None:
    """Spliced lanes and the flat form against nn.LSTM on each piece."""
    rnn = make(num_layers=2, bidirectional=bidirectional)
    lengths = [4, 1, 3, 2, 6]
    pieces = [torch.randn(n, 3, dtype=torch.float64) for n in lengths]
    alone = [nn.LSTM.forward(rnn, piece) for piece in pieces]
    lanes = [torch.cat(pieces[:3]), torch.cat(pieces[3:])]
    reset = torch.zeros(8, 2, dtype=torch.bool)
    reset[[0, 4, 5], 0] = reset[[0, 2], 1] = True
    output, (h, c) = rnn(torch.stack(lanes, 1), reset=reset)
    torch.testing.assert_close(output[:, 0], torch.cat([out for out, _ in alone[:3]]), **EXACT)
    torch.testing.assert_close(output[:, 1], torch.cat([out for out, _ in alone[3:]]), **EXACT)
    torch.testing.assert_close((h[0, 0], c[0, 0]), (alone[2][1][0][0], alone[2][1][1][0]), **EXACT)

    cu_seqlens = torch.tensor([0, 4, 5, 5, 8, 10, 16], dtype=torch.int32)
    hx = state(rnn, 6)
    if bidirectional:  # the reverse direction's h would stand before padding
        hx = (torch.zeros_like(hx[0]), hx[1])
    output, (h, c) = rnn(torch.cat(pieces), hx, cu_seqlens=cu_seqlens)
    for n, (a, b) in enumerate(pairwise(cu_seqlens.tolist())):
        start = hx[0][:, n], hx[1][:, n]
        if a == b:
            assert torch.equal(h[:, n], start[0]) and torch.equal(c[:, n], start[1])
            continue
        out, (h_n, c_n) = nn.LSTM.forward(rnn, torch.cat(pieces)[a:b], start)
        torch.testing.assert_close((output[a:b], h[:, n], c[:, n]), (out, h_n, c_n), **EXACT)


def test_flat_form_of_nothing() -> None:
    rnn = make()
    output, (h, _) = rnn(torch.zeros(0, 3, dtype=torch.float64), cu_seqlens=torch.tensor([0, 0]))
    assert output.shape == (0, 4) and h.shape == (1, 1, 4)
    assert rnn(torch.zeros(0, 3, dtype=torch.float64), cu_seqlens=torch.tensor([0]))[1][0].shape == (1, 0, 4)
    assert rnn(torch.zeros(5, 0, 3).double(), mask=torch.zeros(5, 0, dtype=torch.bool))[0].shape == (5, 0, 4)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("enforce_sorted", [False, True])
def test_packed_sequence(bidirectional: bool, enforce_sorted: bool) -> None:
    """As nn.LSTM on the same PackedSequence."""
    rnn = make(num_layers=2, bidirectional=bidirectional)
    lengths = [5, 3, 1] if enforce_sorted else [3, 5, 1]
    x = pad_sequence([torch.randn(n, 3, dtype=torch.float64) for n in lengths])
    packed = pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=enforce_sorted)
    output, after = rnn(packed)
    expected, expected_after = nn.LSTM.forward(rnn, packed)
    assert torch.equal(output.batch_sizes, expected.batch_sizes)
    torch.testing.assert_close(output.data, expected.data, **EXACT)
    torch.testing.assert_close(pad_packed_sequence(output)[0], pad_packed_sequence(expected)[0], **EXACT)
    torch.testing.assert_close(after, expected_after, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_piece_does_not_move_its_neighbours(dtype: torch.dtype, bidirectional: bool) -> None:
    """Not by a bit: outputs, states and input gradients, whatever the other piece holds."""
    rnn = make(num_layers=2, bidirectional=bidirectional).to(dtype)
    reset = torch.zeros(8, 2, dtype=torch.bool)
    reset[3, 0] = reset[5, 1] = True
    results = []
    for scale in (1.0, 100.0):
        torch.manual_seed(1)
        x = torch.randn(8, 2, 3, dtype=dtype)
        x[:3, 0] *= scale
        x.requires_grad_()
        output, (h, c) = rnn(x, reset=reset)
        grad = torch.autograd.grad(output.sum(), x)[0]
        results.append((output[3:, 0], output[:, 1], grad[3:, 0], grad[:, 1], h[::2], c[::2]))
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


@pytest.mark.parametrize("bidirectional", [False, True])
def test_nan_does_not_cross_a_reset(bidirectional: bool) -> None:
    """Gates of NaN cannot close: such a call selects its states instead."""
    rnn = make(bidirectional=bidirectional)
    reset = (torch.arange(6) == 3)[:, None]
    clean = torch.randn(6, 1, 3, dtype=torch.float64)
    spoiled = clean.clone()
    spoiled[1] = float("nan")
    results = []
    for x in (clean.requires_grad_(), spoiled.requires_grad_()):
        output, (h, c) = rnn(x, reset=reset)
        results.append((output[3:], h[0], c[0], torch.autograd.grad(output.sum(), x)[0][3:]))
        if x is spoiled:
            assert output[1].isnan().all()
    torch.testing.assert_close(results[0], results[1], **EXACT)


@pytest.mark.parametrize("with_flags", [False, True])
def test_chunks_with_carried_state(with_flags: bool) -> None:
    """Two calls with the state handed on equal one."""
    rnn = make(num_layers=2)
    x, reset = torch.randn(8, 3, 3, dtype=torch.float64), torch.rand(8, 3) < 0.3
    mask = torch.ones(8, 3, dtype=torch.bool)
    mask[6:, 0] = False
    whole, after = rnn(x, reset=reset, mask=mask if with_flags else None)
    first, between = rnn(x[:5], reset=reset[:5], mask=mask[:5] if with_flags else None)
    second, end = rnn(x[5:], between, reset=reset[5:], mask=mask[5:] if with_flags else None)
    torch.testing.assert_close(torch.cat([first, second]), whole, **EXACT)
    torch.testing.assert_close(end, after, **EXACT)


def test_forms_of_input() -> None:
    """batch_first and unbatched input with flags, a float32 state for a bfloat16 layer."""
    rnn, first = make(), make(batch_first=True)
    x, reset = torch.randn(6, 2, 3, dtype=torch.float64), torch.rand(6, 2) < 0.4
    expected, after = rnn(x, reset=reset)
    output, again = first(x.transpose(0, 1), reset=reset.T)
    torch.testing.assert_close((output.transpose(0, 1), *again), (expected, *after), **EXACT)
    output, (h, c) = rnn(x[:, 0], (torch.zeros(1, 4).double(), torch.zeros(1, 4).double()), reset=reset[:, 0])
    torch.testing.assert_close((output, h, c), (expected[:, 0], after[0][:, 0], after[1][:, 0]), **EXACT)
    half = make().bfloat16()
    output, _ = half(x.bfloat16(), (torch.zeros(1, 2, 4), torch.zeros(1, 2, 4)), reset=reset)
    assert output.dtype == torch.bfloat16


def test_state_dicts_go_both_ways() -> None:
    stock, ours = nn.LSTM(3, 4, 2, bidirectional=True), LSTM(3, 4, 2, bidirectional=True)
    ours.load_state_dict(stock.state_dict())
    x = torch.randn(5, 2, 3)
    assert torch.equal(ours(x)[0], stock(x)[0])
    torch.testing.assert_close(ours(x, mask=torch.ones(5, 2, dtype=torch.bool))[0], stock(x)[0])
    stock.load_state_dict(LSTM(3, 4, 2, bidirectional=True).state_dict())


def test_dropout_stands_between_layers() -> None:
    """With probability 1 the second layer sees zeros, with flags as without."""
    rnn = make(num_layers=2, dropout=1.0)
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    torch.testing.assert_close(rnn(x, mask=torch.ones(5, 2, dtype=torch.bool))[0], rnn(x)[0], **EXACT)
    assert not torch.equal(rnn.eval()(x)[0], rnn.train()(x)[0])


def test_gradcheck() -> None:
    rnn, reset = make(), torch.tensor([[False, True], [True, False], [False, False]])
    x = torch.randn(3, 2, 3, dtype=torch.float64, requires_grad=True)
    h, c = state(rnn, 2)
    mask = torch.tensor([[True, True], [True, True], [True, False]])
    assert torch.autograd.gradcheck(lambda *a: rnn(a[0], a[1:], reset=reset, mask=mask)[0], (x, h, c))


X = torch.zeros(5, 2, 3)
FLAG = torch.zeros(5, 2, dtype=torch.bool)
BAD: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
    (torch.zeros(5, 2, 4), {"reset": FLAG}, RuntimeError, "input.size.-1. must be input_size, 3, got 4"),
    (torch.zeros(1, 5, 2, 3), {"reset": FLAG}, ValueError, "expected input to be 2-D or 3-D, got 4-D"),
    (X.double(), {"reset": FLAG}, ValueError, "parameters' dtype, torch.float32, got torch.float64; convert it"),
    (X.to("meta"), {"reset": FLAG}, RuntimeError, "must be on one device, got input on meta and parameters on cpu"),
    (X[:0], {"reset": FLAG[:0]}, RuntimeError, "at least one time step"),
    ([1, 2], {"reset": FLAG}, TypeError, "must be a tensor or a PackedSequence, got list"),
    (X, {"reset": FLAG.T}, RuntimeError, r"reset must have shape \(5, 2\), one flag for each step and lane"),
    (X, {"mask": FLAG.float()}, ValueError, "mask must be bool, got torch.float32"),
    (X, {"reset": FLAG, "hx": torch.zeros(1, 2, 4)}, TypeError, r"hx must be \(h, c\), got Tensor"),
    (X, {"reset": FLAG, "hx": (torch.zeros(1, 3, 4),) * 2}, RuntimeError, r"hx\[0\] must have shape \(1, 2, 4\)"),
    (X, {"cu_seqlens": torch.tensor([0, 5])}, ValueError, r"with cu_seqlens the input must be flat, \(S, 3\)"),
    (X[:, 0], {"cu_seqlens": torch.tensor([0, 6])}, ValueError, "must end at the number of rows, 5, got 6"),
    (X[:, 0], {"cu_seqlens": torch.tensor([0, 5]), "reset": FLAG}, ValueError, "reset and cu_seqlens exclude"),
]


@pytest.mark.parametrize(("x", "arguments", "error", "message"), BAD)
def test_bad_input(x: Any, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LSTM(3, 4)(x, **arguments)
