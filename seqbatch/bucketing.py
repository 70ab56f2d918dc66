"""Bucketing: sequences of about the same length meet in a batch.

Three ways to choose who meets, one rule for how many:

* *Pool sort* (the default): sequences are drawn into pools of `window`, each pool is sorted, and
  batches are cut from the sorted row. Every other pool is sorted downwards, so that a batch begun at
  the end of one pool goes on with neighbours of the same length in the next.
* *Buckets*: a sequence goes to the smallest edge that holds it, and meets its bucket at random.
* *Static shapes*: the same, and every batch of a bucket has one shape, for compiled graphs.

How many sequences a batch holds is decided by its longest alone, through one table: `batch_size`, or
as many as the budget `max_tokens` has room for, padding included. So the budget is a hard limit.
"""

from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, dataclass
from itertools import pairwise
from typing import ClassVar, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from seqbatch.edges import EDGE_RULES, find_edges
from seqbatch.lengths import as_lengths
from seqbatch.ordering import ENOUGH_BITS, IntArray, constant, round_up, shuffle_within, stable_order
from seqbatch.pieces import OVERLONG, dropped_rows, fit_overlong, not_empty
from seqbatch.plan import Plan
from seqbatch.strategy import Strategy, check_choice, check_cost, check_integer

__all__ = ["Bucketing"]

_NO_LIMIT = 2**62


