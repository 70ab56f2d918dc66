"""The scan: the reference against single numbers, the operators against the reference, and their laws."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scans import FORMS, gradients, learning, naive_scan, some_scan

from seqbatch.rnn import ops, reference
from seqbatch.rnn.checks import Scan
from seqbatch.rnn.ops import sru_scan

EXACT = {"rtol": 1e-12, "atol": 1e-12}
NAMES = ("form", "planes", "version", "activation", "bidirectional", "dropout_inside")
ACTIVATIONS = ("identity", "tanh", "relu")
GRID = [
    pytest.param(dict(zip(NAMES, values, strict=True)), id="-".join(map(str, values)))
    for values in itertools.product(FORMS, (3, 4), ("v1", "v2"), ACTIVATIONS, (False, True), (False, True))
]


def run(scan: Scan) -> tuple[torch.Tensor, torch.Tensor]:
    return sru_scan(*scan[:5], **dict(zip(Scan._fields[5:-1], scan[5:-1], strict=True)))


@pytest.mark.parametrize("settings", GRID)
def test_reference_equals_single_numbers(settings: dict[str, Any]) -> None:
    """The specification itself, against a loop that has no tensor operation in it."""
    scan = some_scan(**settings)
    h, _, last = reference.sru_scan(*scan[:-1])
    torch.testing.assert_close((h, last), naive_scan(scan), **EXACT)


@pytest.mark.parametrize("settings", GRID)
def test_operator_equals_reference(settings: dict[str, Any]) -> None:
    """Outputs, last state, and the gradients of u, skip, weight_c, bias and initial state."""
    scan = learning(some_scan(**settings))
    h, last = run(scan)
    expected_h, _, expected_last = reference.sru_scan(*scan[:-1])
    torch.testing.assert_close((h, last), (expected_h, expected_last), **EXACT)
    torch.testing.assert_close(gradients(scan, h, last), gradients(scan, expected_h, expected_last), **EXACT)


@given(
    form=st.sampled_from(FORMS),
    version=st.sampled_from(["v1", "v2"]),
    bidirectional=st.booleans(),
    steps=st.integers(1, 12),
    lanes=st.integers(1, 40),
    width=st.sampled_from([2, 8, 520, 1030]),
    seed=st.integers(0, 1000),
)
def test_any_size_and_any_number_of_threads(
    form: str, version: str, bidirectional: bool, steps: int, lanes: int, width: int, seed: int
) -> None:
    """Blocks of columns and groups of lanes meet without gap or overlap; threads change no bit."""
    scan = learning(
        some_scan(form, version=version, bidirectional=bidirectional, steps=steps, lanes=lanes, width=width, seed=seed)
    )
    results = []
    threads = torch.get_num_threads()
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            h, last = run(scan)
            results.append((h, last, *gradients(scan, h, last)))
    finally:
        torch.set_num_threads(threads)
    h, _, last = reference.sru_scan(*scan[:-1])
    torch.testing.assert_close(results[0], (h, last, *gradients(scan, h, last)), **EXACT)
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_without_gradients_the_states_are_not_kept(
    form: str, bidirectional: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The outputs keep every bit."""
    scan, asked, operator = learning(some_scan(form, bidirectional=bidirectional)), [], ops._forward
    monkeypatch.setattr(ops, "_forward", lambda *arguments: asked.append(arguments[-1]) or operator(*arguments))
    expected = run(scan)
    run(Scan(*(x.detach() if isinstance(x, torch.Tensor) else x for x in scan)))
    with torch.no_grad():
        assert all(torch.equal(one, two) for one, two in zip(run(scan), expected, strict=True))
    assert asked == [True, False, False]
    assert operator(*scan._replace(keep=False))[1].numel() == 0


@pytest.mark.parametrize("absent", ["skip", "weight_c", "bias", "dropout", "reset", "mask"])
def test_every_optional_argument_may_be_absent(absent: str) -> None:
    """Each by itself, so that no kernel reads what is not there."""
    scan = learning(some_scan()._replace(**{absent: None}))
    h, last = run(scan)
    expected_h, _, expected_last = reference.sru_scan(*scan[:-1])
    torch.testing.assert_close((h, last), (expected_h, expected_last), **EXACT)
    torch.testing.assert_close(gradients(scan, h, last), gradients(scan, expected_h, expected_last), **EXACT)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("planes", [3, 4])
