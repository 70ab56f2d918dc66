"""Who runs which batch when: the steps of an epoch as data, for any number of ranks.

An epoch is a set of batches, fixed before anyone knows how many ranks there are. A *schedule* orders
it for W ranks::

    sorted by cost      b7 b2 b9 | b0 b4 b1 | b3 b8 b5 | b6       M = 10 batches, W = 3
    left over           M mod W batches next to each other, from a random place:  b6
    groups of W         one group is one step, one batch a rank; groups in random order

A *history* ``[[num_replicas, steps], ...]`` says which schedules were followed for how long. Each
entry takes its steps away from the batches that the entries before it had left, so whatever happens
to the number of ranks, every batch comes exactly once.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from seqbatch.ordering import IntArray, random_bits
from seqbatch.strategy import check_choice, check_integer

__all__ = ["History", "Schedule", "check_history", "lane_ranges", "schedule"]

History = Sequence[Sequence[int]]


class Schedule(NamedTuple):
    """The steps still to come: which batch each rank runs."""

    groups: IntArray
    """(steps, num_replicas) batch indices, one row a step, one column a rank."""
    left_over: IntArray
    """(fewer than num_replicas,) batch indices that fill no step, most expensive first."""


def schedule(
    costs: NDArray[np.float64],
    num_replicas: int,
    *,
    history: History = (),
    tail: str = "split",
    shuffle: bool = True,
    key: tuple[int, ...] = (0, 0),
    worst_first: bool = False,
) -> Schedule:
    """Order the batches that `history` has not taken into steps of `num_replicas` batches.

    Args:
        costs: (M,) float64, one number a batch; batches of a step get neighbouring costs.
        num_replicas: Ranks that will run the schedule.
        history: ``[[num_replicas, steps], ...]`` of what ran before, oldest first. An entry of the
            same number of ranks as the next one is the same schedule, gone on with.
        tail: ``"split"`` or ``"drop"``: whether the left-over batches are one more step.
        shuffle: False keeps the batches in plan order, whatever they cost.
        key: (seed, epoch), which the random order depends on, as it does on `history`.
        worst_first: Begin the epoch with the step of the most expensive batch, so that running out of
            memory shows at once.

    Raises:
        ValueError: where `history` takes more steps than there are.

    >>> groups, left_over = schedule(np.array([5.0, 1.0, 5.0, 1.0, 3.0]), 2)
    >>> groups.tolist(), left_over.tolist()
    ([[1, 3], [4, 2]], [0])
    """
    phases = check_history(history)
    if phases and phases[-1][0] == num_replicas:
        *phases, (_, steps) = phases
    else:
        steps = 0
    remaining = np.arange(len(costs))
    done: list[tuple[int, int]] = []
    for phase in phases:
        groups, left_over = _order(costs, remaining, phase[0], shuffle, key, done, worst_first)
        groups, left_over = _skip(groups, left_over, phase, tail)
        remaining = np.sort(np.concatenate([groups.ravel(), left_over]))
        done.append(phase)
    groups, left_over = _order(costs, remaining, num_replicas, shuffle, key, done, worst_first)
    return Schedule(*_skip(groups, left_over, (num_replicas, steps), tail))


def check_history(history: History) -> list[tuple[int, int]]:
    """Return `history` as pairs, neighbours of the same number of ranks added up.

    >>> check_history([[8, 3], [8, 2], [3, 0], [5, 1]])
    [(8, 5), (5, 1)]
    """
    phases: list[tuple[int, int]] = []
    if not isinstance(history, Sequence):
        raise TypeError(f"history must be [[num_replicas, steps], ...], oldest first, got {history!r}")
    for entry in history:
        if isinstance(entry, str) or not isinstance(entry, Sequence) or len(entry) != 2:
            raise ValueError(f"history must be [[num_replicas, steps], ...], got the entry {entry!r}")
        replicas = check_integer("num_replicas in history", entry[0], at_least=1)
        steps = check_integer("steps in history", entry[1], at_least=0)
        if steps and phases and phases[-1][0] == replicas:
            phases[-1] = (replicas, phases[-1][1] + steps)
        elif steps:
            phases.append((replicas, steps))
    return phases


def _order(
    costs: NDArray[np.float64],
    remaining: IntArray,
    num_replicas: int,
    shuffle: bool,
    key: tuple[int, ...],
    done: list[tuple[int, int]],
    worst_first: bool,
) -> tuple[IntArray, IntArray]:
    """Cut `remaining` into groups of `num_replicas` batches and what is left over."""
    num_groups, num_left = divmod(len(remaining), num_replicas)
    if not shuffle:
        cut = num_groups * num_replicas
        return _first_the_worst(
            remaining[:cut].reshape(num_groups, num_replicas), costs, worst_first and not done
        ), remaining[cut:]
    words = random_bits(len(remaining) + num_groups + 1, *key, "ranks", repr((done, num_replicas)))
    ties, order_keys, place = words[: len(remaining)], words[len(remaining) : -1], words[-1]
    by_cost = remaining[np.lexsort((ties, _comparable(costs[remaining])))]
    # A random place, around the end too, so that no batch is more likely than another to be left over.
    # With worst_first not the most expensive one, the last.
    worst_first = worst_first and not done
    at = int(place % np.uint64(max(len(remaining) - (num_left if worst_first else 0), 1)))
    left = np.sort((at + np.arange(num_left)) % max(len(remaining), 1))
    groups = np.delete(by_cost, left).reshape(num_groups, num_replicas)
    groups = groups[np.argsort(order_keys, kind="stable")]
    return _first_the_worst(groups, costs, worst_first), by_cost[left[::-1]]


def _first_the_worst(groups: IntArray, costs: NDArray[np.float64], wanted: bool) -> IntArray:
    """Move the step with the most expensive batch to the front."""
    if not wanted or not len(groups):
        return groups
    worst = int(np.argmax(_comparable(costs)[groups].max(axis=1)))
    return np.concatenate([groups[worst : worst + 1], np.delete(groups, worst, axis=0)])


def _comparable(costs: NDArray[np.float64]) -> IntArray:
    """Round `costs` to 40 bits below the largest, so that no platform's last bit decides an order."""
    largest = float(np.max(costs, initial=0.0))
    if largest <= 0:
        return np.zeros(len(costs), dtype=np.int64)
    return np.rint(costs * (2.0**40 / largest)).astype(np.int64)


