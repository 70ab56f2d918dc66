"""The only input of a strategy: how long each sequence is, from arrays, files or the bundled corpora."""

import csv
import gzip
import io
import json
import os
import re
import sys
import zlib
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from seqbatch.strategy import check_choice

__all__ = ["UNITS", "as_lengths", "corpus_names", "describe", "load_corpus", "read_lengths"]

UNITS = ("words", "characters", "bytes")
"""In what `read_lengths` measures texts."""

_MOST_TOKENS = 2**62  # planners add lengths in int64: one bit is left for sums of steps and padding
_HOW_TO_MEASURE = f"to measure texts give unit=, one of {', '.join(map(repr, UNITS))}"
_CORPUS_SUFFIX = ".txt.gz"
_PAIRS_SUFFIX = ".pairs.gz"
_INTEGER_LINES = re.compile(rb"(?:\xef\xbb\xbf)?(?:[ \t]*+[0-9]{1,18}+[ \t\r]*+(?:\n|\Z))++\s*+")


def as_lengths(lengths: ArrayLike, *, pairs: bool = False) -> NDArray[np.int64]:
    """Return `lengths` as every strategy needs them, or say what is wrong with them.

    Args:
        lengths: (N,) tokens of each sequence, N >= 1: a list, tensor, pandas Series or array of any
            integer dtype. A length may be 0 (an empty sequence).
        pairs: Take (N, 2), the tokens of source and target of each pair, too.

    Returns:
        (N,) or (N, 2) int64, C-contiguous; the array given, not a copy, where it is that already.

    Raises:
        TypeError: floats, booleans, strings or objects.
        ValueError: no lengths, another shape, a negative length, or more than 2**62 tokens in all.

    >>> as_lengths([3, 0, 2])
    array([3, 0, 2])
    >>> as_lengths([3.0, 2.0])
    Traceback (most recent call last):
    TypeError: lengths must be integers, got float64: round them as you see fit, then .astype(np.int64)
    """
    array = _as_array(lengths, pairs)
    if array.dtype.kind not in "iu":
        raise TypeError(_not_integers(array))
    smallest, largest = int(array.min()), int(array.max())
    if smallest < 0:
        first = int(np.argwhere(array < 0)[0, 0])
        raise ValueError(f"lengths must not be negative, got {array[first].tolist()} at index {first}")
    if largest > _MOST_TOKENS or (largest * array.size > _MOST_TOKENS and _exact_sum(array) > _MOST_TOKENS):
        raise ValueError(f"lengths add up to more than 2**62 tokens (the longest is {largest}): is the unit right?")
    return np.ascontiguousarray(array, dtype=np.int64)


def describe(lengths: ArrayLike) -> dict[str, float | int]:
    """Return the statistics that decide how much padding costs, in tokens.

    Args:
        lengths: (N,) integers.

    Returns:
        ``count`` of all sequences and how many are ``empty``; then, **of the non-empty ones**:
        ``tokens`` in all, ``mean``, ``std`` (of the population), ``cv`` = std / mean, ``min``, the
        percentiles ``p05`` ``p25`` ``median`` ``p75`` ``p95`` ``p99`` (linear interpolation), ``max``.

    Raises:
        TypeError, ValueError: as :func:`as_lengths`, and where all sequences are empty.

    >>> describe([1, 2, 0, 3])["median"]
    2.0
    """
    array = as_lengths(lengths)
    filled = array[array > 0]
    if not len(filled):
        raise ValueError(f"all {len(array)} sequences are empty: there is nothing to describe")
    mean, std = float(filled.mean()), float(filled.std())
    p05, p25, median, p75, p95, p99 = np.percentile(filled, (5, 25, 50, 75, 95, 99)).tolist()
    return {
        **{"count": len(array), "empty": len(array) - len(filled), "tokens": int(filled.sum())},
        **{"mean": mean, "std": std, "cv": std / mean, "min": int(filled.min())},
        **{"p05": p05, "p25": p25, "median": median, "p75": p75, "p95": p95, "p99": p99, "max": int(filled.max())},
    }


def corpus_names(*, pairs: bool = False) -> list[str]:
    """Return the names of the bundled corpora, see ``seqbatch/corpora/README.md`` for units and sources.

    Args:
        pairs: Of those with two lengths a pair, instead of those with one a sequence.

    >>> "ud_en_ewt" in corpus_names(), corpus_names(pairs=True)
    (True, ['tanaka_en_ja', 'tatoeba_en_zh'])
    """
    suffix = _PAIRS_SUFFIX if pairs else _CORPUS_SUFFIX
    names = (entry.name for entry in files("seqbatch.corpora").iterdir())
    return sorted(name.removesuffix(suffix) for name in names if name.endswith(suffix))


