"""Lengths: what is accepted, what each file format means, and that every bad input is named."""

import builtins
import gzip
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from seqbatch.lengths import UNITS, as_lengths, corpus_names, describe, load_corpus, read_lengths

INTEGER_TYPES = ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", ">i8", "<i2"]
CORPORA = {
    "code_python_functions": 25693,
    "librispeech_devtest_clean": 5323,
    "protein_ecoli": 4391,
    "sft_oasst1_conversation": 1002,
    "ud_en_ewt": 16622,
    "wikitext2_paragraph": 4026,
}
FORMATS = ["npy", "parquet", "csv", "tsv", "jsonl", "fa", "fasta", "txt", "anything"]
TEXTS = ["the cat sat", "", "naïve  café", " ", "東京", 'a,b\t"c"']
MEASURED = {"words": [3, 0, 2, 0, 1, 2], "characters": [11, 0, 11, 1, 2, 7], "bytes": [11, 0, 13, 1, 6, 7]}

lists = st.lists(st.integers(0, 127), min_size=1, max_size=50)


# --- arrays ---


@given(lists, st.sampled_from(INTEGER_TYPES))
def test_any_integers_become_int64(values: list[int], dtype: str) -> None:
    """The same lengths come from a list, every integer dtype, a strided view, a Series and a tensor."""
    array = np.array(values, dtype)
    forms: list[Any] = [values, tuple(values), array, np.repeat(array, 2)[::2], pd.Series(values)]
    for given_lengths in [*forms, pd.Series(values, dtype="Int64"), torch.tensor(values)]:
        lengths = as_lengths(given_lengths)

        assert values == lengths.tolist()
        assert (np.int64, True) == (lengths.dtype, lengths.flags.c_contiguous)


def test_int64_is_not_copied() -> None:
    """A million lengths that are right already cost a look at each, and no memory."""
    array = np.arange(10)

    assert as_lengths(array) is array


@given(lists, st.data())
def test_the_first_negative_length_is_named(values: list[int], data: st.DataObject) -> None:
    """With its index and value, whatever comes after it."""
    index = data.draw(st.integers(0, len(values) - 1))
    values[index:] = [-1 - value for value in values[index:]]

    with pytest.raises(ValueError, match=f"must not be negative, got {values[index]} at index {index}$"):
        as_lengths(values)


@given(st.lists(st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**61 - 1, 2**61, 2**62]), min_size=1, max_size=6))
def test_more_than_2_to_the_62_tokens_are_refused(values: list[int]) -> None:
    """The sum is exact, and also catches what would overflow int64."""
    if sum(values) > 2**62:
        with pytest.raises(ValueError, match=r"more than 2\*\*62 tokens"):
            as_lengths(values)
    else:
        assert values == as_lengths(values).tolist()


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ([], ValueError, r"at least one sequence, got list of shape \(0,\)"),
        (np.zeros(0, np.int64), ValueError, "at least one sequence"),
        (5, ValueError, r"one dimension .* got int of shape \(\)"),
        ({3, 4}, ValueError, r"one dimension .* got set of shape \(\)"),
        ("34", ValueError, r"one dimension .* got str of shape \(\)"),
        (
            [[1, 2], [3, 4]],
            ValueError,
            r"one length a sequence is needed here, got list of shape \(2, 2\): pairs go to",
        ),
        ([[1, 2, 3], [3, 4, 5]], ValueError, r"one dimension .* got list of shape \(2, 3\)"),
        ([[1, 2], [3]], ValueError, "one dimension: .*inhomogeneous"),
        ([1.0, 2.0], TypeError, r"got float64: round them .*\.astype\(np\.int64\)"),
        ([1.0, np.nan, np.nan], TypeError, "got float64 with 2 NaN: drop or fill them, round"),
        (np.array([1, 2], np.float16), TypeError, "got float16"),
        (torch.tensor([1.5]), TypeError, "got float32"),
        ([True, False], TypeError, "got bool: a mask is no length"),
        (["3", "4"], TypeError, r"got <U1 \(first value .*'3'.*astype"),
        (np.array([3, None]), TypeError, r"got object \(first value 3\)"),
        (pd.Series(["a b"]), TypeError, r"got object \(first value 'a b'\)"),
        ([2**70], TypeError, "got object"),
        (np.array([1 + 2j]), TypeError, "got complex128"),
        (np.array(["2020"], "datetime64[Y]"), TypeError, "got datetime64"),
        (
            np.array([1, 2**63], np.uint64),
            ValueError,
            r"more than 2\*\*62 tokens \(the longest is 9223372036854775808\)",
        ),
    ],
)
def test_what_is_no_length_is_refused(bad: Any, error: type[Exception], message: str) -> None:
    """With what came, what is allowed and what to do."""
    with pytest.raises(error, match=message):
        as_lengths(bad)


