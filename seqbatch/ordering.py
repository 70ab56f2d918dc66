"""Reproducible random orders: counter-based bits, and sorting as the only shuffle.

The same (seed, epoch, purpose) gives the same bits in every process and on every platform: the bits
come from NumPy's Philox, a counter-based generator whose raw stream is fixed (Salmon et al. 2011,
"Parallel random numbers: as easy as 1, 2, 3"), and an order is made by sorting them, because the
stream behind ``Generator.shuffle`` may change between NumPy releases.

A sort key carries its position in its low bits. All keys then differ, so any sorting algorithm
returns the same order, and NumPy's fast unstable sort becomes a stable one.
"""

from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

__all__ = ["IntArray", "constant", "random_bits", "random_order", "round_up", "shuffle_within", "stable_order"]

IntArray = NDArray[np.int64]

ENOUGH_BITS = 16
"""Random bits below a class in a sort key. Members of a class that agree in all of them, one pair in
65536 at most, keep their order."""


def random_bits(count: int, *key: int | str) -> NDArray[np.uint64]:
    """Return `count` random 64-bit words, a function of `key` alone.

    Args:
        count: How many words.
        *key: What the words are for, such as ``(seed, epoch, "order")``; integers of any size.

    Returns:
        (count,) uint64.

    >>> random_bits(2, 0, 0, "order")
    array([4570755333774905865, 8042843257087479018], dtype=uint64)
    """
    digest = blake2b(repr(key).encode(), digest_size=16).digest()
    words = np.random.Philox(key=int.from_bytes(digest, "little")).random_raw(count)
    return np.asarray(words, dtype=np.uint64)


def random_order(count: int, *key: int | str) -> IntArray:
    """Return a random permutation of ``range(count)``, a function of `key` alone.

    Returns:
        (count,) int64. Two positions whose random bits agree (probability ``2 ** (b - 64)`` a pair,
        where ``count < 2 ** b``) keep their order.

    >>> random_order(5, 0, 0, "order")
    array([0, 2, 4, 3, 1])
    """
    position_mask = np.uint64((1 << max(count - 1, 0).bit_length()) - 1)
    keys = random_bits(count, *key)
    keys &= ~position_mask
    keys |= np.arange(count, dtype=np.uint64)
    keys.sort()
    keys &= position_mask
    return keys.view(np.int64)


def stable_order(keys: IntArray, bound: int) -> IntArray:
    """Return the positions that sort `keys`, equal keys in the order they came.

    The same as ``np.argsort(keys, kind="stable")``, several times faster where a key and a position
    fit into 64 bits together.

    Args:
        keys: (N,) int64, each in ``range(bound)``; overwritten, as the workspace of the sort.
        bound: One more than the largest key allowed.

    >>> stable_order(np.array([2, 0, 2, 1]), bound=3)
    array([1, 3, 0, 2])
    """
    shift = max(len(keys) - 1, 0).bit_length()
    if (bound - 1).bit_length() + shift > 63:
        return np.argsort(keys, kind="stable")
    keys <<= shift
    keys |= np.arange(len(keys))
    keys.sort()
    keys &= (1 << shift) - 1
    return keys


def shuffle_within(classes: IntArray, bound: int, words: NDArray[np.uint64] | None) -> IntArray:
    """Return the positions that sort `classes`, the members of a class in random order.

    Args:
        classes: (N,) int64, each in ``range(bound)``; may be overwritten.
        bound: One more than the largest class allowed.
        words: (N,) uint64 random words, or None to keep the order in which the members came.

    >>> shuffle_within(np.array([1, 0, 1, 1]), 2, random_bits(4, 0, 0, "order"))
    array([1, 0, 2, 3])
    """
    if words is None:
        return stable_order(classes, bound)
    shift = max(len(classes) - 1, 0).bit_length()
    spare = 63 - shift - (bound - 1).bit_length()
    if spare < ENOUGH_BITS:
        order = np.argsort(words, kind="stable")
        return order[stable_order(classes[order], bound)]
    classes <<= spare
    classes |= (words >> np.uint64(64 - spare)).view(np.int64)
    classes <<= shift
    classes |= np.arange(len(classes))
    classes.sort()
    classes &= (1 << shift) - 1
    return classes


def constant(value: int, count: int) -> IntArray:
    """Return a read-only (count,) int64 column of one value that takes no memory.

    >>> constant(0, 1_000_000_000).strides
    (0,)
    """
    return np.broadcast_to(np.int64(value), (count,))


def round_up(values: IntArray, multiple: int) -> IntArray:
    """Return `values` rounded up to a multiple; a multiple stays as it is.

    >>> round_up(np.array([1, 8, 9]), 8)
    array([ 8,  8, 16])
    """
    return values if multiple == 1 else -(-values // multiple) * multiple
