"""Reading one shard of a source whose lengths nobody knows: item i belongs to shard ``i % shards``."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import get_worker_info

from seqbatch.measuring import rows_of

__all__ = ["Source"]


class Source:
    """Items by their number, from any start on; read again from the beginning in each epoch.

    Args:
        source: A callable, which is given the epoch and returns one of the following; or anything with
            ``__getitem__`` and ``__len__``, of which only the shard's own items are read; or any iterable, of which
            other shards' items are read and passed over.
        fields: The per-token fields of the items; the first one is measured.
        per_sequence: Fields with one value a sequence.

    Raises:
        TypeError: a source that is none of these, or a mapping, whose iteration gives its keys.
    """

    def __init__(self, source: Any, fields: Sequence[str | int] | None, per_sequence: Sequence[str | int]) -> None:
        if isinstance(source, Mapping | str | bytes) or not (
            callable(source) or hasattr(source, "__iter__") or _indexable(source)
        ):
            raise TypeError(
                f"source must be an iterable of items, a map-style dataset, or a callable that is given the epoch and "
                f"returns one of them, got {type(source).__name__}"
            )
        self._source = source
        self._field = None if fields is None else fields[0]
        self._per_sequence = tuple(per_sequence)
        self._spent = False
        self._first: list[Any] = []

    def read(self, epoch: int, shards: int, start: int, also: Collection[int] = ()) -> Iterator[tuple[int, Any, int]]:
        """Return (number, item, tokens) of the items `also` and of start, start + shards, ..., numbers rising.

        Args:
            epoch: What a callable source is given.
            shards: The distance of the shard's items.
            start: The first one.
            also: Items of the same shard before it.

        Raises:
            ValueError: while reading: an item that has no length; a one-shot iterator that was read before, or that
                worker processes would share.
        """
        items = self._open(epoch)
        numbered: Iterator[tuple[int, Any]]
        if _indexable(items):
            numbered = ((i, items[i]) for i in chain(sorted(also), range(start, len(items), shards)))
        else:
            begin, wanted = min(also, default=start), frozenset(also)
            numbered = islice(enumerate(self._keep_first(iter(items))), min(begin, start), None, shards)
            numbered = ((i, item) for i, item in numbered if i >= start or i in wanted)
        for number, item in numbered:
            if isinstance(item, np.ndarray | Tensor) and item.ndim:  # the usual case, and the rest is slow
                yield number, item, len(item)
                continue
            yield number, _as_arrays(item, self._per_sequence), self._measure(number, item)

    def first(self, epoch: int) -> Any:
        """Return item 0, whatever the shard: it shows shapes and dtypes to a rank that has no item of its own."""
        if not self._first:
            items = self._open(epoch)
            self._first = list(islice((items[i] for i in range(len(items))) if _indexable(items) else items, 1))
        if not self._first:
            raise ValueError(
                "another rank has items and this one's source has none: give all ranks the same source, of which each "
                "takes its share"
            )
        return self._first[0]

    def _open(self, epoch: int) -> Any:
        items = self._source(epoch) if callable(self._source) else self._source
        if callable(self._source) or _indexable(items) or iter(items) is not items:
            return items
        if get_worker_info() is not None:
            raise ValueError(
                f"source is a one-shot iterator ({type(items).__name__}), which worker processes would share: pass a "
                "callable that is given the epoch and returns a fresh one, or num_workers=0"
            )
        if self._spent:
            raise ValueError(
                f"source is a one-shot iterator ({type(items).__name__}) that was read before, so nothing or only a "
                "rest would come: pass a callable that is given the epoch and returns a fresh one"
            )
        self._spent = True
        return items

    def _keep_first(self, items: Iterator[Any]) -> Iterator[Any]:
        """Keep item 0 of a one-shot iterator, which cannot be asked for it later."""
        for item in items:
            self._first = self._first or [item]
            yield item
            break
        yield from items

    def _measure(self, number: int, item: Any) -> int:
        rows = rows_of(item, self._field, number, self._per_sequence)
        try:
            return len(rows)
        except TypeError:  # a tensor or array of no dimension
            raise ValueError(
                f"item {number} of the source is {rows!s:.60}, a single value without a length: items are rows of "
                "tokens, or dicts or tuples of them; name the per-token fields with fields=[...], others with "
                "per_sequence=[...]"
            ) from None


def _indexable(items: Any) -> bool:
    return hasattr(items, "__getitem__") and hasattr(items, "__len__")


def _as_arrays(item: Any, but: Collection[str | int]) -> Any:
    """Turn lists of tokens into arrays, once: an item may be cut into many pieces."""
    turn: Callable[[Any], Any] = lambda values: np.asarray(values) if isinstance(values, list) else values  # noqa: E731
    if isinstance(item, Mapping):
        return {name: values if name in but else turn(values) for name, values in item.items()}
    if isinstance(item, tuple):
        return tuple(values if place in but else turn(values) for place, values in enumerate(item))
    return turn(item)
