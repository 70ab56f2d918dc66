"""Packing by a linear programme: the knapsack, the bound, and what becomes of the clock and of failures."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import twins
from hypothesis import given, settings
from hypothesis import strategies as st

from seqbatch import Packing, column_generation, cutting
from seqbatch.cutting import Solution
from seqbatch.knapsack import Knapsack

HARD = np.clip(np.rint(np.random.default_rng(0).normal(35, 4, 400)), 1, 100).astype(np.int64)
"""Near a third of 100: best fit needs 158 bins, 149 are enough."""


@pytest.fixture(autouse=True)
def nothing_solved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test solves for itself."""
    monkeypatch.setattr(cutting, "_solved", {})


def optimal(capacity: int, **settings: Any) -> Packing:
    return Packing(capacity, algorithm="optimal", **settings)


def check(found: Solution, lengths: np.ndarray, capacity: int, max_sequences: int | None = None) -> None:
    """All lengths, in bins that hold them."""
    patterns = found.patterns
    assert sum(times for _, times in patterns) == found.bins
    assert sorted(n for pattern, times in patterns for n in pattern * times) == sorted(lengths[lengths > 0].tolist())
    assert all(0 < sum(pattern) <= capacity for pattern, _ in patterns)
    assert all(len(pattern) <= (max_sequences or len(lengths)) for pattern, _ in patterns)
    assert found.bound <= found.bins <= found.best_fit_bins


CLASSES = st.integers(1, 4).flatmap(
    lambda count: st.tuples(
        st.lists(st.integers(1, 12), min_size=count, max_size=count, unique=True).map(sorted),
        st.lists(st.integers(1, 3), min_size=count, max_size=count),
        st.lists(st.integers(0, 9), min_size=count, max_size=count),
    )
)


@given(CLASSES, st.integers(12, 30), st.integers(0, 5))
def test_the_knapsack_is_the_best_of_all_bins(
    classes: tuple[list[int], list[int], list[int]], capacity: int, most: int
) -> None:
    """And its patterns are the best bins in which each class is the largest, and the smallest."""
    sizes, upper, worth = classes
    upper = [min(n, capacity // size, most or n) for n, size in zip(upper, sizes, strict=True)]
    bins = twins.bins_of_classes(sizes, upper, capacity, most)
    bin_ = Knapsack(np.array(sizes), np.array(upper), capacity, most)
    value = lambda way: sum(n * w for n, w in zip(way, worth, strict=True))  # noqa: E731

    assert max(map(value, bins)) == bin_.best(np.array(worth))
    patterns = [tuple(row) for row in bin_.patterns(np.array(worth)).tolist()]
    assert set(patterns) <= set(bins)
    for i, (largest, smallest) in enumerate(zip(patterns[: len(sizes)], patterns[len(sizes) :], strict=True)):
        assert max(value(way) for way in bins if way[i] and not any(way[i + 1 :])) == value(largest)
        assert max(value(way) for way in bins if way[i] and not any(way[:i])) == value(smallest)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=8), st.integers(20, 45), st.none() | st.integers(1, 4))
def test_few_lengths_lie_between_the_bound_and_best_fit(
    lengths: list[int], capacity: int, max_sequences: int | None
) -> None:
    """The bound is not above the fewest bins of all packings, and best fit's are not beaten by it."""
    found = optimal(capacity, max_sequences=max_sequences).solve(lengths)
    fewest = twins.fewest_bins(lengths, capacity, max_sequences or len(lengths))

    check(found, np.array(lengths), capacity, max_sequences)
    assert found.bound <= fewest <= found.bins
    assert (found.status == "optimal") == (found.bins == found.bound)
    best_fit = twins.best_fit(sorted(lengths, reverse=True), capacity, max_sequences or len(lengths))
    assert found.bins <= len(best_fit)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=8), st.integers(20, 45), st.integers(0, 4), st.data())
