"""Plan files: an ``.npz`` of narrow integer columns and one JSON text, no pickles.

A column of one value is stored as that value, the others in the smallest integer type that holds
them: a plan of a million sequences takes 12 MB.
"""

import json
import zipfile
import zlib
from hashlib import sha256
from os import PathLike
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seqbatch.files import replacing

__all__ = ["VERSION", "narrow", "read", "write"]

VERSION = 2


def write(path: "str | PathLike[str]", arrays: dict[str, NDArray[Any]], settings: dict[str, object]) -> None:
    """Write columns and settings to `path`; a file that is there is replaced only when all is written."""
    sizes = {name: len(array) for name, array in arrays.items()}
    content = {"format": "seqbatch plan", "version": VERSION, "sizes": sizes, "settings": settings}
    header = json.dumps(content | {"checksum": _checksum(settings)})
    with replacing(path) as file:
        np.savez(file, allow_pickle=False, header=np.array(header), **{k: narrow(v) for k, v in arrays.items()})


def read(path: "str | PathLike[str]") -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what `write` was given, columns as int64.

    Raises:
        ValueError: not a plan file, a truncated one, or one of another version.
    """
    try:
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            header = json.loads(str(file["header"]))
            if header["format"] != "seqbatch plan":
                raise KeyError("header")
            if header["version"] == VERSION:
                if header["checksum"] != _checksum(header["settings"]):
                    raise KeyError("checksum")
                sizes = header["sizes"].items()
                return {name: _widen(file[name], size) for name, size in sizes}, dict(header["settings"])
    except (FileNotFoundError, IsADirectoryError, PermissionError):
        raise
    except (
        zipfile.BadZipFile,
        zlib.error,
        ValueError,
        KeyError,
        EOFError,
        OSError,
        RuntimeError,
        TypeError,
        AttributeError,
    ) as error:
        raise ValueError(
            f"{path} is not a plan file, or is truncated or changed; make it again with Plan.save"
        ) from error
    raise ValueError(
        f"{path} has plan format version {header['version']}, this seqbatch reads version {VERSION}: "
        "make the plan again with this seqbatch, or read it with the one that wrote it"
    )


def _checksum(settings: dict[str, object]) -> str:
    """Of the settings, as the plan's digest is of its columns."""
    return sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def narrow(array: NDArray[Any]) -> NDArray[Any]:
    """Return an int64 column in the smallest integer type that holds it; one of a single value as that value.

    >>> narrow(np.array([3, 300])).dtype, narrow(np.array([7, 7, 7]))
    (dtype('uint16'), array([7], dtype=uint8))
    """
    if array.dtype != np.int64 or not len(array):
        return array
    low, high = int(array.min()), int(array.max())
    dtype = np.promote_types(np.min_scalar_type(low), np.min_scalar_type(high))
    return array[:1].astype(dtype) if low == high else array.astype(dtype)


def _widen(array: NDArray[Any], size: int) -> NDArray[Any]:
    if array.dtype.kind not in "iu":
        return array
    if array.ndim not in (1, 2) or len(array) not in (size, 1):
        raise ValueError(f"a column of {array.shape} where {size} were written")
    return np.broadcast_to(array.astype(np.int64), (size, *array.shape[1:]))
