"""Streams: batches of data whose lengths nobody knows before they are read.

*A stream is a plan over a bounded buffer.* Items are read until the buffer holds `buffer_tokens` tokens, and what
is at hand is planned by the strategies that plan whole epochs: :class:`BucketStream` and :class:`PackStream` take
pool after pool, :class:`SpliceStream` keeps its lanes and goes on with them window after window. Memory stays flat
however long the stream is, and no item is lost, repeated, or given to two ranks or workers.

Each is a torch ``IterableDataset`` of :class:`~seqbatch.SequenceBatch`; :class:`~seqbatch.StreamLoader` runs one
in workers and on several ranks, and resumes it at any batch.
"""

from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from typing import Any

import numpy as np

from seqbatch.bucketing import Bucketing
from seqbatch.packing import Packing
from seqbatch.splicing import Splicing
from seqbatch.strategy import Strategy
from seqbatch.stream_base import State, Step, Stream
from seqbatch.stream_plans import Open, plan_pool, plan_windows

__all__ = ["BucketStream", "PackStream", "SpliceStream"]


class _PoolStream(Stream):
    """Fill a pool, plan it, give its batches; again."""

    def _begin(self, first: int) -> State:
        return {"at": first, "pool": 0, "given": 0, "dropped": {}, "ended": False}

    def _steps(self, first: int, shards: int, state: State) -> Iterator[Step]:
        reader = self._source.read(self.epoch, shards, state["at"])
        key = (self.seed, self.epoch, first, shards)
        while True:
            # Only `held` knows the items, and it is emptied before the next pool is read.
            held, lengths, past, empty = self._fill(reader, state["at"], shards)
            dropped = _add(state["dropped"], "empty", empty, 0)
            if not held:
                yield Step(None, {**state, "at": past, "dropped": dropped, "ended": True})
                return
            numbers = np.fromiter(held, np.int64, len(held))
            pool = plan_pool(self.strategy, numbers, np.array(lengths), key=key, pool=state["pool"])
            for reason in np.unique(pool.plan.dropped["reason"]).tolist():
                rows = pool.plan.dropped["length"][pool.plan.dropped["reason"] == reason]
                dropped = _add(dropped, reason, len(rows), int(rows.sum()))
            following = self._begin(past) | {"pool": state["pool"] + 1, "dropped": dropped}
            given = state["given"]
            for placement in pool.placements(given=given, next_token=self.next_token):
                given += 1
                after = following if given == len(pool.plan) else {**state, "given": given}
                yield Step(self._fetch(held, placement), after)
            state = following
            del held, pool

    def _fill(
        self, reader: Iterator[tuple[int, Any, int]], at: int, shards: int
    ) -> tuple[dict[int, Any], list[int], int, int]:
        """Read until `buffer_tokens` are held; return items, their tokens, the next number, and empty items."""
        held: dict[int, Any] = {}
        lengths: list[int] = []
        tokens = empty = 0
        for at_, item, length in reader:
            at = at_ + shards
            if not length:  # holds no token, so it would not count against the buffer
                empty += 1
                continue
            held[at_] = item
            lengths.append(length)
            tokens += length
            if tokens >= self.buffer_tokens:
                break
        return held, lengths, at, empty


class BucketStream(_PoolStream):
    """Batches of similar lengths, each pool planned by :class:`~seqbatch.Bucketing`.

    Args:
        source: See :class:`~seqbatch.stream_base.Stream`.
        max_tokens: The budget of a batch, padding included. Either this or `batch_size`.
        batch_size: Sequences of a batch.
        **options: The other settings of :class:`~seqbatch.Bucketing` (but ``drop_last``), such as `overlong` and
            `pad_to_multiple_of`; and those of :class:`~seqbatch.stream_base.Stream`, such as `buffer_tokens`.

    Raises:
        TypeError, ValueError: settings of the wrong type or range; while iterating, an item without a length, or
            with more tokens than fit and ``overlong="error"``.

    >>> stream = BucketStream(([1] * n for n in (5, 1, 4, 2)), max_tokens=10, window=4, shuffle=False)
    >>> [batch.lengths.tolist() for batch in stream]
    [[1, 2], [4, 5]]
    """

    def __init__(
        self, source: Any, *, max_tokens: int | None = None, batch_size: int | None = None, **options: Any
    ) -> None:
        settings = _settings(Bucketing, options)
        if settings.pop("drop_last", False):
            raise ValueError("drop_last would leave out the end of every pool: a stream gives short batches instead")
        super().__init__(source, Bucketing(max_tokens=max_tokens, batch_size=batch_size, **settings), **options)

    def _batch_tokens(self) -> int:
        return int(self.strategy.max_tokens or self.strategy.batch_size)  # type: ignore[attr-defined]