def test_gradcheck(form: str, bidirectional: bool, planes: int) -> None:
    """First and second derivatives against finite differences."""
    scan = learning(some_scan(form, planes, bidirectional=bidirectional, steps=4, lanes=2, width=2))
    inputs = [x for x in scan[:5] if x is not None]

    def function(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found = iter(tensors)
        return run(Scan(*(None if x is None else next(found) for x in scan[:5]), *scan[5:]))

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_opcheck(form: str, bidirectional: bool) -> None:
    """torch's own checks of schema, shapes, registered derivative and compiled call, of both operators."""
    scan = learning(some_scan(form, bidirectional=bidirectional, steps=4, lanes=2, width=4))
    torch.library.opcheck(ops._forward._opoverload, tuple(scan))
    h, c, last = ops._forward(*scan)
    # In the flat form the derivative of the derivative loops over the values of cu_seqlens, which cannot be traced.
    given_ = scan if form != "flat" else [x.detach() if isinstance(x, torch.Tensor) else x for x in scan]
    torch.library.opcheck(ops._backward._opoverload, (h.detach(), last.detach(), c, *given_))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ["identity", "tanh"])
def test_lower_precision(form: str, dtype: torch.dtype, activation: str) -> None:
    """h has u's dtype and the state float32, close to float64 on the same rounded numbers."""
    scan = some_scan(form, activation=activation, dtype=dtype)
    h, last = run(scan)
    assert (h.dtype, last.dtype) == (dtype, torch.float32)
    exact = Scan(*(x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in scan))
    expected_h, _, expected_last = reference.sru_scan(*exact[:-1])
    near = {"rtol": 2e-6, "atol": 2e-6}  # the float32 sigmoid is off by 1.5e-7, over some steps
    torch.testing.assert_close(last.double(), expected_last, **near)
    rounding = near if dtype == torch.float32 else {"rtol": torch.finfo(dtype).eps, "atol": 1e-5}
    torch.testing.assert_close(h.double(), expected_h, **rounding)


def test_saturated_gates_are_exact() -> None:
    """Gates of 0 and 1 for large inputs: nothing leaks through a closed gate in float32."""
    u = torch.zeros(1, 1, 3, 2)
    u[0, 0, 0], u[0, 0, 1] = 5.0, torch.tensor([80.0, -200.0])
    _, last = sru_scan(u, None, None, None, torch.full((1, 2), 3.0))
    assert last.tolist() == [[3.0, 5.0]]


@pytest.mark.parametrize("form", FORMS)
def test_every_output_is_written(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With fresh memory full of NaN, nothing of it is seen."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        scan = learning(some_scan(form))
        h, last = run(scan)
        grads = gradients(scan, h, last)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(x.isfinite().all() for x in (h, last, *grads))


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_nan_does_not_cross_a_reset(bidirectional: bool, version: str) -> None:
    """It is seen in its own piece, and moves no bit of the next one, backwards neither."""
    clean = learning(some_scan("plain", bidirectional=bidirectional, version=version, steps=6, lanes=2))
    reset = torch.zeros(6, 2, dtype=torch.bool)
    reset[3] = True
    clean = clean._replace(reset=reset)
    spoiled = learning(clean)
    with torch.no_grad():
        spoiled.u[2, 0, 0, :] = float("nan")
    (h, last), (h_nan, last_nan) = run(clean), run(spoiled)
    assert h_nan[2, 0].isnan().all()
    assert torch.equal(h_nan[3:], h[3:]) and torch.equal(h_nan[:, 1], h[:, 1])
    half = 6 // (1 + bidirectional)
    assert torch.equal(last_nan[:, :half], last[:, :half])
    grad, grad_nan = gradients(clean, h, last)[0], gradients(spoiled, h_nan, last_nan)[0]
    assert torch.equal(grad[3:], grad_nan[3:]) and grad_nan[:3, 0].isnan().any()


def test_nan_in_padding_is_not_seen() -> None:
    """Not in an output, a state or a gradient."""
    scan = learning(some_scan())
    spoiled = learning(scan)
    with torch.no_grad():
        spoiled.u[~scan.mask] = float("nan")
        spoiled.skip[~scan.mask] = float("nan")
    (h, last), (h_nan, last_nan) = run(scan), run(spoiled)
    assert torch.equal(h, h_nan) and torch.equal(last, last_nan)
    for one, two in zip(gradients(scan, h, last), gradients(spoiled, h_nan, last_nan), strict=True):
        assert torch.equal(one, two)
    first, second = reference.sru_scan(*spoiled[:-1])[::2]
    assert all(g.isfinite().all() for g in gradients(spoiled, first, second))


def test_no_steps_no_lanes_no_sequences() -> None:
    """Nothing in, nothing out, and the initial state where there is one."""
    none = (None, None, None)
    h, last = sru_scan(torch.zeros(4, 0, 3, 2), *none, torch.zeros(0, 2))
    assert h.shape == (4, 0, 2) and last.shape == (0, 2)
    h, last = sru_scan(torch.zeros(0, 2, 3, 2), *none, torch.ones(2, 2))
    assert h.shape == (0, 2, 2) and last.tolist() == [[1, 1], [1, 1]]
    h, last = sru_scan(torch.zeros(0, 3, 2), *none, torch.ones(2, 2), cu_seqlens=torch.tensor([0, 0, 0]))
    assert h.shape == (0, 2) and last.tolist() == [[1, 1], [1, 1]]
    h, last = sru_scan(torch.zeros(0, 3, 2), *none, torch.ones(0, 2), cu_seqlens=torch.tensor([0]))
    assert last.shape == (0, 2)


def test_strided_inputs() -> None:
    """Views of other layouts give the same, gradients too."""
    scan = learning(some_scan())
    strided = Scan(
        *(x.detach().mT.contiguous().mT.requires_grad_() if isinstance(x, torch.Tensor) else x for x in scan[:5]),
        *(x.mT.contiguous().mT if isinstance(x, torch.Tensor) else x for x in scan[5:]),
    )
    assert not strided.u.is_contiguous() and not strided.reset.is_contiguous()
    one, two = run(scan), run(strided)
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])
    for x, y in zip(gradients(scan, *one), gradients(strided, *two), strict=True):
        assert torch.equal(x, y)


