"""What is particular to chunking: context, carried chunks, expected efficiency."""

import numpy as np
import pytest
import strategies
from hypothesis import given
from hypothesis import strategies as st

from seqbatch import Chunking


@given(strategies.lengths(max_size=40), st.integers(1, 20), st.integers(0, 9), st.integers(0, 9))
def test_chunks_have_the_context_that_the_sequence_has(lengths: np.ndarray, size: int, left: int, right: int) -> None:
    """As many tokens on each side as asked for, fewer only at the ends."""
    plan = Chunking(4, size, left_context=left, right_context=right).plan(lengths)
    before = plan.left_context if left + right else np.zeros(len(plan.sequence), int)
    after = plan.right_context if left + right else before
    begin, end = plan.start + before, plan.start + plan.length - after

    assert (begin % size == 0).all()
    assert (end == np.minimum(begin + size, lengths[plan.sequence])).all()
    assert (before == np.minimum(begin, left)).all()
    assert (after == np.minimum(lengths[plan.sequence] - end, right)).all()


def test_tokens_do_not_count_context() -> None:
    """Context is computed, so it costs cells, but is no token."""
    plan = Chunking(8, 10, left_context=5).plan([100] * 16)

    assert plan.tokens == 1600
    assert plan.cells > 1600


@given(strategies.lengths(max_size=60), st.integers(1, 6), st.integers(1, 20))
def test_carried_chunks_of_a_sequence_follow_each_other_in_a_lane(lengths: np.ndarray, lanes: int, size: int) -> None:
    """Batch after batch, at step 0, one piece a lane."""
    plan = Chunking(lanes, size, carry=True).plan(lengths)
    batch = np.repeat(np.arange(len(plan)), np.diff(plan.batch_ptr))
    assert (plan.step == 0).all()
    for sequence in np.unique(plan.sequence):
        own = plan.sequence == sequence
        assert len(set(plan.lane[own])) == 1
        assert (np.diff(batch[own]) == 1).all()
        assert (plan.start[own] == size * np.arange(own.sum())).all()


def test_efficiency_is_that_of_the_formula() -> None:
    """E[L] / (C * E[ceil(L / C)]), Unno's talk, for chunks that fill their batches."""
    lengths = np.random.default_rng(0).integers(30, 300, 2000)

    plan = Chunking(64, 20).plan(lengths)

    assert lengths.sum() / (20 * np.ceil(lengths / 20).sum()) == pytest.approx(plan.padding_efficiency, abs=1e-3)


def test_chunks_longer_than_all_sequences_cut_none() -> None:
    """A huge chunk_size is a way to say so."""
    plan = Chunking(2, 2**62, carry=True).plan([3, 4, 5])

    assert sorted(plan.length.tolist(), reverse=True) == [5, 4, 3]
    assert len(plan) == 2


def test_context_excludes_carry() -> None:
    """The state is the context."""
    with pytest.raises(ValueError, match="carry=True hands the state on"):
        Chunking(4, 8, left_context=1, carry=True)


@pytest.mark.parametrize("carry", [False, True])
def test_drop_last_leaves_no_empty_lane(carry: bool) -> None:
    """Every lane of every batch holds a piece; the rest is listed from where it starts."""
    lengths = np.random.default_rng(0).integers(1, 50, 100)
    plan = Chunking(8, 10, carry=carry, drop_last=True).plan(lengths)

    assert (np.diff(plan.batch_ptr) == 8).all()
    assert lengths.sum() == plan.tokens + plan.dropped["length"].sum()
    assert {"drop_last"} == set(plan.dropped["reason"])