def test_any_worths_give_a_valid_bound(lengths: list[int], capacity: int, most: int, data: st.DataObject) -> None:
    """Farley's bound needs no optimal duals; nor does rounding lengths down, where tables are kept small."""
    values, counts = np.unique(lengths, return_counts=True)
    worth = np.array(data.draw(st.lists(st.integers(0, 99), min_size=len(values), max_size=len(values))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(column_generation, "MOST_CELLS", data.draw(st.sampled_from([2**26, 60, 10])))
        bound = column_generation.lower_bound(values, counts, capacity, most, worth)

    assert bound <= twins.fewest_bins(lengths, capacity, most or len(lengths))


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.sampled_from([None, 2, 3]))
def test_a_coarse_unit_packs_true_lengths(seed: int, max_sequences: int | None) -> None:
    """Where lengths are rounded up, bins still hold them, and bounds are still valid for them."""
    rng = np.random.default_rng(seed)
    lengths, capacity = rng.integers(rng.integers(1, 300), 500, 60), int(rng.integers(500, 1500))
    exact = optimal(capacity, max_sequences=max_sequences).solve(lengths)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(column_generation, "MOST_CLASSES", 12)
        patch.setattr(column_generation, "MOST_CELLS", 3000)
        patch.setattr(cutting, "_solved", {})
        coarse = optimal(capacity, max_sequences=max_sequences).solve(lengths)

    check(exact, lengths, capacity, max_sequences)
    check(coarse, lengths, capacity, max_sequences)
    assert max(exact.bound, coarse.bound) <= min(exact.bins, coarse.bins)


def test_hard_lengths_need_fewer_bins_than_best_fit() -> None:
    """Within a bin of the bound, and what is printed says so."""
    found = optimal(100).solve(HARD)

    check(found, HARD, 100)
    assert (found.bins, found.best_fit_bins) == (149, 158)
    assert f"{found.bins:,} bins, best fit {found.best_fit_bins:,}, at least {found.bound:,}: " in str(found)


@pytest.mark.parametrize("shuffle", [True, False])
def test_epochs_share_patterns_that_are_solved_once(shuffle: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the epoch, the seed and the rows; contents are fresh, or stay where nothing is shuffled."""
    calls, solve = [], cutting._solve
    monkeypatch.setattr(cutting, "_solve", lambda *args: calls.append(args) or solve(*args))
    strategy = optimal(100, shuffle=shuffle)
    found = strategy.solve(HARD)
    plans = [strategy.plan(HARD, epoch=epoch, seed=seed) for epoch, seed in ((0, 0), (1, 0), (0, 1))]
    optimal(100, rows=3, shuffle=shuffle).plan(HARD[::-1])

    assert len(calls) == 1
    for plan in plans:
        bins = sorted(tuple(sorted(part.length, reverse=True)) for part in plan)
        assert sorted(pattern for pattern, times in found.patterns for _ in range(times)) == bins
    contents = [{frozenset(part.sequence) for part in plan} for plan in plans]
    assert (contents[0] == contents[1]) == (not shuffle)
    assert (contents[0] == contents[2]) == (not shuffle)
    optimal(100, time_limit=20).plan(HARD)
    optimal(101).plan(HARD)
    optimal(100).plan(HARD + 1)
    assert len(calls) == 4


def test_equal_lengths_of_a_bin_keep_their_order_without_shuffle() -> None:
    """The first of a length lies in the first of its places."""
    plan = optimal(100, shuffle=False).plan(HARD)
    bins = np.repeat(np.arange(len(plan)), np.diff(plan.batch_ptr))
    for length in np.unique(HARD):
        of_length = plan.length == length
        placed = cutting.solve(HARD, 100, None, 30.0).placed[np.sort(HARD)[::-1] == length]
        assert placed.tolist() == bins[of_length][np.argsort(plan.sequence[of_length])].tolist()


def test_the_fewest_recent_solutions_are_kept() -> None:
    """Memory does not grow with the number of corpora."""
    for capacity in range(70, 80):
        optimal(capacity).solve(HARD)

    assert len(cutting._solved) == cutting._KEPT


def test_the_clock_leaves_best_fit_and_warns() -> None:
    """Once, saying what was reached and what to do; the plan obeys the same laws."""
    strategy = optimal(100, time_limit=1e-9)
    with pytest.warns(UserWarning, match=r"clock ended packing .*best fit 158.* raise time_limit=1e-09") as caught:
        found = strategy.solve(HARD)

    assert len(caught) == 1
    assert (found.status, found.bins) == ("time limit", found.best_fit_bins)
    check(found, HARD, 100)
    assert len(strategy.plan(HARD)) == found.bins


def test_the_clock_leaves_the_best_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a few solutions of a coarse unit: valid bins, fewer than best fit's, and a valid bound."""
    lengths = np.clip(np.rint(np.random.default_rng(0).normal(1400, 120, 3000)), 1, 4096).astype(np.int64)
    calls, master = [], column_generation._master

    def until(patterns: np.ndarray, counts: np.ndarray, deadline: float) -> tuple:
        calls.append(len(counts))
        if len(counts) > 300:
            raise TimeoutError
        return master(patterns, counts, deadline)

    monkeypatch.setattr(column_generation, "_master", until)
    with pytest.warns(UserWarning, match="clock ended packing"):
        found = optimal(4096).solve(lengths)

    check(found, lengths, 4096)
    assert (found.status, found.unit > 1) == ("time limit", True)
    assert found.bound < found.bins < found.best_fit_bins
    assert f"rounded up to multiples of {found.unit}" in str(found)


@pytest.mark.parametrize("how", ["raises", "status"])
def test_a_solver_that_fails_leaves_best_fit_and_warns(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether HiGHS raises or says that it did not solve."""
    linprog = column_generation.linprog

    def failing(*args: Any, **kwargs: Any) -> Any:
        if how == "raises":
            raise ValueError("no")
        result = linprog(*args, **kwargs)
        result.status, result.message = 4, "numerical difficulties"
        return result

    monkeypatch.setattr(column_generation, "linprog", failing)
    with pytest.warns(UserWarning, match=r"packing failed: .*(no|difficulties); best fit is used: 158 bins"):
        found = optimal(100).solve(HARD)

    assert found.bins == found.best_fit_bins
    assert found.status.startswith("failed")
    check(found, HARD, 100)


@pytest.mark.parametrize(
    ("lengths", "capacity", "bins"),
    [([7] * 50, 20, 25), ([7] * 50, 7, 50), ([1], 1, 1), ([0, 0], 5, 0), ([3, 0, 5], 2**40, 1), ([5, 6, 9], 9, 3)],
)
def test_lengths_that_leave_no_choice(lengths: list[int], capacity: int, bins: int) -> None:
    """Equal ones, one, none, all in one bin, one a bin."""
    found = optimal(capacity).solve(lengths)

    assert (found.bins, found.bound, found.status) == (bins, bins, "optimal")
    check(found, np.array(lengths), capacity)


def test_overlong_sequences_are_dealt_with_first() -> None:
    """As with best fit: split into pieces of the capacity and a rest."""
    found = optimal(10, overlong="split").solve([25, 5, 4])

    assert found.patterns == [((10,), 2), ((4,), 1), ((5, 5), 1)]
    with pytest.raises(ValueError, match="sequence 0 has 25 tokens, but capacity=10 allows at most 10"):
        optimal(10).solve([25, 5, 4])


def test_a_limit_of_sequences_that_binds() -> None:
    """Four would fit with short sequences; patterns have three, and are still better than best fit."""
    lengths = np.concatenate([HARD, np.full(40, 3)])
    found = optimal(100, max_sequences=3).solve(lengths)

    check(found, lengths, 100, 3)
    assert found.bins < found.best_fit_bins


@pytest.mark.slow
def test_a_million_different_lengths_are_rounded_up() -> None:
    """To few enough classes and small enough tables; what that may cost is said."""
    lengths = np.random.default_rng(0).permutation(1_000_000) + 500_000
    found = optimal(2_560_000, time_limit=300).solve(lengths)

    assert found.unit > 1
    assert found.rounded_up > 0
    assert found.bound <= found.bins < found.best_fit_bins
    assert np.bincount(found.placed, weights=np.sort(lengths)[::-1]).max() <= 2_560_000


def test_the_same_bits_in_another_process() -> None:
    """Nothing depends on the order of sets, on hashes, or on what was solved before."""
    code = f"""
import numpy as np
from seqbatch import Packing
lengths = np.array({HARD.tolist()})
print(Packing(100, algorithm="optimal").plan(lengths, epoch=2).digest)
"""
    optimal(99).plan(HARD)
    here = optimal(100).plan(HARD, epoch=2).digest
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert here == there.stdout.strip()


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"time_limit": 0}, ValueError, "time_limit must be above 0 seconds, got 0"),
        ({"time_limit": float("nan")}, ValueError, "time_limit must be above 0 seconds, got nan"),
        ({"time_limit": "30"}, TypeError, "time_limit must be a number of seconds, got '30'"),
        ({"time_limit": True}, TypeError, "time_limit must be a number of seconds, got True"),
        ({"time_limit": 5, "algorithm": "best_fit"}, ValueError, 'time_limit=5.0 goes with algorithm="optimal"'),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict, error: type, message: str) -> None:
    """Saying what came and what would do."""
    with pytest.raises(error, match=message):
        Packing(10, **({"algorithm": "optimal"} | settings))
    with pytest.raises(ValueError, match="nothing to solve with algorithm='best_fit'"):
        Packing(10).solve([1])


def test_a_kept_solution_is_used_by_other_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read where it is of these lengths and settings, written where not; the plan does not say where it is kept."""
    path = tmp_path / "bins.npz"
    lengths = np.random.default_rng(3).normal(30, 3, 300).astype(np.int64)
    kept = Packing(100, algorithm="optimal", solution=path)
    plan = kept.plan(lengths)
    assert plan.digest == Packing(100, algorithm="optimal").plan(lengths).digest
    assert repr(kept) == "Packing(100, algorithm='optimal')" == plan.strategy
    assert kept == Packing(100, algorithm="optimal")

    cutting._solved.clear()
    monkeypatch.setattr(cutting, "_solve", None)  # any call would fail
    again = kept.solve(lengths)
    assert kept.plan(lengths, epoch=0).digest == plan.digest
    assert again.bins == len(plan)
    monkeypatch.undo()

    other = Packing(100, algorithm="optimal", max_sequences=2, solution=path)
    assert other.solve(lengths).bins == 150  # written anew
    cutting._solved.clear()
    assert kept.solve(lengths).bins == again.bins


def test_a_kept_solution_that_is_damaged_is_refused(tmp_path: Path) -> None:
    """Another file, half of one, and one whose bins hold too much."""
    path = tmp_path / "bins.npz"
    lengths = [5, 5, 4, 4, 3, 3]
    path.write_bytes(b"nothing")
    packing = Packing(12, algorithm="optimal", solution=path)
    with pytest.raises(ValueError, match="is not a packing that seqbatch kept"):
        packing.solve(lengths)
    path.unlink()
    packing.solve(lengths)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    cutting._solved.clear()
    with pytest.raises(ValueError, match="remove it, and it is made again"):
        packing.solve(lengths)
    path.write_bytes(whole)
    with np.load(path) as file:
        arrays = dict(file)
    arrays["placed"][:] = 0
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match="a bin holds too much"):
        packing.solve(lengths)
    with pytest.raises(ValueError, match=r"solution='x' goes with algorithm=\"optimal\""):
        Packing(12, solution="x")
    with pytest.raises(TypeError, match="solution must be the path of a file, got 3"):
        Packing(12, algorithm="optimal", solution=3)
