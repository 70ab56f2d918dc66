"""Bucket edges for pairs: padded lengths of source and target, found from both lengths together.

Edges of the two sides apart make a table of buckets, most of them nearly empty, since the lengths of a pair
go together. Here the shorter and the longer sources are cut into strips, and each strip gets target edges of
its own, so that the edges follow the data. How many strips there are, where they end, and how many target edges each
of them gets is an exact dynamic programme over the pairs' histogram; the other way round, targets first, may
need fewer cells, and then is taken.
"""

import numpy as np

from seqbatch.edges import EDGE_RULES
from seqbatch.ordering import IntArray, round_up
from seqbatch.rows import classes_of, smallest_holding

__all__ = ["assign_pairs", "find_pair_edges"]

GRID = 64
"""Lengths a side that edges are chosen from: a side with more distinct ones is first given its own best edges."""


def find_pair_edges(lengths: IntArray, num_buckets: int, *, multiple: int = 1) -> IntArray:
    """Return at most `num_buckets` edges (source, target) that hold all pairs in the fewest cells.

    The fewest of all edges that come in strips of one side, each cut on the other side, with padded lengths out of
    `GRID` a side (which is all of them where there are no more).

    Args:
        lengths: (N, 2) int64, at least 1 each, at least one pair.
        num_buckets: Edges wanted; data of fewer classes have fewer.
        multiple: Edges are multiples of this.

    Returns:
        (K, 2) int64, in rising order of the strips.

    >>> find_pair_edges(np.array([[1, 9], [2, 9], [8, 3], [9, 2]]), 2)
    array([[2, 9],
           [9, 3]])
    """
    padded = round_up(lengths, multiple)
    sides = [_grid(padded[:, side]) for side in range(2)]
    place = [smallest_holding(edges, padded[:, side]) for side, edges in enumerate(sides)]
    shape = (len(sides[0]), len(sides[1]))
    counts = np.bincount(place[0] * shape[1] + place[1], minlength=shape[0] * shape[1]).reshape(shape)
    # Cells are added up in int64: beyond it they are counted in larger units.
    longest = int(sides[0][-1]) + int(sides[1][-1])
    shift = max(0, (len(lengths) * longest).bit_length() - 62)
    cells, edges = _strips(counts, sides[0], sides[1], num_buckets, shift)
    cells_across, across = _strips(counts.T, sides[1], sides[0], num_buckets, shift)
    return across[:, ::-1].copy() if cells_across < cells else edges


def _grid(lengths: IntArray) -> IntArray:
    """Return the padded lengths of one side that edges are chosen from."""
    values, codes = classes_of(lengths)
    counts = np.bincount(codes, minlength=len(values))
    filled = np.flatnonzero(counts)
    values, counts = values[filled], counts[filled]
    return values if len(values) <= GRID else EDGE_RULES["optimal"](values, counts, GRID, 1)


def _strips(counts: IntArray, first: IntArray, second: IntArray, num_buckets: int, shift: int) -> tuple[int, IntArray]:
    """Return the fewest cells, and the (K, 2) edges, where the first side is cut into strips."""
    from seqbatch.pair_kernels import best_strips, strip_cells

    most = min(num_buckets, int(np.count_nonzero(counts)))
    cells = strip_cells(np.ascontiguousarray(counts), first >> shift, second >> shift, min(most, len(second)))
    begins, shares = np.empty(most, np.int64), np.empty(most, np.int64)
    total, number = best_strips(cells, most, begins, shares)
    ends = np.append(begins[1:number], len(first))
    edges = [
        _edges_of(counts[begin:end].sum(axis=0), second, int(share), int(first[end - 1]), shift)
        for begin, end, share in zip(begins[:number], ends, shares[:number], strict=True)
    ]
    return int(total), np.concatenate(edges)


def _edges_of(counts: IntArray, values: IntArray, share: int, strip: int, shift: int) -> IntArray:
    """Return the (share, 2) edges of one strip, whose own edge is `strip`."""
    from seqbatch.kernels import optimal_splits

    filled = np.flatnonzero(counts)
    splits = values[filled][optimal_splits(values[filled] >> shift, counts[filled], min(share, len(filled)))]
    return np.stack([np.full(len(splits), strip), splits], axis=1)


def assign_pairs(lengths: IntArray, edges: IntArray, costs: IntArray) -> IntArray:
    """Return (N,) which edge each pair goes to: the cheapest that holds both sides, ``len(edges)`` if none does.

    Args:
        lengths: (N, 2) int64.
        edges: (K, 2) int64.
        costs: (K,) what a lane of each edge costs.

    >>> assign_pairs(np.array([[1, 1], [3, 1], [9, 9]]), np.array([[4, 4], [2, 2]]), np.array([8, 4])).tolist()
    [1, 0, 2]
    """
    limits = [np.unique(edges[:, side]) for side in range(2)]
    shape = (len(limits[0]) + 1, len(limits[1]) + 1)
    table = np.full(shape, len(edges))  # by the smallest limit of each side that holds a length
    for edge in np.argsort(costs, kind="stable")[::-1]:
        source, target = (np.searchsorted(limits[side], edges[edge, side], "right") for side in range(2))
        table[:source, :target] = edge
    place = [smallest_holding(limits[side], lengths[:, side]) for side in range(2)]
    assigned: IntArray = table[place[0], place[1]]
    return assigned
