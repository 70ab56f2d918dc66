"""The loops of planning pairs, compiled by numba on first use; see :mod:`seqbatch.kernels`."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from seqbatch.compiling import compiled
from seqbatch.kernels import split_table
from seqbatch.ordering import IntArray

__all__ = ["best_strips", "cut_pairs", "strip_cells"]


@compiled
def cut_pairs(
    first: IntArray,
    second: IntArray,
    first_cost: NDArray[np.number],
    second_cost: NDArray[np.number],
    sums: bool,
    budget: Any,
    most: int,
    multiple: int,
    stops: IntArray,
    ends: IntArray,
    longest: IntArray,
) -> int:
    """Cut a row of pairs into batches, each as large as its longest source and its longest target allow.

    Args:
        first: (N,) length class of each source, larger for longer ones.
        second: (N,) the same of each target.
        first_cost: (classes,) what a lane of a source class costs, never falling; int64 or float64.
        second_cost: (classes,) the same of targets.
        sums: Whether a lane costs the sum of its two sides, else the larger.
        budget: What a batch's lanes may cost, of the same type as the costs; a pair beyond it is alone.
        most: Pairs that a batch holds at most.
        multiple: A batch of more than `multiple` pairs holds a multiple of it.
        stops: Positions, rising to N, that no batch crosses.
        ends: (N,) filled with the end of each batch.
        longest: (2, N) filled with the largest classes of each batch.

    Returns:
        The number of batches.
    """
    count = begin = 0
    for stop in stops:
        while begin < stop:
            a, b = first[begin], second[begin]
            end = begin + 1
            while end < stop and end - begin < most:
                c, d = max(a, first[end]), max(b, second[end])
                rough = float(first_cost[c]) + float(second_cost[d]) if sums else 0.0
                if (end - begin + 1) * max(rough, float(first_cost[c]), float(second_cost[d])) > 1.5 * budget:
                    break  # where int64 might not hold the exact product
                each = first_cost[c] + second_cost[d] if sums else max(first_cost[c], second_cost[d])
                if (end - begin + 1) * each > budget:
                    break
                a, b = c, d
                end += 1
            extra = (end - begin) % multiple
            if extra and end - begin > multiple:
                end -= extra
                a, b = first[begin:end].max(), second[begin:end].max()
            ends[count] = end
            longest[0, count] = a
            longest[1, count] = b
            count += 1
            begin = end
    return count


@compiled
def strip_cells(counts: IntArray, first: IntArray, second: IntArray, most: int) -> IntArray:
    """Return the fewest cells of each strip of the first side, for each number of edges on the second.

    Args:
        counts: (U, V) pairs of each class.
        first: (U,) rising padded lengths of the first side.
        second: (V,) the same of the second.
        most: Edges on the second side at most.

    Returns:
        (U, U, most + 1) int64: ``[i, j, k]`` is what the pairs of first classes i to j need with at most k edges on
        the second side, 0 where there are none; -1 where it cannot be.
    """
    rows, columns = counts.shape
    cells = np.full((rows, rows, most + 1), -1, np.int64)
    values, filled = np.empty(columns, np.int64), np.empty(columns, np.int64)
    for i in range(rows):
        held = np.zeros(columns, np.int64)
        for j in range(i, rows):
            number = total = 0
            for column in range(columns):
                held[column] += counts[j, column]
                if held[column]:
                    values[number], filled[number] = second[column], held[column]
                    number += 1
                    total += held[column]
            if total == 0:
                cells[i, j, :] = 0
                continue
            splits = min(most, number)
            fewest = split_table(values[:number], filled[:number], splits)[1]
            for k in range(1, most + 1):
                cells[i, j, k] = fewest[min(k, splits) - 1] + total * first[j]
    return cells


@compiled
def best_strips(cells: IntArray, most: int, begins: IntArray, shares: IntArray) -> tuple[int, int]:
    """Choose strips, and how many edges each gets, that need the fewest cells in all.

    Args:
        cells: (U, U, K + 1) of `strip_cells`.
        most: Edges in all.
        begins: (most,) filled with the first class of each strip.
        shares: (most,) filled with the edges of each strip.

    Returns:
        The cells, and the number of strips.
    """
    rows, per_strip = cells.shape[0], cells.shape[2] - 1
    fewest = np.full((most + 1, rows + 1), -1, np.int64)
    fewest[:, 0] = 0
    begin = np.zeros((most + 1, rows + 1), np.int64)
    share = np.zeros((most + 1, rows + 1), np.int64)
    for k in range(1, most + 1):
        for end in range(1, rows + 1):
            for i in range(end):
                for own in range(1, min(k, per_strip) + 1):
                    if fewest[k - own, i] < 0 or cells[i, end - 1, own] < 0:
                        continue
                    total = fewest[k - own, i] + cells[i, end - 1, own]
                    if fewest[k, end] < 0 or total < fewest[k, end]:
                        fewest[k, end] = total
                        begin[k, end] = i
                        share[k, end] = own
    number, end, left = 0, rows, most
    while end > 0:
        begins[number], shares[number] = begin[left, end], share[left, end]
        left, end = left - share[left, end], begin[left, end]
        number += 1
    begins[:number] = begins[:number][::-1].copy()
    shares[:number] = shares[:number][::-1].copy()
    return fewest[most, rows], number
