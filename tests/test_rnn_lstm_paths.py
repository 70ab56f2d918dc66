"""Which way an LSTM call takes: stock kernels wherever they can express it, and the same numbers there."""

from typing import Any

import pytest
import torch
from test_rnn_lstm import EXACT, compare, make, state
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from seqbatch.rnn import LSTM, SRU, SlowPathWarning, lstm, reference

pytestmark = pytest.mark.usefixtures("pieces_of_time")


@pytest.fixture
def no_loop(monkeypatch: Any) -> None:
    """The loop over steps is an error: a fault of the stock path would else hide behind it."""

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("the loop over steps ran")

    monkeypatch.setattr(reference, "lstm_layer", fail)


@pytest.mark.filterwarnings("ignore::seqbatch.rnn.SlowPathWarning")
@pytest.mark.parametrize("seed", range(4))
def test_holes_without_resets(seed: int) -> None:
    """Padding anywhere, in two layers."""
    mask = torch.rand(6, 4, generator=torch.Generator().manual_seed(seed)) < 0.6
    rnn = make(num_layers=2)
    compare(rnn, torch.randn(6, 4, 3).double(), state(rnn, 4), None, mask)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.usefixtures("no_loop")
def test_what_stock_kernels_express_runs_on_them(dtype: torch.dtype, bidirectional: bool) -> None:
    """NaN in padding, or in a state that a reset discards, is no reason for the loop; gradients end at the reset."""
    rnn = make(bidirectional=bidirectional).to(dtype)
    x, mask = torch.randn(6, 2, 3).to(dtype), torch.arange(6)[:, None] < torch.tensor([6, 4])
    reset = torch.zeros(6, 2, dtype=torch.bool)
    reset[3, 0] = reset[0, 1] = True
    x[4:, 1] = float("nan")
    x.requires_grad_()
    h = torch.zeros(1 + bidirectional, 2, 4, dtype=dtype)
    h[0, 1] = float("nan")
    output, after = rnn(x, (h, h), reset=reset, mask=mask)
    assert all(part.isfinite().all() for part in (output, *after))
    grad = torch.autograd.grad(output[3:, 0, :4].sum(), x)[0]
    assert not grad[:3].any(), "the gradient crosses a reset"


@pytest.mark.usefixtures("no_loop")
def test_reset_at_0_needs_no_loop() -> None:
    """A state that is cleared at once is lost to padding without harm."""
    rnn, mask, reset = make(), torch.ones(5, 2, dtype=torch.bool), torch.zeros(5, 2, dtype=torch.bool)
    mask[0] = False
    reset[0] = True
    x = torch.randn(5, 2, 3).double()
    output, _ = rnn(x, state(rnn, 2), reset=reset, mask=mask)
    torch.testing.assert_close(output[1:], nn.LSTM.forward(rnn, x[1:])[0], **EXACT)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.usefixtures("no_loop")
def test_nan_in_padding_needs_no_loop(bidirectional: bool) -> None:
    """Whatever lies in padding is not read."""
    rnn, x, mask = make(bidirectional=bidirectional), torch.randn(8, 8, 3).double(), torch.ones(8, 8).triu().bool()
    spoiled = torch.where(mask[..., None], x, float("nan"))
    torch.testing.assert_close(rnn(spoiled, mask=mask), rnn(x, mask=mask), **EXACT)


@pytest.mark.usefixtures("no_loop")
def test_sum_of_half_precision_outputs_may_be_large() -> None:
    """Only what is not finite itself takes the loop, not a sum that float16 cannot hold."""
    rnn = LSTM(3, 32, dtype=torch.float16)
    with torch.no_grad():
        rnn.bias_ih_l0.fill_(9.0)
    output, _ = rnn(torch.zeros(60, 60, 3, dtype=torch.float16), mask=torch.ones(60, 60, dtype=torch.bool))
    assert output.sum(dtype=torch.float32) > torch.finfo(torch.float16).max


