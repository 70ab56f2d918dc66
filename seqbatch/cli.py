"""The ``seqbatch`` command: ``stats``, ``simulate``, ``compare``, ``plan``, ``explain`` and ``simulate-pipeline``.

Data go to standard output, progress and notes to standard error. Exit status 0: done; 1: the run
failed, such as for a bad line in a file; 2: the command was not understood. Whatever takes time to
import is imported where it is used.
"""

import ast
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from seqbatch import __version__
from seqbatch.cli_compare import compare
from seqbatch.cli_explain import explain
from seqbatch.cli_pipeline import simulate_pipeline
from seqbatch.command_line import (
    check_plot,
    failing_readably,
    numbers,
    output,
    print_rows,
    read,
    source,
    strategy_names,
)

if TYPE_CHECKING:
    import pandas as pd

    from seqbatch.ordering import IntArray
    from seqbatch.strategy import Strategy

__all__ = ["main"]


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """Plan batches of variable-length sequences and see what each strategy wastes.

    LENGTHS is a file of one whole number per line (.txt, .gz), a column of a .csv, .jsonl or .parquet
    file, a .npy array, a FASTA file, a text measured by --unit, or - for standard input. Two --columns, or a .npy
    array of two, are the lengths of pairs, source and target.
    """


main.add_command(compare)
main.add_command(explain)
main.add_command(simulate_pipeline)


@main.command()
@source
@output
@click.option("--list", "list_corpora", is_flag=True, help="Name the corpora that come with seqbatch.")
@failing_readably
def stats(
    lengths: str | None, corpus: str | None, column: str | None, unit: str | None, form: str | None, list_corpora: bool
) -> None:
    """Describe lengths, fit distributions, and say what random batches would use."""
    import pandas as pd

    from seqbatch.distributions import expected_efficiency
    from seqbatch.fitting import fit
    from seqbatch.lengths import corpus_names, describe

    if list_corpora:
        click.echo("\n".join([*corpus_names(), *(f"{name} (pairs)" for name in corpus_names(pairs=True))]))
        return
    array = read(lengths, corpus, column, unit)
    if array.ndim == 2:
        raise ValueError("stats describes one length a sequence, and these are pairs: give their sides one by one")
    values: dict[str, float] = describe(array)
    for size in (2, 8, 32, 128):
        if size <= len(array):
            values[f"padding efficiency, random batches of {size}"] = expected_efficiency(array, size)
    try:
        for found in fit(array):
            values[f"fit: {found.distribution} (Kolmogorov-Smirnov distance)"] = found.ks_distance
    except ValueError as error:
        click.echo(f"no distribution fitted: {error}", err=True)
    # Objects, so that counts stay whole numbers.
    rows = pd.DataFrame({"what": list(values), "value": pd.Series(list(values.values()), dtype=object)})
    print_rows(rows, form)


