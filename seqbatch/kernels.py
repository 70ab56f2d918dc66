"""The few loops of planning that numpy cannot express, compiled by numba on first use.

Each takes and fills plain integer arrays and releases the interpreter's lock. The naive twin of each
is in the tests. Compiled code is kept on disk where a folder can be written, so that a program's
second run starts at once.
"""

import numpy as np
from numpy.typing import NDArray

from seqbatch.compiling import compiled
from seqbatch.ordering import IntArray

__all__ = [
    "best_fit",
    "cut_batches",
    "draw_keys",
    "first_free",
    "group_by",
    "next_fit",
    "number_lanes",
    "optimal_splits",
    "pool_keys",
    "read_pool_keys",
    "split_table",
]


@compiled
def draw_keys(keys: NDArray[np.uint64], codes: IntArray, code_bits: int, place_bits: int) -> None:
    """Turn random words into keys (random bits, code, place) that sort sequences at random.

    Args:
        keys: (N,) random words, changed in place.
        codes: (N,) length class of each sequence.
        code_bits: Bits that hold a class.
        place_bits: Bits that hold a place in ``range(N)``.
    """
    low = np.uint64(code_bits + place_bits)
    for i in range(len(keys)):
        keys[i] = keys[i] >> low << low | np.uint64(codes[i]) << np.uint64(place_bits) | np.uint64(i)


@compiled
def pool_keys(
    keys: NDArray[np.uint64], window: int, classes: int, code_bits: int, place_bits: int, pool_bits: int
) -> None:
    """Turn sorted keys of `draw_keys` into keys (pool, code, random bits, place) that sort each pool.

    Every other pool is sorted downwards, by its classes counted from the longest.

    Args:
        keys: (N,) keys in their sorted order, changed in place.
        window: Sequences of a pool.
        classes: Number of length classes.
        code_bits: As in `draw_keys`.
        place_bits: As in `draw_keys`.
        pool_bits: Bits that hold a pool.
    """
    code_mask = (np.uint64(1) << np.uint64(code_bits)) - np.uint64(1)
    place_mask = (np.uint64(1) << np.uint64(place_bits)) - np.uint64(1)
    random_bits = np.uint64(64 - pool_bits - code_bits - place_bits)
    random_mask = (np.uint64(1) << random_bits) - np.uint64(1)
    for i in range(len(keys)):
        key = keys[i]
        pool = i // window
        code = (key >> np.uint64(place_bits)) & code_mask
        if pool % 2 == 1:
            code = np.uint64(classes - 1) - code
        top = (np.uint64(pool) << np.uint64(code_bits)) | code
        drawn = (key >> np.uint64(code_bits + place_bits)) & random_mask
        keys[i] = (top << random_bits | drawn) << np.uint64(place_bits) | (key & place_mask)


