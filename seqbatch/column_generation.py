"""The linear programme behind packing: how often to use each way to fill a bin, fractions allowed.

``min sum(times)`` such that all patterns together have a place for each sequence (Gilmore and Gomory
1961, 1963, "A linear programming approach to the cutting-stock problem"). There are far too many
patterns to list, so it is solved for some, its duals say what a place of each length is worth, and a
knapsack finds patterns that are worth more than the bin they take, until there are none.

What makes it fast here:

* A place for a longer sequence also holds a shorter one, which is a column for each pair of
  neighbours, so that duals never fall with the length.
* Lengths are first rounded up to multiples of a large unit, then of smaller ones; patterns and duals of
  one unit are where the next begins.
* Patterns are priced halfway between the duals and the best ones known (Wentges 1997), and two are
  added for each class at once.

Duals are rounded to whole numbers before anything is compared, so a pattern is added or not, and the
bound is what it is, to the bit.
"""

import time
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog
from scipy.sparse import csc_matrix, diags_array, hstack

from seqbatch.knapsack import Knapsack, table_cells
from seqbatch.ordering import IntArray

__all__ = ["Relaxation", "lower_bound", "relaxations"]

SCALE = 2**36
"""What a bin is worth in whole numbers. Duals are at most this, so int64 holds those of 2 ** 27 places."""
MOST_CLASSES = 1000
MOST_CELLS = 2**26
ENOUGH_CLASSES = 100
FEW_CLASSES = 32

_RATIO = 4  # of a unit to the next smaller one
_BETTER = SCALE >> 20  # that a pattern must be worth more than a bin, since HiGHS is exact to 1e-7
_SIMPLEX = 200  # classes up to which the simplex method is faster than the interior point, as measured
_STALLED = 10  # solutions in a row that are no better


class Relaxation(NamedTuple):
    """Patterns and how often to use each, as fractions."""

    sizes: IntArray
    """(m,) rising tokens that a place of each class holds."""
    patterns: NDArray[np.int32]
    """(J, m) places of each class in a pattern."""
    times: NDArray[np.float64]
    """(J,) how often each is used."""
    worth: IntArray
    """(m,) duals: what a place of each class is worth, SCALE is a bin."""
    unit: int
    """Sizes are multiples of this."""
    finished: bool
    """Whether no pattern could improve it, rather than that time was up."""

    def classes_of(self, values: IntArray) -> IntArray:
        """Return the smallest class whose places hold each length; what none holds fills a bin as the last does."""
        return np.minimum(np.searchsorted(self.sizes, values), len(self.sizes) - 1)


class _Classes(NamedTuple):
    """Lengths rounded up to multiples of a unit."""

    unit: int
    counts: IntArray  # (m,) sequences of each class
    bin_: Knapsack

    @property
    def sizes(self) -> IntArray:
        return self.bin_.sizes * self.unit