def test_no_dropout_in_evaluation() -> None:
    """With flags or without."""
    rnn, x = make(num_layers=2, dropout=0.5).eval(), torch.randn(5, 2, 3).double()
    torch.testing.assert_close(rnn(x, mask=torch.ones(5, 2, dtype=torch.bool))[0], rnn(x)[0], **EXACT)


@pytest.mark.parametrize("settings", [{"bidirectional": True}, {"proj_size": 2}])
def test_sizes_of_nothing(settings: dict[str, Any]) -> None:
    """No rows, or no lanes: the output has the features it would have."""
    rnn, width = make(**settings), 8 if "bidirectional" in settings else 2
    assert rnn(torch.zeros(0, 3).double(), cu_seqlens=torch.tensor([0, 0]))[0].shape == (0, width)
    assert rnn(torch.zeros(5, 0, 3).double(), mask=torch.ones(5, 0).bool())[0].shape == (5, 0, width)


def test_forms_of_mask() -> None:
    """batch_first and unbatched calls take theirs transposed and without lanes; packed input needs none."""
    rnn, first = make(), make(batch_first=True)
    x, mask = torch.randn(6, 2, 3).double(), torch.arange(6)[:, None] < torch.tensor([6, 4])
    expected, after = rnn(x, mask=mask)
    output, again = first(x.transpose(0, 1), mask=mask.T)
    torch.testing.assert_close((output.transpose(0, 1), *again), (expected, *after), **EXACT)
    torch.testing.assert_close(rnn(x[:, 1], mask=mask[:, 1])[0], expected[:, 1], **EXACT)
    packed = pack_padded_sequence(x, torch.tensor([6, 4]))
    torch.testing.assert_close(first(packed)[0].data, nn.LSTM.forward(first, packed)[0].data, **EXACT)


@pytest.mark.filterwarnings("ignore::seqbatch.rnn.SlowPathWarning")
@pytest.mark.parametrize("seed", range(4))
def test_state_of_one_layer_only(seed: int) -> None:
    """An initial h anywhere in the stack counts."""
    rnn = make(seed, num_layers=2, bidirectional=True)
    for i in range(4):
        h, c = (part.detach() for part in state(rnn, 3))
        h = h * (torch.arange(4) == i)[:, None, None]
        compare(rnn, torch.randn(5, 3, 3).double(), (h, c), None, torch.arange(5)[:, None] >= torch.tensor([0, 2, 1]))
        compare(rnn, torch.randn(5, 3, 3).double(), (h, c), None, torch.arange(5)[:, None] < torch.tensor([5, 2, 3]))


def test_leading_padding_ends_the_reverse_direction() -> None:
    """Its last state is the one after the first real step."""
    rnn, x, steps = make(bidirectional=True), torch.randn(4, 1, 3).double(), torch.arange(4)[:, None]
    (_, (h, c)), (_, (right_h, right_c)) = rnn(x, reset=steps == 3, mask=steps > 0), nn.LSTM.forward(rnn, x[1:3, 0])
    torch.testing.assert_close((h[1, 0], c[1, 0]), (right_h[1], right_c[1]), **EXACT)


@pytest.mark.parametrize("kind", [LSTM, SRU])
def test_packed_lanes_of_equal_length_keep_the_callers_order(kind: type) -> None:
    """Whoever packed may have sorted equal lengths in another way than torch does."""
    torch.manual_seed(0)
    rnn, x = kind(3, 4).double(), torch.randn(3, 4, 3, dtype=torch.float64)
    lengths, order = torch.tensor([3, 2, 3, 2]), torch.tensor([2, 0, 3, 1])
    sorted_first = pack_padded_sequence(x[:, order], lengths[order])
    packed = PackedSequence(sorted_first.data, sorted_first.batch_sizes, order, order.argsort())
    output, _ = nn.utils.rnn.pad_packed_sequence(rnn(packed)[0])
    mask = torch.arange(3)[:, None] < lengths
    torch.testing.assert_close(output, rnn(x, mask=mask)[0], **EXACT)


