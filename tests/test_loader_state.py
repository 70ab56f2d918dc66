"""What trainers ask of a loader: its state without a batch, its length, and inputs that keep documents apart."""

import numpy as np
import pytest

import seqbatch

DATA = seqbatch.TokenArray.of_sequences([np.arange(i % 7 + 1) for i in range(40)])
STRATEGY = seqbatch.Bucketing(max_tokens=20)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_state_without_a_batch(num_workers):
    """It is that after the last batch handed out, not the last one read; a move or a resume starts it anew."""
    loader = seqbatch.make_loader(DATA, STRATEGY, num_workers=num_workers)
    start, batches = loader.state_dict(), iter(loader)
    assert start["history"] == []
    for _ in range(3):
        batch = next(batches)
        assert loader.state_dict() == loader.state_dict(after=batch)
    state = loader.state_dict()
    loader.load_state_dict(start)
    assert loader.state_dict() == start
    loader.load_state_dict(state)
    assert loader.state_dict() == state
    loader.set_epoch(1)
    assert loader.state_dict() == start | {"epoch": 1, "plan": loader.plan.digest[:32]}


def test_state_of_all_ranks():
    """With rank="all" a state is that of whole steps."""
    loader = seqbatch.make_loader(DATA, STRATEGY, rank="all", num_replicas=2)
    steps = [loader.state_dict()["history"] for _ in loader]
    assert steps[:4] == [[], [[2, 1]], [[2, 1]], [[2, 2]]]


def test_len_counts_the_whole_epoch():
    """What ran before a resume counts in the loader's length; the sampler's is what is still to come."""
    loader = seqbatch.make_loader(DATA, STRATEGY)
    batches, count = iter(loader), len(loader)
    state = [loader.state_dict() for _, _ in zip(range(3), batches, strict=False)][-1]
    again = seqbatch.make_loader(DATA, STRATEGY)
    again.load_state_dict(state)
    assert (len(again), len(again.batch_sampler)) == (count, count - 3)
    assert len(list(again)) == count - 3
    assert len(again) == len(again.batch_sampler) == len(again.plan)


def test_packed_inputs_have_no_cache():
    """Models look for documents in position_ids only while they keep no cache; one a row needs no such care."""
    packed = next(iter(seqbatch.make_loader(DATA, seqbatch.Packing(20), as_dict=True)))
    padded = next(iter(seqbatch.make_loader(DATA, seqbatch.Padding(4), as_dict=True)))
    assert packed["use_cache"] is False
    assert "attention_mask" not in packed
    assert "use_cache" not in padded
    assert "attention_mask" in padded