# --- statistics ---


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=40).filter(any))
def test_describe_is_pandas_describe_of_the_non_empty(values: list[int]) -> None:
    """All statistics but the counts leave out empty sequences."""
    filled = pd.Series([value for value in values if value])
    points = {"p05": 0.05, "p25": 0.25, "median": 0.5, "p75": 0.75, "p95": 0.95, "p99": 0.99}
    expected = {"count": len(values), "empty": values.count(0), "tokens": sum(values), "mean": filled.mean()}
    expected |= {"std": filled.std(ddof=0), "cv": filled.std(ddof=0) / filled.mean(), "min": filled.min()}
    expected |= {name: filled.quantile(q) for name, q in points.items()} | {"max": filled.max()}

    assert pytest.approx(expected) == describe(values)
    json.dumps(describe(values))


def test_all_empty_sequences_have_no_statistics() -> None:
    """Rather than a mean of NaN."""
    with pytest.raises(ValueError, match="all 3 sequences are empty"):
        describe([0, 0, 0])


# --- files, all formats ---


def write(path: Path, content: str | bytes, *, zipped: bool = False) -> Path:
    data = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(data) if zipped else data)
    return path


def npy(values: list[int]) -> bytes:
    file = io.BytesIO()
    np.save(file, np.array(values, np.int32))
    return file.getvalue()


def parquet(**columns: Any) -> bytes:
    return pd.DataFrame(columns).to_parquet(index=False)


def as_file(kind: str, values: list[int]) -> bytes:
    """The same lengths in each format."""
    contents = {
        "npy": lambda: npy(values),
        "parquet": lambda: parquet(n=values),
        "csv": lambda: pd.DataFrame({"n": values}).to_csv(index=False).encode(),
        "tsv": lambda: "".join(f"{value}\n" for value in ["n", *values]).encode(),
        "jsonl": lambda: "".join(f'{{"n": {value}}}\n' for value in values).encode(),
        "fa": lambda: "".join(f">p{i}\n{'M' * value}\n" for i, value in enumerate(values)).encode(),
        "fasta": lambda: "".join(
            f">\r\n{'M' * (value // 2)} \r\n\r\n{'M' * -(-value // 2)}\r\n" for value in values
        ).encode(),
        "txt": lambda: "\n".join(map(str, values)).encode(),
        "anything": lambda: "".join(f" {value:03}\t\r\n" for value in values).encode() + b"\n \n",
    }
    return contents[kind]()


@given(
    lists,
    st.sampled_from(FORMATS),
    st.booleans(),
    st.booleans(),
)
def test_every_format_gives_back_the_lengths(
    tmp_path_factory: pytest.TempPathFactory, values: list[int], kind: str, zipped: bool, named: bool
) -> None:
    """Zipped or not, and a zipped file is known by its first bytes, not by its name."""
    path = tmp_path_factory.getbasetemp() / f"lengths.{kind}{'.gz' * named}"

    assert values == read_lengths(write(path, as_file(kind, values), zipped=zipped)).tolist()


@given(st.lists(st.text("ab, \t\x0b\x85\u2028é東🙂", max_size=9), min_size=1, max_size=9))
def test_a_text_has_a_length_for_each_line(tmp_path_factory: pytest.TempPathFactory, lines: list[str]) -> None:
    """A blank line is an empty sequence and is not lost, wherever it stands; the last line needs no end."""
    path = tmp_path_factory.getbasetemp() / "text.txt"
    measures = {"words": lambda t: len(t.split()), "characters": len, "bytes": lambda t: len(t.encode())}
    for unit, end in [(unit, end) for unit in UNITS for end in ("\n", "\r\n")]:
        write(path, "".join(line + end for line in lines))

        assert [measures[unit](line) for line in lines] == read_lengths(path, unit=unit).tolist()
    if lines[-1]:
        assert len(lines) == len(read_lengths(write(path, "\n".join(lines)), unit="words"))


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_a_column_of_texts_is_measured(tmp_path: Path, kind: str, unit: str) -> None:
    """Separators, quotes and empty texts included."""
    frame = pd.DataFrame({"id": range(len(TEXTS)), "text": TEXTS})
    path = tmp_path / f"texts.{kind}"
    if kind == "parquet":
        frame.to_parquet(path)
    elif kind == "jsonl":
        frame.to_json(path, orient="records", lines=True)
    else:
        frame.to_csv(path, index=False, sep="\t" if kind == "tsv" else ",")

    assert MEASURED[unit] == read_lengths(path, column="text", unit=unit).tolist()


