"""The CUDA kernels without a GPU: their numbers under Triton's interpreter, and ahead-of-time compilation."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from scans import gradients, learning, some_scan

from seqbatch.rnn import reference
from seqbatch.rnn.checks import Scan

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(os.environ["TRITON_INTERPRET"] != "1", reason="the GPU's own tests run the kernels")

ROOT = Path(__file__).parent.parent
ALL_LANES, ALL_CHUNKS = 0, 10**9  # what counts as many columns


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Blocks, chunks and unrolled steps so small that odd sizes have several and a rest; fresh memory holds NaN."""
    from seqbatch.rnn import cuda

    monkeypatch.setattr(cuda, "BLOCK", 4)
    monkeypatch.setattr(cuda, "CHUNK", 2)
    monkeypatch.setattr(cuda, "PROGRAMS", 10**9)  # more than there can be: the least chunk
    monkeypatch.setattr(cuda, "AHEAD", {"forward": (3, 3), "backward": (2, 2), "combine": (2, 2)})
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield cuda
    torch.use_deterministic_algorithms(False)


def test_chunks_are_several(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tests below rely on: chunks of two steps, and a last one of one."""
    monkeypatch.setattr(small, "MANY", ALL_CHUNKS)
    walk = small._Walk(some_scan(version="v1", steps=9, lanes=3), linear=True)
    assert (walk.chunked, walk.chunk, walk.chunks, walk.programs) == (True, 2, 5, 15)


def both(cuda: Any, scan: Scan) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """Outputs and gradients by the kernels and by the reference."""
    scan = learning(scan)
    expected = reference.sru_scan(*scan[:-1])
    g = torch.Generator().manual_seed(7)
    weigh = [torch.randn(x.shape, generator=g, dtype=torch.float64).to(x.dtype) for x in expected[::2]]
    wanted = gradients(scan, *expected[::2])
    bare = Scan(*(x.detach() if isinstance(x, torch.Tensor) else x for x in scan))
    h, c, last = cuda.forward(bare)
    return (h, c, last, *cuda.backward(*weigh, c, bare)), (*expected, *wanted)


SETTINGS: list[dict[str, Any]] = [
    {"form": "flags", "version": "v2", "activation": "tanh"},
    {"form": "flags", "version": "v1", "activation": "identity", "bidirectional": True},
    {"form": "flags", "version": "v2", "activation": "relu", "bidirectional": True, "planes": 4},
    {"form": "plain", "version": "v1", "activation": "relu", "planes": 4, "dropout_inside": True},
    {"form": "flags", "version": "v1", "activation": "tanh", "dropout_inside": True, "bidirectional": True},
    {"form": "flags", "version": "v1", "activation": "tanh", "steps": 1, "lanes": 1},
    {"form": "plain", "version": "v2", "activation": "identity", "width": 2, "lanes": 1, "bidirectional": True},
]


@pytest.mark.parametrize(
    "settings", [SETTINGS[0], *(pytest.param(s, marks=pytest.mark.slow) for s in SETTINGS[1:])], ids=str
)
@pytest.mark.parametrize("many", [ALL_LANES, ALL_CHUNKS], ids=["lanes", "chunks"])
def test_padded_form(settings: dict[str, Any], many: int, small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole lanes and chunks of time, odd sizes, resets at the ends, masks."""
    monkeypatch.setattr(small, "MANY", many)
    found, expected = both(small, some_scan(**settings))
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("planes", [3, 4])
def test_flat_form(version: str, bidirectional: bool, planes: int, small: Any) -> None:
    """Sequences that begin and end inside chunks, an empty one among them."""
    scan = some_scan("flat", planes, version, bidirectional=bidirectional, dropout_inside=bidirectional)
    for one, two in zip(*both(small, scan), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["flags", "flat"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(form: str, dtype: torch.dtype, small: Any) -> None:
    """Half precision in and out, float32 carried."""
    found, expected = both(small, some_scan(form, version="v1", dtype=dtype))
    assert [x.dtype for x in found] == [x.dtype for x in expected]
    for one, two in zip(found, expected, strict=True):
        rounding = max(torch.finfo(one.dtype).eps, 1e-6) * 4  # the sums of bias gradients have some terms
        torch.testing.assert_close(one, two, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("absent", ["skip", "weight_c", "bias", "dropout", "reset", "mask"])
def test_every_optional_argument_may_be_absent(absent: str, small: Any) -> None:
    for one, two in zip(*both(small, some_scan(steps=5)._replace(**{absent: None})), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("many", [ALL_LANES, ALL_CHUNKS], ids=["lanes", "chunks"])
def test_nan_does_not_cross_a_reset(many: int, small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither forward nor back, chunk edges in between or not."""
    monkeypatch.setattr(small, "MANY", many)
    scan = some_scan("plain", version="v1", lanes=1, steps=7)._replace(dropout=None)
    scan = scan._replace(reset=(torch.arange(7) == 4)[:, None])
    spoiled = scan._replace(u=scan.u.clone())
    spoiled.u[1] = float("nan")
    results = []
    for one in (scan, spoiled):
        h, c, last = small.forward(one)
        results.append((h, last, small.backward(torch.ones_like(h), torch.ones_like(last), c, one)[0]))
    (h, last, grad), (h_nan, last_nan, grad_nan) = results
    assert h_nan[1:4].isnan().all() and grad_nan[1].isnan().any()
    assert torch.equal(h[4:], h_nan[4:]) and torch.equal(last, last_nan) and torch.equal(grad[4:], grad_nan[4:])


def test_nothing_to_do(small: Any) -> None:
    """Launches of no program are left out."""
    none = (None, None, None)
    for scan in (
        Scan(torch.zeros(4, 0, 3, 2), *none, torch.zeros(0, 2)),
        Scan(torch.zeros(0, 2, 3, 2), *none, torch.ones(2, 2)),
        Scan(torch.zeros(0, 3, 2), *none, torch.ones(2, 2), cu_seqlens=torch.tensor([0, 0, 0])),
    ):
        h, c, last = small.forward(scan)
        assert torch.equal(last, scan.initial)
        assert torch.equal(small.backward(h, last, c, scan)[1], last)


@pytest.mark.slow
def test_compiles_ahead_of_time_without_spills() -> None:
    """A few variants for sm_80 and sm_90, in a process of its own, which does not interpret."""
    code = (
        "import json; from experiments.rnn_speed.aot import compile_variant, variants\n"
        "some = [v for v in variants() if v['dtype'] == 'bf16' and not v['two']]\n"
        "chosen = [next(v for v in some if v['walk'] == w and v['peephole'] == p)"
        " for w, p in (('lanes', True), ('flat chunks', False))]\n"
        "chosen += [v for v in some if v['walk'] == 'lanes' and v['peephole'] and v['flags'] and v['planes'] == 3]\n"
        "rows = [compile_variant(n, v, t) for v in chosen for n in ('forward', 'backward') for t in (80, 90)]\n"
        "print(json.dumps(rows))"
    )
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    for row in json.loads(done.stdout):
        assert row["spill_store_bytes"] == row["spill_load_bytes"] == 0, row
        assert 0 < row["registers"] <= 255
