"""Sigmoid and tanh for numba loops.

In float32 tanh is a rational function (absolute error 2e-7), which LLVM turns into vector code; numpy's would be a
scalar call for each element. In float64 both are exact.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from numba import types
from numba.extending import overload, register_jitable

from seqbatch.compiling import compiled

__all__ = ["compiled_fast", "sigmoid", "tanh"]

R = TypeVar("R")

# Values may be fused and divisions turned around, but NaN and infinity keep their meaning.
_OPTIONS: Any = {"fastmath": {"contract", "arcp", "nsz"}, "error_model": "numpy"}
_HALF, _EDGE = np.float32(0.5), np.float32(7.99881172180175781)
# A minimax quotient of an odd and an even polynomial.
_P0, _P1, _P2, _P3, _P4, _P5, _P6 = (
    np.float32(p)
    for p in (
        4.89352455891786e-03,
        6.37261928875436e-04,
        1.48572235717979e-05,
        5.12229709037114e-08,
        -8.60467152213735e-11,
        2.00018790482477e-13,
        -2.76076847742355e-16,
    )
)
_Q0, _Q1, _Q2, _Q3 = (
    np.float32(q) for q in (4.89352518554385e-03, 2.26843463243900e-03, 1.18534705686654e-04, 1.19825839466702e-06)
)


def compiled_fast(function: Callable[..., R]) -> Callable[..., R]:
    """Compile a loop whose float operations may be fused."""
    return compiled(function, **_OPTIONS)


@register_jitable(**_OPTIONS)
def _rational(y: Any) -> Any:
    y = _EDGE if y > _EDGE else y  # comparisons with NaN are false: NaN stays
    y = -_EDGE if y < -_EDGE else y
    s = y * y
    p = (((((_P6 * s + _P5) * s + _P4) * s + _P3) * s + _P2) * s + _P1) * s + _P0
    q = ((_Q3 * s + _Q2) * s + _Q1) * s + _Q0
    return y * p / q


def tanh(x: Any) -> Any:
    """Hyperbolic tangent, inside compiled loops and outside."""
    return np.tanh(x)


def sigmoid(x: Any) -> Any:
    """1 / (1 + exp(-x)), inside compiled loops and outside."""
    return 1 / (1 + np.exp(-x))


@overload(tanh, jit_options=_OPTIONS)
def _tanh_of(x: Any) -> Callable[[Any], Any]:
    def exact(x: Any) -> Any:
        return np.tanh(x)

    def rational(x: Any) -> Any:
        return _rational(x)

    return rational if x == types.float32 else exact


@overload(sigmoid, jit_options=_OPTIONS)
def _sigmoid_of(x: Any) -> Callable[[Any], Any]:
    """1/2 + tanh(x/2)/2 in float32."""

    def exact(x: Any) -> Any:
        return 1 / (1 + np.exp(-x))

    def rational(x: Any) -> Any:
        return _HALF * _rational(x * _HALF) + _HALF

    return rational if x == types.float32 else exact
