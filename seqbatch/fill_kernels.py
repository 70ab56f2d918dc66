"""The loops that lay tokens and marks on a grid, compiled by numba on first use."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from seqbatch.kernels import compiled
from seqbatch.ordering import IntArray

__all__ = ["fill", "mark"]


@compiled
def fill(
    tokens: NDArray[Any],
    source: IntArray,
    count: IntArray,
    first: IntArray,
    stride: int,
    out: NDArray[Any],
    mask: NDArray[np.bool_],
) -> None:
    """Copy ``tokens[source[p] + i]`` to ``out[first[p] + i * stride]`` for i below ``count[p]``, and mark the cells.

    Args:
        tokens: (S,) what to read.
        source: (P,) the first token of each piece.
        count: (P,) its tokens.
        first: (P,) the cell of its first token.
        stride: Cells from a token to the next one.
        out: (cells,) changed in place.
        mask: (cells,) set true where a token was written.
    """
    for p in range(len(source)):
        at = first[p]
        for i in range(source[p], source[p] + count[p]):
            out[at] = tokens[i]
            mask[at] = True
            at += stride


@compiled
def mark(first: IntArray, count: IntArray, stride: int, mask: NDArray[np.bool_]) -> None:
    """Set ``mask[first[p] + i * stride]`` for i below ``count[p]``.

    Args:
        first: (P,) a cell.
        count: (P,) how many.
        stride: Cells from one to the next.
        mask: (cells,) changed in place.
    """
    for p in range(len(first)):
        at = first[p]
        for _ in range(count[p]):
            mask[at] = True
            at += stride