def _skip(groups: IntArray, left_over: IntArray, phase: tuple[int, int], tail: str) -> tuple[IntArray, IntArray]:
    """Take the steps of one entry of a history away."""
    check_choice("tail", tail, ("split", "drop"))
    num_replicas, steps = phase
    last_step = int(tail == "split" and len(left_over) > 0)
    if steps > len(groups) + last_step:
        raise ValueError(
            f"history says that {num_replicas} ranks took {steps} steps, but there were only "
            f"{len(groups) + last_step} to take: it belongs to another plan, or its entries are out of order"
        )
    if steps > len(groups):
        left_over = left_over[:0]
    return groups[steps:], left_over


def lane_ranges(left_over: IntArray, lanes: IntArray, num_replicas: int) -> tuple[IntArray, IntArray, IntArray]:
    """Deal the lanes of the left-over batches to all ranks.

    Args:
        left_over: (K,) batch indices, ``0 < K < num_replicas``, most expensive first: those are
            shared by one rank more where K does not divide `num_replicas`.
        lanes: (K,) lanes of each of them.
        num_replicas: Ranks.

    Returns:
        (batch, first lane, end lane), each (num_replicas,): what each rank runs. A rank beyond the
        lanes of its batch gets an empty range.

    >>> batch, first, end = lane_ranges(np.array([7, 2]), np.array([4, 1]), num_replicas=5)
    >>> batch.tolist(), first.tolist(), end.tolist()
    ([7, 7, 7, 2, 2], [0, 1, 2, 0, 0], [1, 2, 4, 0, 1])
    """
    shares = np.full(len(left_over), num_replicas // len(left_over))
    shares[: num_replicas % len(left_over)] += 1
    index = np.repeat(np.arange(len(left_over)), shares)
    turn = np.arange(num_replicas) - np.repeat(np.cumsum(shares) - shares, shares)
    first = turn * lanes[index] // shares[index]
    end = (turn + 1) * lanes[index] // shares[index]
    return left_over[index], first, end
