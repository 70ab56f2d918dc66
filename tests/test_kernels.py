"""Every compiled loop does what its naive twin does."""

import numpy as np
import twins
from hypothesis import given
from hypothesis import strategies as st

from seqbatch import kernels
from seqbatch.edges import EDGE_RULES, find_edges

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=60)


@given(st.lists(st.integers(0, 7), max_size=60), st.lists(st.integers(0, 9), min_size=8, max_size=8), st.integers(1, 4))
def test_batches_are_cut_where_the_next_one_does_not_fit(codes: list[int], fits: list[int], multiple: int) -> None:
    """Greedy cutting by the longest so far, down to a multiple where one fits."""
    fits = sorted(fits, reverse=True)
    ends, longest = np.empty(len(codes), np.int64), np.empty(len(codes), np.int64)
    stops = np.array([len(codes) // 2, len(codes)])
    halves = codes[: stops[0]], codes[stops[0] :]
    expected = [batch for half in halves for batch in twins.greedy_batches(half, lambda code: fits[code], multiple)]

    count = kernels.cut_batches(np.array(codes, np.int64), np.array(fits), multiple, stops, ends, longest)

    assert [len(batch) for batch in expected] == np.diff(ends[:count], prepend=0).tolist()
    assert [max(batch) for batch in expected] == longest[:count].tolist()


@given(LENGTHS, st.integers(1, 9))
def test_the_first_free_lane_is_found(lengths: list[int], num_lanes: int) -> None:
    """Lanes and steps are those of a heap of (free at, lane)."""
    lane, begin = np.empty(len(lengths), np.int64), np.empty(len(lengths), np.int64)

    kernels.first_free(np.array(lengths), num_lanes, lane, begin)

    assert twins.first_free(lengths, num_lanes) == (lane.tolist(), begin.tolist())


def bins_of(lengths: list[int], bins: np.ndarray, count: int) -> list[list[int]]:
    return [[length for length, bin_ in zip(lengths, bins, strict=True) if bin_ == number] for number in range(count)]


@given(LENGTHS, st.integers(40, 5000), st.integers(1, 9))
def test_best_fit_fills_bins_as_far_as_the_twin(lengths: list[int], capacity: int, max_sequences: int) -> None:
    """Longest first: the same loads of bins, whichever of equally full ones was taken."""
    lengths = sorted((length * capacity // 40 for length in lengths), reverse=True)
    bins = np.empty(len(lengths), np.int64)

    count = kernels.best_fit(np.array(lengths), capacity, len(lengths), bins)
    capped = np.empty(len(lengths), np.int64)
    capped_count = kernels.best_fit(np.array(lengths), capacity, max_sequences, capped)

    expected = sorted(sum(bin_) for bin_ in twins.best_fit(lengths, capacity, len(lengths)))
    assert expected == sorted(sum(bin_) for bin_ in bins_of(lengths, bins, count))
    for bin_ in bins_of(lengths, capped, capped_count):
        assert 0 < len(bin_) <= max_sequences
        assert sum(bin_) <= capacity


@given(LENGTHS, st.integers(40, 200), st.integers(1, 9))
def test_next_fit_fills_bin_after_bin(lengths: list[int], capacity: int, max_sequences: int) -> None:
    """The same bins as the twin."""
    bins = np.empty(len(lengths), np.int64)

    count = kernels.next_fit(np.array(lengths), capacity, max_sequences, bins)

    assert twins.next_fit(lengths, capacity, max_sequences) == bins_of(lengths, bins, count)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=40))
def test_members_of_a_group_lie_end_to_end(groups: list[int]) -> None:
    """Group after group, members in their order, each at the sum of those before it."""
    lengths = np.arange(1, len(groups) + 1)
    order, offset = np.empty(len(groups), np.int64), np.empty(len(groups), np.int64)

    kernels.group_by(np.array(groups), lengths, np.cumsum(np.bincount(groups)), order, offset)

    assert np.argsort(groups, kind="stable").tolist() == order.tolist()
    for at, member in enumerate(order):
        before = [lengths[i] for i in order[:at] if groups[i] == groups[member]]
        assert sum(before) == offset[at]


@given(st.lists(st.integers(1, 25), min_size=1, max_size=40), st.integers(1, 6))
def test_no_choice_of_edges_needs_fewer_cells_than_the_optimal_ones(lengths: list[int], num_buckets: int) -> None:
    """As few cells as the best of all choices."""
    edges = find_edges(np.array(lengths), num_buckets)

    assert twins.fewest_cells(lengths, num_buckets) == twins.padded_cells(lengths, edges.tolist())


@given(st.lists(st.integers(1, 500), min_size=1, max_size=80), st.integers(1, 12), st.integers(1, 16))
def test_edges_of_every_rule_rise_and_hold_all(lengths: list[int], num_buckets: int, multiple: int) -> None:
    """At most as many as asked for, rising, multiples, none too long, and never better than the optimal ones."""
    longest = -(-max(lengths) // multiple) * multiple
    best = find_edges(np.array(lengths), num_buckets, multiple=multiple).tolist()
    for rule in EDGE_RULES:
        edges = find_edges(np.array(lengths), num_buckets, rule=rule, multiple=multiple).tolist()
        assert 1 <= len(edges) <= num_buckets
        assert edges == sorted(set(edges))
        assert longest == edges[-1]
        assert all(edge % multiple == 0 for edge in edges)
        assert twins.padded_cells(lengths, best) <= twins.padded_cells(lengths, edges)
