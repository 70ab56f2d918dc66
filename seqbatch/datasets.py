"""Where tokens come from: flat arrays of them, and any map-style dataset, served piece by piece."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from mmap import mmap
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.utils.data import Dataset, StackDataset, default_collate

from seqbatch.ordering import IntArray
from seqbatch.placement import PieceIndices, Placement

__all__ = ["Column", "Fetched", "FetchedPair", "PieceDataset", "TokenArray"]

Key = str | int | None
"""A field of an item: its name in a dict, its place in a tuple, None where the item is the tokens itself."""


class Column(NamedTuple):
    """Tokens laid end to end, and where each piece of a batch begins among them."""

    tokens: NDArray[Any] | Tensor
    """(S, ...); it may hold more than the batch needs."""
    source: IntArray
    """(P,) the row of each piece's first token."""


class Fetched(NamedTuple):
    """What a dataset hands to `collate`: the pieces of one batch."""

    placement: Placement
    columns: dict[Key, Column]
    target: Key
    """The field whose next tokens are the targets, where the placement asks for them."""
    per_sequence: dict[Key, Any]


class FetchedPair(NamedTuple):
    """The two sides of a batch of pairs, and the fields that they are."""

    source: Fetched
    target: Fetched
    keys: tuple[Key, Key]


class TokenArray(Dataset[Any]):
    """Sequences as one array of tokens and their offsets: the fast path, since a batch is one gather.

    Args:
        tokens: (S,) or (S, D...) tokens of all sequences end to end: numpy, a ``numpy.memmap``, a torch tensor.
        offsets: (N + 1,) rising from 0 to S: sequence i is ``tokens[offsets[i] : offsets[i + 1]]``.

    Raises:
        ValueError: offsets that do not fit the tokens.

    >>> data = TokenArray.of_sequences([[1, 2, 3], [4]])
    >>> len(data), data.lengths, data[1]
    (2, array([3, 1]), array([4]))
    """

    def __init__(self, tokens: Any, offsets: ArrayLike) -> None:
        if isinstance(tokens, Tensor):
            if tokens.dtype == torch.bfloat16:
                raise TypeError("bfloat16 tokens have no numpy type: pass tokens.float() or tokens.half()")
            tokens = tokens.numpy(force=True)
        self.tokens: NDArray[Any] = tokens if isinstance(tokens, np.memmap) else np.asarray(tokens)
        if self.tokens.dtype.kind not in "iufb" or not self.tokens.dtype.isnative:
            raise TypeError(
                f"tokens must be integers, floats or bools in this machine's byte order, got {self.tokens.dtype}: "
                "convert them, or store the numbers that an encoder gives them"
            )
        self.offsets: IntArray = np.asarray(offsets).astype(np.int64)
        if self.offsets.ndim != 1 or not len(self.offsets) or (np.diff(self.offsets) < 0).any():
            raise ValueError(f"offsets must be one row of rising integers, N + 1 of them, got {self.offsets}")
        if self.offsets[0] != 0 or self.tokens.ndim < 1 or self.offsets[-1] != len(self.tokens):
            raise ValueError(
                f"offsets must rise from 0 to the number of tokens, which is {self.tokens.shape[:1]}, "
                f"got {self.offsets[0]} to {self.offsets[-1]}"
            )

    @classmethod
    def of_sequences(cls, sequences: Iterable[ArrayLike], dtype: Any = None) -> "TokenArray":
        """Lay sequences end to end."""
        rows = [np.asarray(sequence, dtype) for sequence in sequences]
        kind = next((row.dtype for row in rows if len(row)), np.dtype(dtype or np.int64))
        rows = [row if len(row) else row.astype(kind) for row in rows]  # an empty list says nothing of its tokens
        offsets = np.append(0, np.cumsum([len(row) for row in rows], dtype=np.int64))
        return cls(np.concatenate(rows) if rows else np.empty(0, dtype or np.int64), offsets)

    @classmethod
    def from_arrow(cls, column: Any) -> "TokenArray":
        """Take an Arrow list column, such as ``dataset.data.column("input_ids")`` of a Hugging Face dataset.

        One chunk is taken without a copy; several are laid end to end.
        """
        chunks = column.chunks if hasattr(column, "chunks") else [column]
        if any(chunk.null_count for chunk in chunks):
            raise ValueError("the column has null lists: drop or fill them first")
        lengths = [np.diff(chunk.offsets.to_numpy()) for chunk in chunks]
        tokens = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in chunks]
        offsets = np.append(0, np.cumsum(np.concatenate(lengths), dtype=np.int64))
        return cls(tokens[0] if len(tokens) == 1 else np.concatenate(tokens), offsets)

    def save(self, folder: "str | os.PathLike[str]") -> None:
        """Write ``tokens.npy`` and ``offsets.npy`` into `folder`, for `load`."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        np.save(Path(folder) / "tokens.npy", self.tokens)
        np.save(Path(folder) / "offsets.npy", self.offsets)

    @classmethod
    def load(cls, folder: "str | os.PathLike[str]") -> "TokenArray":
        """Map what `save` wrote into memory: nothing is read before it is used."""
        tokens = np.load(Path(folder) / "tokens.npy", mmap_mode="r", allow_pickle=False)
        return cls(tokens, np.load(Path(folder) / "offsets.npy", allow_pickle=False))

    @property
    def lengths(self) -> IntArray:
        """(N,) int64."""
        return np.diff(self.offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> NDArray[Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sequence {index} of a TokenArray of {len(self)} sequences")
        index %= len(self)
        return np.asarray(self.tokens[self.offsets[index] : self.offsets[index + 1]])

    def __getstate__(self) -> dict[str, Any]:
        """Send a mapped file to other processes as its name, not its contents."""
        state = dict(self.__dict__)
        tokens = self.tokens
        # A slice of a mapped array keeps the whole one's name and offset, but has an array as its base.
        if isinstance(tokens, np.memmap) and tokens.filename is not None and isinstance(tokens.base, mmap):
            state["tokens"] = (str(tokens.filename), tokens.dtype, tokens.offset, tokens.shape)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        if isinstance(state["tokens"], tuple):
            name, dtype, offset, shape = state["tokens"]
            state = state | {"tokens": np.memmap(name, dtype, "r", offset, shape)}
        self.__dict__.update(state)


_Items = dict[int, tuple[dict[Key, Any], dict[Key, Any]]]
"""By index: the per-token and the per-sequence fields of an item."""


class PieceDataset(Dataset[Any]):
    """A map-style dataset that serves the pieces a :class:`~seqbatch.sampler.PlanBatchSampler` asks for.

    Items are the tokens (tensor, array or list, (T_i, ...)), or a dict or tuple of such fields. A list is
    tokens, a tuple is fields.

    Pairs are items with two such fields, source and target; of a ``torch.utils.data.StackDataset`` of two datasets each
    is asked for its own pieces, so that two :class:`TokenArray` are as fast as one.

    Args:
        dataset: Map-style, of N items; ``__getitems__`` is used where it has one.
        fields: The fields to use, each with one row a token; all that are not in `per_sequence` by default. Of
            pairs two, in the order of the columns of lengths.
        per_sequence: Fields with one value a sequence, such as a label.
        target: The field whose next tokens are the targets, where the sampler has ``next_token``; by default the
            only field, or ``"input_ids"``.

    Raises:
        ValueError: while serving: an item that disagrees with the lengths of the plan, or with the shape or
            dtype of the items before it; a field that is not per token and was not declared.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        fields: Sequence[str | int] | None = None,
        per_sequence: Sequence[str | int] = (),
        target: Key = None,
    ) -> None:
        for name, value in (("fields", fields), ("per_sequence", per_sequence)):
            if isinstance(value, str):
                raise TypeError(f"{name} must be a sequence of names, got the text {value!r}: write [{value!r}]")
        self.dataset = dataset
        if fields is not None and not len(fields):
            raise ValueError("fields=[] leaves nothing to serve: name at least one field, or leave fields out")
        self.fields = None if fields is None else tuple(fields)
        self.per_sequence = tuple(per_sequence)
        self.target = target

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index]

    def __getitems__(self, indices: Sequence[int]) -> Any:
        """Return the :class:`Fetched` pieces for a sampler's indices, or the plain items for plain ones."""
        if not isinstance(indices, PieceIndices):
            return self._items(indices)
        if indices.source is not None:
            return self._pairs(indices, indices.source)
        placement = indices.placement
        if isinstance(self.dataset, TokenArray):
            begin = self.dataset.offsets[placement.sequence]
            whole = self.dataset.offsets[placement.sequence + 1] - begin
            if (whole != placement.whole).any():
                at = int(np.argmax(whole != placement.whole))
                raise _disagrees(int(placement.sequence[at]), "tokens", int(whole[at]), int(placement.whole[at]))
            return Fetched(placement, {None: Column(self.dataset.tokens, begin + placement.start)}, None, {})
        items, keys = self._fields(indices)
        target = self._target(keys) if placement.next_token else None
        columns = {key: _column(key, items, placement, placement.next_token and key == target) for key in keys}
        return Fetched(placement, columns, target, self._labels(indices, items))

    def _pairs(self, indices: PieceIndices, source: Placement) -> FetchedPair:
        """Return both sides of a batch of pairs."""
        if isinstance(self.dataset, StackDataset) and not self.per_sequence:
            parts = self.dataset.datasets
            named = parts if isinstance(parts, Mapping) else dict(enumerate(parts))
            keys = self._two(tuple(named) if self.fields is None else self.fields, tuple(named))
            served = [
                _only(key, PieceDataset(named[key]).__getitems__(PieceIndices(indices, placement)))
                for key, placement in zip(keys, (source, indices.placement), strict=True)
            ]
            return FetchedPair(served[0], served[1], keys)
        items, found = self._fields(indices)
        keys = self._two(found, found)
        sides = [
            Fetched(placement, {None: _column(key, items, placement, placement.next_token)}, None, {})
            for key, placement in zip(keys, (source, indices.placement), strict=True)
        ]
        return FetchedPair(sides[0], sides[1]._replace(per_sequence=self._labels(indices, items)), keys)

    def _two(self, keys: tuple[Key, ...], there: tuple[Key, ...]) -> tuple[Key, Key]:
        """Return the keys of the two sides, or say why these are none."""
        if len(keys) != 2 or not set(keys) <= set(there):
            raise ValueError(
                f"pairs have two fields, source and target, and the dataset's items have {list(there)}: name the two "
                "with fields=[source, target], in the order of the columns of lengths"
            )
        if self.target is not None and self.target != keys[1]:
            raise ValueError(f"next_token must be of the second field of pairs, {keys[1]!r}, got {self.target!r}")
        return keys[0], keys[1]

    def _fields(self, indices: PieceIndices) -> tuple[_Items, tuple[Key, ...]]:
        """Return the items of a batch by index, split, and the per-token fields that all of them have."""
        distinct = list(dict.fromkeys(indices)) or [indices.placement.template]
        items = dict(zip(distinct, map(self._split, self._items(distinct)), strict=True))
        keys = tuple(items[distinct[0]][0])
        for index, (own, _) in items.items():
            if set(own) != set(keys):
                raise ValueError(
                    f"sequence {index} has the fields {list(own)}, but sequence {distinct[0]} {list(keys)}: all must "
                    "have the same, or choose with fields=[...]"
                )
        return items, keys

    def _labels(self, indices: PieceIndices, items: _Items) -> dict[Key, Any]:
        """Return the per-sequence fields, stacked: one row a piece."""
        pieces = [items[index] for index in indices]
        shown = pieces or list(items.values())  # a rank without a piece has labels too, of no rows
        labels: dict[Key, Any] = {
            name: default_collate([piece[1][name] for piece in shown]) for name in self.per_sequence
        }
        if not pieces:
            labels = {name: _no_rows(value) for name, value in labels.items()}
        return labels

    def _items(self, indices: Sequence[int]) -> list[Any]:
        many: Callable[[Sequence[int]], list[Any]] | None = getattr(self.dataset, "__getitems__", None)
        return many(list(indices)) if many is not None else [self.dataset[index] for index in indices]

    def _split(self, item: Any) -> tuple[dict[Key, Any], dict[Key, Any]]:
        """Return (per-token fields, per-sequence fields) of an item."""
        named: dict[Key, Any]
        if isinstance(item, Mapping):
            named = dict(item)
        elif isinstance(item, tuple):
            named = dict(enumerate(item))
        else:
            named = {None: item}
        wanted = self.fields if self.fields is not None else [key for key in named if key not in self.per_sequence]
        missing = [key for key in (*wanted, *self.per_sequence) if key not in named]
        if missing:
            raise ValueError(
                f"the dataset's items have the fields {list(named)}, but not {missing[0]!r}: "
                "correct fields or per_sequence"
            )
        return {key: named[key] for key in wanted}, {key: named[key] for key in self.per_sequence}

    def _target(self, keys: tuple[Key, ...]) -> Key:
        target = self.target
        if target is None and None not in keys:
            target = keys[0] if len(keys) == 1 else "input_ids"
        if target not in keys:
            raise ValueError(f"next_token must name the field whose next tokens are the targets, one of {list(keys)}")
        return target


