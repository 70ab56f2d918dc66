"""The bounded knapsack: which lengths fill a bin with the most worth, compiled by numba on first use.

Of each class at most so many are taken, in parts of 1, 2, 4, ... of them, so that a class costs the
logarithm of its bound (Martello and Toth 1990, "Knapsack Problems", section 3.4).
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from seqbatch.compiling import compiled
from seqbatch.ordering import IntArray

__all__ = ["Knapsack", "table_cells"]


@compiled
def _fill(
    sizes: IntArray, upper: IntArray, worth: IntArray, capacity: int, most: int, taken: NDArray[np.uint8],
    last: IntArray,
) -> int:  # fmt: skip
    """Fill the tables of all classes, first to last, and return what the best bin is worth.

    Args:
        sizes: (m,) room that one of a class takes, from 1 up.
        upper: (m,) how many of a class a bin may hold.
        worth: (m,) of one.
        capacity: Room of a bin.
        most: How many a bin may hold in all; 0 means that it is not limited.
        taken: (parts, most + 1, capacity + 1) filled: whether the best with so much room takes the part.
        last: (m,) filled: how many the best bin holds of a class, at least 1, if no later class may be in it.
    """
    best = np.zeros((most + 1, capacity + 1), np.int64)
    other = np.empty_like(best)
    part = 0
    for i in range(len(sizes)):
        reached = -1
        for n in range(1, upper[i] + 1):
            value = n * worth[i] + best[most - n if most else 0, capacity - n * sizes[i]]
            if value > reached:
                reached = value
                last[i] = n
        left, number = upper[i], 1
        while left > 0:
            n = min(number, left)
            room, value = n * sizes[i], n * worth[i]
            for k in range(most + 1):
                other[k, :room] = best[k, :room]
                taken[part, k, :room] = 0
                if most and k < n:
                    other[k] = best[k]
                    taken[part, k] = 0
                    continue
                before, row, new, old = best[k - n if most else 0], taken[part, k], other[k], best[k]
                for c in range(room, capacity + 1):
                    with_it = before[c - room] + value
                    better = with_it > old[c]
                    row[c] = better
                    new[c] = with_it if better else old[c]
            best, other = other, best
            left -= n
            number *= 2
            part += 1
    return int(best[most, capacity])


@compiled
def _read(
    sizes: IntArray, upper: IntArray, capacity: int, most: int, taken: NDArray[np.uint8], last: IntArray,
    patterns: NDArray[np.int32],
) -> None:  # fmt: skip
    """Fill row i of `patterns` (m, m) with the best bin that holds class i and no later one."""
    ends = np.zeros(len(sizes), np.int64)
    parts = 0
    for i in range(len(sizes)):
        left, number = upper[i], 1
        while left > 0:
            left -= min(number, left)
            number *= 2
            parts += 1
        ends[i] = parts
    patterns[:] = 0
    for i in range(len(sizes)):
        patterns[i, i] = last[i]
        room = capacity - last[i] * sizes[i]
        k = most - last[i] if most else 0
        for j in range(i - 1, -1, -1):
            begin = ends[j - 1] if j else 0
            for part in range(ends[j] - 1, begin - 1, -1):
                if taken[part, k, room]:
                    power = 1 << (part - begin)
                    n = min(power, upper[j] - power + 1)
                    patterns[i, j] += n
                    room -= n * sizes[j]
                    k -= n if most else 0


def table_cells(upper: IntArray, capacity: int, most: int) -> int:
    """Return how many cells the tables of a knapsack have, which is what it costs in bytes and in steps."""
    return int(np.frexp(upper)[1].sum()) * (most + 1) * (capacity + 1)


class Knapsack(NamedTuple):
    """A bin and what may be put into it.

    >>> bin_ = Knapsack(np.array([2, 3]), np.array([2, 2]), 7, 0)
    >>> bin_.best(np.array([4, 7]))
    15
    >>> bin_.patterns(np.array([4, 7]))
    array([[2, 0],
           [2, 1],
           [2, 1],
           [0, 2]], dtype=int32)
    """

    sizes: IntArray
    """(m,) rising room that one of a class takes, from 1 up."""
    upper: IntArray
    """(m,) how many of a class a bin may hold, from 1 up; what they take is at most the capacity."""
    capacity: int
    most: int
    """How many a bin may hold in all; 0 means that it is not limited."""

    def best(self, worth: IntArray) -> int:
        """Return what the best bin is worth, for the (m,) worth of one of each class."""
        return self._solve(worth, slice(None))[0]

    def patterns(self, worth: IntArray) -> NDArray[np.int32]:
        """Return (2 m, m) bins: for each class the best one in which it is the largest, then the smallest."""
        found = []
        for order in (slice(None), slice(None, None, -1)):
            _, taken, last = self._solve(worth, order)
            rows = np.empty((len(worth), len(worth)), np.int32)
            sizes, upper = (np.ascontiguousarray(column[order]) for column in (self.sizes, self.upper))
            _read(sizes, upper, self.capacity, self.most, taken, last, rows)
            found.append(rows[order, order])
        return np.concatenate(found)

    def _solve(self, worth: IntArray, order: slice) -> tuple[int, NDArray[np.uint8], IntArray]:
        parts = int(np.frexp(self.upper)[1].sum())
        taken = np.empty((parts, self.most + 1, self.capacity + 1), np.uint8)
        last = np.empty(len(worth), np.int64)
        sizes, upper, worth = (np.ascontiguousarray(column[order]) for column in (self.sizes, self.upper, worth))
        return int(_fill(sizes, upper, worth, self.capacity, self.most, taken, last)), taken, last