class PackStream(_PoolStream):
    """Whole sequences in bins, each pool packed by :class:`~seqbatch.Packing`; every batch has the same shape.

    Args:
        source: See :class:`~seqbatch.stream_base.Stream`.
        capacity: Tokens of a bin: steps of every batch.
        rows: Bins: lanes of every batch. The last batch of a pool may have empty ones.
        **options: The other settings of :class:`~seqbatch.Packing`, and of :class:`~seqbatch.stream_base.Stream`.

    Raises:
        TypeError, ValueError: as of :class:`BucketStream`.

    >>> stream = PackStream(([1] * n for n in (5, 3, 4, 2, 2)), capacity=8, rows=2)
    >>> [(batch.placement.steps, batch.placement.tokens) for batch in stream]
    [(8, 16)]
    """

    def __init__(self, source: Any, *, capacity: int, rows: int = 1, **options: Any) -> None:
        settings = _settings(Packing, options)
        super().__init__(source, Packing(capacity, rows=rows, **settings), **options)

    def _batch_tokens(self) -> int:
        return int(self.strategy.capacity * self.strategy.rows)  # type: ignore[attr-defined]

    @property
    def lanes(self) -> int:
        """Rows of every batch."""
        return int(self.strategy.rows)  # type: ignore[attr-defined]


class SpliceStream(Stream):
    """Lanes in which the next item starts where the last one ended, cut into windows; state is carried.

    The items are dealt in the order of the source, each to the lane that ends first, as by
    :class:`~seqbatch.Splicing` without shuffling: a source that should come in another order each epoch is a
    callable. The open items of the lanes are held besides the buffer. To go on exactly, the recurrent state after the
    batch must be saved beside the stream's.

    Args:
        source: See :class:`~seqbatch.stream_base.Stream`.
        num_lanes: Lanes of a batch (B), of each rank; several workers share them, so their number must divide it.
        chunk_size: Steps of a batch (T); those at the end that fewer are left for have fewer.
        **options: See :class:`~seqbatch.stream_base.Stream`.

    Raises:
        TypeError, ValueError: settings of the wrong type or range; while iterating, an item without a length.

    >>> stream = SpliceStream([[1, 2, 3], [4], [5, 6]], num_lanes=2, chunk_size=2)
    >>> [(batch.data.t().tolist(), batch.reset.t().int().tolist()) for batch in stream]
    [([[1, 2], [4, 5]], [[1, 0], [1, 1]]), ([[3], [6]], [[0], [0]])]
    """

    carry = True

    def __init__(self, source: Any, *, num_lanes: int, chunk_size: int, **options: Any) -> None:
        super().__init__(source, Splicing(num_lanes, chunk_size, shuffle=False), **options)

    def _batch_tokens(self) -> int:
        return int(self.lanes * self.strategy.chunk_size)  # type: ignore[attr-defined]

    @property
    def lanes(self) -> int:
        """Lanes of every batch of this rank."""
        return int(self.strategy.num_lanes)  # type: ignore[attr-defined]

    def _begin(self, first: int) -> State:
        return {"at": first, "open": [], "dropped": {}, "ended": False}

    def _steps(self, first: int, shards: int, state: State) -> Iterator[Step]:
        buffer = _Lanes(state)
        numbers = [number for _, number, _ in state["open"]]
        reader = self._source.read(self.epoch, shards, state["at"], also=numbers)
        buffer.reopen(reader)
        num_lanes = self.lanes // (shards // self.num_replicas)
        while True:
            final = buffer.fill(reader, self.buffer_tokens, shards)
            windows = plan_windows(
                np.array(buffer.numbers, np.int64),
                np.array(buffer.lengths, np.int64),
                num_lanes,
                self.strategy.chunk_size,  # type: ignore[attr-defined]
                opened=buffer.opened,
                final=final,
            )
            edges = self.strategy.chunk_size * np.arange(1, len(windows.plan) + 1)  # type: ignore[attr-defined]
            begun = np.searchsorted(windows.begin, edges).tolist()
            for number, placement in enumerate(windows.placements(next_token=self.next_token)):
                if state.get("reset"):
                    placement = replace(placement, continues=np.zeros_like(placement.continues))
                    state = {}
                fetched = self._fetch(buffer.held, placement)
                yield Step(fetched, buffer.state(begun[number], windows.open_after(number)))
            if len(windows.plan):
                buffer.forget(begun[-1], windows.open_after(len(windows.plan) - 1))
            if final:
                yield Step(None, buffer.state(0, Open.nothing()) | {"ended": True})
                return


