"""The CUDA form of BN-LSTM without a GPU: its numbers under Triton's interpreter, and ahead-of-time compilation."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from seqbatch.rnn import norm_reference

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(os.environ["TRITON_INTERPRET"] != "1", reason="the GPU's own tests run the kernels")

ROOT = Path(__file__).parent.parent
F64 = torch.float64


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Tiles so small that odd sizes have several and a rest; fresh memory holds NaN."""
    from seqbatch.rnn import norm_cuda

    monkeypatch.setattr(norm_cuda, "BLOCK", 2)
    monkeypatch.setattr(norm_cuda, "ROWS", 2)
    torch.use_deterministic_algorithms(True)
    yield norm_cuda
    torch.use_deterministic_algorithms(False)


def some_walk(inside: bool, of_h: bool, of_c: bool, dtype: torch.dtype = F64) -> tuple[Any, ...]:
    """Groups that own, borrow and are given; states that do and do not stand in line."""
    g = torch.Generator().manual_seed(4)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=F64).to(dtype).requires_grad_()

    walk = (
        torch.tensor([0, 1, 3, 2, 1, 4, 5, 6, 9]),
        torch.tensor([0, 2, 5, 8, 9]),
        torch.tensor([0, -1, 4, 9]),
        torch.tensor([-1, 1, 2, 2]),
    )
    gammas = (normal(12) if of_h else None, normal(3) if of_c else None, normal(3) if of_c else None)
    moments = tuple(normal(4, n).square().detach() + 0.1 for n in (12, 12, 3, 3))
    tensors = (normal(9, 12), normal(9, 12) if inside else None, normal(12, 3))
    return (*tensors, gammas, (normal(2, 3), normal(2, 3)), walk, moments)


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("case", [(False, True, True), (True, True, False), (False, False, False)], ids=str)
def test_numbers(case: tuple[bool, bool, bool], dtype: torch.dtype, small: Any) -> None:
    outside, inside, weight, gammas, states, walk, moments = some_walk(*case, dtype)
    previous, offsets, _, source = walk
    expected = norm_reference.bn_lstm(outside, inside, weight, *gammas, *states, previous, offsets, source, moments)
    leaves = [x for x in (outside, inside, weight, *gammas, *states) if x is not None]
    weigh = torch.randn_like(expected[0]), torch.randn_like(expected[1])
    wanted = torch.autograd.grad(expected[:2], leaves, weigh)

    def bare(x: Any) -> Any:
        return tuple(map(bare, x)) if isinstance(x, tuple) else x if x is None else x.detach()

    arguments = bare((outside, inside, weight, gammas, states, walk, moments))
    h, c, a, *used = small.bn_lstm(*arguments, 1e-5)
    near = {"rtol": 1e-12, "atol": 1e-12} if dtype == F64 else {"rtol": 2e-5, "atol": 2e-5}
    torch.testing.assert_close((h, c), expected[:2], **near)
    for k, present in ((0, case[1]), (2, case[2])):
        if present:
            torch.testing.assert_close(tuple(used[k : k + 2]), expected[2 + k : 4 + k], **near)
    grads = small.bn_lstm_backward(
        weigh, arguments[2], arguments[3], (h, c), (a, arguments[0]), arguments[5], tuple(used), 1e-5
    )
    kept = [grad for grad, x in zip(grads, (outside, inside, weight, *gammas, *states), strict=True) if x is not None]
    near = near if dtype == F64 else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(kept, list(wanted), **near)


@pytest.mark.slow
def test_compiles_ahead_of_time_without_spills() -> None:
    """Both kernels for sm_80 and sm_90, in a process of its own, which does not interpret."""
    code = (
        "import json; from experiments.rnn_speed.aot import compile_step\n"
        "print(json.dumps([compile_step(n, True, True, t) for n in ('forward', 'backward') for t in (80, 90)]))"
    )
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    for row in json.loads(done.stdout):
        assert row["spill_store_bytes"] == row["spill_load_bytes"] == 0, row
        assert 0 < row["registers"] <= 255