@dataclass(frozen=True, repr=False)
class Bucketing(Strategy):
    """Batches of similar lengths under a budget of tokens, padding included, or of a fixed size.

    Args:
        max_tokens: The budget: ``steps * lanes <= max_tokens`` in every batch, padding included (with
            `cost`, the cost of the lanes). Either this or `batch_size`.
        batch_size: Sequences of a batch.
        window: Sequences in a pool; by default the larger of an eighth of all and a hundred batches, but
            at most half of all. A larger pool wastes less, in a smaller one more mates change each epoch.
        num_buckets: Use this many buckets with edges found from the lengths (8 for static shapes).
        bucket_edges: Use these edges: rising inclusive padded lengths. A sequence longer than the last
            is overlong.
        edges: How edges are found: ``"optimal"`` (least padding, an exact dynamic programme over the
            lengths' histogram), ``"quantile"``, ``"equal_tokens"`` or ``"geometric"``.
        static_shapes: Pad to the bucket's edge, and give all its batches the lanes its edge allows;
            empty lanes count as cells. At most one shape a bucket.
        cost: (a, b) makes the budget one of ``a * l + b * l**2`` for each lane of l steps.
        max_sequences: At most this many sequences in a batch.
        batch_size_multiple: Lanes are a multiple of this where at least one multiple fits.
        pad_to_multiple_of: Steps are rounded up to a multiple of this; the budget counts them.
        overlong: What becomes of a sequence that fits into no batch: ``"error"``, ``"split"``,
            ``"truncate"``, ``"drop"``, or ``"alone"`` (one lane, the only case over budget).
        shuffle: Draw pools and mates at random, new in each epoch; False keeps the order of the data.
        drop_last: Leave out batches that the end of the data, or of a bucket, cut short.

    Raises:
        TypeError, ValueError: settings of the wrong type or range, or that exclude each other.

    >>> plan = Bucketing(max_tokens=12).plan([5, 1, 6, 2, 3, 1, 6])
    >>> int((plan.steps * plan.lanes).max()), plan.tokens, plan.cells
    (12, 24, 31)
    """

    _: KW_ONLY
    max_tokens: int | None = None
    batch_size: int | None = None
    window: int | None = None
    num_buckets: int | None = None
    bucket_edges: Sequence[int] | None = None
    edges: str = "optimal"
    static_shapes: bool = False
    cost: tuple[float, float] = (1.0, 0.0)
    max_sequences: int | None = None
    batch_size_multiple: int = 1
    pad_to_multiple_of: int = 1
    overlong: str = "error"
    shuffle: bool = True
    drop_last: bool = False

    at_least: ClassVar[dict[str, int]] = dict.fromkeys(
        ("max_tokens", "batch_size", "window", "num_buckets", "max_sequences", "batch_size_multiple"), 1
    ) | {"pad_to_multiple_of": 1}

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "cost", check_cost(self.cost))
        check_choice("edges", self.edges, tuple(EDGE_RULES))
        check_choice("overlong", self.overlong, OVERLONG)
        if self.bucket_edges is not None:
            object.__setattr__(self, "bucket_edges", _check_edges(self.bucket_edges))
        self._check_together()
        if not self._lanes_at(np.array([self.pad_to_multiple_of]))[0]:
            raise ValueError(
                f"max_tokens={self.max_tokens} has no room for one sequence of {self.pad_to_multiple_of} steps"
                f" at cost={self.cost}: raise max_tokens, or lower pad_to_multiple_of or the cost"
            )
        if self.bucket_edges is not None and not self._fitting_edges():
            raise ValueError(
                f"max_tokens={self.max_tokens} has no room for one sequence padded to the first of bucket_edges, "
                f"{self.bucket_edges[0]}: raise max_tokens, or add a shorter edge"
            )

    def _check_together(self) -> None:
        """Raise where two settings exclude each other."""
        if (self.max_tokens is None) == (self.batch_size is None):
            raise ValueError(
                f"give either max_tokens or batch_size, got max_tokens={self.max_tokens}, batch_size={self.batch_size}"
            )
        if self.batch_size is not None:
            for name, default in (("cost", (1.0, 0.0)), ("max_sequences", None), ("batch_size_multiple", 1)):
                if getattr(self, name) != default:
                    raise ValueError(f"{name}={getattr(self, name)} goes with max_tokens; with batch_size leave it out")
        if self.bucket_edges is not None and (self.num_buckets is not None or self.edges != "optimal"):
            raise ValueError("bucket_edges are the edges: leave num_buckets and edges out")
        if self.window is not None and self._has_buckets:
            raise ValueError("window is for pool sort: leave it out with buckets or static_shapes")
        if self.edges != "optimal" and not self._has_buckets:
            raise ValueError(f"edges={self.edges!r} needs num_buckets or static_shapes=True")

    @property
    def _has_buckets(self) -> bool:
        return self.static_shapes or self.num_buckets is not None or self.bucket_edges is not None

    def plan(self, lengths: ArrayLike, *, seed: int = 0, epoch: int = 0) -> Plan:
        from seqbatch.kernels import cut_batches, number_lanes

        pieces, empty = not_empty(as_lengths(lengths))
        limit, why = self._limit(int(pieces.length.max(initial=1)))
        pieces, overlong = fit_overlong(pieces, limit, self.overlong, why)
        row = (self._into_buckets if self._has_buckets else self._into_pools)(pieces.length, limit, seed, epoch)
        steps = round_up(row.values, self.pad_to_multiple_of)
        lanes = self._lanes_at(steps)
        lanes[row.alone_from :] = 0
        ends, longest = np.empty(len(row.order), np.int64), np.empty(len(row.order), np.int64)
        count = cut_batches(row.codes, lanes, self.batch_size_multiple, row.stops, ends, longest)
        ends, longest = ends[:count].copy(), longest[:count].copy()
        sizes, steps, lanes = np.diff(ends, prepend=0), steps[longest], lanes[longest]
        columns: tuple[IntArray, ...] = (*pieces.take(row.order), row.length)
        dropped = [empty, overlong]
        if self.drop_last:
            kept = (sizes >= lanes) | ~np.isin(ends, row.stops)
            stays = np.repeat(kept, sizes)
            dropped.append(dropped_rows("drop_last", *(column[~stays] for column in columns)))
            columns = tuple(column[stays] for column in columns)
            sizes, steps, lanes = sizes[kept], steps[kept], lanes[kept]
        lane = np.empty(len(columns[0]), np.int64)
        number_lanes(sizes, lane)
        return Plan(
            sequence=columns[0],
            start=columns[1],
            length=columns[2],
            step=constant(0, len(columns[0])),
            lane=lane,
            batch_ptr=np.append([0], np.cumsum(sizes)),
            steps=steps,
            lanes=np.maximum(lanes, 1) if self.static_shapes else sizes,
            dropped=np.concatenate(dropped),
            **self._provenance(seed, epoch),
        )

    def _lanes_at(self, steps: IntArray) -> IntArray:
        """How many lanes a batch of so many steps may have; 0 where not even one fits."""
        if self.max_tokens is None:
            return np.full(len(steps), self.batch_size)
        if self.cost == (1.0, 0.0):
            lanes = self.max_tokens // np.maximum(steps, 1)
        else:
            # Single operations of IEEE arithmetic, which give the same bits on every platform.
            a, b = self.cost
            lengths = np.maximum(steps, 1).astype(np.float64)
            each = a * lengths + b * (lengths * lengths)
            lanes = np.floor(np.minimum(self.max_tokens / each, _NO_LIMIT)).astype(np.int64)
            lanes -= lanes * each > self.max_tokens
        lanes = np.minimum(lanes, self.max_sequences or _NO_LIMIT)
        multiples: IntArray = lanes - lanes % self.batch_size_multiple
        return np.where(lanes > self.batch_size_multiple, multiples, lanes)

    def _fitting_edges(self) -> tuple[int, ...]:
        """The edges that sequences can be sent to: static ones must fit the budget themselves."""
        edges = tuple(self.bucket_edges or ())
        if not self.static_shapes:
            return edges
        lanes = self._lanes_at(round_up(np.array(edges, dtype=np.int64), self.pad_to_multiple_of))
        return tuple(edge for edge, room in zip(edges, lanes, strict=True) if room)

    def _limit(self, longest: int) -> tuple[int, str]:
        """The most tokens a lane may hold, up to `longest`, and the setting that says so."""
        last = longest if self.bucket_edges is None else self._fitting_edges()[-1]
        low, high = 0, min(longest, last)
        while low < high:
            middle = (low + high + 1) // 2
            if self._lanes_at(round_up(np.array([middle]), self.pad_to_multiple_of))[0]:
                low = middle
            else:
                high = middle - 1
        if self.bucket_edges is not None and low == last:
            return low, f"the last of bucket_edges that fits, {last},"
        why = f"max_tokens={self.max_tokens}"
        why += f" at cost={self.cost}" if self.cost != (1.0, 0.0) else ""
        return low, why + (f" with pad_to_multiple_of={self.pad_to_multiple_of}" if self.pad_to_multiple_of > 1 else "")

    def _into_pools(self, length: IntArray, limit: int, seed: int, epoch: int) -> "_Row":
        """Draw pools and sort each by length, every other one downwards."""
        values, codes = _classes(length)
        count = len(length)
        per_batch = self.batch_size or int(self.max_tokens or 0) * count // max(int(length.sum()), 1)
        # Two pools at least, so that even few sequences meet others in the next epoch.
        default = min(max(-(-count // 8), 100 * per_batch), -(-count // 2))
        window = max(1, min(self.window or default, count))
        order, codes = _sort_pools(codes, len(values), window, self._words(count, seed, epoch))
        row_length = codes if len(values) and values[-1] == len(values) - 1 else values[codes]
        return _Row(order, row_length, codes, values, int(np.searchsorted(values, limit, "right")), np.array([count]))

    def _into_buckets(self, length: IntArray, limit: int, seed: int, epoch: int) -> "_Row":
        """Send every sequence to the smallest edge that holds it; those that none holds come last."""
        multiple = self.pad_to_multiple_of
        fitting = length[length <= limit]
        if self.bucket_edges is not None:
            edges = np.unique(round_up(np.array(self._fitting_edges()), multiple))
        elif len(fitting):
            edges = find_edges(fitting, self.num_buckets or 8, rule=self.edges, multiple=multiple)
        else:
            edges = np.array([limit])
        bucket = np.where(length <= limit, np.searchsorted(edges, length), len(edges))
        stops = np.cumsum(np.bincount(bucket, minlength=len(edges) + 1))
        row = shuffle_within(bucket, len(edges) + 1, self._words(len(length), seed, epoch))
        row_length = length[row]
        if not self.static_shapes:
            values, codes = _classes(row_length)
            return _Row(row, row_length, codes, values, int(np.searchsorted(values, limit, "right")), stops)
        codes = np.repeat(np.arange(len(edges) + 1), np.diff(stops, prepend=0))
        alone, own_code = np.unique(row_length[stops[-2] :], return_inverse=True)
        codes[stops[-2] :] += own_code
        return _Row(row, row_length, codes, np.concatenate([edges, alone]), len(edges), stops)


class _Row(NamedTuple):
    """Pieces in a row, to cut batches from."""

    order: IntArray  # (P,) positions of the pieces
    length: IntArray  # (P,) tokens of each
    codes: IntArray  # (P,) length class of each, larger for longer ones
    values: IntArray  # (classes,) the length that a class is padded to
    alone_from: int  # classes from this one on fit into no batch
    stops: IntArray  # places in the row that no batch crosses


def _sort_pools(
    codes: IntArray, classes: int, window: int, words: NDArray[np.uint64] | None
) -> tuple[IntArray, IntArray]:
    """Return (order, codes in that order): rows drawn by `words`, cut into pools, each sorted by code."""
    from seqbatch.kernels import draw_keys, pool_keys, read_pool_keys

    count = len(codes)
    num_pools = -(-count // window)
    code_bits, place_bits, pool_bits = (max(number - 1, 0).bit_length() for number in (classes, count, num_pools))
    if code_bits + place_bits + pool_bits > 64 - ENOUGH_BITS:
        row = np.arange(count) if words is None else np.argsort(words, kind="stable")
        pool = np.arange(count) // window
        code = np.where(pool % 2, classes - 1 - codes[row], codes[row])
        row = row[stable_order(pool * classes + code, bound=num_pools * classes)]
        return row, codes[row]
    keys = np.zeros(count, np.uint64) if words is None else words
    draw_keys(keys, codes, code_bits, place_bits)
    if words is not None:
        keys.sort()
    pool_keys(keys, window, classes, code_bits, place_bits, pool_bits)
    keys.sort()
    sorted_codes = np.empty(count, np.int64)
    read_pool_keys(keys, window, classes, code_bits, place_bits, pool_bits, sorted_codes)
    return keys.view(np.int64), sorted_codes


def _classes(length: IntArray) -> tuple[IntArray, IntArray]:
    """Return (values, codes) with ``values[codes] == length``, values rising."""
    longest = int(length.max(initial=0))
    if longest < max(len(length), 1 << 16):
        return np.arange(longest + 1), length
    values, codes = np.unique(length, return_inverse=True)
    return values, codes


def _check_edges(edges: Sequence[int]) -> tuple[int, ...]:
    if not isinstance(edges, Iterable):
        raise TypeError(f"bucket_edges must be a sequence of rising integers, got {edges!r}")
    numbers = tuple(check_integer("an edge of bucket_edges", edge, at_least=1) for edge in edges)
    if not numbers or any(a >= b for a, b in pairwise(numbers)):
        raise ValueError(f"bucket_edges must rise, each edge once, got {numbers}: use sorted(set(bucket_edges))")
    return numbers
