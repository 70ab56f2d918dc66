"""How :class:`~seqbatch.Bucketing` chooses which pairs meet, and cuts them into batches.

A batch of pairs is padded to its longest source and its longest target, so mates must be alike on both sides; pairs of
equal sums need not be. *Pool sort* cuts each pool by source into strips of about equal tokens, and sorts each strip by
target, every other one downwards: neighbours then differ little on either side, also from one strip to the next.
*Buckets* have edges (source, target), see :mod:`seqbatch.pair_edges`.
"""

from collections.abc import Callable
from math import isqrt
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from seqbatch.ordering import IntArray, round_up, shuffle_within
from seqbatch.pair_edges import assign_pairs, find_pair_edges
from seqbatch.pieces import Pieces, fit_pairs
from seqbatch.rows import Cut, classes_of, dense, sort_pools

if TYPE_CHECKING:
    from seqbatch.bucketing import Bucketing

__all__ = ["cut_into_batches"]


class _Row(NamedTuple):
    """Pairs in a row, to cut batches from."""

    order: IntArray  # (P,) positions of the pairs
    stops: IntArray  # places in the row that no batch crosses
    padded: IntArray | None  # (P, 2) lengths that each is padded to at least, None for its own
    alone_from: int  # pairs from this one on are alone


def cut_into_batches(strategy: "Bucketing", pieces: Pieces, draw: Callable[[int], NDArray[np.uint64] | None]) -> Cut:
    """Return the batches of whole pairs; `draw` gives random words, one a pair, or None to keep the order."""
    edges = _edges(strategy, pieces.length) if strategy.has_buckets else None
    bucket, why = _fit(strategy, pieces.length, edges)
    pieces, overlong = fit_pairs(pieces, bucket >= 0, strategy.overlong, why)
    bucket = bucket if len(bucket) == len(pieces.length) else bucket[bucket >= 0]
    words = draw(len(bucket))
    if edges is None:
        row = _into_pools(strategy, pieces.length, words)
    else:
        row = _into_buckets(strategy, pieces.length, edges, bucket, words)
    length = pieces.length[row.order]
    ends, steps = _cut(strategy, length if row.padded is None else row.padded, row.stops)
    lanes = strategy.lanes_at(steps)
    lanes[ends > row.alone_from] = 0
    return Cut(pieces, overlong, row.order, length, row.stops, ends, steps, lanes)


def _edges(strategy: "Bucketing", lengths: IntArray) -> IntArray:
    """(K, 2) the edges that pairs can be sent to: static ones must fit the budget themselves."""
    multiple = strategy.pad_to_multiple_of
    if strategy.bucket_edges is not None:
        edges = round_up(np.array(strategy.bucket_edges, np.int64), multiple)
    else:
        fitting = lengths[strategy.lanes_at(round_up(lengths, multiple)) > 0]
        if not len(fitting):
            return np.empty((0, 2), np.int64)
        edges = find_pair_edges(fitting, strategy.num_buckets or 16, multiple=multiple)
    if not strategy.static_shapes:
        return edges
    edges = edges[strategy.lanes_at(edges) > 0]
    return edges if strategy.bucket_edges is not None else _with_more(strategy, round_up(fitting, multiple), edges)


def _with_more(strategy: "Bucketing", padded: IntArray, edges: IntArray) -> IntArray:
    """Add edges within the budget until every pair that fits alone has one that holds it."""
    count = 1
    while True:
        padded = padded[assign_pairs(padded, edges, edges.sum(axis=1)) == len(edges)]
        if not len(padded):
            return edges
        # Edges of few pairs are those of their own lengths at last, which fit.
        more = find_pair_edges(padded, count) if count < len(padded) else np.unique(padded, axis=0)
        edges = np.concatenate([edges, more[strategy.lanes_at(more) > 0]])
        count *= 2


