"""The linear scan: the operator against its plain twin, its derivatives and laws; the CUDA kernels without a GPU."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scans import linear_gradients, some_linear
from torch import Tensor

from seqbatch.rnn import linear_scan as module
from seqbatch.rnn.linear_scan import linear_scan, linear_scan_reference

F64 = torch.float64
NEAR = {F64: {"rtol": 1e-12, "atol": 1e-12}, torch.float32: {"rtol": 2e-6, "atol": 2e-6}}  # a product may be fused
ROOT = Path(__file__).parent.parent


def with_gradients(scan: Any, tensors: list[Tensor], flags: dict[str, Tensor]) -> list[Tensor]:
    """Both outputs and the gradients of a, b and initial."""
    before, last = scan(*tensors, **flags)
    return [before, last, *linear_gradients(tensors, before, last)]


@given(
    steps=st.integers(0, 12),
    lanes=st.integers(0, 40),
    width=st.sampled_from([0, 1, 3, 8, 520]),
    dtype=st.sampled_from([F64, torch.float32]),
    reset=st.booleans(),
    mask=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_operator_equals_reference(
    steps: int, lanes: int, width: int, dtype: torch.dtype, reset: bool, mask: bool, seed: int
) -> None:
    """Outputs and gradients, of any size, none too; threads change no bit."""
    tensors, flags = some_linear(steps, lanes, width, dtype, reset, mask, seed)
    results, threads = [], torch.get_num_threads()
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            results.append(with_gradients(linear_scan, tensors, flags))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))
    torch.testing.assert_close(results[0], with_gradients(linear_scan_reference, tensors, flags), **NEAR[dtype])


def test_single_numbers() -> None:
    """The specification itself, against a loop that has no tensor operation in it."""
    tensors, flags = some_linear()
    a, b, initial = (x.detach() for x in tensors)
    before, last = linear_scan_reference(a, b, initial, **flags)
    for n in range(initial.shape[0]):
        for j in range(initial.shape[1]):
            state = float(initial[n, j])
            for t in range(len(a)):
                state = 0.0 if flags["reset"][t, n] else state
                assert float(before[t, n, j]) == pytest.approx(state, rel=1e-12)
                state = float(a[t, n, j]) * state + float(b[t, n, j]) if flags["mask"][t, n] else state
            assert float(last[n, j]) == pytest.approx(state, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lower_precision(dtype: torch.dtype) -> None:
    """The state is carried and returned in float32; a and b get gradients of their own dtype."""
    tensors, flags = some_linear(dtype=dtype)
    found = with_gradients(linear_scan, tensors, flags)
    assert [x.dtype for x in found] == [torch.float32, torch.float32, dtype, dtype, dtype]
    for one, two in zip(found, with_gradients(linear_scan_reference, tensors, flags), strict=True):
        rounding = max(torch.finfo(one.dtype).eps, 2e-6)
        torch.testing.assert_close(one, two, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("scan", [linear_scan, linear_scan_reference])
def test_nan_does_not_cross_a_reset(scan: Any) -> None:
    """It is seen in its own piece of its own lane, and moves no bit of another, backwards neither."""
    clean, spoiled = (some_linear(steps=6, lanes=2, reset=False, mask=False)[0] for _ in range(2))
    reset = torch.zeros(6, 2, dtype=torch.bool)
    reset[3] = True
    with torch.no_grad():
        spoiled[1][1, 0] = float("nan")  # in the first piece; and of the second, whose gradient walks back:
        spoiled[0][5, 1] = float("nan")
    before, last, *grads = with_gradients(scan, clean, {"reset": reset})
    before_nan, last_nan, *grads_nan = with_gradients(scan, spoiled, {"reset": reset})
    assert before_nan[2, 0].isnan().all() and last_nan[1].isnan().all()
    assert torch.equal(before_nan[3:], before[3:]) and torch.equal(last_nan[0], last[0])
    for one, two in zip(grads[:2], grads_nan[:2], strict=True):
        assert torch.equal(one[3:, 0], two[3:, 0]) and torch.equal(one[:3, 1], two[:3, 1])
    assert grads_nan[1][3:5, 1].isnan().all() and torch.equal(grads[2], grads_nan[2])


@pytest.mark.parametrize("scan", [linear_scan, linear_scan_reference])
def test_nan_in_padding_is_not_seen(scan: Any) -> None:
    """Not in a state or a gradient, nor in the gradient of a gradient."""
    clean, flags = some_linear()
    spoiled, _ = some_linear()
    with torch.no_grad():
        for x in spoiled[:2]:
            x[~flags["mask"]] = float("nan")
    assert spoiled[0].isnan().any()
    found, expected = (with_gradients(scan, tensors, flags) for tensors in (spoiled, clean))
    assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))
    twice = []
    for tensors in (spoiled, clean):
        first = torch.autograd.grad(scan(*tensors, **flags)[1].square().sum(), tensors, create_graph=True)
        weigh = [torch.full_like(x, 2.0) for x in first]
        for x in weigh[:2]:
            x[~flags["mask"]] = float("nan")
        twice.append(torch.autograd.grad(first, tensors, weigh))
    assert all(torch.equal(one, two) and one.isfinite().all() for one, two in zip(*twice, strict=True))


@pytest.mark.parametrize("scan", [linear_scan, linear_scan_reference])
def test_padding_beside_nan_has_no_gradient(scan: Any) -> None:
    """Exactly 0 where all real steps are NaN; its second derivative too."""
    tensors, flags = some_linear()
    mask = flags["mask"]
    with torch.no_grad():
        tensors[0][mask] = float("nan")
    first = torch.autograd.grad(sum(x.sum() for x in scan(*tensors, **flags)), tensors, create_graph=True)
    second = torch.autograd.grad(sum(x.square().sum() for x in first), tensors)
    for grad in (*first[:2], *second[:2]):
        assert grad[mask].isnan().any() and not grad[~mask].any()


@pytest.mark.parametrize("flagged", [False, True])
def test_gradcheck(flagged: bool) -> None:
    """First and second derivatives against finite differences, of each output by itself too."""
    tensors, flags = some_linear(steps=4, lanes=2, width=2, reset=flagged, mask=flagged)
    assert torch.autograd.gradcheck(lambda *x: linear_scan(*x, **flags), tensors)
    assert torch.autograd.gradgradcheck(lambda *x: linear_scan(*x, **flags), tensors)
    for k in range(2):
        assert torch.autograd.gradcheck(lambda *x, k=k: linear_scan(*x, **flags)[k], tensors)


def test_third_derivatives() -> None:
    """The operators differentiate each other: as deep as the twin's."""
    tensors, flags = some_linear(steps=4, lanes=2, width=2)
    results = []
    for scan in (linear_scan, linear_scan_reference):
        found = (scan(*tensors, **flags)[1] ** 3).sum()
        for _ in range(3):
            grads = torch.autograd.grad(found, tensors, create_graph=True)
            found = sum((x**2).sum() for x in grads)
        results.append(grads)
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("flagged", [False, True])
@pytest.mark.parametrize("dtype", [F64, torch.bfloat16])
def test_opcheck(flagged: bool, dtype: torch.dtype) -> None:
    """torch's own checks of schema, shapes, registered derivative and compiled call, of both operators."""
    (a, b, initial), flags = some_linear(4, 2, 3, dtype, flagged, flagged)
    given_ = flags.get("reset"), flags.get("mask")
    initial = initial.detach().to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    torch.library.opcheck(module._scan._opoverload, (a, b, initial, *given_))
    before, last = (x.detach().requires_grad_() for x in linear_scan(a, b, initial, **flags))
    torch.library.opcheck(module._scan_backward._opoverload, (before, last, a, before, *given_))


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # of torch's compiler, about torch.jit
@pytest.mark.parametrize("dynamic", [pytest.param(False, marks=pytest.mark.slow), True])
def test_compiles_as_one_graph(dynamic: bool) -> None:
    """Forward and backward equal eager, at other sizes too."""

    def layer(x: Tensor, gate: Tensor, initial: Tensor, reset: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        f = torch.sigmoid(gate)
        before, last = linear_scan(f, (1 - f) * x, initial, reset=reset, mask=mask)
        return torch.tanh(before), last

    compiled = torch.compile(layer, fullgraph=True, backend="inductor" if not dynamic else "aot_eager", dynamic=dynamic)
    for sizes in ((7, 3, 4), (9, 2, 5)) if dynamic else ((7, 3, 4),):
        tensors, flags = some_linear(*sizes)
        found, expected = (with_gradients(call, tensors, flags) for call in (compiled, layer))
        torch.testing.assert_close(found, expected)


def test_every_output_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """With fresh memory full of NaN, nothing of it is seen."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    tensors, flags = some_linear()
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        assert all(x.isfinite().all() for x in with_gradients(linear_scan, tensors, flags))
    finally:
        torch.use_deterministic_algorithms(False)


def test_strided_inputs() -> None:
    """Views of other layouts give the same, gradients too."""
    tensors, flags = some_linear()
    strided = [x.detach().mT.contiguous().mT.requires_grad_() for x in tensors]
    turned = {name: x.mT.contiguous().mT for name, x in flags.items()}
    assert not strided[0].is_contiguous() and not turned["mask"].is_contiguous()
    found, expected = with_gradients(linear_scan, strided, turned), with_gradients(linear_scan, tensors, flags)
    assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))


ZERO, FLAG = torch.zeros(9, 3, 6), torch.zeros(9, 3, dtype=torch.bool)
BAD = [
    ({"a": 0.5}, TypeError, r"a must be a tensor, got float: expand it to \(T, B, H\)"),
    ({"a": ZERO[0]}, RuntimeError, r"a must be \(T, B, H\), got \(3, 6\)"),
    ({"a": ZERO.int()}, ValueError, "a must have a floating dtype, got torch.int32"),
    ({"b": ZERO[:, :1]}, RuntimeError, r"b must have shape \(9, 3, 6\), got \(9, 1, 6\)"),
    ({"b": ZERO.double()}, ValueError, r"b must have a's dtype, torch.float32, got torch.float64; convert it: b.to"),
    ({"b": ZERO.to("meta")}, RuntimeError, "b must be on the input's device, cpu, got meta"),
    ({"initial": ZERO}, RuntimeError, r"initial must have shape \(3, 6\), got \(9, 3, 6\)"),
    ({"reset": FLAG.int()}, ValueError, r"reset must be bool, got torch.int32; convert it: reset.bool\(\)"),
    ({"mask": FLAG.T}, RuntimeError, r"mask must have shape \(9, 3\), one flag for each step and lane, got \(3, 9\)"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        linear_scan(**({"a": ZERO, "b": ZERO, "initial": ZERO[0]} | change))


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")  # torch itself, on first use of duals
def test_forward_mode_is_an_error() -> None:
    """It would silently be 0."""
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(ZERO, ZERO)
        with pytest.raises(RuntimeError, match="linear_scan has no forward-mode derivative"):
            linear_scan(ZERO, dual, ZERO[0])


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The CUDA kernels, interpreted: blocks and unrolled steps so small that odd sizes have several and a rest."""
    pytest.importorskip("triton")
    if os.environ["TRITON_INTERPRET"] != "1":
        pytest.skip("the GPU's own tests run the kernels")
    from seqbatch.rnn import linear_scan_triton

    monkeypatch.setattr(linear_scan_triton, "BLOCK", 4)
    monkeypatch.setattr(linear_scan_triton, "AHEAD", {"forward": 3, "backward": 2})
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield linear_scan_triton
    torch.use_deterministic_algorithms(False)


def interpreted(kernels: Any, tensors: list[Tensor], flags: dict[str, Tensor]) -> list[Tensor]:
    """What :func:`with_gradients` finds, by the CUDA kernels."""
    a, b, initial = (x.detach() for x in tensors)
    given_ = flags.get("reset"), flags.get("mask")
    before, last = kernels.forward(a, b, initial.to(torch.promote_types(a.dtype, torch.float32)), *given_)
    weigh = linear_gradients(None, before, last)
    return [before, last, *kernels.backward(*weigh, a, before, *given_)]


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("flagged", [(False, False), (True, False), (False, True), (True, True)], ids=str)
@pytest.mark.parametrize("sizes", [(9, 3, 6), (1, 1, 1), (6, 2, 4), (0, 2, 3), (3, 0, 2), (3, 2, 0)], ids=str)
def test_cuda_kernels(sizes: tuple[int, int, int], flagged: tuple[bool, bool], dtype: torch.dtype, small: Any) -> None:
    """Equal to the reference: outputs and gradients, odd sizes, none too."""
    tensors, flags = some_linear(*sizes, dtype, *flagged)
    found, expected = interpreted(small, tensors, flags), with_gradients(linear_scan_reference, tensors, flags)
    assert [x.dtype for x in found[:4]] == [x.dtype for x in expected[:4]]
    for one, two in zip(found, expected, strict=True):
        rounding = 1e-12 if dtype == F64 else max(torch.finfo(two.dtype).eps, 2e-6)
        torch.testing.assert_close(one.to(two.dtype), two, rtol=rounding, atol=rounding)


def test_nan_in_cuda_kernels(small: Any) -> None:
    """Neither across a reset, forward or back, nor out of padding."""
    tensors, spoiled = (some_linear(7, 2, 3)[0] for _ in range(2))
    row = torch.arange(7)[:, None].expand(7, 2)
    flags = {"reset": row == 4, "mask": row != 5}
    with torch.no_grad():
        for x in spoiled[:2]:
            x[1, 0] = x[5] = x[6, 1] = float("nan")  # the first piece, padding, and the second piece of the other lane
    before, last, *grads = interpreted(small, tensors, flags)
    before_nan, last_nan, *grads_nan = interpreted(small, spoiled, flags)
    assert before_nan[2:4, 0].isnan().all() and last_nan[1].isnan().all() and grads_nan[1][4, 1].isnan().all()
    assert torch.equal(before[4:], before_nan[4:]) and torch.equal(last[0], last_nan[0])
    for one, two in zip(grads[:2], grads_nan[:2], strict=True):
        assert torch.equal(one[4:, 0], two[4:, 0]) and torch.equal(one[:4, 1], two[:4, 1])
        assert not two[5].any()
    assert torch.equal(grads[2][1], grads_nan[2][1])


AHEAD_OF_TIME = """
import itertools, json, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from experiments.rnn_speed.aot import assembled
from seqbatch.rnn import linear_scan_triton as kernels

rows = []
for (name, kernel), data, flags, target in itertools.product(
    (("forward", kernels.walk), ("backward", kernels.walk_back)), ("fp32", "bf16"), (False, True), (80, 90)
):
    constants = {"HAS_RESET": flags, "HAS_MASK": flags, "BLOCK": kernels.BLOCK, "UNROLL": kernels.AHEAD[name]}
    types = dict.fromkeys(("a", "b", "grad_a", "grad_b"), "*" + data) | dict.fromkeys(("reset", "mask"), "*u8")
    types |= dict.fromkeys(("steps", "lanes", "width"), "i32") | dict.fromkeys(constants, "constexpr")
    signature = {n: types.get(n, "*fp32") for n in kernel.arg_names}
    used = {(kernel.arg_names.index(n),): value for n, value in constants.items()}
    aligned = [i for i, n in enumerate(kernel.arg_names) if signature[n].startswith("*") or n == "width"]
    source = ASTSource(kernel, signature, used, {(i,): [["tt.divisibility", 16]] for i in aligned})
    compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options={"num_warps": 1})
    rows.append({"kernel": name, "data": data, "flags": flags} | assembled(compiled.asm["ptx"], target))
print(json.dumps(rows))
"""


@pytest.mark.slow
def test_compiles_ahead_of_time_without_spills() -> None:
    """Both kernels for sm_80 and sm_90, in a process of its own, which does not interpret."""
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", AHEAD_OF_TIME], capture_output=True, text=True, env=environment, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert len(rows) == 16
    for row in rows:
        assert row["spill_store_bytes"] == row["spill_load_bytes"] == 0, row
        assert 0 < row["registers"] <= 255