def test_a_quoted_text_may_span_lines(tmp_path: Path) -> None:
    """Its line ends are part of the text, and later errors still name the line of the file."""
    path = write(tmp_path / "a.csv", 'id,text\n1,"one\ntwo three"\n2,four\n')

    assert read_lengths(path, column="text", unit="characters").tolist() == [13, 4]
    with pytest.raises(ValueError, match=r"a\.csv, line 3: 'one\\ntwo three' is not"):
        read_lengths(path, column="text")


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_lists_of_tokens_count_their_tokens(tmp_path: Path, kind: str) -> None:
    """An empty list is an empty sequence."""
    frame = pd.DataFrame({"n": [1, 2, 3], "ids": [[5, 6], [], [7]]})
    path = tmp_path / f"tokens.{kind}"
    frame.to_parquet(path) if kind == "parquet" else frame.to_json(path, orient="records", lines=True)

    assert read_lengths(path, column="ids").tolist() == [2, 0, 1]
    assert read_lengths(path, column="n").tolist() == [1, 2, 3]


def test_columns_may_have_empty_names(tmp_path: Path) -> None:
    """As the index of a pandas table has."""
    assert read_lengths(write(tmp_path / "a.csv", "n,\n1,7\n2,8\n"), column="").tolist() == [7, 8]


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    """At the start of integers, of texts and of a header."""
    mark = b"\xef\xbb\xbf"

    assert read_lengths(write(tmp_path / "a.txt", mark + b"5\n6\n")).tolist() == [5, 6]
    assert read_lengths(write(tmp_path / "b.txt", mark + b"ab\n"), unit="characters").tolist() == [2]
    assert read_lengths(write(tmp_path / "c.csv", mark + b"n,m\n5,6\n"), column="n").tolist() == [5]


@given(
    st.binary(max_size=60),
    st.sampled_from(FORMATS),
    st.booleans(),
)
def test_garbage_is_named_or_read(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, kind: str, zipped: bool
) -> None:
    """Whatever the bytes, the answer is lengths or a ValueError or TypeError that names the file."""
    path = write(tmp_path_factory.getbasetemp() / f"garbage.{kind}", content, zipped=zipped)
    try:
        assert read_lengths(path).dtype == np.int64
    except (ValueError, TypeError) as error:
        named = str(error).startswith(str(path))
        assert named, error  # noqa: PT017 - reading it is right as well


@given(st.data(), st.sampled_from(["txt", "npy", "parquet"]))
def test_a_truncated_file_is_never_read(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, kind: str
) -> None:
    """Cut anywhere: all of a gzip, the end of an array or a table."""
    content = as_file(kind, list(range(100)))
    content = gzip.compress(content) if kind == "txt" else content
    path = write(tmp_path_factory.getbasetemp() / f"cut.{kind}", content[: data.draw(st.integers(2, len(content) - 1))])

    with pytest.raises(ValueError, match=r"truncated|corrupt|binary"):
        read_lengths(path)


# --- standard input ---


@pytest.mark.parametrize("zipped", [False, True])
def test_standard_input_is_text(monkeypatch: pytest.MonkeyPatch, zipped: bool) -> None:
    """Zipped or not; and it stays open."""
    for unit, content, expected in [(None, b"3\n4\n", [3, 4]), ("words", b"a b\n\n", [2, 0])]:
        buffer = io.BytesIO(gzip.compress(content) if zipped else content)
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=buffer))

        assert expected == read_lengths("-", unit=unit).tolist()
        assert not buffer.closed


def test_errors_name_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    """As "standard input", not as a dash."""
    for content, message in [(b"", "standard input is empty"), (b"1\nx\n", "standard input, line 2: 'x'")]:
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(content)))
        with pytest.raises(ValueError, match=message):
            read_lengths("-")


def test_a_pipe_is_read_to_its_end() -> None:
    """A real one, which cannot seek."""
    code = "from seqbatch.lengths import read_lengths; print(read_lengths('-').sum())"
    content = gzip.compress(b"7\n" * 100_000)

    done = subprocess.run([sys.executable, "-c", code], input=content, capture_output=True, check=True)

    assert done.stdout.split() == [b"700000"]