@main.command()
@source
@output
@click.option(
    "--gamma", callback=numbers(float, 2), metavar="SHAPE,SCALE", help="Draw lengths from a gamma distribution."
)
@click.option("--lognormal", callback=numbers(float, 2), metavar="MU,SIGMA", help="Draw lengths from a lognormal.")
@click.option("-n", "count", type=click.IntRange(1), default=100_000, show_default=True, help="Lengths to draw.")
@click.option("--batch-sizes", callback=numbers(int), default="1,2,4,8,16,32,64,128,256", show_default=True)
@click.option(
    "--strategies",
    default="all",
    show_default=True,
    metavar="all|NAME,...",
    help="Which strategies to count; all leaves packing_optimal out.",
)
@click.option("--chunk-size", type=click.IntRange(1), default=35, show_default=True, help="Steps of a window or chunk.")
@click.option(
    "--batch-us", type=click.FloatRange(0), default=200.0, show_default=True, help="Device: microseconds per batch."
)
@click.option(
    "--step-us", type=click.FloatRange(0), default=20.0, show_default=True, help="Device: microseconds per step."
)
@click.option(
    "--cell-ns", type=click.FloatRange(0), default=400.0, show_default=True, help="Device: nanoseconds per cell."
)
@click.option("--ranks", type=click.IntRange(1), default=8, show_default=True, help="Ranks that share the batches.")
@click.option(
    "--cost", callback=numbers(float, 2), default="1,0", show_default=True, metavar="A,B", help="Cost a*l + b*l^2."
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--plot", type=click.Path(dir_okay=False), help="Draw efficiency and predicted throughput into FILE.")
@failing_readably
def simulate(
    lengths: str | None, corpus: str | None, column: str | None, unit: str | None, form: str | None,
    gamma: tuple[float, float] | None, lognormal: tuple[float, float] | None, count: int,
    batch_sizes: tuple[int, ...], strategies: str, chunk_size: int, batch_us: float, step_us: float, cell_ns: float,
    ranks: int, cost: tuple[float, float], seed: int, plot: str | None,
) -> None:  # fmt: skip
    """Count what each strategy wastes at each batch size, and predict its throughput.

    The device model's defaults put its knee at 50 lanes; they are no measurement.
    """
    check_plot(plot)
    from seqbatch.simulate import DeviceModel
    from seqbatch.simulate import simulate as run

    names = strategy_names(strategies)
    array = _draw_orread(lengths, corpus, column, unit, gamma, lognormal, count, seed)
    device = DeviceModel(batch_us, step_us, cell_ns)
    frame = run(
        array, strategies=names, batch_sizes=batch_sizes, chunk_size=chunk_size, device=device,
        num_replicas=ranks, cost=cost, seed=seed, progress=True,
    )  # fmt: skip
    if plot:
        _plot(frame, array, device, plot)
    print_rows(frame if form else frame.drop(columns=["tokens", "settings"]), form)


@main.command()
@source
@output
@click.option("--strategy", metavar="CALL", help='Settings as in Python, such as "Bucketing(max_tokens=16384)".')
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--epoch", type=click.IntRange(0), default=0, show_default=True)
@click.option("--out", type=click.Path(dir_okay=False), help="Write the plan to FILE (.npz).")
@click.option("--show", type=click.Path(exists=True, dir_okay=False), help="Describe a plan that --out wrote.")
@failing_readably
def plan(
    lengths: str | None, corpus: str | None, column: str | None, unit: str | None, form: str | None,
    strategy: str | None, seed: int, epoch: int, out: str | None, show: str | None,
) -> None:  # fmt: skip
    """Plan one epoch, write it to a file, or show one; prints one row per batch."""
    from seqbatch.plan import Plan

    if show:
        if lengths or corpus or strategy or out:
            raise click.UsageError("--show describes a plan file; leave LENGTHS, --corpus, --strategy and --out out")
        made = Plan.load(show)
    elif strategy is None:
        raise click.UsageError('say how to batch, such as --strategy "Bucketing(max_tokens=16384)", or use --show FILE')
    else:
        settings = _parse_strategy(strategy)
        made = settings.plan(read(lengths, corpus, column, unit), seed=seed, epoch=epoch)
    if out is not None:
        made.save(out)
    click.echo(f"{made!r}\ndigest {made.digest}, dropped {len(made.dropped)} pieces", err=form is not None)
    if out is None or form:
        print_rows(made.to_frame().reset_index(), form)


def _parse_strategy(text: str) -> "Strategy":
    """Read a constructor call of a strategy with literal arguments, and nothing else."""
    import seqbatch

    classes = {name: getattr(seqbatch, name) for name in ("Padding", "Bucketing", "Splicing", "Chunking", "Packing")}
    try:
        call = ast.parse(text, mode="eval").body
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in classes):
            raise ValueError(f"expected a call of one of {', '.join(classes)}")
        if any(keyword.arg is None for keyword in call.keywords):
            raise ValueError("** is not understood")
        positional = [ast.literal_eval(argument) for argument in call.args]
        named = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
        strategy: Strategy = classes[call.func.id](*positional, **named)
    except (SyntaxError, ValueError, TypeError) as error:
        raise click.BadParameter(f"{text!r}: {error}", param_hint="--strategy") from error
    return strategy


def _draw_orread(
    path: str | None, corpus: str | None, column: str | None, unit: str | None,
    gamma: tuple[float, float] | None, lognormal: tuple[float, float] | None, count: int, seed: int,
) -> "IntArray":  # fmt: skip
    from seqbatch import distributions

    if gamma is None and lognormal is None:
        return read(path, corpus, column, unit)
    if path or corpus or (gamma and lognormal):
        raise click.UsageError("give one of LENGTHS, --corpus, --gamma and --lognormal")
    drawn = distributions.gamma(*gamma) if gamma else distributions.lognormal(*lognormal or ())
    array: IntArray = drawn.lengths(count, seed=seed)
    return array


def _plot(frame: "pd.DataFrame", lengths: "IntArray", device: Any, path: str) -> None:
    from matplotlib.figure import Figure

    from seqbatch.plots import plot_efficiency, plot_throughput

    figure = Figure(figsize=(13, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    plot_efficiency(frame, lengths=lengths, ax=left)
    plot_throughput(frame, device=device, ax=right)
    figure.legend(*left.get_legend_handles_labels(), loc="outside right center", frameon=False)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    click.echo(f"wrote {path}", err=True)


if __name__ == "__main__":
    sys.exit(main())
