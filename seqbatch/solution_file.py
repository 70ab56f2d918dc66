"""Solutions of a packing on disk, so that another process, rank or machine packs exactly alike without solving."""

import json
import zipfile
import zlib
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from seqbatch.files import replacing

if TYPE_CHECKING:
    from seqbatch.cutting import Solution

__all__ = ["read", "write"]

_FORMAT = "seqbatch packing 1"
_ARRAYS = ("values", "counts", "placed")
_NUMBERS = ("bins", "best_fit_bins", "bound", "seconds", "status", "unit", "rounded_up", "capacity")


def write(path: "str | PathLike[str]", fingerprint: str, found: "Solution") -> None:
    """Write a solution; a file that is there is replaced only when all is written."""
    header = json.dumps({"format": _FORMAT, "of": fingerprint} | {name: getattr(found, name) for name in _NUMBERS})
    with replacing(path) as file:
        np.savez_compressed(
            file, allow_pickle=False, header=np.array(header), **{name: getattr(found, name) for name in _ARRAYS}
        )


def read(path: "str | PathLike[str]", fingerprint: str, at_most: int) -> dict[str, Any] | None:
    """Return the fields of the solution kept at `path`; None where there is none, or one of something else.

    Args:
        path: The file.
        fingerprint: Of the lengths and settings that it must be of.
        at_most: Sequences a bin holds.

    Raises:
        ValueError: no file of this kind, or one whose bins do not hold what it says.
    """
    if not Path(path).exists():
        return None
    try:
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            header = json.loads(str(file["header"]))
            if header["format"] != _FORMAT:
                raise KeyError("format")
            if header["of"] != fingerprint:
                return None
            arrays: dict[str, NDArray[Any]] = {name: file[name] for name in _ARRAYS}
        fields = {name: header[name] for name in _NUMBERS}
        _check(**arrays, bins=fields["bins"], capacity=fields["capacity"], at_most=at_most)
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, TypeError, ValueError, OSError) as error:
        raise ValueError(
            f"{path} is not a packing that seqbatch kept, or is truncated or changed ({error}): remove it, and it is "
            "made again, or name another file"
        ) from error
    return fields | arrays


def _check(
    values: NDArray[Any], counts: NDArray[Any], placed: NDArray[Any], bins: int, capacity: int, at_most: int
) -> None:
    """Raise unless every sequence has a bin and no bin holds too much."""
    items = np.repeat(values[::-1], counts[::-1])
    if placed.shape != items.shape or (len(items) and not 0 <= placed.min() <= placed.max() < bins):
        raise ValueError("its sequences and bins do not agree")
    held = np.bincount(placed, minlength=bins)
    loads = np.bincount(placed, weights=items, minlength=bins)
    if len(items) and (loads.max() > capacity or held.max() > at_most or held.min() == 0):
        raise ValueError("a bin holds too much, or nothing")
