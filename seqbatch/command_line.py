"""What the commands share: where lengths come from, how rows are printed, and errors that say what to do."""

import functools
import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from seqbatch.files import check_writable

if TYPE_CHECKING:
    import pandas as pd

    from seqbatch.ordering import IntArray

__all__ = [
    "JSON_VERSION",
    "check_matplotlib",
    "check_plot",
    "failing_readably",
    "numbers",
    "output",
    "print_rows",
    "read",
    "source",
    "strategy_names",
]

JSON_VERSION = 1
_INPUT = click.Path(exists=True, dir_okay=False, allow_dash=True)


def failing_readably(command: Callable[..., None]) -> Callable[..., None]:
    """Turn the errors that a user can cause into a message and exit status 1."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except BrokenPipeError:
            raise
        except (ValueError, TypeError, OSError, ModuleNotFoundError, OverflowError, RecursionError) as error:
            raise click.ClickException(str(error)) from error
        except MemoryError as error:
            raise click.ClickException(f"not enough memory: {error}; smaller batch sizes take less") from error

    return run


def numbers(kind: Callable[[str], Any], how_many: int | None = None) -> Callable[..., Any]:
    """A click callback that reads comma-separated numbers."""

    def read(context: click.Context, option: click.Parameter, text: str | None) -> tuple[Any, ...] | None:
        if text is None:
            return None
        try:
            values = tuple(kind(part) for part in text.split(","))
        except ValueError:
            values = ()
        if any(value < 1 if kind is int else not abs(value) < float("inf") for value in values):
            raise click.BadParameter(
                f"expected {'numbers from 1 up' if kind is int else 'finite numbers'}, got {text!r}"
            )
        if not values or (how_many is not None and len(values) != how_many):
            wanted = f"{how_many} numbers" if how_many else "whole numbers"
            raise click.BadParameter(f"expected {wanted} separated by commas, got {text!r}")
        return values

    return read


def source(command: Callable[..., None]) -> Callable[..., None]:
    """The options that say where lengths come from; two columns come to the command as a tuple."""
    options = [
        click.argument("lengths", required=False, type=_INPUT),
        click.option("--corpus", metavar="NAME", help="Lengths that come with seqbatch; see 'seqbatch stats --list'."),
        click.option("--column", help="Column of a csv, jsonl or parquet file."),
        click.option("--columns", metavar="SOURCE,TARGET", callback=_two, help="Two columns: lengths of pairs."),
        click.option(
            "--unit", type=click.Choice(["words", "characters", "bytes"]), help="Measure the lines of a text."
        ),
    ]

    @functools.wraps(command)
    def run(*args: Any, column: str | None, columns: tuple[str, str] | None, **kwargs: Any) -> None:
        if column is not None and columns is not None:
            raise click.UsageError("give either --column NAME or --columns SOURCE,TARGET")
        if columns is not None and kwargs.get("lengths") is None:
            raise click.UsageError("--columns names two columns of a file of LENGTHS: give that file")
        command(*args, column=columns or column, **kwargs)

    for option in reversed(options):
        run = option(run)
    return run


def _two(context: click.Context, option: click.Parameter, text: str | None) -> tuple[str, str] | None:
    names = None if text is None else tuple(name.strip() for name in text.split(","))
    if names is not None and (len(names) != 2 or not all(names)):
        raise click.BadParameter(f"expected the names of two columns with a comma between, got {text!r}")
    return names


def output(command: Callable[..., None]) -> Callable[..., None]:
    """The options that say how rows are printed."""
    command = click.option("--csv", "form", flag_value="csv", help="Print CSV.")(command)
    return click.option("--json", "form", flag_value="json", help="Print one JSON document.")(command)


def strategy_names(text: str | None) -> "list[str] | str | None":
    """Names of strategies separated by commas; ``all`` as it is, None where there is no text."""
    from seqbatch.simulate import STRATEGIES

    if not text or text == "all":
        return text or None
    names = text.split(",")
    for name in names:
        if name not in STRATEGIES:
            raise click.BadParameter(f"{name!r} is none of {', '.join(STRATEGIES)}", param_hint="--strategies")
    return names


def check_plot(path: str | None) -> None:
    """Raise if a figure cannot be written to `path`, before there is any work to lose."""
    if path is None:
        return
    if Path(path).suffix not in (".png", ".svg", ".pdf"):
        raise click.BadParameter(f"FILE must end in .png, .svg or .pdf, got {path!r}", param_hint="--plot")
    check_matplotlib("--plot")
    check_writable(path)


def check_matplotlib(option: str) -> None:
    """Raise unless there is what draws."""
    if find_spec("matplotlib") is None:
        raise ModuleNotFoundError(f"{option} needs matplotlib: pip install 'seqbatch[plot]'")


def read(path: str | None, corpus: str | None, column: "str | tuple[str, str] | None", unit: str | None) -> "IntArray":
    """Return the lengths that the options of `source` name: (N,), or (N, 2) of pairs."""
    from seqbatch.lengths import corpus_names, load_corpus, read_lengths

    if (path is None) == (corpus is None):
        raise click.UsageError("give either a file of LENGTHS or --corpus NAME (one of them)")
    if corpus is None:
        return read_lengths(str(path), column=column, unit=unit)
    names = corpus_names() + corpus_names(pairs=True)
    if corpus not in names:
        raise click.BadParameter(f"{corpus!r} is none of {', '.join(names)}", param_hint="--corpus")
    return load_corpus(corpus)


def print_rows(frame: "pd.DataFrame", form: str | None, **more: Any) -> None:
    """Print rows as a table, as CSV, or as JSON with a version, `more` beside them and null for what is not known."""
    if form == "json":
        rows = json.loads(frame.to_json(orient="records", double_precision=15))
        click.echo(json.dumps({"version": JSON_VERSION, "rows": rows} | more, indent=1))
    elif form == "csv":
        click.echo(frame.to_csv(index=False), nl=False)
    else:
        click.echo(frame.to_string(index=False, na_rep="-", float_format=_short))


def _short(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.0f}"
