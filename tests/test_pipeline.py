"""A pipeline in one process trains as the layers after one another do, however it is cut."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pipelines import CELLS, Network, assert_same_step, assert_same_training, padded, spliced

F32, F64 = torch.float32, torch.float64
MODES = {"full": {"chunk_size": 3}, "truncated": {"chunk_size": 3}, "microbatch": {"num_microbatches": 2}}


def made(cell, mode, virtual, dtype=F64, **more):
    network = Network(CELLS[cell], dtype=dtype)
    pipe = network.pipeline(mode=mode, virtual=virtual, **MODES[mode], **more)
    if cell == "BNLSTM":  # batch statistics of chunks are not those of a batch; a population's are
        network.eval(), pipe.eval()
    return network, pipe


@pytest.mark.parametrize(("virtual", "dtype"), [(1, F64), (2, F64), (4, F64), (2, F32)])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("cell", CELLS)
def test_three_steps(cell, mode, virtual, dtype):
    """Every cell in every mode, with several stages on the one rank."""
    network, pipe = made(cell, mode, virtual, dtype)
    assert_same_training(network, pipe, cut=3 if mode == "truncated" else None)


@given(
    lengths=st.lists(st.integers(1, 13), min_size=1, max_size=6),
    chunk=st.integers(1, 15),
    virtual=st.sampled_from([1, 2, 3]),
    mode=st.sampled_from(["full", "truncated", "microbatch"]),
    cell=st.sampled_from(["SRU", "GRU", "LSTM"]),
    seed=st.integers(0, 99),
)
@settings(max_examples=50)
def test_ragged(lengths, chunk, virtual, mode, cell, seed):
    """Any lengths, chunks longer than the batch and a batch of one included."""
    network = Network(CELLS[cell], layers=3, seed=seed)
    cut = {"num_microbatches": 1 + chunk % len(lengths)} if mode == "microbatch" else {"chunk_size": chunk}
    pipe = network.pipeline(mode=mode, virtual=virtual, **cut)
    assert_same_step(network, pipe, padded(lengths, seed), cut=chunk if mode == "truncated" else None)


@given(
    lengths=st.lists(st.integers(2, 9), min_size=3, max_size=12),
    lanes=st.integers(1, 3),
    window=st.integers(1, 8),
    chunk=st.integers(1, 4),
    mode=st.sampled_from(["full", "truncated", "microbatch"]),
    cell=st.sampled_from(["SRU", "GRU", "LSTM"]),
)
@settings(max_examples=30)
def test_spliced_streams_carry_their_state(lengths, lanes, window, chunk, mode, cell):
    """Resets in the middle of chunks, and states over batches."""
    network = Network(CELLS[cell], layers=2)
    cut = {"num_microbatches": 1 + chunk % lanes} if mode == "microbatch" else {"chunk_size": chunk}
    pipe = network.pipeline(mode=mode, virtual=2, **cut)
    states = None
    for batch in spliced(lengths, lanes, window):
        states = assert_same_step(network, pipe, batch, states, cut=chunk if mode == "truncated" else None)


def test_a_stage_of_the_head_alone():
    """As Chen+15 place hidden layers and softmax."""
    network = Network(layers=2)
    pipe = network.pipeline(split=[2, 0], virtual=2, chunk_size=2)
    assert_same_step(network, pipe, padded([5, 3]))
    assert pipe.split == [2, 0]