def _classes(values: IntArray, counts: IntArray, capacity: int, most: int, unit: int) -> _Classes:
    # What no multiple holds fills a bin alone, which a place as large as a bin says as well.
    sizes, of = np.unique(np.minimum(-(-values // unit), capacity // unit), return_inverse=True)
    sums = np.bincount(of, weights=counts).astype(np.int64)
    upper = np.minimum(sums, capacity // unit // sizes)
    return _Classes(unit, sums, Knapsack(sizes, np.minimum(upper, most) if most else upper, capacity // unit, most))


def relaxations(
    values: IntArray, counts: IntArray, capacity: int, most: int, *, bins: int, bound: int, deadline: float
) -> Iterator[Relaxation]:
    """Solve the linear programme, in smaller and smaller units.

    Args:
        values: (U,) rising lengths, from 1 to `capacity`.
        counts: (U,) sequences of each, from 1 up.
        capacity: Tokens a bin holds.
        most: Sequences a bin holds; 0 means that it is not limited.
        bins: A number of bins that is enough, as known before.
        bound: A number of bins that is needed.
        deadline: When to end with what there is, by ``time.monotonic``.

    Yields:
        The solution in each unit, the smallest that has few enough classes last; one that is not finished
        where time was up, if there is any.

    Raises:
        RuntimeError: HiGHS did not solve it.
    """
    most_classes = min(MOST_CLASSES, max(bins, ENOUGH_CLASSES))
    units = [_smallest_unit(values, counts, capacity, most, most_classes)]
    while units[-1] * _RATIO <= capacity and len(np.unique(-(-values // units[-1]))) > FEW_CLASSES:
        units.append(units[-1] * _RATIO)
    found = None
    for unit in reversed(units):
        classes = _classes(values, counts, capacity, most, unit)
        try:
            found = _solve(classes, found, 0.0 if unit == units[0] else 1e-3, bound, deadline)
        except TimeoutError:
            if found is not None:
                yield found._replace(finished=False)
            return
        yield found
        if not found.finished:
            return


def _smallest_unit(values: IntArray, counts: IntArray, capacity: int, most: int, most_classes: int) -> int:
    """The smallest power of two whose classes and tables are small enough; the largest there can be, if none is."""
    unit = _power_of_two(min(len(values) / most_classes, capacity / 2))  # no class holds more lengths than its unit
    while 2 * unit <= capacity:
        classes = _classes(values, counts, capacity, most, unit)
        cells = table_cells(classes.bin_.upper, capacity // unit, most)
        if len(classes.counts) <= most_classes and cells <= MOST_CELLS:
            break
        unit *= 2
    return unit


def _power_of_two(least: float) -> int:
    """The smallest power of two from `least` on, at least 1."""
    return 1 << max(0, int(np.ceil(np.log2(max(least, 1.0)))))


def _solve(classes: _Classes, known: Relaxation | None, tolerance: float, needed: int, deadline: float) -> Relaxation:
    """Add patterns until none is worth more than its bin, or the value is within `tolerance` of its bound."""
    counts, bin_ = classes.counts, classes.bin_
    patterns, center = _begin(classes, known)
    bound, lowest, stalled = 0.0, np.inf, 0
    while True:
        value, times, duals = _master(patterns, counts, deadline)
        worth = _whole(duals)
        lowest, stalled = (value, 0) if value < lowest * (1 - 1e-9) else (lowest, stalled + 1)
        weight = 0.0 if center is None or stalled >= _STALLED // 2 else 0.5
        while True:
            trial = worth if center is None else _whole(weight * center + (1 - weight) * duals)
            found = bin_.patterns(trial)
            best = max(int((found @ trial).max()), SCALE)
            total = sum(int(n) * int(w) for n, w in zip(counts, trial, strict=True))
            if total / best > bound:
                bound, center = total / best, trial / best
            found = found[found @ worth > SCALE + _BETTER]
            if len(found) or not weight:
                break
            weight = weight / 2 if weight > 0.2 else 0.0
        good = max(np.ceil(bound - 1e-6), needed) >= np.ceil(value - 1e-6) or value - bound <= tolerance * value
        done = good or not len(found)
        if done or stalled >= _STALLED or time.monotonic() > deadline:
            finished = bool(done or stalled >= _STALLED)
            final = worth if center is None else _whole(center)
            return Relaxation(classes.sizes, patterns, times, final, classes.unit, finished)
        if not stalled:  # else what was dropped would come back, and so on for ever
            used = SCALE - patterns @ worth
            patterns = patterns[used <= max(np.sort(used)[min(2 * len(counts), len(used) - 1)], _BETTER)]
        patterns = np.concatenate([patterns, np.unique(found, axis=0)])


def _begin(classes: _Classes, known: Relaxation | None) -> tuple[NDArray[np.int32], NDArray[np.float64] | None]:
    """Return patterns to begin with, which have a place for every class, and duals, of a larger unit."""
    single = np.diag(classes.bin_.upper).astype(np.int32)
    if known is None:
        return single, None
    # A place of a larger unit becomes one of the largest class that it holds.
    into = np.searchsorted(classes.sizes, known.sizes, "right") - 1
    lifted = np.zeros((len(known.patterns), len(classes.sizes)), np.int32)
    np.add.at(lifted.T, into[into >= 0], known.patterns.T[into >= 0])
    lifted = np.minimum(lifted, classes.bin_.upper.astype(np.int32))
    from_ = np.minimum(np.searchsorted(known.sizes, classes.sizes), len(known.sizes) - 1)
    return np.concatenate([single, np.unique(lifted, axis=0)]), known.worth[from_] / SCALE


def _master(
    patterns: NDArray[np.int32], counts: IntArray, deadline: float
) -> tuple[float, NDArray[np.float64], NDArray[np.float64]]:
    """Solve the linear programme of some patterns; return its value, how often each is used, and the duals."""
    classes = len(counts)
    # A place of a class given up for one of the class below it.
    down = diags_array([np.ones(classes - 1), -np.ones(classes - 1)], offsets=[0, -1], shape=(classes, classes - 1))
    places = hstack([csc_matrix(patterns.T.astype(np.float64)), down], format="csc")
    cost = np.concatenate([np.ones(len(patterns)), np.zeros(classes - 1)])
    left = max(deadline - time.monotonic(), 1e-3)
    solution = linprog(
        cost, A_ub=-places, b_ub=-counts.astype(np.float64), options={"time_limit": left},
        method="highs-ds" if classes < _SIMPLEX else "highs-ipm",
    )  # fmt: skip
    if solution.status == 1 and time.monotonic() >= deadline - 1e-3:
        raise TimeoutError
    if solution.status != 0:
        raise RuntimeError(f"HiGHS: {solution.message}")
    return float(solution.fun), solution.x[: len(patterns)], np.clip(-solution.ineqlin.marginals, 0.0, 1.0)


def _whole(duals: NDArray[np.float64]) -> IntArray:
    """Duals as whole numbers, of which SCALE is a bin."""
    worth: IntArray = np.floor(np.minimum(duals, 1.0) * SCALE).astype(np.int64)
    return worth


def lower_bound(values: IntArray, counts: IntArray, capacity: int, most: int, worth: IntArray) -> int:
    """Return how many bins there must be at least, by what each length is worth (Farley 1990).

    If no bin is worth more than z, all sequences together take at least their worth / z bins. Where the
    tables would be too large, lengths are rounded down, which bins may only hold more of.

    Args:
        values: As in :func:`relaxations`, as `counts`, `capacity`, `most`.
        worth: (U,) what each length is worth, from 0 up; any worths give a valid bound.
    """
    unit = _power_of_two(np.sqrt(len(values) / MOST_CELLS * capacity))  # with a smaller one there are more cells
    while True:
        sizes, first = np.unique(values // unit, return_index=True)
        upper = np.minimum(np.add.reduceat(counts, first), capacity // values[first])
        upper = np.minimum(upper, most) if most else upper
        highest = np.maximum.reduceat(worth, first)
        fitting = sizes > 0
        if table_cells(upper[fitting], capacity // unit, most) <= MOST_CELLS:
            break
        unit *= 2
    best = Knapsack(sizes[fitting], upper[fitting], capacity // unit, most).best(highest[fitting])
    best += sum(int(n) * int(w) for n, w in zip(upper[~fitting], highest[~fitting], strict=True))
    total = sum(int(n) * int(w) for n, w in zip(counts, worth, strict=True))
    return -(-total // max(best, 1))
