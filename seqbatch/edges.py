"""Bucket edges: the inclusive padded lengths of a fixed set of shapes, found from the lengths.

With static shapes every sequence of a bucket costs its edge, so the edges decide the waste.
``optimal`` has the least padding that K edges can have; the other rules are those of the field, kept
to compare with: equal counts (``quantile``), equal tokens (lhotse's rule) and ``geometric``.
"""

from collections.abc import Callable

import numpy as np

from seqbatch.ordering import IntArray, round_up

__all__ = ["EDGE_RULES", "find_edges"]


def find_edges(lengths: IntArray, num_buckets: int, *, rule: str = "optimal", multiple: int = 1) -> IntArray:
    """Return at most `num_buckets` rising edges, the last one holding the longest sequence.

    Args:
        lengths: (N,) int64, at least 1 each, at least one.
        num_buckets: Edges wanted; equal ones are merged, so short data has fewer.
        rule: One of :data:`EDGE_RULES`. ``"optimal"`` is exact: no other edges need fewer cells.
        multiple: Edges are multiples of this.

    >>> find_edges(np.array([1, 1, 1, 9, 10, 10]), 2)
    array([ 1, 10])
    """
    values, counts = np.unique(round_up(lengths, multiple), return_counts=True)
    return np.unique(EDGE_RULES[rule](values, counts, min(num_buckets, len(values)), multiple))


def _optimal(values: IntArray, counts: IntArray, num_buckets: int, multiple: int) -> IntArray:
    from seqbatch.kernels import optimal_splits

    edges: IntArray = values[optimal_splits(values, counts, num_buckets)]
    return edges


def _quantile(values: IntArray, counts: IntArray, num_buckets: int, multiple: int) -> IntArray:
    return _equal_shares(values, counts, num_buckets)


def _equal_tokens(values: IntArray, counts: IntArray, num_buckets: int, multiple: int) -> IntArray:
    return _equal_shares(values, counts * values, num_buckets)


def _equal_shares(values: IntArray, weights: IntArray, num_buckets: int) -> IntArray:
    """The smallest value below which k of K equal shares of the weight lie, for each k."""
    total = np.cumsum(weights)
    # Integers throughout: the share k/K is reached where K times the running total is k times all.
    wanted = -(-np.arange(1, num_buckets + 1) * int(total[-1]) // num_buckets)
    return values[np.searchsorted(total, wanted)]


def _geometric(values: IntArray, counts: IntArray, num_buckets: int, multiple: int) -> IntArray:
    low, high = int(values[0]), int(values[-1])
    ratio = (high / low) ** (np.arange(1, num_buckets) / num_buckets)
    # Rounded before it is cut to integers, so that no platform's last bit decides an edge.
    inner = round_up(np.ceil(np.round(low * ratio, 6)).astype(np.int64), multiple)
    return np.append(np.minimum(inner, high), high)


EDGE_RULES: dict[str, Callable[[IntArray, IntArray, int, int], IntArray]] = {
    "optimal": _optimal,
    "quantile": _quantile,
    "equal_tokens": _equal_tokens,
    "geometric": _geometric,
}
