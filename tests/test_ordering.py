"""Random orders: reproducible, complete, uniform."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqbatch import ordering
from seqbatch.ordering import random_bits, random_order, round_up, shuffle_within, stable_order


@given(st.integers(0, 300), st.integers(0, 2**80))
def test_an_order_holds_every_position_once(count: int, seed: int) -> None:
    """Whatever the seed."""
    assert list(range(count)) == sorted(random_order(count, seed, 0, "order"))


def test_orders_are_uniform() -> None:
    """Each of the 24 orders of four comes up about as often."""
    orders = [tuple(random_order(4, seed, 0, "order").tolist()) for seed in range(4800)]
    counts = np.unique(orders, axis=0, return_counts=True)[1]

    assert len(counts) == 24
    # 200 each, standard deviation 14: five of them.
    assert abs(counts - 200).max() < 70


def test_another_process_draws_the_same_bits() -> None:
    """Nothing depends on the process, its hash seed or its state."""
    code = "from seqbatch.ordering import random_bits; print(random_bits(3, 1, 2, 'order').tolist())"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout

    assert str(random_bits(3, 1, 2, "order").tolist()) == printed.strip()


@given(st.lists(st.integers(0, 9), max_size=50))
def test_a_stable_order_is_numpys(keys: list[int]) -> None:
    """Also where keys are too large to be packed with a position."""
    expected = np.argsort(np.array(keys, np.int64), kind="stable").tolist()

    assert expected == stable_order(np.array(keys, np.int64), 10).tolist()
    assert expected == stable_order(np.array(keys, np.int64) * 2**58, 2**62).tolist()


@pytest.mark.parametrize("enough", [16, 64])
@given(st.lists(st.integers(0, 5), min_size=1, max_size=50))
def test_members_of_a_class_are_ordered_by_their_words(enough: int, classes: list[int]) -> None:
    """With packed keys and without."""
    words = random_bits(len(classes), 5, 0, "order")
    expected = np.lexsort((words, classes)).tolist()
    before, ordering.ENOUGH_BITS = ordering.ENOUGH_BITS, enough
    try:
        assert expected == shuffle_within(np.array(classes), 6, words).tolist()
        assert np.argsort(classes, kind="stable").tolist() == shuffle_within(np.array(classes), 6, None).tolist()
    finally:
        ordering.ENOUGH_BITS = before


@given(st.lists(st.integers(0, 10**12), min_size=1), st.integers(1, 1000))
def test_rounding_up_is_to_the_next_multiple(values: list[int], multiple: int) -> None:
    """A multiple stays as it is."""
    rounded = round_up(np.array(values), multiple).tolist()

    assert all(up % multiple == 0 and 0 <= up - value < multiple for up, value in zip(rounded, values, strict=True))
