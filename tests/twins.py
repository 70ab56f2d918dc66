"""Naive twins, in plain Python and one line a thought, of what the library does fast."""

import heapq
import itertools
from collections.abc import Callable, Sequence


def greedy_batches(row: Sequence[int], fits: Callable[[int], int], multiple: int = 1) -> list[list[int]]:
    """Cut a row of lengths into batches: take the next one while ``fits(longest)`` allows it."""
    batches = []
    while row:
        size = 1
        while size < len(row) and size + 1 <= fits(max(row[: size + 1])):
            size += 1
        if size > multiple:
            size -= size % multiple
        batches.append(list(row[:size]))
        row = row[size:]
    return batches


def greedy_pair_batches(
    row: Sequence[tuple[int, int]], fits: Callable[[int, int], int], multiple: int = 1
) -> list[list[tuple[int, int]]]:
    """Cut a row of pairs into batches: take the next one while ``fits(longest source, longest target)`` allows it."""
    batches = []
    while row:
        size = 1
        while size < len(row) and size + 1 <= fits(*(max(side) for side in zip(*row[: size + 1], strict=True))):
            size += 1
        if size > multiple:
            size -= size % multiple
        batches.append(list(row[:size]))
        row = row[size:]
    return batches


def pool_row(order: Sequence[int], lengths: Sequence[int], window: int) -> list[list[int]]:
    """Lengths of each pool of the order, sorted upwards and downwards in turn."""
    pools = [[lengths[i] for i in order[at : at + window]] for at in range(0, len(order), window)]
    return [sorted(pool, reverse=bool(number % 2)) for number, pool in enumerate(pools)]


def first_free(reserved: Sequence[int], num_lanes: int) -> tuple[list[int], list[int]]:
    """Lane and first step of each, given to the lane that is free first."""
    lanes = [(0, lane) for lane in range(num_lanes)]
    placed = []
    for steps in reserved:
        free_at, lane = heapq.heappop(lanes)
        placed.append((lane, free_at))
        heapq.heappush(lanes, (free_at + steps, lane))
    return [lane for lane, _ in placed], [begin for _, begin in placed]


def best_fit(lengths: Sequence[int], capacity: int, max_sequences: int) -> list[list[int]]:
    """Bins after putting each length into the fullest bin that holds it."""
    bins: list[list[int]] = []
    for length in lengths:
        open_ = [bin_ for bin_ in bins if sum(bin_) + length <= capacity and len(bin_) < max_sequences]
        if open_:
            max(open_, key=sum).append(length)
        else:
            bins.append([length])
    return bins


def next_fit(lengths: Sequence[int], capacity: int, max_sequences: int) -> list[list[int]]:
    """Bins after filling one after another."""
    bins: list[list[int]] = []
    for length in lengths:
        if not bins or sum(bins[-1]) + length > capacity or len(bins[-1]) == max_sequences:
            bins.append([])
        bins[-1].append(length)
    return bins


def padded_cells(lengths: Sequence[int], edges: Sequence[int]) -> int:
    """Cells if each sequence is padded to the smallest edge that holds it."""
    return sum(min(edge for edge in edges if edge >= length) for length in lengths)


def fewest_cells(lengths: Sequence[int], num_edges: int) -> int:
    """The fewest cells that any choice of at most `num_edges` edges needs, by trying all."""
    values = sorted(set(lengths))
    inner = itertools.combinations(values[:-1], min(num_edges, len(values)) - 1)
    return min(padded_cells(lengths, (*choice, values[-1])) for choice in inner)


def fewest_pair_cells(pairs: Sequence[tuple[int, int]], num_edges: int) -> int:
    """The fewest cells of edges in strips of the sources, each with own target edges, by trying all."""
    sources = sorted({source for source, _ in pairs})
    best = None
    for cuts in _subsets(range(1, len(sources)), num_edges - 1):
        bounds = [0, *cuts, len(sources)]
        strips = [[p for p in pairs if p[0] in sources[a:b]] for a, b in itertools.pairwise(bounds)]
        for shares in itertools.product(range(1, num_edges + 1), repeat=len(strips)):
            if sum(shares) <= num_edges:
                cells = sum(
                    len(strip) * max(s for s, _ in strip) + fewest_cells([t for _, t in strip], share)
                    for strip, share in zip(strips, shares, strict=True)
                )
                best = cells if best is None else min(best, cells)
    return best


def _subsets(values: Sequence[int], most: int) -> list[tuple[int, ...]]:
    return [subset for size in range(most + 1) for subset in itertools.combinations(values, size)]


def fewest_bins(lengths: Sequence[int], capacity: int, max_sequences: int) -> int:
    """The fewest bins that hold all lengths, by trying all ways to fill the first one."""
    if not lengths:
        return 0
    first, rest = lengths[0], lengths[1:]
    fewest = len(lengths)
    for size in range(min(max_sequences, len(lengths))):
        for others in itertools.combinations(range(len(rest)), size):
            if first + sum(rest[i] for i in others) <= capacity:
                left = [length for i, length in enumerate(rest) if i not in others]
                fewest = min(fewest, 1 + fewest_bins(left, capacity, max_sequences))
    return fewest


def bins_of_classes(sizes: Sequence[int], upper: Sequence[int], capacity: int, most: int) -> list[tuple[int, ...]]:
    """All ways to fill a bin: how many of each class."""
    ways = itertools.product(*(range(number + 1) for number in upper))
    room = lambda way: sum(n * size for n, size in zip(way, sizes, strict=True)) <= capacity  # noqa: E731
    return [way for way in ways if room(way) and (not most or sum(way) <= most)]