# --- bad files ---

BAD_FILES: list[tuple[str, str | bytes, dict[str, str], str]] = [
    ("a.txt", b"", {}, r"a\.txt is empty"),
    ("a.txt.gz", gzip.compress(b""), {}, r"a\.txt\.gz is empty"),
    ("a.npy", b"", {}, r"a\.npy is empty"),
    ("a.txt", "\n\n", {}, r"a\.txt: .*at least one sequence"),
    ("a.txt", "1\n2\n\n3\n", {}, r"a\.txt, line 3: blank, .* with unit= it would be an empty sequence"),
    ("a.txt", "\n1\n", {}, r"line 1: blank"),
    ("a.txt", "1\n" * 16 + "abc\n", {}, r"a\.txt, line 17: 'abc' is not a non-neg.* unit=, one of 'words'"),
    ("a.txt", "1\n-2\n", {}, r"line 2: '-2' is not a non-negative integer"),
    ("a.txt", "3.0\n", {}, r"line 1: '3\.0' is not a non-negative integer"),
    ("a.txt", "1 2\n", {}, r"line 1: '1 2' is not"),
    ("a.txt", "1\n+2\n", {}, r"line 2: '\+2' is not"),
    ("a.txt", "1_000\n", {}, r"line 1: '1_000' is not"),
    ("a.txt", "٣\n", {}, r"line 1: '٣' is not"),
    ("a.txt", "1e3\n", {}, r"line 1: '1e3' is not"),
    ("a.txt", "1\n9223372036854775807\n", {}, r"a\.txt: lengths add up to more than 2\*\*62"),
    ("a.txt", "1\n1" + "0" * 19, {}, r"line 2: 10{19} is beyond 2\*\*62 tokens"),
    ("a.txt", "1\n" + "9" * 5000, {}, r"line 2: 9{40} is beyond 2\*\*62 tokens"),
    ("a.txt", "x" * 999, {}, r"line 1: 'x{40}' is not"),
    ("a.txt", b"1\n2\0\n", {}, r"a\.txt, line 2: looks binary"),
    ("a.txt", b"1\n\xff\xfe\n", {}, r"a\.txt, line 2: looks binary"),
    ("a.txt", b"a\n\0\n", {"unit": "words"}, r"a\.txt, line 2: looks binary"),
    ("a.txt", "3\n".encode("utf-16"), {}, "line 1: looks binary"),
    ("a.npz", b"PK\3\4\0\0", {}, "line 1: looks binary: .* format"),
    ("a.txt", "1\n", {"column": "n"}, r"a\.txt: plain text has no columns, leave out column='n'"),
    ("a.txt", "1\n", {"unit": "tokens"}, "unit must be one of 'words', 'characters', 'bytes', got 'tokens'"),
    ("a.gz", gzip.compress(b"1\n" * 999)[:-9], {}, r"a\.gz: the gzip data are corrupt or truncated"),
    ("a.gz", gzip.compress(b"1\n" * 999)[:15] + b"????????????", {}, "gzip data are corrupt"),
    ("a.gz", gzip.compress(b"1\n") + b"garbage", {}, "gzip data are corrupt"),
    ("a.npy", npy([1, 2])[:-1], {}, r"a\.npy is not a \.npy file of integers, or is truncated"),
    ("a.npy", "1\n2\n", {}, r"a\.npy is not a \.npy file"),
    ("a.npy", npy([1, -2]), {}, r"a\.npy: lengths must not be negative, got -2 at index 1"),
    ("a.npy", npy([1]), {"column": "n"}, "an array has no columns"),
    ("a.npy", npy([1]), {"unit": "words"}, "an array is not measured in words, leave out unit='words'"),
    ("a.csv", "n,m\n1,2\n", {}, r"a\.csv: name a column with column=; there are 'n', 'm'"),
    ("a.csv", "n,m\n1,2\n", {"column": "k"}, r"a\.csv: no column 'k'; there are 'n', 'm'"),
    ("a.csv", "3\n4\n", {}, r"line 1: '3' names no column: a header line is needed"),
    ("a.csv", "n\n3\n\n4\n", {}, r"line 3: blank"),
    ("a.csv", "n,m\n3,1\n4\n", {"column": "n"}, "line 3: 1 columns, where the header has 2"),
    ("a.csv", "n,m\n3,1,5\n", {"column": "n"}, "line 2: 3 columns, where the header has 2"),
    ("a.csv", "n\n3.5\n", {}, r"line 2: '3\.5' is not a non-negative integer"),
    ("a.csv", "n\n" + "x" * 200_000, {"unit": "words"}, "line 2: field larger than field limit"),
    ("a.csv", "n\n", {}, r"a\.csv: .*at least one sequence"),
    ("a.csv", "\n", {}, r"a\.csv: name a column with column=; there are none"),
    ("a.tsv", "n\tm\n1\t2\n", {"column": "n\tm"}, "there are 'n', 'm'"),
    ("a.jsonl", '{"n": 1, "m": 2}\n', {}, r"a\.jsonl, line 1: name a column with column=; there are 'n', 'm'"),
    ("a.jsonl", '{"n": 1}\n{"m": 2}\n', {"column": "n"}, "line 2: no column 'n'; there are 'm'"),
    ("a.jsonl", '{"n": 1}\n{"n": \n', {"column": "n"}, "line 2: '{\"n\": ' is not a JSON object"),
    ("a.jsonl", "[1]\n", {"column": "n"}, r"line 1: '\[1\]' is not a JSON object"),
    ("a.jsonl", '{"n": 1}\n\n{"n": 1}\n', {"column": "n"}, "line 2: '' is not a JSON object"),
    ("a.jsonl", '{"n": 1.0}\n', {"column": "n"}, r"line 1: 1\.0 is not a length; an integer or a list"),
    ("a.jsonl", '{"n": true}\n', {"column": "n"}, "line 1: True is not a length"),
    ("a.jsonl", '{"n": "a b"}\n', {"column": "n"}, "line 1: 'a b' is not a length; .* unit=, one of 'words'"),
    ("a.jsonl", '{"n": -1}\n', {"column": "n"}, r"a\.jsonl: lengths must not be negative"),
    ("a.parquet", parquet(n=[1], m=[2]), {}, r"a\.parquet: name a column .* 'n', 'm'"),
    ("a.parquet", parquet(n=[1], m=[2]), {"column": "k"}, "no column 'k'"),
    ("a.parquet", parquet(n=[1, None]), {}, r"row 1: 1\.0 is not a length"),
    ("a.parquet", parquet(n=pd.array([1, None], "Int64")), {}, "row 2: None is not a length"),
    ("a.parquet", parquet(n=["a"]), {}, "row 1: 'a' is not a length; .* unit="),
    ("a.parquet", "n\n1\n", {}, r"a\.parquet is not a parquet file, or is corrupt"),
    ("a.fasta", ">a\nMK\n", {"column": "n"}, "FASTA has no columns"),
    ("a.faa", ">a\nMK\n", {"unit": "words"}, "FASTA is not measured in words"),
    ("a.fa", "MK\n>a\n", {}, "line 1: 'MK' comes before the first record, which begins with '>'"),
    ("a.fa", "\n", {}, r"a\.fa: .*at least one sequence"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "options", "message"), BAD_FILES)
