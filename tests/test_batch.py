"""SequenceBatch: what lies where, the way back, other forms, and attention that stays inside pieces."""

import pickle

import pytest
import torch
from loaders import CARRIED, DATA, LENGTHS, STRATEGIES, load, naive
from torch.nn.utils.rnn import PackedSequence, pad_sequence

import seqbatch
from seqbatch import SequenceBatch

TENSORS = ("data", "mask", "reset", "targets", "loss_mask")


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_batch_is_its_naive_twin(name: str) -> None:
    """Data, mask, reset, targets, loss mask and ids, cell by cell."""
    loader = load(name, next_token=True, rank=0, num_replicas=1)
    shard = loader.plan.shard(0, 1)
    count = 0
    for number, batch in enumerate(loader):
        for key, value in naive(shard, number).items():
            assert torch.equal(getattr(batch, key), value), (key, number)
        assert batch.loss_tokens == int(batch.loss_mask.sum())
        count += 1

    assert count == len(shard)


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("layout", ["batch_first", "flat"])
def test_layouts_hold_the_same_batch(name: str, layout: str) -> None:
    """Loaded in a layout, or brought to it, and back again: the same tensors."""
    for whole, other in zip(load(name, next_token=True), load(name, next_token=True, layout=layout), strict=True):
        there, back = whole.to_layout(layout), other.to_layout("time_major")
        for key in TENSORS:
            for got, wanted in ((getattr(there, key), getattr(other, key)), (getattr(back, key), getattr(whole, key))):
                assert (got is None and wanted is None) or torch.equal(got, wanted), key
        assert torch.equal(there.position_ids, other.position_ids)
        assert torch.equal(there.cu_seqlens, whole.cu_seqlens)
        assert torch.equal(other.segment_ids[other.loss_mask], there.segment_ids[there.loss_mask])


@pytest.mark.parametrize("name", STRATEGIES)
def test_unbatch_is_the_inverse(name: str) -> None:
    """Each piece comes back with its tokens, whatever the form of what is unbatched."""
    for batch in load(name):
        wanted = [DATA[i][a : a + n].tolist() for i, a, n in zip(*pieces(batch), strict=True)]
        assert [piece.tolist() for piece in batch.unbatch()] == wanted
        for form in ("time_major", "batch_first", "flat", "packed", "nested"):
            if not wanted and form in ("packed", "nested"):
                continue
            there = batch.convert(batch.data, form)
            if form in ("packed", "nested"):
                assert [piece.tolist() for piece in batch.unbatch(there)] == wanted
                assert torch.equal(batch.convert(there, "time_major"), batch.data)
            assert torch.equal(batch.to_layout("flat").data, batch.convert(batch.data, "flat"))


def pieces(batch: SequenceBatch) -> tuple[list[int], list[int], list[int]]:
    at = batch.placement
    return at.sequence.tolist(), at.start.tolist(), at.length.tolist()


def test_conversions_carry_gradients() -> None:
    """Padding gets none, every token its own."""
    batch = next(iter(load("packing")))
    values = torch.randn(*batch.data.shape, 2, dtype=torch.float64, requires_grad=True)
    for form in ("flat", "batch_first", "packed", "nested"):
        there = batch.convert(values, form)
        flat = there.data if isinstance(there, PackedSequence) else there.values() if there.is_nested else there
        (gradient,) = torch.autograd.grad((flat**2).sum(), values)
        assert torch.equal(gradient, torch.where(batch.mask[..., None], 2 * values, 0.0))


def test_values_of_another_shape_are_refused() -> None:
    """The message says what the batch has."""
    batch = next(iter(load("padding")))
    with pytest.raises(ValueError, match="time_major batch has"):
        batch.unbatch(torch.zeros(3, 2))
    with pytest.raises(ValueError, match="form must be one of"):
        batch.convert(batch.data, "ragged")


def test_lengths_only_where_lanes_hold_one_piece() -> None:
    """Zero padding has them, also of empty lanes; packing has not."""
    batch = next(iter(load("padding")))
    assert batch.lengths.tolist() == batch.mask.sum(0).tolist()
    static = [batch for batch in load("static shapes") if len(batch.placement.length) < batch.placement.lanes]
    assert static and all(batch.lengths.tolist() == batch.mask.sum(0).tolist() for batch in static)
    with pytest.raises(ValueError, match="use reset and mask, or cu_seqlens"):
        _ = next(iter(load("packing"))).lengths


