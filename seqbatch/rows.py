"""Pieces in a row, from which batches are cut: what :mod:`seqbatch.bucketing` does alike for sequences and pairs."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from seqbatch.ordering import ENOUGH_BITS, IntArray, stable_order
from seqbatch.pieces import Pieces

__all__ = ["Cut", "classes_of", "dense", "smallest_holding", "sort_pools"]


class Cut(NamedTuple):
    """Pieces in a row, cut into batches."""

    pieces: Pieces
    overlong: NDArray[np.void]  # rows of what the policy left out
    order: IntArray  # (P,) positions of the pieces
    length: IntArray  # (P,) or (P, 2) tokens of each
    stops: IntArray  # places in the row that no batch crosses
    ends: IntArray  # (M,) place at which each batch ends
    steps: IntArray  # (M,) or (M, 2) steps of each
    lanes: IntArray  # (M,) lanes it may have, 0 for one that is alone


def sort_pools(
    codes: IntArray, classes: int, window: int, words: NDArray[np.uint64] | None
) -> tuple[IntArray, IntArray]:
    """Return (order, codes in that order): rows drawn by `words`, cut into pools, each sorted by code."""
    from seqbatch.kernels import draw_keys, pool_keys, read_pool_keys

    count = len(codes)
    num_pools = -(-count // window)
    code_bits, place_bits, pool_bits = (max(number - 1, 0).bit_length() for number in (classes, count, num_pools))
    if code_bits + place_bits + pool_bits > 64 - ENOUGH_BITS:
        row = np.arange(count) if words is None else np.argsort(words, kind="stable")
        pool = np.arange(count) // window
        code = np.where(pool % 2, classes - 1 - codes[row], codes[row])
        row = row[stable_order(pool * classes + code, bound=num_pools * classes)]
        return row, codes[row]
    keys = np.zeros(count, np.uint64) if words is None else words
    draw_keys(keys, codes, code_bits, place_bits)
    if words is not None:
        keys.sort()
    pool_keys(keys, window, classes, code_bits, place_bits, pool_bits)
    keys.sort()
    sorted_codes = np.empty(count, np.int64)
    read_pool_keys(keys, window, classes, code_bits, place_bits, pool_bits, sorted_codes)
    return keys.view(np.int64), sorted_codes


def classes_of(length: IntArray) -> tuple[IntArray, IntArray]:
    """Return (values, codes) with ``values[codes] == length``, values rising.

    >>> values, codes = classes_of(np.array([5, 2**40, 5]))
    >>> values.tolist(), codes.tolist()
    ([5, 1099511627776], [0, 1, 0])
    """
    longest = int(length.max(initial=0))
    if longest < max(len(length), 1 << 16):
        return np.arange(longest + 1), length
    values, codes = np.unique(length, return_inverse=True)
    return values, codes


def dense(keys: IntArray) -> IntArray:
    """Return numbers from 0 up without a gap, in the order of `keys`, none of which is negative.

    >>> dense(np.array([7, 3, 7, 50])).tolist()
    [1, 0, 1, 2]
    """
    largest = int(keys.max(initial=0))
    if largest >= max(len(keys), 1 << 20):
        return np.unique(keys, return_inverse=True)[1].reshape(-1)
    there = np.zeros(largest + 1, np.bool_)
    there[keys] = True
    codes: IntArray = (np.cumsum(there) - 1)[keys]
    return codes


def smallest_holding(edges: IntArray, lengths: IntArray) -> IntArray:
    """Return the position of the smallest of rising `edges` that holds each length, ``len(edges)`` where none does.

    >>> smallest_holding(np.array([2, 5]), np.array([1, 5, 3, 9])).tolist()
    [0, 1, 1, 2]
    """
    longest = int(lengths.max(initial=0))
    if longest < max(len(lengths), 1 << 16):  # a table is ten times as fast as searching for each
        return np.searchsorted(edges, np.arange(longest + 1))[lengths]
    return np.searchsorted(edges, lengths)
