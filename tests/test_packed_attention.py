"""Attention over packed rows: each document gets the output and the gradients that it gets alone."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

import seqbatch
from seqbatch import Packing, SequenceBatch, TokenArray

CAPACITY, HEADS, WIDTH = 12, 2, 8
LENGTHS = [12, 7, 4, 1, 5, 9, 2, 6, 11, 3, 8, 10]
LAYOUTS = ["batch_first", "time_major", "flat"]

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Attention(torch.nn.Module):
    """Self-attention with learned positions: one that counts on from the document before would be seen."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.position = torch.nn.Embedding(CAPACITY, WIDTH, dtype=dtype)
        self.project = torch.nn.Linear(WIDTH, 3 * WIDTH, dtype=dtype)
        self.out = torch.nn.Linear(WIDTH, WIDTH, dtype=dtype)

    def forward(self, values: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """(B, T, WIDTH) and (B, T) to (B, T, WIDTH)."""
        projected = self.project(values + self.position(positions)).unflatten(-1, (3, HEADS, -1))
        query, key, value = projected.permute(2, 0, 3, 1, 4)  # each (B, heads, T, features)
        return self.out(attend(query, key, value).transpose(1, 2).flatten(2))


def batches(layout: str, lengths: list[int] = LENGTHS, rows: int = 3, capacity: int = CAPACITY) -> list[SequenceBatch]:
    data = TokenArray.of_sequences([list(range(n)) for n in lengths])
    return list(seqbatch.make_loader(data, Packing(capacity, rows=rows), layout=layout, rank=0, num_replicas=1))


def as_rows(batch: SequenceBatch, grid: Tensor) -> Tensor:
    """(B, T, ...) of what lies in the batch's layout."""
    return grid[None] if batch.layout == "flat" else grid.transpose(0, 1) if batch.layout == "time_major" else grid


def of_rows(batch: SequenceBatch, rows: Tensor) -> Tensor:
    """The way back."""
    return rows[0] if batch.layout == "flat" else as_rows(batch, rows)


def together(
    model: Attention, batch: SequenceBatch, values: Tensor, weights: Tensor, attend: Attend
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Outputs by document, gradients of its input by document, gradients of the parameters, of a weighted sum."""
    values = values.detach().requires_grad_()
    output = of_rows(batch, model(as_rows(batch, values), as_rows(batch, batch.position_ids), attend))
    assert output.isfinite().all()  # on padding too
    loss = (batch.flatten(output) * batch.flatten(weights)).sum()
    inner, *parameters = torch.autograd.grad(loss, [values, *model.parameters()])
    assert batch.mask is None or not inner[~batch.mask].any()
    return batch.unbatch(output.detach()), batch.unbatch(inner), parameters


def alone(
    model: Attention, batch: SequenceBatch, values: Tensor, weights: Tensor, causal: bool
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The same of every document in a batch of its own, with no mask but torch's causal one."""
    outputs, inner = [], []
    total = [torch.zeros_like(parameter) for parameter in model.parameters()]
    for piece, weight in zip(batch.unbatch(values), batch.unbatch(weights), strict=True):
        piece = piece.detach().requires_grad_()
        attend = partial(scaled_dot_product_attention, is_causal=causal)
        output = model(piece[None], torch.arange(len(piece))[None], attend)[0]
        gradient, *parameters = torch.autograd.grad((output * weight).sum(), [piece, *model.parameters()])
        outputs.append(output.detach())
        inner.append(gradient)
        total = [a + b for a, b in zip(total, parameters, strict=True)]
    return outputs, inner, total


def assert_as_alone(batch: SequenceBatch, attend: Attend, causal: bool, dtype: torch.dtype, atol: float) -> None:
    """Padding cells hold noise, as a model's own activations there would be."""
    model = Attention(dtype)
    values, weights = torch.randn(2, *batch.data.shape, WIDTH, dtype=dtype)
    with sdpa_kernel(SDPBackend.MATH):
        wanted = alone(model, batch, values, weights, causal)
    got = together(model, batch, values, weights, attend)
    for name, ours, theirs in zip(("output", "input", "parameters"), got, wanted, strict=True):
        assert len(ours) == len(theirs)
        for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            torch.testing.assert_close(a, b, rtol=0, atol=atol, msg=lambda m, at=(name, number): f"{at}: {m}")


def masked(batch: SequenceBatch, causal: bool) -> Attend:
    return partial(scaled_dot_product_attention, attn_mask=batch.attention_mask(causal=causal))


def flex(batch: SequenceBatch, causal: bool, attention: Callable[..., Tensor] = flex_attention) -> Attend:
    lanes, steps = as_rows(batch, batch.segment_ids).shape
    blocks = create_block_mask(batch.mask_mod(causal=causal), lanes, None, steps, steps, device="cpu")
    return partial(attention, block_mask=blocks)


def nested(batch: SequenceBatch, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """No mask: jagged nested tensors, made of the flat layout by `cu_seqlens`."""
    ragged = [batch.convert(x[0].transpose(0, 1).contiguous(), "nested").transpose(1, 2) for x in (query, key, value)]
    return batch.flatten(scaled_dot_product_attention(*ragged).transpose(1, 2)).transpose(0, 1)[None]


def test_the_batches_have_what_can_go_wrong() -> None:
    """Rows with several documents, with padding at the end, full ones and empty ones."""
    masks = [batch.mask for batch in batches("batch_first")]
    kinds = {(bool(row.any()), bool(row.all())) for mask in masks for row in mask}
    assert kinds == {(False, False), (True, False), (True, True)}
    assert any(batch.reset.sum(1).max() > 1 for batch in batches("batch_first"))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_scaled_dot_product_attention(layout: str, causal: bool) -> None:
    """In float64 with plain kernels to 1e-10; in float32 with those that torch chooses, to 1e-5."""
    for batch in batches(layout):
        with sdpa_kernel(SDPBackend.MATH):
            assert_as_alone(batch, masked(batch, causal), causal, torch.float64, 1e-10)
        assert_as_alone(batch, masked(batch, causal), causal, torch.float32, 1e-5)


@settings(max_examples=12)
@given(
    lengths=st.lists(st.integers(0, CAPACITY), min_size=1, max_size=9).filter(any),
    rows=st.integers(1, 4),
    layout=st.sampled_from(LAYOUTS),
    causal=st.booleans(),
)
def test_any_lengths(lengths: list[int], rows: int, layout: str, causal: bool) -> None:
    """However the documents fall into rows."""
    for batch in batches(layout, lengths, rows):
        with sdpa_kernel(SDPBackend.MATH):
            assert_as_alone(batch, masked(batch, causal), causal, torch.float64, 1e-10)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_document_moves_no_other(layout: str, causal: bool) -> None:
    """To the bit: a weight of exactly 0 adds nothing to an output or to a gradient."""
    model, batch = Attention(torch.float32), batches(layout)[0]
    values, weights = torch.randn(2, *batch.data.shape, WIDTH)
    with sdpa_kernel(SDPBackend.MATH):
        before = together(model, batch, values, weights, masked(batch, causal))
        for changed in range(len(before[0])):
            cells = batch.segment_ids == changed
            noise = torch.where(cells[..., None], 100 * torch.randn_like(values), 0)
            after = together(model, batch, values + noise, weights + noise, masked(batch, causal))
            for old, new in zip(before[:2], after[:2], strict=True):
                same = [torch.equal(a, b) for a, b in zip(old, new, strict=True)]
                assert same == [number != changed for number in range(len(same))]


@pytest.mark.filterwarnings("ignore")  # that it is not compiled, and what tracing it has to say
@pytest.mark.parametrize(("layout", "causal"), [("batch_first", False), ("time_major", True), ("flat", True)])
def test_flex_attention(layout: str, causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its plain path to 1e-10. torch refuses CPU tensors that want gradients, which that path does have."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *tensors: None, raising=False)
    found = batches(layout)
    for batch in found[-1:] if layout == "flat" else found:  # each new shape is traced, for a second or two
        assert_as_alone(batch, flex(batch, causal), causal, torch.float64, 1e-10)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_blocks_that_are_computed(layout: str, causal: bool) -> None:
    """Each block with an allowed pair, lane by lane, also where blocks do not divide the steps: the rest is skipped."""
    for batch in batches(layout):
        lanes, steps = as_rows(batch, batch.segment_ids).shape
        for size in (4, 5, 128):
            function = batch.mask_mod(causal=causal)
            blocks = create_block_mask(function, lanes, None, steps, steps, device="cpu", BLOCK_SIZE=size)
            allowed = torch.nn.functional.pad(batch.attention_mask(causal=causal), 2 * (0, -steps % size))
            wanted = allowed.unflatten(3, (-1, size)).unflatten(2, (-1, size)).any(5).any(3)
            assert torch.equal(blocks.to_dense().bool(), wanted)


def test_one_table_of_blocks_for_all_lanes_is_refused() -> None:
    """Compiled attention would skip in every lane what the first one may skip. One lane is no such case."""
    batch = batches("batch_first")[0]
    for lanes in (None, 1):
        with pytest.raises(ValueError, match=r"B=None or 1, and this batch has 3 lanes .*: give it B=3"):
            create_block_mask(batch.mask_mod(), lanes, None, CAPACITY, CAPACITY, device="cpu")
    flat = batch.to_layout("flat")
    assert create_block_mask(flat.mask_mod(), None, None, len(flat.data), len(flat.data), device="cpu").shape[0] == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # whatever the compiler has to say
@pytest.mark.parametrize("layout", ["batch_first", "time_major"])
def test_flex_attention_compiled(layout: str) -> None:
    """Forward, of blocks of 128 in steps that they do not divide; batches of one shape share one graph."""
    lengths = torch.randint(1, 300, (60,), generator=torch.Generator().manual_seed(0)).tolist()
    attention = torch.compile(flex_attention, fullgraph=True)
    for batch in batches(layout, lengths, capacity=300)[-3:]:
        lanes, steps = as_rows(batch, batch.segment_ids).shape
        query, key, value = torch.randn(3, lanes, HEADS, steps, 16)
        got, wanted = flex(batch, True, attention)(query, key, value), masked(batch, True)(query, key, value)
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_nested_tensors() -> None:
    """Which have no causal mask on CPU: torch refuses it."""
    for batch in batches("flat"):
        assert_as_alone(batch, partial(nested, batch), False, torch.float64, 1e-10)
