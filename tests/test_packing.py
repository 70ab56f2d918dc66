"""What is particular to packing: bins, rows, bounds."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqbatch import Packing
from seqbatch.lengths import load_corpus


def loads(plan: object, capacity: int) -> list[int]:
    bins = np.repeat(np.arange(len(plan)), np.diff(plan.batch_ptr)) * int(plan.lanes.max()) + plan.lane
    return sorted(np.bincount(bins, weights=plan.length).astype(int)[np.unique(bins)].tolist())


@pytest.mark.parametrize("corpus", ["ud_en_ewt", "code_python_functions", "sft_oasst1_conversation"])
def test_easy_lengths_need_no_bin_more_than_their_tokens(corpus: str) -> None:
    """Best fit meets the lower bound on real lengths that are short for the capacity."""
    lengths = load_corpus(corpus)
    capacity = max(4096, int(lengths.max()))

    plan = Packing(capacity).plan(lengths)

    assert -(-lengths.sum() // capacity) == len(plan)


def test_contents_of_bins_change_with_the_epoch_and_their_loads_do_not() -> None:
    """The shapes are found once, the sequences are drawn."""
    lengths = np.random.default_rng(0).integers(1, 9, 300)
    first, second = (Packing(16, rows=2).plan(lengths, epoch=epoch) for epoch in (0, 1))

    assert loads(first, 16) == loads(second, 16)
    assert {frozenset(p.sequence) for p in first} != {frozenset(p.sequence) for p in second}


@given(st.lists(st.integers(1, 16), min_size=1, max_size=60), st.integers(1, 5))
def test_rows_never_change_the_bins(lengths: list[int], rows: int) -> None:
    """More rows are the same bins side by side; only the last batch has empty ones."""
    one, several = Packing(16).plan(lengths), Packing(16, rows=rows).plan(lengths)

    assert loads(one, 16) == loads(several, 16)
    assert -(-len(one) // rows) == len(several)


def test_members_of_a_bin_lie_end_to_end() -> None:
    """No gap between the sequences of a bin."""
    lengths = np.random.default_rng(0).integers(1, 30, 200)
    plan = Packing(64, rows=2).plan(lengths)
    for part in plan:
        for lane in range(2):
            inside = part.lane == lane
            ends = np.cumsum(part.length[inside])
            assert (part.step[inside] == ends - part.length[inside]).all()


def test_a_huge_capacity_takes_no_huge_table() -> None:
    """One bin, at once."""
    plan = Packing(2**50).plan([5, 3, 9])

    assert (len(plan), plan.cells, plan.tokens) == (1, 2**50, 17)


def test_settings_that_cannot_be_are_refused() -> None:
    """All batches have `capacity` steps, so no sequence can be alone."""
    with pytest.raises(ValueError, match="overlong must be one of 'error', 'split', 'truncate', 'drop'"):
        Packing(16, overlong="alone")
    with pytest.raises(ValueError, match="algorithm must be one of"):
        Packing(16, algorithm="first_fit")
    with pytest.raises(ValueError, match="sequence 1 has 17 tokens, but capacity=16 allows at most 16"):
        Packing(16).plan([3, 17])