def _only(side: Key, fetched: Fetched) -> Fetched:
    """Return one side of pairs with its only field as the tokens themselves."""
    if len(fetched.columns) != 1:
        raise ValueError(
            f"side {side!r} of the pairs has the fields {list(fetched.columns)}, and one is what a side is: stack "
            "datasets of tokens, or use items with two fields"
        )
    return fetched._replace(columns={None: next(iter(fetched.columns.values()))}, target=None)


def _column(key: Key, items: dict[int, Any], placement: Placement, one_more: bool) -> Column:
    """Lay the pieces of one field end to end, each with the token after it where `one_more` and there is one."""
    sequences, begins = placement.sequence.tolist(), placement.start.tolist()
    ends = placement.start + placement.length
    ends = (np.minimum(ends + 1, placement.whole) if one_more else ends).tolist()
    wholes = dict(zip(sequences, placement.whole.tolist(), strict=True))
    rows = {index: _rows(index, key, item[0][key], wholes.get(index)) for index, item in items.items()}
    first_index, first = next(((index, row) for index, row in rows.items() if len(row)), next(iter(rows.items())))
    for index, item in items.items():
        if isinstance(item[0][key], list) and not len(rows[index]):  # an empty list has no dtype
            rows[index] = first[:0] if isinstance(first, np.ndarray) else np.asarray(first[:0])
    for index, row in rows.items():
        if row.shape[1:] != first.shape[1:] or row.dtype != first.dtype or type(row) is not type(first):
            raise ValueError(
                f"{_field(key)}of sequence {index} has rows of shape {tuple(row.shape[1:])} and {row.dtype}, but "
                f"of sequence {first_index} {tuple(first.shape[1:])} and {first.dtype}: all sequences must agree"
            )
    parts = [rows[index][begin:end] for index, begin, end in zip(sequences, begins, ends, strict=True)] or [first[:0]]
    tokens = torch.cat(parts) if isinstance(first, Tensor) else np.concatenate(parts)
    sizes = np.array(ends, np.int64) - placement.start
    return Column(tokens, np.cumsum(sizes) - sizes)