BAD = [
    ({"u": torch.zeros(9, 3, 5, 6)}, RuntimeError, r"with k = 3 or 4 planes, got \(9, 3, 5, 6\)"),
    ({"u": torch.zeros(9, 3, 6)}, RuntimeError, r"u must be \(T, B, k, H\)"),
    ({"u": torch.zeros(9, 3, 3, 6, dtype=torch.int64)}, ValueError, "floating dtype, got torch.int64"),
    ({"skip": torch.zeros(9, 3, 5)}, RuntimeError, r"skip must have shape \(9, 3, 6\), got \(9, 3, 5\)"),
    ({"weight_c": torch.zeros(6)}, RuntimeError, r"weight_c must have shape \(2, 6\), got \(6,\)"),
    ({"bias": torch.zeros(2, 6, device="meta")}, RuntimeError, "bias must be on the input's device, cpu, got meta"),
    ({"initial": torch.zeros(4, 6)}, RuntimeError, r"initial must have shape \(3, 6\), got \(4, 6\)"),
    ({"dropout": torch.ones(3, 6, dtype=torch.bool)}, ValueError, "dropout must have a floating dtype"),
    ({"reset": torch.zeros(9, 3)}, ValueError, r"reset must be bool, got torch.float32; convert it: reset.bool\(\)"),
    ({"mask": torch.zeros(3, 9, dtype=torch.bool)}, RuntimeError, r"mask must have shape \(9, 3\), one flag for each"),
    ({"activation": "gelu"}, ValueError, "activation must be one of identity, tanh, relu, got 'gelu'"),
    ({"u": torch.zeros(9, 3, 3, 5), "bidirectional": True}, RuntimeError, "even number of columns .* got 5"),
    ({"u": torch.zeros(9, 3, 4, 6)}, RuntimeError, "skip must be None when u holds four planes"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        run(some_scan()._replace(**change))


BAD_OFFSETS = [
    ([1, 5, 9], ValueError, "must start at 0, got 1"),
    ([0, 5, 8], ValueError, "must end at the number of rows, 9, got 8"),
    ([0, 7, 5, 9], ValueError, "must not decrease, got 5 after 7 at position 2"),
    ([[0, 9]], RuntimeError, r"must be \(N \+ 1,\) offsets, got shape \(1, 2\)"),
    ([], RuntimeError, r"must be \(N \+ 1,\) offsets, got shape \(0,\)"),
    ([0.0, 9.0], ValueError, "must be int32 or int64, got torch.float32"),
]


@pytest.mark.parametrize(("offsets", "error", "message"), BAD_OFFSETS)
def test_bad_offsets(offsets: list[Any], error: type[Exception], message: str) -> None:
    cu_seqlens = torch.tensor(offsets)
    cu_seqlens = cu_seqlens if cu_seqlens.numel() and cu_seqlens.is_floating_point() else cu_seqlens.to(torch.int64)
    states = max(len(offsets) - 1, 0)
    with pytest.raises(error, match=f"cu_seqlens {message}"):
        sru_scan(torch.zeros(9, 3, 2), None, None, None, torch.zeros(states, 2), cu_seqlens=cu_seqlens)


@pytest.mark.parametrize("name", ["reset", "mask"])
def test_flags_with_offsets(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} and cu_seqlens exclude each other"):
        run(some_scan("flat")._replace(**{name: torch.zeros(9, dtype=torch.bool)}))