def load_corpus(name: str) -> NDArray[np.int64]:
    """Return the lengths of a bundled corpus, in the order of its source.

    Args:
        name: One of :func:`corpus_names`.

    Returns:
        (N,) int64, all positive, in the unit that ``seqbatch/corpora/README.md`` names; (N, 2) of pairs.

    Raises:
        ValueError: no such corpus.

    >>> load_corpus("ud_en_ewt")[:3], load_corpus("tatoeba_en_zh").shape
    (array([ 7,  2, 35]), (29154, 2))
    """
    pairs = corpus_names(pairs=True)
    check_choice("corpus", name, corpus_names() + pairs)
    content = (files("seqbatch.corpora") / (name + (_PAIRS_SUFFIX if name in pairs else _CORPUS_SUFFIX))).read_bytes()
    numbers = np.fromstring(gzip.decompress(content), np.int64, sep=" ")
    return as_lengths(numbers.reshape(-1, 2) if name in pairs else numbers, pairs=True)


def read_lengths(
    source: str | os.PathLike[str], *, column: str | tuple[str, str] | None = None, unit: str | None = None
) -> NDArray[np.int64]:
    """Read the length of each sequence from a file, gzipped or not, the format told by its suffix.

    ==================== =============================================================================
    ``.npy``             an array of integers, (N,) or (N, 2) of pairs; pickles are refused
    ``.csv`` ``.tsv``    `column` of integers, or of texts with `unit`; a header line names the columns
    ``.jsonl``           `column` of integers, of lists (their length), or of texts with `unit`
    ``.parquet``         the same; needs pyarrow
    ``.fasta`` ``.fa`` ``.faa`` residues of each record
    any other, and ``-`` one integer per line; with `unit` one sequence per line, a blank one is empty
    ==================== =============================================================================

    Args:
        source: A path, or ``"-"`` for standard input.
        column: Which column or key; may be left out where there is only one. Two names are those of the source
            and the target of pairs.
        unit: Measure texts in ``"words"`` (split at whitespace), ``"characters"`` or (UTF-8)
            ``"bytes"``, ends of lines not counted.

    Returns:
        (N,) int64; (N, 2) of pairs.

    Raises:
        FileNotFoundError, IsADirectoryError: nothing to read there.
        ImportError: a ``.parquet`` without pyarrow.
        TypeError, ValueError: an empty, corrupt or binary file, a line that is no length (named by
            its number), a column that is missing or not named, and as :func:`as_lengths`.

    >>> from pathlib import Path; from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     path = Path(folder, "text.txt")
    ...     _ = path.write_text("the cat sat\\n\\nso it did\\n")
    ...     read_lengths(path, unit="words")
    array([3, 0, 3])
    """
    if unit is not None:
        check_choice("unit", unit, UNITS)
    name = os.fspath(source)
    label = "standard input" if name == "-" else name
    suffix = Path(name.lower().removesuffix(".gz")).suffix
    reader = _READERS.get(suffix, _read_text)
    try:
        with _opened(label, name) as stream:
            if isinstance(column, str) or column is None:
                values = reader(_Request(label, column, unit), stream)
            else:
                values = _read_pairs(reader, [_Request(label, side, unit) for side in column], stream.read())
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{label}: the gzip data are corrupt or truncated ({error})") from error
    try:
        return as_lengths(values, pairs=column is not None or suffix == ".npy")
    except (TypeError, ValueError) as error:
        raise type(error)(f"{label}: {error}") from None


def _read_pairs(
    reader: "Callable[[_Request, BinaryIO], ArrayLike]", sides: "list[_Request]", content: bytes
) -> ArrayLike:
    if len(sides) != 2 or sides[0].column == sides[1].column:
        raise ValueError(f"pairs are in two columns, source and target, got {[side.column for side in sides]}")
    source, target = (as_lengths(reader(side, io.BytesIO(content))) for side in sides)
    if len(source) != len(target):
        raise ValueError(
            f"{sides[0].name}: column {sides[0].column!r} has {len(source)} rows, column {sides[1].column!r} "
            f"{len(target)}: pairs need one of each"
        )
    return np.stack([source, target], axis=1)