def _rows(index: int, key: Key, values: Any, whole: int | None) -> Any:
    """Return one field of one item as an array or tensor with a row for each token."""
    rows = values if isinstance(values, Tensor) else np.asarray(values)
    if rows.ndim < 1 or (isinstance(rows, np.ndarray) and rows.dtype.kind not in "iufb"):
        raise ValueError(
            f"{_field(key)}of sequence {index} is {type(values).__name__} {values!s:.60}, not one row of numbers a "
            "token: declare it with per_sequence=[...], or choose the fields to use with fields=[...]"
        )
    if whole is not None and len(rows) != whole:
        raise _disagrees(index, f"rows in {_field(key).strip() or 'it'}", len(rows), whole)
    return rows


def _no_rows(values: Any) -> Any:
    """A collated field, without its one row."""
    if isinstance(values, Mapping):
        return {name: _no_rows(value) for name, value in values.items()}
    return values[:0]


def _field(key: Key) -> str:
    return "the item " if key is None else f"field {key!r} "


def _disagrees(index: int, what: str, found: int, planned: int) -> ValueError:
    return ValueError(
        f"sequence {index} has {found} {what}, but lengths[{index}] is {planned}: lengths and data do not belong "
        "together (a per-sequence field must be declared with per_sequence=[...], and pairs need lengths of both "
        "sides, (N, 2)); measure the lengths again, without their cache"
    )