def _fit(strategy: "Bucketing", lengths: IntArray, edges: IntArray | None) -> tuple[IntArray, str]:
    """Return (P,) the bucket of each pair, 0 for all where there are none, -1 where it fits into no batch; and why."""
    settings = {
        "max_tokens": strategy.max_tokens,
        "cost": None if strategy.cost == (1.0, 0.0) else strategy.cost,
        "budget": None if strategy.budget == "sum" else strategy.budget,
        "pad_to_multiple_of": None if strategy.pad_to_multiple_of == 1 else strategy.pad_to_multiple_of,
        "bucket_edges": strategy.bucket_edges,
    }
    why = ", ".join(f"{name}={value!r}" for name, value in settings.items() if value is not None)
    bucket = np.zeros(len(lengths), np.int64)
    if edges is not None:
        bucket = assign_pairs(lengths, edges, edges.sum(axis=1))
        bucket[bucket == len(edges)] = -1
    bucket[strategy.lanes_at(round_up(lengths, strategy.pad_to_multiple_of)) == 0] = -1
    return bucket, why


def _into_pools(strategy: "Bucketing", length: IntArray, words: NDArray[np.uint64] | None) -> _Row:
    """Draw pools and sort each along strips, every other pool backwards."""
    count, tokens = len(length), int(length.sum())
    window = strategy.pool_size(count, tokens, share=4, batches=1000)
    per_batch = strategy.batch_size or max(1, int(strategy.max_tokens or 0) * count // max(tokens, 1))
    codes = _snake(length, max(1, isqrt(window // per_batch)))
    order, _ = sort_pools(codes, int(codes.max(initial=0)) + 1, window, words)
    return _Row(order, np.array([count]), None, count)


def _snake(length: IntArray, strips: int) -> IntArray:
    """Return (P,) a code for each pair, so that pairs of neighbouring codes differ little on both sides.

    >>> _snake(np.array([[1, 1], [1, 9], [7, 8], [7, 1], [1, 9]]), 2).tolist()
    [0, 1, 2, 3, 1]
    """
    (sources, source), (targets, target) = (classes_of(length[:, side]) for side in range(2))
    tokens = np.bincount(source, length.sum(axis=1).astype(np.float64), minlength=len(sources))
    middle = np.cumsum(tokens) - tokens / 2
    strip = np.minimum((middle * strips / max(tokens.sum(), 1)).astype(np.int64), strips - 1)[source]
    target = np.where(strip % 2, len(targets) - 1 - target, target)
    if strips * len(targets) * len(sources) > 2**62:
        targets, target = np.unique(target, return_inverse=True)
        sources, source = np.unique(source, return_inverse=True)
    keys = (strip * len(targets) + target) * len(sources) + source
    return dense(keys)


def _into_buckets(
    strategy: "Bucketing", length: IntArray, edges: IntArray, bucket: IntArray, words: NDArray[np.uint64] | None
) -> _Row:
    """Put the pairs of a bucket side by side, and those that none holds at the end, each alone."""
    bucket = np.where(bucket < 0, len(edges), bucket)
    sizes = np.bincount(bucket, minlength=len(edges) + 1)
    order = shuffle_within(bucket.copy(), len(edges) + 1, words)
    stops = np.cumsum(sizes)
    alone_from = int(stops[-1] - sizes[-1])
    padded = None
    if strategy.static_shapes:
        padded = length[order]
        padded[:alone_from] = edges[bucket[order[:alone_from]]]
    return _Row(order, np.append(stops[:-1], np.arange(alone_from, len(order)) + 1), padded, alone_from)


def _cut(strategy: "Bucketing", length: IntArray, stops: IntArray) -> tuple[IntArray, IntArray]:
    """Return the end and the (M, 2) steps of each batch."""
    from seqbatch.pair_kernels import cut_pairs

    values, (first, second) = zip(*(classes_of(np.ascontiguousarray(column)) for column in length.T), strict=True)
    steps = [round_up(column, strategy.pad_to_multiple_of) for column in values]
    costs = [np.zeros_like(column) if strategy.max_tokens is None else strategy.lane_cost(column) for column in steps]
    ends, longest = np.empty(len(length), np.int64), np.empty((2, len(length)), np.int64)
    budget = costs[0].dtype.type(strategy.max_tokens or 0)
    most = strategy.batch_size or strategy.max_sequences or max(len(length), 1)
    sums, multiple = strategy.budget == "sum", strategy.batch_size_multiple
    count = cut_pairs(first, second, costs[0], costs[1], sums, budget, most, multiple, stops, ends, longest)
    return ends[:count].copy(), np.stack([steps[side][longest[side, :count]] for side in range(2)], axis=1)
