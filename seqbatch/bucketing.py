"""Bucketing: sequences of about the same length meet in a batch.

Three ways to choose who meets, one rule for how many:

* *Pool sort* (the default): sequences are drawn into pools of `window`, each pool is sorted, and
  batches are cut from the sorted row. Every other pool is sorted downwards, so that a batch begun at
  the end of one pool goes on with neighbours of the same length in the next.
* *Buckets*: a sequence goes to the smallest edge that holds it, and meets its bucket at random.
* *Static shapes*: the same, and every batch of a bucket has one shape, for compiled graphs.

How many sequences a batch holds is decided by its longest alone, through one table: `batch_size`, or
as many as the budget `max_tokens` has room for, padding included. So the budget is a hard limit.

Lengths of pairs, (N, 2), are bucketed in both dimensions; see :mod:`seqbatch.pair_bucketing`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, dataclass
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from seqbatch.edges import EDGE_RULES, find_edges
from seqbatch.lengths import as_lengths
from seqbatch.ordering import IntArray, constant, round_up, shuffle_within
from seqbatch.pieces import OVERLONG, Pieces, dropped_rows, fit_overlong, not_empty
from seqbatch.plan import Plan
from seqbatch.rows import Cut, classes_of, sort_pools
from seqbatch.strategy import Strategy, check_choice, check_cost, check_integer

__all__ = ["Bucketing"]

_NO_LIMIT = 2**62


@dataclass(frozen=True, repr=False)
class Bucketing(Strategy):
    """Batches of similar lengths under a budget of tokens, padding included, or of a fixed size.

    Args:
        max_tokens: The budget: ``steps * lanes <= max_tokens`` in every batch, padding included (with
            `cost`, the cost of the lanes; for pairs see `budget`). Either this or `batch_size`.
        batch_size: Sequences of a batch.
        window: Sequences in a pool; by default the larger of an eighth of all and a hundred batches (of pairs
            a quarter and a thousand, since they are sorted in two dimensions), but at most half of all. A
            larger pool wastes less, in a smaller one more mates change each epoch.
        num_buckets: Use this many buckets with edges found from the lengths (8 for static shapes, 16 of pairs).
        bucket_edges: Use these edges: rising inclusive padded lengths, or (source, target) for pairs, in any
            order. A sequence longer than the last is overlong, and so is a pair that none holds.
        edges: How edges are found: ``"optimal"`` (least padding, an exact dynamic programme over the
            lengths' histogram), ``"quantile"``, ``"equal_tokens"`` or ``"geometric"``. Pairs take the first, the
            best of all edges in strips (:func:`~seqbatch.pair_edges.find_pair_edges`).
        static_shapes: Pad to the bucket's edge, and give all its batches the lanes its edge allows;
            empty lanes count as cells. At most one shape a bucket; of pairs more than `num_buckets`, if else
            an edge would be over the budget that all its pairs are within.
        cost: (a, b) makes the budget one of ``a * l + b * l**2`` for each lane of l steps.
        budget: What a lane of a pair costs: the ``"sum"`` of its source and its target steps, or their ``"max"``,
            as where encoder and decoder run one after the other in the same memory.
        max_sequences: At most this many sequences in a batch.
        batch_size_multiple: Lanes are a multiple of this where at least one multiple fits.
        pad_to_multiple_of: Steps are rounded up to a multiple of this; the budget counts them.
        overlong: What becomes of a sequence that fits into no batch: ``"error"``, ``"split"``,
            ``"truncate"``, ``"drop"``, or ``"alone"`` (one lane, the only case over budget). Pairs are not cut.
        shuffle: Draw pools and mates at random, new in each epoch; False keeps the order of the data.
        drop_last: Leave out batches that the end of the data, or of a bucket, cut short.

    Raises:
        TypeError, ValueError: settings of the wrong type or range, or that exclude each other.

    >>> plan = Bucketing(max_tokens=12).plan([5, 1, 6, 2, 3, 1, 6])
    >>> int((plan.steps * plan.lanes).max()), plan.tokens, plan.cells
    (12, 24, 31)
    >>> plan = Bucketing(max_tokens=12).plan([[5, 1], [1, 2], [4, 2], [2, 1]])
    >>> int((plan.steps.sum(axis=1) * plan.lanes).max()), plan.tokens, plan.cells
    (12, 18, 21)
    """

    _: KW_ONLY
    max_tokens: int | None = None
    batch_size: int | None = None
    window: int | None = None
    num_buckets: int | None = None
    bucket_edges: Sequence[int] | Sequence[tuple[int, int]] | None = None
    edges: str = "optimal"
    static_shapes: bool = False
    cost: tuple[float, float] = (1.0, 0.0)
    budget: str = "sum"
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
        check_choice("budget", self.budget, ("sum", "max"))
        check_choice("overlong", self.overlong, OVERLONG)
        if self.bucket_edges is not None:
            object.__setattr__(self, "bucket_edges", _check_edges(self.bucket_edges))
        self._check_together()
        if not self.lanes_at(np.array([self.pad_to_multiple_of]))[0]:
            raise ValueError(
                f"max_tokens={self.max_tokens} has no room for one sequence of {self.pad_to_multiple_of} steps"
                f" at cost={self.cost}: raise max_tokens, or lower pad_to_multiple_of or the cost"
            )
        if self.bucket_edges is not None:
            edges = round_up(np.array(self.bucket_edges), self.pad_to_multiple_of)
            if self.static_shapes and not self.lanes_at(edges).any():
                raise ValueError(
                    f"max_tokens={self.max_tokens} has no room for one sequence padded to any of bucket_edges, "
                    f"{self.bucket_edges}: raise max_tokens, or add a shorter edge"
                )

    def _check_together(self) -> None:
        """Raise where two settings exclude each other."""
        if (self.max_tokens is None) == (self.batch_size is None):
            raise ValueError(
                f"give either max_tokens or batch_size, got max_tokens={self.max_tokens}, batch_size={self.batch_size}"
            )
        if self.batch_size is not None:
            for name, default in (
                ("cost", (1.0, 0.0)),
                ("budget", "sum"),
                ("max_sequences", None),
                ("batch_size_multiple", 1),
            ):
                if getattr(self, name) != default:
                    raise ValueError(f"{name}={getattr(self, name)} goes with max_tokens; with batch_size leave it out")
        if self.bucket_edges is not None and (self.num_buckets is not None or self.edges != "optimal"):
            raise ValueError("bucket_edges are the edges: leave num_buckets and edges out")
        if self.window is not None and self.has_buckets:
            raise ValueError("window is for pool sort: leave it out with buckets or static_shapes")
        if self.edges != "optimal" and not self.has_buckets:
            raise ValueError(f"edges={self.edges!r} needs num_buckets or static_shapes=True")

    @property
    def has_buckets(self) -> bool:
        """Whether batches come from buckets, not from sorted pools."""
        return self.static_shapes or self.num_buckets is not None or self.bucket_edges is not None

    def plan(self, lengths: ArrayLike, *, seed: int = 0, epoch: int = 0) -> Plan:
        from seqbatch.kernels import number_lanes
        from seqbatch.pair_bucketing import cut_into_batches

        pieces, empty = not_empty(as_lengths(lengths, pairs=True))
        self._check_dimensions(pieces.length.ndim)
        if pieces.length.ndim == 2:
            cut = cut_into_batches(self, pieces, lambda count: self._words(count, seed, epoch))
        else:
            cut = self._cut(pieces, seed, epoch)
        sizes, steps, lanes = np.diff(cut.ends, prepend=0), cut.steps, cut.lanes
        columns: tuple[IntArray, ...] = (*cut.pieces.take(cut.order), cut.length)
        dropped = [empty, cut.overlong]
        if self.drop_last:
            kept = (sizes >= lanes) | ~np.isin(cut.ends, cut.stops)
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

    def _cut(self, pieces: Pieces, seed: int, epoch: int) -> Cut:
        """Put sequences in a row and cut it into batches."""
        from seqbatch.kernels import cut_batches

        limit, why = self._limit(int(pieces.length.max(initial=1)))
        pieces, overlong = fit_overlong(pieces, limit, self.overlong, why)
        row = (self._into_buckets if self.has_buckets else self._into_pools)(pieces.length, limit, seed, epoch)
        steps = round_up(row.values, self.pad_to_multiple_of)
        lanes = self.lanes_at(steps)
        lanes[row.alone_from :] = 0
        ends, longest = np.empty(len(row.order), np.int64), np.empty(len(row.order), np.int64)
        count = cut_batches(row.codes, lanes, self.batch_size_multiple, row.stops, ends, longest)
        ends, longest = ends[:count].copy(), longest[:count].copy()
        return Cut(pieces, overlong, row.order, row.length, row.stops, ends, steps[longest], lanes[longest])

    def _check_dimensions(self, dimensions: int) -> None:
        """Raise where the edges are not of what the lengths are of."""
        if self.bucket_edges is not None and np.ndim(self.bucket_edges) != dimensions:
            have, want = ("one length", "(source, target)") if dimensions == 2 else ("(source, target)", "one length")
            raise ValueError(f"each of bucket_edges is {have}, but the lengths need {want}: got {self.bucket_edges}")
        if dimensions == 2 and self.edges != "optimal":
            raise ValueError(f'edges={self.edges!r} is for one length a sequence: pairs take edges="optimal"')

    def lanes_at(self, steps: IntArray) -> IntArray:
        """Return how many lanes batches of (M,) or (M, 2) steps may have; 0 where not even one fits."""
        if self.max_tokens is None:
            return np.full(len(steps), self.batch_size)
        each = self.lane_cost(steps)
        if self.cost == (1.0, 0.0):
            each = each.astype(np.uint64)  # a sum of two lengths may be beyond int64
        if steps.ndim == 2:
            each = each[:, 0] + each[:, 1] if self.budget == "sum" else np.maximum(each[:, 0], each[:, 1])
        if self.cost == (1.0, 0.0):
            lanes = (np.uint64(self.max_tokens) // each).astype(np.int64)
        else:
            lanes = np.floor(np.minimum(self.max_tokens / each, _NO_LIMIT)).astype(np.int64)
            lanes -= lanes * each > self.max_tokens
        lanes = np.minimum(lanes, self.max_sequences or _NO_LIMIT)
        multiples: IntArray = lanes - lanes % self.batch_size_multiple
        return np.where(lanes > self.batch_size_multiple, multiples, lanes)

    def lane_cost(self, steps: IntArray) -> NDArray[Any]:
        """Return what a lane of so many steps takes of the budget: int64 steps, or float64 with a `cost`."""
        if self.cost == (1.0, 0.0):
            return np.maximum(steps, 1)
        # Single operations of IEEE arithmetic, which give the same bits on every platform.
        a, b = self.cost
        lengths = np.maximum(steps, 1).astype(np.float64)
        costs: NDArray[Any] = a * lengths + b * (lengths * lengths)
        return costs

    def pool_size(self, count: int, tokens: int, *, share: int = 8, batches: int = 100) -> int:
        """Return the sequences of a pool: one of `share` of all, or some batches, whichever is more."""
        per_batch = self.batch_size or int(self.max_tokens or 0) * count // max(tokens, 1)
        # Two pools at least, so that even few sequences meet others in the next epoch.
        default = min(max(-(-count // share), batches * per_batch), -(-count // 2))
        return max(1, min(self.window or default, count))

    def _fitting_edges(self) -> tuple[int, ...]:
        """The edges that sequences can be sent to: static ones must fit the budget themselves."""
        edges = cast("tuple[int, ...]", tuple(self.bucket_edges or ()))
        if not self.static_shapes:
            return edges
        lanes = self.lanes_at(round_up(np.array(edges, dtype=np.int64), self.pad_to_multiple_of))
        return tuple(edge for edge, room in zip(edges, lanes, strict=True) if room)

    def _limit(self, longest: int) -> tuple[int, str]:
        """The most tokens a lane may hold, up to `longest`, and the setting that says so."""
        last = longest if self.bucket_edges is None else self._fitting_edges()[-1]
        low, high = 0, min(longest, last)
        while low < high:
            middle = (low + high + 1) // 2
            if self.lanes_at(round_up(np.array([middle]), self.pad_to_multiple_of))[0]:
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
        values, codes = classes_of(length)
        count = len(length)
        window = self.pool_size(count, int(length.sum()))
        order, codes = sort_pools(codes, len(values), window, self._words(count, seed, epoch))
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
            values, codes = classes_of(row_length)
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


def _check_edges(edges: Any) -> tuple[int, ...] | tuple[tuple[int, int], ...]:
    if not isinstance(edges, Iterable):
        raise TypeError(f"bucket_edges must be a sequence of rising integers, or of pairs of them, got {edges!r}")
    edges = tuple(edge.tolist() if hasattr(edge, "tolist") else edge for edge in edges)
    if edges and all(isinstance(edge, Sequence) and len(edge) == 2 for edge in edges):
        sides = [check_integer("a side of bucket_edges", side, at_least=1) for edge in edges for side in edge]
        pairs = tuple(zip(sides[::2], sides[1::2], strict=True))
        if len(set(pairs)) < len(pairs):
            raise ValueError(f"bucket_edges must differ, got {pairs}: use sorted(set(bucket_edges))")
        return pairs
    numbers = tuple(check_integer("an edge of bucket_edges", edge, at_least=1) for edge in edges)
    if not numbers or any(a >= b for a, b in pairwise(numbers)):
        raise ValueError(f"bucket_edges must rise, each edge once, got {numbers}: use sorted(set(bucket_edges))")
    return numbers
