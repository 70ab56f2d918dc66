"""Batches on a CUDA device: moved, pinned, converted; make gpu runs this."""

import pytest
import torch
from loaders import STRATEGIES, load

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("name", STRATEGIES)
def test_batches_on_the_device(name: str) -> None:
    """Every tensor and every form there equals the one on the CPU."""
    for plain, pinned in zip(load(name, next_token=True), load(name, next_token=True, pin_memory=True), strict=True):
        assert pinned.data.is_pinned()
        there = pinned.to("cuda", non_blocking=True)
        for key in ("data", "mask", "reset", "targets", "loss_mask", "position_ids", "segment_ids", "cu_seqlens"):
            assert getattr(there, key).is_cuda
            assert torch.equal(getattr(there, key).cpu(), getattr(plain, key))
        flat = there.to_layout("flat")
        assert torch.equal(flat.to_layout("time_major").data, there.data)
        pieces = zip(there.unbatch(), plain.unbatch(), strict=True)
        assert all(torch.equal(ours.cpu(), theirs) for ours, theirs in pieces)
        assert torch.equal(there.attention_mask(causal=True).cpu(), plain.attention_mask(causal=True))
        if there.placement.carry:
            lanes = torch.randn(2, there.placement.lanes, 3, device="cuda")
            assert there.to_lanes(there.to_segments(lanes)).is_cuda
