"""``seqbatch compare``: which strategy trains fastest on given lengths, cell and device."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from seqbatch.command_line import (
    check_matplotlib,
    check_plot,
    failing_readably,
    numbers,
    output,
    print_rows,
    read,
    source,
    strategy_names,
)
from seqbatch.files import check_writable

if TYPE_CHECKING:
    from seqbatch.compare import Comparison
    from seqbatch.measure import Calibration
    from seqbatch.simulate import DeviceModel

__all__ = ["compare"]

_QUICK_SECONDS, _SECONDS = 75.0, 300.0
_QUICK_SIZES, _SIZES = (8, 32, 128), (4, 16, 64, 256)
_SHOWN = ["strategy", "batch_size", "padding_efficiency", "batches", "predicted", "measured", "error", "memory_mib",
          "loader_share", "note"]  # fmt: skip


@click.command()
@source
@output
@click.option("--cell", type=click.Choice(["sru", "lstm", "bnlstm", "nn.LSTM"]), default="sru", show_default=True)
@click.option("--hidden", type=click.IntRange(1), default=256, show_default=True, help="Units of a layer.")
@click.option("--layers", type=click.IntRange(1), default=1, show_default=True)
@click.option("--device", default="cpu", show_default=True, metavar="cpu|cuda|cuda:N")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float64"]), default="float32", show_default=True)
@click.option("--batch-sizes", callback=numbers(int), help="[default: 4,16,64,256; with --quick 8,32,128]")
@click.option("--strategies", default="", metavar="all|NAME,...", help="Which strategies; the main seven by default.")
@click.option("--chunk-size", type=click.IntRange(1), default=64, show_default=True, help="Steps of a window or chunk.")
@click.option("--seconds", type=click.FloatRange(1), help="About how long to measure.  [default: 300]")
@click.option("--quick", is_flag=True, help="Measure for 75 seconds at three batch sizes.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--plot", type=click.Path(dir_okay=False), help="Draw the talk's two figures, measured, into FILE.")
@click.option("--html", type=click.Path(dir_okay=False), help="Write a page with tables and figures to FILE.")
@failing_readably
def compare(
    lengths: str | None, corpus: str | None, column: str | None, unit: str | None, form: str | None, cell: str,
    hidden: int, layers: int, device: str, dtype: str, batch_sizes: tuple[int, ...] | None, strategies: str,
    chunk_size: int, seconds: float | None, quick: bool, seed: int, plot: str | None, html: str | None,
) -> None:  # fmt: skip
    """Predict and measure real tokens per second of each strategy, and recommend one.

    Measured is forward and backward of recurrent layers over batches as a loader makes them. The prediction comes from
    a few full grids that are measured first. Ctrl-C ends the measuring; rows that were measured are
    printed and written.
    """
    check_plot(plot)
    if html is not None:
        check_matplotlib("--html")
        check_writable(html)
    from seqbatch.compare import compare as run

    found = run(
        read(lengths, corpus, column, unit), cell=cell, hidden=hidden, layers=layers, device=device, dtype=dtype,
        strategies=strategy_names(strategies),
        batch_sizes=batch_sizes or (_QUICK_SIZES if quick else _SIZES), chunk_size=chunk_size,
        seconds=seconds or (_QUICK_SECONDS if quick else _SECONDS), seed=seed, progress=True,
    )  # fmt: skip
    _print(found, form)
    _write(found, plot, html, corpus or lengths or "")
    if found.interrupted:
        raise click.exceptions.Exit(130)


def _write(found: "Comparison", plot: str | None, html: str | None, name: str) -> None:
    if plot is not None:
        from matplotlib.figure import Figure

        from seqbatch.plots import plot_efficiency, plot_measured

        figure = Figure(figsize=(13, 4.8), layout="constrained")
        left, right = figure.subplots(1, 2)
        plot_efficiency(found.frame, lengths=found.lengths, ax=left)
        plot_measured(found.frame, ax=right)
        figure.legend(*left.get_legend_handles_labels(), loc="outside right center", frameon=False)
        figure.savefig(plot, dpi=150)
        click.echo(f"wrote {plot}", err=True)
    if html is not None:
        from seqbatch.report import comparison_section, write_page

        title = "standard input" if name == "-" else Path(name).name
        write_page(html, f"seqbatch compare: {title}", [comparison_section(found, title)])
        click.echo(f"wrote {html}", err=True)


def _print(found: "Comparison", form: str | None) -> None:
    advice = found.recommendation
    if form:
        more = {
            "recommendation": advice and advice.__dict__,
            "setting": found.setting,
            "environment": found.environment,
            "calibration": found.calibration and _numbers(found.calibration),
            "interrupted": found.interrupted,
        }
        print_rows(found.frame, form, **more)
        return
    frame = found.frame[_SHOWN]
    print_rows(frame if (frame["note"] != "").any() else frame.drop(columns="note"), None)
    if found.calibration is not None:
        device = found.calibration.device
        click.echo(
            f"\npredicted with {device.batch_us:.0f} us a batch, {device.step_us:.1f} us a step and "
            f"{device.cell_ns:.0f} ns a cell{_large(device)}, as measured here"
        )
    if advice is not None:
        click.echo(f"\n{advice.sentence}\n\n{advice.code}")


def _large(device: "DeviceModel") -> str:
    more, cells = device.large_cell_ns, device.large_batch
    return f" ({more:.0f} more for each beyond {cells:,.0f} of a batch)" if more else ""


def _numbers(calibration: "Calibration") -> dict[str, object]:
    points = json.loads(calibration.points.to_json(orient="records"))
    return {**calibration.device.__dict__, "points": points}