def _as_array(lengths: ArrayLike, pairs: bool) -> NDArray[Any]:
    try:
        array = np.asarray(lengths)
    except ValueError as error:  # rows of different lengths
        wanted = "one number a sequence, or source and target of each pair, (N, 2)" if pairs else "one dimension"
        raise ValueError(f"lengths must have {wanted}: {error}") from None
    if (len(array.shape) == 1 and len(array)) or (pairs and array.ndim == 2 and array.shape[1] == 2 and len(array)):
        return array
    what = f"{type(lengths).__name__} of shape {array.shape}"
    if pairs and array.ndim == 2 and len(array) == 2:
        raise ValueError(
            f"lengths of pairs must be (N, 2), one row a pair, got {what}: np.stack(..., axis=1) makes them"
        )
    if not pairs and array.ndim == 2 and array.shape[1] == 2:
        raise ValueError(f"one length a sequence is needed here, got {what}: pairs go to Padding and Bucketing")
    also = ", or two for pairs, (N, 2)," if pairs else ""
    raise ValueError(f"lengths must have one dimension{also} and name at least one sequence, got {what}")


def _not_integers(array: NDArray[Any]) -> str:
    message = f"lengths must be integers, got {array.dtype}"
    if array.dtype.kind == "f":
        missing = int(np.isnan(array).sum())
        holes = f" with {missing} NaN: drop or fill them," if missing else ":"
        return f"{message}{holes} round them as you see fit, then .astype(np.int64)"
    if array.dtype.kind == "b":
        return f"{message}: a mask is no length; if 0 and 1 are meant, .astype(np.int64)"
    return f"{message} (first value {array.flat[0]!r:.40}): convert them with .astype(np.int64)"


def _exact_sum(array: NDArray[Any]) -> int:
    return (int((array >> 32).sum()) << 32) + int((array & 0xFFFFFFFF).sum())


class _Request(NamedTuple):
    """What the reader of a format needs to know, and to name in its errors."""

    name: str
    column: str | None
    unit: str | None

    def refuse(self, line: int, why: str) -> NoReturn:
        raise ValueError(f"{self.name}, line {line}: {why}")

    def choose(self, columns: list[str], where: str = "") -> str:
        if self.column in columns or (self.column is None and len(columns) == 1):
            return columns[0] if self.column is None else self.column
        missing = "name a column with column=" if self.column is None else f"no column {self.column!r}"
        raise ValueError(f"{self.name}{where}: {missing}; there are {', '.join(map(repr, columns)) or 'none'}")

    def expect(self, what: str, units: tuple[str, ...]) -> None:
        if self.column is not None:
            raise ValueError(f"{self.name}: {what} has no columns, leave out column={self.column!r}")
        if self.unit is not None and self.unit not in units:
            raise ValueError(f"{self.name}: {what} is not measured in {self.unit}, leave out unit={self.unit!r}")


@contextmanager
def _opened(label: str, path: str) -> Iterator[BinaryIO]:
    """Open a file or standard input, unzipped if its first bytes are gzip's, whatever its name."""
    if path == "-" and sys.stdin is None:
        raise ValueError("standard input is closed: name a file")
    raw = sys.stdin.buffer if path == "-" else open(path, "rb", buffering=0)  # noqa: SIM115 - closed below
    file = io.BufferedReader(cast(io.RawIOBase, raw))
    try:
        zipped = file.peek(2)[:2] == b"\x1f\x8b"
        stream = io.BufferedReader(cast(io.RawIOBase, gzip.GzipFile(fileobj=file))) if zipped else file
        if not stream.peek(1):
            raise ValueError(f"{label} is empty")
        yield stream
    finally:
        file.detach() if path == "-" else file.close()


def _lines(request: _Request, stream: BinaryIO) -> Iterator[tuple[int, str]]:
    """Yield each line's number and text, without its end."""
    for number, line in enumerate(stream, 1):
        line = line.removeprefix(BOM_UTF8) if number == 1 else line
        try:
            text = line.decode()
        except UnicodeDecodeError:
            text = "\0"
        if "\0" in text:
            request.refuse(number, "looks binary: neither UTF-8 text nor a format that seqbatch.read_lengths names")
        yield number, text.removesuffix("\n").removesuffix("\r")


def _records(request: _Request, stream: BinaryIO) -> Iterator[tuple[int, str]]:
    """Yield lines as `_lines` does, but not the blank ones that end a file."""
    blank = []
    for number, text in _lines(request, stream):
        blank.append((number, text))
        if text.strip(" "):
            yield from blank
            blank.clear()


def _measure(text: str, unit: str) -> int:
    if unit == "words":
        return len(text.split())
    return len(text) if unit == "characters" else len(text.encode(errors="surrogatepass"))


