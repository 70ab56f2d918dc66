"""How loops are compiled: by numba on first use, and kept on disk where a folder can be written."""

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from numba import njit

__all__ = ["compiled"]

P = ParamSpec("P")
R = TypeVar("R")


def compiled(function: Callable[P, R], **options: Any) -> Callable[P, R]:
    """Compile a loop without the interpreter's lock; `options` are numba's."""
    try:
        kernel: Callable[P, R] = njit(cache=True, nogil=True, **options)(function)
    except RuntimeError:  # numba found no folder to write to: compile once a process
        kernel = njit(nogil=True, **options)(function)
    return kernel
