"""Timing, memory and `compare` on a CUDA device."""

import numpy as np
import pytest
import torch

from seqbatch.compare import compare
from seqbatch.measure import Timing, environment, free_bytes, peak_memory, stopwatch
from seqbatch.workload import CELLS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
LENGTHS = np.random.default_rng(0).integers(1, 60, 400)


def test_a_stopwatch_waits_for_the_device() -> None:
    """A product that is only queued takes as long as it takes."""
    x = torch.randn(4096, 4096, device="cuda")
    timing = Timing()
    for count in (1, 1, 20):
        with stopwatch("cuda", timing):
            for _ in range(count):
                x @ x

    assert timing.wall[2] > 5 * timing.wall[1] > 0


def test_memory_is_the_allocators() -> None:
    """What a job adds at most, in bytes; and something is free."""
    peak = peak_memory(lambda: torch.ones(2**24, device="cuda").sum(), "cuda")

    assert pytest.approx(2**26, rel=0.01) == peak
    assert (free_bytes("cuda") or 0) > 2**26
    assert "gpu" in environment("cuda")


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_cell_is_compared(cell: str, dtype: str) -> None:
    """Rows are measured, the loader takes a share, and something is recommended."""
    found = compare(
        LENGTHS, cell=cell, hidden=64, device="cuda", dtype=dtype, batch_sizes=(8, 32), chunk_size=16, seconds=8,
        strategies=("padding", "token_budget", "splicing"),
    )  # fmt: skip
    rows = found.frame[found.frame["note"] == ""]

    assert len(rows) == (4 if cell == "nn.LSTM" else 6)
    assert rows["measured"].gt(0).all()
    assert rows["loader_share"].between(0, 1).all()
    assert rows["memory_mib"].gt(0).all()
    assert found.recommendation is not None
