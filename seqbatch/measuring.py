"""The lengths of a dataset's sequences: measured once, in parallel, and kept beside the data."""

import json
import os
import warnings
import zipfile
from collections.abc import Collection, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from seqbatch.files import replacing
from seqbatch.lengths import as_lengths
from seqbatch.ordering import IntArray

__all__ = ["dataset_lengths", "rows_of"]

_PROBES = 64


def dataset_lengths(
    dataset: Any,
    column: str | None = None,
    *,
    fields: Sequence[str | int] | None = None,
    per_sequence: Sequence[str | int] = (),
    num_workers: int = 0,
    cache: "str | os.PathLike[str] | None" = None,
) -> IntArray:
    """Return the tokens of each sequence of a dataset.

    Args:
        dataset: Map-style. What it knows itself is taken: ``dataset.lengths``, or a list column of a Hugging Face
            dataset. Otherwise every item is read once, with a progress bar.
        column: A column of a Hugging Face dataset that holds the lengths.
        fields: The per-token fields; the first one is measured. By default the item itself, or its first field
            that is not in `per_sequence`.
        per_sequence: Fields with one value a sequence.
        num_workers: Processes that read.
        cache: A file to keep measured lengths in. It is read instead of the data while the fingerprint agrees:
            the number of items, 64 of them spread over the dataset, and where the dataset has one its own
            fingerprint. A file that cannot be written is a warning, not an end.

    Returns:
        (N,) int64.

    >>> dataset_lengths([[1, 2, 3], [4]])
    array([3, 1])
    """
    if column is not None:
        return as_lengths(np.asarray(dataset[column]))
    own = getattr(dataset, "lengths", None)
    if own is not None and not callable(own):
        return as_lengths(np.asarray(own))
    field = None if fields is None else fields[0]
    fast = _arrow_lengths(dataset, field, per_sequence)
    if fast is not None:
        return fast
    print_of = _fingerprint(dataset, field, per_sequence) if cache is not None else ""
    if cache is not None:
        kept = _read(Path(cache), print_of)
        if kept is not None:
            return kept
    lengths = _measure(dataset, field, per_sequence, num_workers)
    if cache is not None:
        _write(Path(cache), print_of, lengths)
    return lengths


def _measure(dataset: Any, field: str | int | None, but: Collection[str | int], num_workers: int) -> IntArray:
    readers: DataLoader[Any] = DataLoader(
        _Lengths(dataset, field, but), batch_size=256, num_workers=num_workers, collate_fn=np.concatenate
    )
    parts = []
    with tqdm(total=len(dataset), desc="measuring lengths", unit="seq", delay=1.0) as bar:
        for part in readers:
            parts.append(part)
            bar.update(len(part))
    return np.concatenate(parts) if parts else np.empty(0, np.int64)


class _Lengths(Dataset[Any]):
    """A view of a dataset whose items are their lengths."""

    def __init__(self, dataset: Any, field: str | int | None, but: Collection[str | int]) -> None:
        self.dataset, self.field, self.but = dataset, field, but

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, indices: list[int]) -> list[NDArray[np.int64]]:
        many = getattr(self.dataset, "__getitems__", None)
        items = many(indices) if many is not None else [self.dataset[index] for index in indices]
        rows = [rows_of(item, self.field, index, self.but) for index, item in zip(indices, items, strict=True)]
        return [np.array([len(row)], np.int64) for row in rows]


def rows_of(item: Any, field: str | int | None, index: int, but: Collection[str | int] = ()) -> Any:
    """Return the field of an item that is counted: `field`, the item itself, or its first field that is not in `but`.

    >>> rows_of({"id": 7, "input_ids": [1, 2]}, None, 0, but=["id"])
    [1, 2]
    """
    if isinstance(item, Mapping | tuple):
        named = dict(item) if isinstance(item, Mapping) else dict(enumerate(item))
        key = next((name for name in named if name not in but), None) if field is None else field
        if key not in named:
            raise ValueError(f"sequence {index} has the fields {list(named)}, but not {key!r}")
        item = named[key]
    if isinstance(item, str) or not hasattr(item, "__len__"):
        raise ValueError(
            f"sequence {index} is {str(item)!r:.60}, which has no rows of tokens to count: pass lengths, or name the "
            "field with fields=[...]"
        )
    return item


def _arrow_lengths(dataset: Any, field: str | int | None, but: Collection[str | int]) -> IntArray | None:
    """List lengths straight from a Hugging Face dataset's Arrow column; None where there is no such thing."""
    table, indices = getattr(dataset, "data", None), getattr(dataset, "_indices", None)
    names = getattr(table, "column_names", None)
    if table is None or not names or indices is not None:
        return None
    if field is None:
        field = "input_ids" if "input_ids" in names else next((name for name in names if name not in but), names[0])
    name = field
    if name not in names:
        raise ValueError(f"the dataset has the columns {list(names)}, but not {name!r}")
    chunks = getattr(table.column(name), "chunks", [])
    if not all(hasattr(chunk, "offsets") and hasattr(chunk, "values") and not chunk.null_count for chunk in chunks):
        return None
    parts = [np.diff(chunk.offsets.to_numpy()) for chunk in chunks]
    return np.concatenate(parts).astype(np.int64) if parts else np.empty(0, np.int64)


def _fingerprint(dataset: Any, field: str | int | None, but: Collection[str | int]) -> str:
    """What changes when the data do, as far as a few reads can see."""
    sha = sha256(f"{type(dataset).__qualname__} {len(dataset)} {field} {getattr(dataset, '_fingerprint', '')}".encode())
    for index in np.unique(np.linspace(0, max(len(dataset) - 1, 0), _PROBES).astype(int))[: len(dataset)].tolist():
        row = rows_of(dataset[index], field, index, but)
        bits = row.detach().cpu().contiguous().view(-1).view(torch.uint8) if isinstance(row, Tensor) else row
        sha.update(np.asarray(bits).tobytes())
        sha.update(f" {len(row)} ".encode())
    return sha.hexdigest()


def _read(path: Path, fingerprint: str) -> IntArray | None:
    try:
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            if json.loads(str(file["header"])) == {
                "format": "seqbatch lengths",
                "version": 1,
                "fingerprint": fingerprint,
            }:
                return np.asarray(file["lengths"], np.int64)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, EOFError):
        pass
    return None


def _write(path: Path, fingerprint: str, lengths: IntArray) -> None:
    header = json.dumps({"format": "seqbatch lengths", "version": 1, "fingerprint": fingerprint})
    try:
        with replacing(path) as file:
            np.savez(file, header=np.array(header), lengths=lengths)
    except OSError as error:
        warnings.warn(f"the measured lengths could not be kept in {path} ({error})", stacklevel=3)