def test_a_bad_file_is_refused(
    tmp_path: Path, name: str, content: str | bytes, options: dict[str, str], message: str
) -> None:
    """With the file, the line and what to do."""
    with pytest.raises(ValueError, match=message):
        read_lengths(write(tmp_path / name, content), **options)


def test_floats_in_an_array_file_are_refused(tmp_path: Path) -> None:
    """As in an array."""
    np.save(tmp_path / "a.npy", [1.0, np.nan])
    with pytest.raises(TypeError, match=r"a\.npy: lengths must be integers, got float64 with 1 NaN"):
        read_lengths(tmp_path / "a.npy")


def test_a_pickle_is_not_loaded(tmp_path: Path) -> None:
    """Reading lengths runs no code from a file."""
    np.save(tmp_path / "a.npy", np.array([print, 1], object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"a\.npy is not a \.npy file of integers"):
        read_lengths(tmp_path / "a.npy")


def test_a_path_that_is_no_file_is_named(tmp_path: Path) -> None:
    """Missing ones and directories, with the errors of open()."""
    with pytest.raises(FileNotFoundError, match=re.escape(repr(str(tmp_path / "none.txt")))):
        read_lengths(tmp_path / "none.txt")
    with pytest.raises(IsADirectoryError, match=re.escape(repr(str(tmp_path)))):
        read_lengths(tmp_path)


def test_without_pyarrow_parquet_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other formats do without it."""
    real = builtins.__import__

    def without_pyarrow(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("pyarrow"):
            raise ModuleNotFoundError(name)
        return real(name, *args, **kwargs)

    path = write(tmp_path / "a.parquet", parquet(n=[1]))
    monkeypatch.setattr(builtins, "__import__", without_pyarrow)
    with pytest.raises(ImportError, match="pip install pyarrow"):
        read_lengths(path)


# --- corpora ---


def test_the_corpora_are_those_of_their_readme() -> None:
    """Names and numbers of lengths, as the table of sources and licences says."""
    readme = Path(str(sys.modules["seqbatch"].__file__)).parent / "corpora" / "README.md"
    rows = re.findall(r"^\| `(\w+)\.txt\.gz` \| ([\d,]+) \|", readme.read_text(), re.MULTILINE)

    assert list(CORPORA) == corpus_names()
    assert {name: int(count.replace(",", "")) for name, count in rows} == CORPORA


@pytest.mark.parametrize("name", CORPORA)
def test_a_corpus_is_all_there(name: str) -> None:
    """As many lengths as its source has sequences, none empty."""
    lengths = load_corpus(name)

    assert CORPORA[name] == len(lengths)
    assert lengths.min() > 0
    assert np.int64 == lengths.dtype


def test_corpora_of_pairs_are_those_of_their_readme() -> None:
    """As many as the table says, both sides filled."""
    readme = Path(str(sys.modules["seqbatch"].__file__)).parent / "corpora" / "README.md"
    rows = re.findall(r"^\| `(\w+)\.pairs\.gz` \| ([\d,]+) \|", readme.read_text(), re.MULTILINE)

    assert sorted(name for name, _ in rows) == corpus_names(pairs=True)
    for name, count in rows:
        lengths = load_corpus(name)
        assert lengths.shape == (int(count.replace(",", "")), 2)
        assert lengths.min() > 0


# --- pairs ---


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
def test_two_columns_are_pairs(tmp_path: Path, suffix: str) -> None:
    """Source and target in the order in which they are named."""
    path = tmp_path / f"pairs.{suffix}"
    rows = [("a", 3, 4), ("b", 0, 2)]
    if suffix == "parquet":
        pytest.importorskip("pyarrow")
        write(path, parquet(name=["a", "b"], src=[3, 0], tgt=[4, 2]))
    elif suffix == "jsonl":
        path.write_text("".join(json.dumps(dict(zip(("name", "src", "tgt"), row, strict=True))) + "\n" for row in rows))
    else:
        mark = {"csv": ",", "tsv": "\t"}[suffix]
        path.write_text("".join(mark.join(map(str, row)) + "\n" for row in [("name", "src", "tgt"), *rows]))

    assert read_lengths(path, column=("src", "tgt")).tolist() == [[3, 4], [0, 2]]
    assert read_lengths(path, column=("tgt", "src")).tolist() == [[4, 3], [2, 0]]
    with pytest.raises(ValueError, match="no column 'source'"):
        read_lengths(path, column=("source", "tgt"))
    with pytest.raises(ValueError, match=r"pairs are in two columns, source and target, got \['src', 'src'\]"):
        read_lengths(path, column=("src", "src"))


def test_an_array_of_pairs_and_texts_of_pairs(tmp_path: Path) -> None:
    """A .npy of two columns, and columns of texts."""
    np.save(tmp_path / "pairs.npy", np.array([[1, 2], [3, 4]]))
    (tmp_path / "texts.tsv").write_text("en\tzh\na b c\td e\nf\t\n")

    assert read_lengths(tmp_path / "pairs.npy").tolist() == [[1, 2], [3, 4]]
    assert read_lengths(tmp_path / "texts.tsv", column=("en", "zh"), unit="words").tolist() == [[3, 2], [1, 0]]


def test_columns_of_pairs_must_both_be_filled(tmp_path: Path) -> None:
    """A row without its target is named by its line."""
    (tmp_path / "a.csv").write_text("src,tgt\n3,4\n5\n")
    (tmp_path / "b.csv").write_text("src,tgt\n3,4\n5,\n")
    with pytest.raises(ValueError, match="line 3: 1 columns, where the header has 2"):
        read_lengths(tmp_path / "a.csv", column=("src", "tgt"))
    with pytest.raises(ValueError, match="line 3: blank, where a length is needed"):
        read_lengths(tmp_path / "b.csv", column=("src", "tgt"))


def test_an_unknown_corpus_lists_the_known_ones() -> None:
    """So that the right name is at hand."""
    with pytest.raises(ValueError, match=r"corpus must be one of 'code_python_functions', .*, got 'ewt'"):
        load_corpus("ewt")
