"""The loops that lay pieces on a grid, compiled by numba on first use."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from seqbatch.compiling import compiled
from seqbatch.ordering import IntArray

__all__ = ["copy_rows", "lay_pieces", "mark_cells"]


@compiled
def lay_pieces(
    tokens: NDArray[Any],
    source: IntArray,
    first: IntArray,
    stride: int,
    length: IntArray,
    continues: NDArray[np.bool_],
    out: NDArray[Any],
    mask: NDArray[np.bool_],
    reset: NDArray[np.bool_],
) -> int:
    """Copy tokens to their cells and mark them, and mark the starts; P pieces, R cells.

    Args:
        tokens: (S,) what to read.
        source: (P,) the row of each piece's first token; without elements only marks are made.
        first: (P,) the cell of each piece's first token.
        stride: Cells from a token to the next one.
        length: (P,) tokens.
        continues: (P,) pieces that are no start.
        out: (R,) changed in place, as the next two.
        mask: (R,)
        reset: (R,)

    Returns:
        Nothing of use: a sum that keeps the compiler from leaving the early reads out.
    """
    seen = 0
    for p in range(len(source)):  # ask for all rows at once: they lie far apart in memory
        if length[p] > 0:
            seen += int(tokens[source[p]]) + int(tokens[source[p] + length[p] - 1])
    # Unsigned numbers need no test for indices that count from the end.
    step, copy = np.uint64(stride), len(source) > 0
    for p in range(len(first)):
        at = np.uint64(first[p])
        if length[p] > 0 and not continues[p]:
            reset[at] = True
        if copy:
            row = np.uint64(source[p])
            for _ in range(length[p]):
                out[at] = tokens[row]
                mask[at] = True
                at += step
                row += np.uint64(1)
        else:
            for _ in range(length[p]):
                mask[at] = True
                at += step
    return seen


@compiled
def mark_cells(first: IntArray, stride: int, count: IntArray, mask: NDArray[np.bool_]) -> None:
    """Set ``mask[first[p] + i * stride]`` for i below ``count[p]``."""
    for p in range(len(first)):
        at = first[p]
        for _ in range(count[p]):
            mask[at] = True
            at += stride


@compiled
def copy_rows(
    tokens: NDArray[Any], source: IntArray, count: IntArray, first: IntArray, stride: int, out: NDArray[Any]
) -> None:
    """Copy ``tokens[source[p] + i]`` to ``out[first[p] + i * stride]`` for i below ``count[p]``.

    Args:
        tokens: (S,) what to read.
        source: (P,) the first token of each piece.
        count: (P,) its tokens.
        first: (P,) the cell of its first token.
        stride: Cells from a token to the next one.
        out: (R,) changed in place.
    """
    for p in range(len(source)):
        at = first[p]
        for i in range(source[p], source[p] + count[p]):
            out[at] = tokens[i]
            at += stride
