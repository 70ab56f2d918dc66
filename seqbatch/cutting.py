"""Few bins for many sequences: patterns of a linear programme, rounded, where best fit wastes some.

Cutting stock: sequences of one length are interchangeable, so what is solved is how often to use each
pattern of lengths, whatever the number of sequences. Fractions of a linear programme are rounded to
whole numbers, sequences are dealt to the places, the few without one go where there is room, and the
best of several roundings and best fit itself is used.
"""

import time
import warnings
from collections import Counter
from dataclasses import dataclass, field
from hashlib import blake2b
from os import PathLike, fspath

import numpy as np
from numpy.typing import NDArray

from seqbatch import kernels, solution_file
from seqbatch.column_generation import Relaxation, lower_bound, relaxations
from seqbatch.compiling import compiled
from seqbatch.knapsack import Knapsack
from seqbatch.ordering import IntArray

__all__ = ["Solution", "solve"]

_ROUNDINGS = (0.5, 0.4, 0.6, 0.3, 0.7, 0.0)
"""A pattern is used once more where the fraction of its times is at least 1 less this."""
_KEPT = 4
_solved: dict[tuple[object, ...], "Solution"] = {}


@dataclass(frozen=True, eq=False)
class Solution:
    """Which lengths share a bin.

    Attributes:
        bins: Bins used; never more than `best_fit_bins`.
        best_fit_bins: What best fit, longest first, uses.
        bound: No packing uses fewer.
        seconds: What it took.
        status: ``"optimal"`` where `bins` is `bound`; ``"LP optimal"``: the linear programme (of lengths rounded up to
            multiples of `unit`) was solved, and rounding took `bins` over the bound; ``"time limit"``; or
            ``"failed: ..."``, and best fit is used.
        unit: Lengths were rounded up to multiples of this to be solved; 1 is exact.
        rounded_up: Tokens that this added to all sequences together.
        capacity: Tokens a bin holds.
        values: (U,) rising lengths.
        counts: (U,) sequences of each.
        placed: (N,) the bin of each sequence, longest first.
    """

    bins: int
    best_fit_bins: int
    bound: int
    seconds: float
    status: str
    unit: int
    rounded_up: int
    capacity: int
    values: IntArray = field(repr=False)
    counts: IntArray = field(repr=False)
    placed: NDArray[np.int32] = field(repr=False)

    @property
    def patterns(self) -> list[tuple[tuple[int, ...], int]]:
        """The lengths in a bin, longest first, and how many such bins there are, from the most frequent on."""
        order = np.argsort(self.placed, kind="stable")
        lengths = np.repeat(self.values[::-1], self.counts[::-1])[order]
        ends = np.cumsum(np.bincount(self.placed, minlength=self.bins))[:-1]
        times = Counter(tuple(part.tolist()) for part in np.split(lengths, ends)) if self.bins else Counter()
        return sorted(times.items(), key=lambda item: (-item[1], item[0]))

    def __str__(self) -> str:
        """All numbers in one line."""
        rounded = ""
        if self.unit > 1:
            share = self.rounded_up / max(self.bins * self.capacity, 1)
            rounded = f", lengths rounded up to multiples of {self.unit} (at most {share:.2%} of the bins)"
        return (
            f"{self.bins:,} bins, best fit {self.best_fit_bins:,}, at least {self.bound:,}: "
            f"{self.status} in {self.seconds:.2g} s{rounded}"
        )


def solve(
    length: IntArray,
    capacity: int,
    max_sequences: int | None,
    time_limit: float,
    path: "str | PathLike[str] | None" = None,
) -> Solution:
    """Pack sequences into few bins; the same lengths and settings are solved once in a process.

    Args:
        length: (N,) from 1 to `capacity`.
        capacity: Tokens a bin holds.
        max_sequences: Sequences a bin holds.
        time_limit: Seconds after which the best so far is used.
        path: A file that keeps the solution for other processes.

    Warns:
        UserWarning: time was up, or HiGHS failed.
    """
    values, counts = _histogram(length)
    digest = blake2b(repr((len(values), capacity, max_sequences)).encode(), digest_size=16)
    digest.update(values.tobytes() + counts.tobytes())
    fingerprint, at_most = digest.hexdigest(), max_sequences or max(len(length), 1)
    key = fingerprint, time_limit, None if path is None else fspath(path)
    found = _solved.pop(key, None)
    if found is None and path is not None:
        kept = solution_file.read(path, fingerprint, at_most)
        found = None if kept is None else Solution(**kept)
    if found is None:
        found = _solve(values, counts, capacity, at_most, time_limit)
        _warn(found, time_limit)
        if path is not None and not found.status.startswith("failed"):
            solution_file.write(path, fingerprint, found)
    _solved[key] = found
    while len(_solved) > _KEPT:
        _solved.pop(next(iter(_solved)), None)
    return found


def _histogram(length: IntArray) -> tuple[IntArray, IntArray]:
    """Return the rising lengths that there are, and how many of each."""
    if len(length) and length.max() < 8 * len(length):
        counts = np.bincount(length)
        values = np.flatnonzero(counts)
        return values, counts[values]
    return np.unique(length, return_counts=True)


def _warn(found: Solution, time_limit: float) -> None:
    reached = f"{found.bins:,} bins (best fit {found.best_fit_bins:,}, at least {found.bound:,})"
    if found.status == "time limit":
        warnings.warn(
            f"the clock ended packing after {found.seconds:.3g} s with {reached}. Another run or machine may get "
            "further and pack otherwise, and ranks or a resume whose plans' digests differ are refused: raise "
            f'time_limit={time_limit:g}, or keep this solution with solution="FILE"',
            stacklevel=5,
        )
    elif found.status.startswith("failed"):
        warnings.warn(f"packing {found.status}; best fit is used: {reached}", stacklevel=5)