class _Lanes:
    """The buffer of a splicing shard: the open items of the lanes, and those that have not begun."""

    def __init__(self, state: State) -> None:
        self.held: dict[int, Any] = {}
        self.numbers: list[int] = []  # items that have not begun
        self.lengths: list[int] = []
        self.passed: list[int] = []  # empty items before each of them
        self.tokens = 0  # of items that have not begun: what is open must be held anyway
        self.at = state["at"]  # the next number to read
        self.empty = state["dropped"].get("empty", [0, 0])[0]
        rows = [[lane, number, start, 0] for lane, number, start in state["open"]]
        self.opened = Open(*np.array(rows, np.int64).reshape(-1, 4).T)

    def reopen(self, reader: Iterator[tuple[int, Any, int]]) -> None:
        """Read again the items that were open."""
        whole: dict[int, int] = {}
        while len(whole) < len(self.opened.lane):
            number, item, length = next(reader, (-1, None, 0))
            if number not in self.opened.sequence:
                raise ValueError(
                    f"the state has item {self.opened.sequence.tolist()[len(whole)]} of the source open, which the "
                    "source does not give: it must give the same items again to be resumed"
                )
            self.held[number], whole[number] = item, length
        lengths = np.array([whole[number] for number in self.opened.sequence.tolist()], np.int64)
        if (lengths <= self.opened.start).any():
            raise ValueError("items that were open in the state are shorter now: the source must give the same again")
        self.opened = self.opened._replace(whole=lengths)

    def fill(self, reader: Iterator[tuple[int, Any, int]], buffer_tokens: int, shards: int) -> bool:
        """Read one item at least, then more until `buffer_tokens` are held; return whether the source has ended."""
        for number, item, length in reader:
            self.at = number + shards
            if not length:
                self.empty += 1
                continue
            self.held[number] = item
            self.numbers.append(number)
            self.lengths.append(length)
            self.passed.append(self.empty)
            self.tokens += length
            if self.tokens >= buffer_tokens:
                return False
        return True

    def state(self, begun: int, opened: Open) -> State:
        """Return the state in which so many of the items have begun, and these are open."""
        some = begun < len(self.numbers)
        rows = np.stack(opened[:3], axis=1).tolist()
        empty = self.passed[begun] if some else self.empty
        # Empty items right before the next one are counted already, so reading begins after them.
        at = self.numbers[begun] if some else self.at
        dropped = _add({}, "empty", empty, 0)
        return {"at": at, "open": rows, "dropped": dropped, "ended": False}

    def forget(self, begun: int, opened: Open) -> None:
        """Let go of all items that neither are open nor have yet to begin."""
        for column in (self.numbers, self.lengths, self.passed):
            del column[:begun]
        self.opened = opened
        kept = {*self.numbers, *opened.sequence.tolist()}
        self.held = {number: item for number, item in self.held.items() if number in kept}
        self.tokens = sum(self.lengths)


def _settings(strategy: type[Strategy], options: dict[str, Any]) -> dict[str, Any]:
    """Take the settings of a strategy out of `options`."""
    return {f.name: options.pop(f.name) for f in fields(strategy) if f.name in options}


def _add(dropped: Mapping[str, list[int]], reason: str, pieces: int, tokens: int) -> dict[str, list[int]]:
    """Return counts of what was left out, (pieces, tokens) by reason, with some more."""
    if not pieces:
        return dict(dropped)
    before = dropped.get(reason, [0, 0])
    return {**dropped, reason: [before[0] + pieces, before[1] + tokens]}