@compiled
def read_pool_keys(
    keys: NDArray[np.uint64],
    window: int,
    classes: int,
    code_bits: int,
    place_bits: int,
    pool_bits: int,
    codes: IntArray,
) -> None:
    """Turn the sorted keys of `pool_keys` into places, and fill the length classes in that order."""
    code_mask = (np.uint64(1) << np.uint64(code_bits)) - np.uint64(1)
    place_mask = (np.uint64(1) << np.uint64(place_bits)) - np.uint64(1)
    for i in range(len(keys)):
        code = np.int64((keys[i] >> np.uint64(64 - pool_bits - code_bits)) & code_mask)
        codes[i] = code if (i // window) % 2 == 0 else classes - 1 - code
        keys[i] &= place_mask


@compiled
def number_lanes(sizes: IntArray, lane: IntArray) -> None:
    """Fill `lane` with 0, 1, ... ``size - 1`` for each size in turn."""
    i = 0
    for size in sizes:
        for number in range(size):
            lane[i] = number
            i += 1


@compiled
def cut_batches(
    codes: IntArray, fits: IntArray, multiple: int, stops: IntArray, ends: IntArray, longest: IntArray
) -> int:
    """Cut a row of sequences into batches, each as large as its longest sequence allows.

    Args:
        codes: (N,) length class of each sequence, larger for longer ones.
        fits: (classes,) how many sequences a batch may hold whose longest is of that class; 0 means
            that such a sequence is alone. Never increasing.
        multiple: A batch of more than `multiple` sequences holds a multiple of it.
        stops: Positions, rising to N, that no batch crosses.
        ends: (N,) filled with the end of each batch.
        longest: (N,) filled with the largest code of each batch.

    Returns:
        The number of batches.
    """
    count = begin = 0
    for stop in stops:
        while begin < stop:
            most = codes[begin]
            end = begin + 1
            while end < stop:
                code = max(most, codes[end])
                if end - begin >= fits[code]:
                    break
                most = code
                end += 1
            extra = (end - begin) % multiple
            if extra and end - begin > multiple:
                end -= extra
                most = codes[begin:end].max()
            ends[count] = end
            longest[count] = most
            count += 1
            begin = end
    return count


@compiled
def first_free(reserved: IntArray, num_lanes: int, lane: IntArray, begin: IntArray) -> None:
    """Give each sequence in turn to the lane that is free first, the lowest of several.

    Args:
        reserved: (N,) steps for which a sequence occupies its lane.
        num_lanes: Lanes.
        lane: (N,) filled with the lane of each sequence.
        begin: (N,) filled with its first step in that lane.
    """
    free_at = np.zeros(num_lanes, np.int64)
    heap = np.arange(num_lanes)  # lanes; the root is free first
    for i in range(len(reserved)):
        top = heap[0]
        lane[i] = top
        begin[i] = free_at[top]
        time = free_at[top] + reserved[i]
        free_at[top] = time
        node = 0
        while True:
            child = 2 * node + 1
            if child >= num_lanes:
                break
            other = child + 1
            if other < num_lanes and (
                free_at[heap[other]] < free_at[heap[child]]
                or (free_at[heap[other]] == free_at[heap[child]] and heap[other] < heap[child])
            ):
                child = other
            smallest = heap[child]
            if time < free_at[smallest] or (time == free_at[smallest] and top < smallest):
                break
            heap[node] = smallest
            node = child
        heap[node] = top


@compiled
def next_fit(lengths: IntArray, capacity: int, max_sequences: int, bins: IntArray) -> int:
    """Fill bins one after another, in the order the sequences come.

    Args:
        lengths: (N,) tokens, each at most `capacity`.
        capacity: Tokens a bin holds.
        max_sequences: Sequences a bin holds.
        bins: (N,) filled with the bin of each sequence, never falling.

    Returns:
        The number of bins.
    """
    count, room, held = 0, 0, 0
    for i in range(len(lengths)):
        if lengths[i] > room or held == max_sequences or count == 0:
            count += 1
            room = capacity
            held = 0
        bins[i] = count - 1
        room -= lengths[i]
        held += 1
    return count


@compiled
def best_fit(lengths: IntArray, capacity: int, max_sequences: int, bins: IntArray) -> int:
    """Put each sequence into the fullest bin that still holds it, in the order they come.

    Bins are kept in a stack per room left. A set of bits says which stacks are not empty, 64 to a
    word, and a second set which words are not 0, so the fullest bin is found in a few instructions.
    Sequences of one length that follow each other go into a bin together, as best fit would send
    them: what is left of it then is the smallest room that holds the next one.

    Args:
        lengths: (N,) tokens, each at most `capacity`; longest first makes it best-fit decreasing.
        capacity: Tokens a bin holds.
        max_sequences: Sequences a bin holds.
        bins: (N,) filled with the bin of each sequence.

    Returns:
        The number of bins.
    """
    words = (capacity >> 6) + 1
    word_bits = np.zeros(words, np.uint64)
    summary = np.zeros((words >> 6) + 1, np.uint64)
    stack = np.full(capacity + 1, -1, np.int64)
    below = np.empty(len(lengths), np.int64)
    held = np.zeros(len(lengths), np.int64)
    one = np.uint64(1)
    count = i = 0
    while i < len(lengths):
        length = lengths[i]
        room = _next_bit(word_bits, summary, length)
        if room < 0:
            room, bin_ = capacity, count
            count += 1
        else:
            bin_ = stack[room]
            stack[room] = below[bin_]
            if stack[room] < 0:
                word_bits[room >> 6] &= ~(one << np.uint64(room & 63))
                if word_bits[room >> 6] == 0:
                    summary[room >> 12] &= ~(one << np.uint64((room >> 6) & 63))
        while i < len(lengths) and lengths[i] == length and room >= length and held[bin_] < max_sequences:
            bins[i] = bin_
            room -= length
            held[bin_] += 1
            i += 1
        if room > 0 and held[bin_] < max_sequences:
            below[bin_] = stack[room]
            stack[room] = bin_
            word_bits[room >> 6] |= one << np.uint64(room & 63)
            summary[room >> 12] |= one << np.uint64((room >> 6) & 63)
    return count


@compiled
def _next_bit(word_bits: NDArray[np.uint64], summary: NDArray[np.uint64], start: int) -> int:
    """Return the smallest bit from `start` on that is set, or -1."""
    word = start >> 6
    bits = word_bits[word] >> np.uint64(start & 63)
    if bits != 0:
        return start + _lowest_bit(bits)
    word += 1
    block = word >> 6
    if block >= len(summary):
        return -1
    bits = summary[block] >> np.uint64(word & 63) << np.uint64(word & 63)
    while bits == 0:
        block += 1
        if block == len(summary):
            return -1
        bits = summary[block]
    word = (block << 6) + _lowest_bit(bits)
    return (word << 6) + _lowest_bit(word_bits[word])


@compiled
def _lowest_bit(bits: np.uint64) -> int:
    """Return the position of the lowest bit of a word that is not 0."""
    position = 0
    for width in (32, 16, 8, 4, 2, 1):
        if bits & ((np.uint64(1) << np.uint64(width)) - np.uint64(1)) == 0:
            bits = bits >> np.uint64(width)
            position += width
    return position


@compiled
def group_by(groups: IntArray, lengths: IntArray, ends: IntArray, order: IntArray, offset: IntArray) -> None:
    """Gather the members of each group, in the order they come, end to end.

    Args:
        groups: (N,) the group of each member.
        lengths: (N,) how much room each member takes.
        ends: (groups,) members of that group and those before it; changed in place to begins.
        order: (N,) filled with the members' positions, group after group.
        offset: (N,) filled, in that order, with the room taken by earlier members of the group.
    """
    for i in range(len(groups) - 1, -1, -1):
        ends[groups[i]] -= 1
        order[ends[groups[i]]] = i
    last = -1
    room = 0
    for i in range(len(order)):
        if groups[order[i]] != last:
            last = groups[order[i]]
            room = 0
        offset[i] = room
        room += lengths[order[i]]


@compiled
def optimal_splits(values: IntArray, counts: IntArray, num_splits: int) -> IntArray:
    """Return the positions of the edges that give the fewest cells.

    Args:
        values: (U,) rising edges to choose from, the last one is always chosen.
        counts: (U,) sequences of each class.
        num_splits: K, at most U.

    Returns:
        (K,) rising positions in `values`.
    """
    best = split_table(values, counts, num_splits)[0]
    edges = np.empty(num_splits, np.int64)
    j = len(values) - 1
    for k in range(num_splits - 1, -1, -1):
        edges[k] = j
        j = best[k, j] - 1
    return edges


@compiled
def split_table(values: IntArray, counts: IntArray, num_splits: int) -> tuple[IntArray, IntArray]:
    """Find the edges that give the fewest cells, for each number of edges, by dynamic programming.

    ``cells[k, j]``, the fewest cells for the classes up to j in k buckets, is the least of
    ``cells[k - 1, i] + values[j] * (count of the classes after i up to j)`` over i < j. The best i
    never falls as j rises, so each level is solved by halving j and keeping i between its
    neighbours' solutions: O(K U log U) for U classes, exactly.

    Args:
        values: (U,) rising edges to choose from.
        counts: (U,) sequences of each class.
        num_splits: K, at most U.

    Returns:
        (K, U) the first class of the last of k + 1 buckets that hold the classes up to j, and (K,) the cells of all
        classes in k + 1 buckets.
    """
    classes = len(values)
    total = np.zeros(classes + 1, np.int64)
    for i in range(classes):
        total[i + 1] = total[i] + counts[i]
    cells = values * total[1:]
    best = np.zeros((num_splits, classes), np.int64)
    fewest = np.empty(num_splits, np.int64)
    fewest[0] = cells[classes - 1]
    stack = np.empty((128, 4), np.int64)
    for k in range(1, num_splits):
        fewer = cells.copy()
        depth = 0
        stack[0] = (k, classes - 1, k, classes - 1)
        while depth >= 0:
            low, high, from_, to = stack[depth]
            depth -= 1
            if low > high:
                continue
            j = (low + high) // 2
            least, at = -1, from_
            for i in range(from_, min(to, j) + 1):
                total_cells = fewer[i - 1] + values[j] * (total[j + 1] - total[i])
                if least < 0 or total_cells < least:
                    least, at = total_cells, i
            cells[j] = least
            best[k, j] = at
            depth += 1
            stack[depth] = (low, j - 1, from_, at)
            depth += 1
            stack[depth] = (j + 1, high, at, to)
        fewest[k] = cells[classes - 1]
    return best, fewest