def test_a_packed_state_of_the_reverse_direction_needs_no_loop() -> None:
    """What nn.LSTM expresses runs as there, without a warning."""
    rnn = make(bidirectional=True)
    packed = pack_padded_sequence(torch.randn(5, 2, 3).double(), torch.tensor([5, 3]))
    hx = state(rnn, 2)
    output, after = rnn(packed, hx)
    right, expected = nn.LSTM.forward(rnn, packed, hx)
    torch.testing.assert_close((output.data, *after), (right.data, *expected), **EXACT)


@pytest.mark.parametrize("flags", ["none", "mask", "reset", "loop"])
def test_autocast_carries_its_own_state(flags: str) -> None:
    """A state that a call returns, the next one takes; outputs have autocast's dtype whatever way they took."""
    rnn, x, carried = LSTM(3, 4), torch.randn(5, 2, 3), None
    given: dict[str, Any] = {"mask": {"mask": torch.ones(5, 2, dtype=torch.bool)}}.get(flags, {})
    if flags in ("reset", "loop"):
        given = {"reset": (torch.arange(5) == 3)[:, None].expand(5, 2)}
    if flags == "loop":
        x[0, 0] = float("nan")
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            output, carried = rnn(x, carried, **given)
            assert {output.dtype, *(part.dtype for part in carried)} == {torch.bfloat16}


def test_float32_states_of_half_layers() -> None:
    """A loop may carry float32, with flags or without."""
    rnn, x = LSTM(3, 4).bfloat16(), torch.randn(5, 2, 3).bfloat16()
    hx = (torch.randn(1, 2, 4), torch.randn(1, 2, 4))
    flagged = rnn(x, hx, mask=torch.ones(5, 2, dtype=torch.bool))[0]
    torch.testing.assert_close(rnn(x, hx)[0], flagged, rtol=0.02, atol=0.02)  # bfloat16 rounds to 1 in 256


def test_the_warning_names_the_callers_line() -> None:
    """Each line that takes the loop warns for itself."""
    mask = torch.tensor([[True], [False], [True]])
    with pytest.warns(SlowPathWarning) as caught:
        make()(torch.randn(3, 1, 3).double(), mask=mask)
    assert caught[0].filename == __file__


def test_ragged_lanes_that_begin_with_a_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loader's batches have both flags: lanes that have ended are left out all the same, and the state is cleared."""
    torch.manual_seed(0)
    rnn = LSTM(3, 4, num_layers=2, dtype=torch.float64)
    x = torch.randn(9, 4, 3, dtype=torch.float64)
    mask = torch.arange(9)[:, None] < torch.tensor([9, 2, 4, 3])
    reset = torch.zeros(9, 4, dtype=torch.bool)
    reset[0] = torch.tensor([True, True, False, True])
    hx = tuple(torch.randn(2, 4, 4, dtype=torch.float64) for _ in range(2))
    calls: list[int] = []
    monkeypatch.setattr(lstm, "SAVED_AT_LEAST", 0)  # however little it saves
    ragged = LSTM._run_ragged
    monkeypatch.setattr(LSTM, "_run_ragged", lambda *arguments: (calls.append(1), ragged(*arguments))[1])
    output, state = rnn(x, hx, reset=reset, mask=mask)

    assert calls
    expected, after = rnn._run_reference(x, reset, mask, hx)  # type: ignore[arg-type]
    torch.testing.assert_close(torch.where(mask[..., None], expected, 0.0), output, rtol=0, atol=1e-12)
    torch.testing.assert_close(after, state, rtol=0, atol=1e-12)
    calls.clear()
    reset[2, 2] = True
    rnn(x, hx, reset=reset, mask=mask)
    assert not calls