def test_moving_keeps_everything() -> None:
    """`to`, and pickling as between processes; a field of labels too."""
    batch = next(iter(load("splicing", next_token=True)))
    for moved in (batch.to("cpu"), pickle.loads(pickle.dumps(batch)), batch.to(torch.device("meta")).to("meta")):
        assert moved.position == batch.position
        assert moved.data.shape == batch.data.shape
    assert torch.equal(pickle.loads(pickle.dumps(batch)).sequence_ids, batch.sequence_ids)
    assert batch.to("meta").targets.device.type == "meta"


@pytest.mark.parametrize("name", CARRIED)
def test_segments_and_lanes_are_the_same_state(name: str) -> None:
    """A flat call per piece, state in and out, equals the lanes with resets."""
    torch.manual_seed(0)
    rnn = seqbatch.rnn.SRU(4, 4, num_layers=2).double()
    embed = torch.nn.Embedding(60_000, 4).double()
    state = flat_state = None
    for batch, flat in zip(load(name), load(name, layout="flat"), strict=True):
        output, state = rnn(embed(batch.data), batch.carry_in(state), reset=batch.reset, mask=batch.mask)
        start = None if flat_state is None else flat.to_segments(flat.carry_in(flat_state))
        flat_output, segments = rnn(embed(flat.data), start, cu_seqlens=flat.cu_seqlens)
        flat_state = flat.to_lanes(segments)
        torch.testing.assert_close(batch.convert(output, "flat"), flat_output, rtol=0, atol=1e-12)
        held = torch.zeros(batch.placement.lanes, dtype=torch.bool)
        held[batch.placement.lane] = True
        torch.testing.assert_close(state[:, held], flat_state[:, held], rtol=0, atol=1e-12)


def test_state_that_is_not_carried() -> None:
    """None where the plan does not carry; else without its graph, whatever the nest."""
    state = (torch.ones(1, 2, 3, requires_grad=True) * 2, [torch.ones(1)])
    assert next(iter(load("padding"))).carry_in(state) is None
    carried = next(iter(load("splicing"))).carry_in(state)
    assert not carried[0].requires_grad
    assert carried[1][0] is not None


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("layout", ["time_major", "batch_first", "flat"])
def test_attention_inside_pieces(causal: bool, layout: str) -> None:
    """Packed rows through scaled_dot_product_attention: each document as it is alone, and no NaN on padding."""
    torch.manual_seed(0)
    batch = next(iter(load("packing", layout=layout)))
    values = torch.nn.Embedding(60_000, 8).double()(batch.data)
    rows = {"time_major": values.transpose(0, 1), "flat": values[None]}.get(layout, values)[:, None]
    mask = batch.attention_mask(causal=causal)
    out = torch.nn.functional.scaled_dot_product_attention(rows, rows, rows, attn_mask=mask)
    assert out.isfinite().all()
    out = {"time_major": out[:, 0].transpose(0, 1), "flat": out[0, 0]}.get(layout, out[:, 0])
    for piece, alone in zip(batch.unbatch(out), batch.unbatch(values), strict=True):
        wanted = torch.nn.functional.scaled_dot_product_attention(
            alone[None], alone[None], alone[None], is_causal=causal
        )
        torch.testing.assert_close(piece, wanted[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
def test_mask_mod_is_the_attention_mask(causal: bool) -> None:
    """FlexAttention's function, asked for every pair, draws the same mask."""
    for name in ("packing", "padding", "splicing"):
        batch = next(iter(load(name)))
        wanted = batch.attention_mask(causal=causal)
        index = torch.meshgrid(*(torch.arange(n) for n in wanted.shape), indexing="ij")
        assert torch.equal(batch.mask_mod(causal=causal)(*index), wanted)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")  # comes once a process
def test_flex_attention_takes_the_mask_mod() -> None:
    """Forward, against scaled_dot_product_attention with the mask."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    batch = next(iter(load("packing")))
    lanes, steps = batch.placement.lanes, batch.placement.steps
    rows = torch.randn(lanes, 2, steps, 8)
    block_mask = create_block_mask(batch.mask_mod(causal=True), lanes, None, steps, steps, device="cpu")
    got = flex_attention(rows, rows, rows, block_mask=block_mask)
    mask = batch.attention_mask(causal=True)
    wanted = torch.nn.functional.scaled_dot_product_attention(rows, rows, rows, attn_mask=mask)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_padding_is_pad_sequence() -> None:
    """The batch of whole sequences is what torch makes of them."""
    rows = [torch.from_numpy(DATA[i]) for i in range(6) if LENGTHS[i]]
    assert torch.equal(SequenceBatch.of_sequences(rows).data, pad_sequence(rows))
