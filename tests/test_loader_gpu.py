"""Batches on a CUDA device: moved, pinned, converted; make gpu runs this."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from loaders import STRATEGIES, load
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from seqbatch import Packing, SequenceBatch, TokenArray, make_loader

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


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def packed(layout: str, device: str = "cuda") -> list[SequenceBatch]:
    """Rows of several documents, some of them longer than a block of 128 steps, with padding and empty rows."""
    lengths = torch.randint(1, 300, (25,), generator=torch.Generator().manual_seed(0)).tolist()
    data = TokenArray.of_sequences([list(range(n)) for n in lengths])
    return [batch.to(device) for batch in make_loader(data, Packing(300, rows=3), layout=layout)]


def assert_as_alone(batch: SequenceBatch, attend: Attend, causal: bool) -> None:
    """Output and gradients in bfloat16 are each document's, alone in float32, to 0.03 or 3 % of the largest."""
    torch.manual_seed(0)
    shape = (*batch.placement.shape(batch.layout), 2, 64)
    *values, weight = torch.randn(4, *shape, dtype=torch.bfloat16, device=batch.device)
    values = [value.requires_grad_() for value in values]
    output = attend(*values)
    assert output.isfinite().all()
    gradients = torch.autograd.grad((batch.flatten(output) * batch.flatten(weight)).sum(), values)
    got = [batch.unbatch(x.float()) for x in (output.detach(), *gradients)]
    for number, pieces in enumerate(zip(*(batch.unbatch(x.detach().float()) for x in (*values, weight)), strict=True)):
        heads = [piece.transpose(0, 1).requires_grad_() for piece in pieces]
        wanted = scaled_dot_product_attention(*(x[None] for x in heads[:3]), is_causal=causal)[0]
        for ours, theirs in zip(got, (wanted, *torch.autograd.grad((wanted * heads[3]).sum(), heads[:3])), strict=True):
            difference = ours[number] - theirs.detach().transpose(0, 1)
            assert difference.abs().max() <= 0.03 * theirs.abs().max().clamp(min=1)


def flex(batch: SequenceBatch, causal: bool, attention: Callable[..., Tensor]) -> Attend:
    """Of what lies in the batch's layout, (..., heads, features)."""
    lanes, steps = batch.attention_mask().shape[0], batch.attention_mask().shape[3]
    blocks = create_block_mask(batch.mask_mod(causal=causal), lanes, None, steps, steps, device=batch.device)

    def turn(grid: Tensor) -> Tensor:
        return grid[None] if batch.layout == "flat" else grid.transpose(0, 1) if batch.layout == "time_major" else grid

    def attend(*values: Tensor) -> Tensor:
        output = attention(*(turn(value).transpose(1, 2) for value in values), block_mask=blocks).transpose(1, 2)
        return output[0] if batch.layout == "flat" else turn(output)

    return attend


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("layout", ["batch_first", "time_major", "flat"])
def test_packed_rows_through_compiled_flex_attention(layout: str, causal: bool) -> None:
    """Blocks are skipped in each lane by its own documents, forward and backward."""
    attention = torch.compile(flex_attention)
    for batch in packed(layout):
        assert_as_alone(batch, flex(batch, causal, attention), causal)


@pytest.mark.parametrize("causal", [False, True])
def test_flat_batches_through_varlen_attention(causal: bool) -> None:
    """torch's own kernel for sequences end to end takes `cu_seqlens`."""
    from torch.nn.attention.varlen import varlen_attn

    for batch in packed("flat"):
        ends, longest = batch.cu_seqlens, batch.max_seqlen
        more = {"cu_seq_q": ends, "cu_seq_k": ends, "max_q": longest, "max_k": longest}
        assert_as_alone(batch, partial(varlen_attn, **more, window_size=(-1, 0 if causal else -1)), causal)
