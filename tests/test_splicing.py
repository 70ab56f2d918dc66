"""What is particular to splicing: lanes without gaps, windows, carried state."""

import numpy as np
import pytest
import strategies
import twins
from hypothesis import given
from hypothesis import strategies as st

from seqbatch import Splicing


@given(strategies.lengths(), st.integers(1, 9), st.integers(1, 40), st.sampled_from(["first_free", "round_robin"]))
def test_lanes_put_together_again_are_the_twins_lanes(lengths: np.ndarray, lanes: int, chunk: int, assign: str) -> None:
    """Windows side by side give each lane its sequences, end to end, in the order they were dealt."""
    filled = np.flatnonzero(lengths)
    if assign == "first_free":
        lane, begin = twins.first_free(lengths[filled].tolist(), lanes)
    else:
        lane = [i % lanes for i in range(len(filled))]
        begin = [int(lengths[filled[i % lanes : i : lanes]].sum()) for i in range(len(filled))]
    expected = {
        (a, t): (s, k) for a, b, s in zip(lane, begin, filled, strict=True) for k in range(lengths[s]) for t in [b + k]
    }

    plan = Splicing(lanes, chunk, assign=assign, shuffle=False).plan(lengths)
    cells = {}
    for number, part in enumerate(plan):
        for s, start, length, step, a in zip(part.sequence, part.start, part.length, part.step, part.lane, strict=True):
            cells |= {(a, number * chunk + step + k): (s, start + k) for k in range(length)}

    assert expected == cells


def test_first_free_wastes_at_most_the_longest_sequence_a_lane() -> None:
    """Cells beyond the tokens are fewer than lanes times the longest."""
    lengths = np.random.default_rng(0).integers(1, 50, 1000)
    plan = Splicing(32, 16).plan(lengths)

    assert plan.cells - plan.tokens < 32 * 50


def test_settings_that_cannot_be_are_refused() -> None:
    """The ways to assign are two."""
    with pytest.raises(ValueError, match="assign must be one of 'first_free', 'round_robin', got 'random'"):
        Splicing(4, 8, assign="random")
    with pytest.raises(ValueError, match="chunk_size must be at least 1, got 0"):
        Splicing(4, 0)
