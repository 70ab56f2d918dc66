"""``seqbatch explain``: which operations of a recurrent cell leave the loop over steps, and why others stay."""

import inspect
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from seqbatch.command_line import check_plot, failing_readably, numbers
from seqbatch.files import check_writable

if TYPE_CHECKING:
    from torch import Tensor

    from seqbatch.rnn.explain import Explanation

__all__ = ["explain"]

_LANES = 4


@click.command()
@click.argument("cells", nargs=-1, required=True, metavar="MODULE:CELL...")
@click.option("--sizes", callback=numbers(int), metavar="N,...", help="What a class is made with, such as 8,16.")
@click.option("--widths", callback=numbers(int), metavar="N,...",
              help="Widths of x and of each state; not needed for cells with .example().")  # fmt: skip
@click.option("--dot", type=click.Path(dir_okay=False), help="Write the graph for graphviz into FILE.")
@click.option("--plot", type=click.Path(dir_okay=False), help="Draw the graph, without views, into FILE.")
@failing_readably
def explain(
    cells: tuple[str, ...], sizes: tuple[int, ...] | None, widths: tuple[int, ...] | None, dot: str | None,
    plot: str | None,
) -> None:  # fmt: skip
    """Say which operations of a recurrent cell must walk through time.

    CELL is one step, cell(x_t, *state) -> (y_t, *new_state): a class of nn.Module, one that is made already, or a
    function. MODULE is imported, also from the current folder. Several cells are drawn side by side.

    Such as: seqbatch explain seqbatch.rnn.cells:SRUv1 --sizes 8,8
    """
    check_plot(plot)
    if dot is not None:
        check_writable(dot)
    found = [_explained(name, sizes, widths) for name in cells]
    click.echo("\n\n".join(map(str, found)))
    if dot is not None:
        Path(dot).write_text("\n".join(one.to_dot() for one in found), encoding="utf-8")
        click.echo(f"wrote {dot}", err=True)
    if plot is not None:
        from seqbatch.rnn.explain_plot import figure_for

        figure, axes = figure_for(found)
        for one, ax in zip(found, axes, strict=True):
            one.plot(ax=ax)
        figure.savefig(plot, dpi=120)
        click.echo(f"wrote {plot}", err=True)


def _explained(name: str, sizes: tuple[int, ...] | None, widths: tuple[int, ...] | None) -> "Explanation":
    from seqbatch.rnn.parallel import parallelize

    cell = _made(name, _found(name), sizes)
    example = _example(name, cell, widths)
    try:
        return parallelize(cell, example=example).explain()
    except ValueError as error:
        hint = "; --widths are those of x and of each state" if "fails on tensors" in str(error) else ""
        raise click.ClickException(f"{name}: {error}{hint}") from error


def _found(name: str) -> Any:
    """What MODULE:CELL names."""
    module, colon, path = name.partition(":")
    if not (module and colon and path):
        raise click.UsageError(f"expected MODULE:CELL, such as seqbatch.rnn.cells:SRUv1, got {name!r}")
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.insert(0, os.getcwd())  # as python -m does
    try:
        found: Any = import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # the module is there, and lacks another one
        raise click.UsageError(f"no module {error.name!r} here or among those installed ({name})") from error
    except Exception as error:
        raise click.ClickException(f"importing {module} failed: {type(error).__name__}: {_line(error)}") from error
    for part in path.split("."):
        if not hasattr(found, part):
            known = [key for key, value in vars(found).items() if callable(value) and not key.startswith("_")]
            raise click.UsageError(f"{module!r} has no {path!r}; it has {', '.join(sorted(known)) or 'no cell'}")
        found = getattr(found, part)
    return found


def _made(name: str, found: Any, sizes: tuple[int, ...] | None) -> Any:
    """The cell: a module or a function."""
    from torch import nn

    if isinstance(found, type) and issubclass(found, nn.Module):
        return _constructed(name, found, sizes)
    if sizes is not None:
        raise click.UsageError(f"--sizes makes a class into a cell, and {name} is none: leave it out")
    if isinstance(found, nn.Module) or inspect.isroutine(found):
        return found
    raise click.UsageError(f"{name} is a {type(found).__name__}, not a cell: expected an nn.Module or a function")


def _constructed(name: str, found: type, sizes: tuple[int, ...] | None) -> Any:
    signature = inspect.signature(found)
    try:
        signature.bind(*sizes or ())
    except TypeError as error:
        given = ",".join(map(str, sizes)) if sizes else "none"
        raise click.UsageError(
            f"{name} takes {signature}: give whole numbers as --sizes, such as --sizes 8,16; got {given}"
        ) from error
    try:
        return found(*sizes or ())
    except Exception as error:
        raise click.ClickException(
            f"{name} cannot be made ({type(error).__name__}: {_line(error)}); see --sizes"
        ) from error


def _example(name: str, cell: Any, widths: tuple[int, ...] | None) -> Sequence["Tensor"]:
    import torch

    if widths is None:
        if callable(getattr(cell, "example", None)):
            return tuple(cell.example())
        raise click.UsageError(
            f"{name} has no .example(): give the widths of x and of each state, such as --widths 8,16"
        )
    like = next(cell.parameters(), None) if isinstance(cell, torch.nn.Module) else None
    dtype = None if like is None else like.dtype
    return tuple(torch.randn(_LANES, width, dtype=dtype) for width in widths)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