def _integer(request: _Request, number: int, text: str) -> int:
    digits = text.strip()
    if not digits:
        request.refuse(number, "blank, where a length is needed; with unit= it would be an empty sequence")
    if not (digits.isascii() and digits.isdigit()):
        request.refuse(number, f"{digits[:40]!r} is not a non-negative integer; {_HOW_TO_MEASURE}")
    if len(digits.lstrip("0")) > 19:  # 2**62 has 19 digits; int() itself refuses more than 4300
        request.refuse(number, f"{digits[:40]} is beyond 2**62 tokens")
    return int(digits)


def _length(request: _Request, where: str, value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, list):
        return len(value)
    if isinstance(value, str) and request.unit is not None:
        return _measure(value, request.unit)
    hint = _HOW_TO_MEASURE if isinstance(value, str) else "an integer or a list is needed"
    raise ValueError(f"{request.name}, {where}: {value!r:.40} is not a length; {hint}")


def _read_text(request: _Request, stream: BinaryIO) -> ArrayLike:
    request.expect("plain text", UNITS)
    if request.unit is not None:
        unit = request.unit
        return np.fromiter((_measure(text, unit) for _, text in _lines(request, stream)), np.int64)
    data = stream.read()
    if _INTEGER_LINES.fullmatch(data):
        return np.fromstring(data.removeprefix(BOM_UTF8), np.int64, sep="\n")
    return [_integer(request, number, text) for number, text in _records(request, io.BytesIO(data))]


def _read_npy(request: _Request, stream: BinaryIO) -> ArrayLike:
    request.expect("an array", ())
    try:
        return np.asarray(np.lib.format.read_array(io.BytesIO(stream.read()), allow_pickle=False))
    except (ValueError, MemoryError) as error:
        raise ValueError(f"{request.name} is not a .npy file of integers, or is truncated ({error})") from error


def _read_csv(request: _Request, stream: BinaryIO, delimiter: str = ",") -> ArrayLike:
    rows = csv.reader((text + "\n" for _, text in _records(request, stream)), delimiter=delimiter)
    try:
        header = next(rows, [])
        index = header.index(request.choose(header))
        if request.column is None and header[0].strip().isdigit():
            request.refuse(1, f"{header[0]!r} names no column: a header line is needed, or call the file .txt")
        return [_cell(request, rows.line_num, row, index, len(header)) for row in rows]
    except csv.Error as error:
        raise ValueError(f"{request.name}, line {rows.line_num}: {error}") from error


def _cell(request: _Request, number: int, row: list[str], index: int, width: int) -> int:
    if len(row) != width and (row or width > 1):
        request.refuse(number, f"{len(row)} columns, where the header has {width}")
    text = row[index] if row else ""
    return _integer(request, number, text) if request.unit is None else _measure(text, request.unit)


def _json_length(request: _Request, number: int, text: str) -> int:
    try:
        record = json.loads(text)
    except ValueError:
        record = None
    if not isinstance(record, dict):
        request.refuse(number, f"{text[:40]!r} is not a JSON object")
    return _length(request, f"line {number}", record[request.choose(list(record), f", line {number}")])


def _read_parquet(request: _Request, stream: BinaryIO) -> ArrayLike:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError(f"reading {request.name} needs pyarrow: pip install pyarrow") from error
    try:
        file = parquet.ParquetFile(pyarrow.BufferReader(stream.read()))
        column = request.choose(file.schema_arrow.names)
        values = file.read(columns=[column]).column(0)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{request.name} is not a parquet file, or is corrupt ({error})") from error
    if pyarrow.types.is_integer(values.type) and not values.null_count:
        return cast(ArrayLike, values.to_numpy())
    return [_length(request, f"row {row}", value) for row, value in enumerate(values.to_pylist(), 1)]


def _read_fasta(request: _Request, stream: BinaryIO) -> ArrayLike:
    request.expect("FASTA", ("characters",))
    counts: list[int] = []
    for number, text in _lines(request, stream):
        if text.startswith(">"):
            counts.append(0)
        elif counts:
            counts[-1] += len("".join(text.split()))
        elif text.strip():
            request.refuse(number, f"{text[:40]!r} comes before the first record, which begins with '>'")
    return counts


_READERS: dict[str, Callable[[_Request, BinaryIO], ArrayLike]] = {
    ".npy": _read_npy,
    ".csv": _read_csv,
    ".tsv": partial(_read_csv, delimiter="\t"),
    ".jsonl": lambda request, stream: [_json_length(request, *line) for line in _records(request, stream)],
    ".parquet": _read_parquet,
    **dict.fromkeys((".fasta", ".fa", ".faa"), _read_fasta),
}