def _solve(values: IntArray, counts: IntArray, capacity: int, at_most: int, time_limit: float) -> Solution:
    """Best fit, and where it is over the bound what the linear programme finds."""
    begin = time.monotonic()
    items = np.repeat(values[::-1], counts[::-1])
    placed = np.empty_like(items)
    bins = best_fit = kernels.best_fit(items, capacity, at_most, placed)
    held = int(np.searchsorted(np.cumsum(items[::-1]), capacity, "right"))
    most = at_most if at_most < held else 0  # 0: no bin can hold so many anyway
    full = max(min(at_most, held), 1)
    bound = max(-(-int(items.sum()) // max(capacity, 1)), -(-len(items) // full), int((2 * items > capacity).sum()))
    status, unit, rounded_up, found = "LP optimal", 1, 0, None
    if bound < bins:
        # Compiled, if it has to be, before the clock starts.
        one = np.ones(1, np.int64)
        Knapsack(one, one, 1, 0).patterns(one)
        status, deadline = "time limit", time.monotonic() + time_limit
        levels = relaxations(values, counts, capacity, most, bins=bins, bound=bound, deadline=deadline)
        try:
            for found in levels:
                status = "LP optimal" if found.finished else "time limit"
                rounded = _best_rounding(found, items, values, counts, capacity, most, bound, deadline)
                if rounded.max() + 1 < bins:
                    placed, bins = rounded, int(rounded.max()) + 1
                if bins == bound:
                    break
        except (RuntimeError, ValueError, MemoryError) as error:
            status = f"failed: {error}"
    if found is not None:
        of, unit = found.classes_of(values), found.unit
        bound = max(bound, lower_bound(values, counts, capacity, most, found.worth[of]))
        rounded_up = int((np.maximum(found.sizes[of] - values, 0) * counts).sum())
    status = "optimal" if bins == bound else status
    seconds, kept = time.monotonic() - begin, placed.astype(np.int32)
    for column in (values, counts, kept):  # they are used again
        column.setflags(write=False)
    return Solution(bins, best_fit, bound, seconds, status, unit, rounded_up, capacity, values, counts, kept)


def _best_rounding(
    found: Relaxation, items: IntArray, values: IntArray, counts: IntArray, capacity: int, most: int, bound: int,
    deadline: float,
) -> IntArray:  # fmt: skip
    """Return the bin of each item, by the rounding of the patterns' times that needs the fewest bins."""
    classes = np.repeat(found.classes_of(values)[::-1], counts[::-1])
    best: IntArray | None = None
    for extra in _ROUNDINGS:
        times = np.floor(found.times + (extra + 1e-9)).astype(np.int64)
        placed = _round(found.patterns, times, items, classes, capacity, most)
        if best is None or placed.max() < best.max():
            best = placed
        if best.max() + 1 == bound or time.monotonic() > deadline:
            break
    return best if best is not None else items


def _round(
    patterns: NDArray[np.int32], times: IntArray, items: IntArray, classes: IntArray, capacity: int, most: int
) -> IntArray:
    """Return the bin of each item if each pattern is used so many times; all else goes where best fit puts it."""
    used = times > 0
    patterns, times = patterns[used], times[used]
    pattern, of = np.nonzero(patterns)
    order = np.argsort(-of, kind="stable")
    pattern, of = pattern[order], of[order]
    placed = np.empty_like(items)
    _deal(
        of, patterns[pattern, of].astype(np.int64), (np.cumsum(times) - times)[pattern], times[pattern], classes, placed
    )
    left = placed < 0
    # A bin with what it holds is one more thing to pack: the rest, or another bin, may fit beside it.
    used_bins, inside = np.unique(placed[~left], return_inverse=True)
    loads = np.bincount(inside, weights=items[~left], minlength=len(used_bins)).astype(np.int64)
    things = np.concatenate([loads, items[left]])
    order = np.argsort(-things, kind="stable") if not most else len(loads) + np.arange(int(left.sum()))
    bins = np.empty(len(order), np.int64)
    kernels.best_fit(things[order], capacity, most or max(len(items), 1), bins)
    of_thing = np.arange(len(things))
    of_thing[order] = bins + (len(loads) if most else 0)
    placed[~left] = of_thing[inside]
    placed[left] = of_thing[len(loads) :]
    return placed


@compiled
def _deal(
    of: IntArray, places: IntArray, first: IntArray, times: IntArray, classes: IntArray, placed: IntArray
) -> None:
    """Give each item, largest first, the smallest place that is left and holds it; -1 where there is none.

    Args:
        of: (E,) class of the places of an entry, never rising.
        places: (E,) how many a bin has.
        first: (E,) the first bin.
        times: (E,) bins from there on.
        classes: (N,) class of each item, never rising.
        placed: (N,) filled with the bin of each.
    """
    free = np.empty(max(1, (places * times).sum()), np.int64)
    top = entry = 0
    for i in range(len(classes)):
        while entry < len(of) and of[entry] >= classes[i]:
            for bin_ in range(first[entry], first[entry] + times[entry]):
                for _ in range(places[entry]):
                    free[top] = bin_
                    top += 1
            entry += 1
        placed[i] = -1
        if top > 0:
            top -= 1
            placed[i] = free[top]
