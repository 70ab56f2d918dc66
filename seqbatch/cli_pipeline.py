"""``seqbatch simulate-pipeline``: what a pipeline of layers gains, and when each rank does what."""

import math
from typing import TYPE_CHECKING, Any

import click

from seqbatch.command_line import check_plot, failing_readably, numbers, print_rows

if TYPE_CHECKING:
    from seqbatch.pipeline.timeline import Timeline

__all__ = ["simulate_pipeline"]


@click.command("simulate-pipeline")
@click.option("--stages", type=click.IntRange(1), required=True, help="Stages on all ranks together.")
@click.option("--chunks", type=click.IntRange(1), required=True,
              help="Pieces that a batch is cut into, in steps (wavefront) or in lanes.")  # fmt: skip
@click.option("--virtual", type=click.IntRange(1), default=1, show_default=True, help="Stages on each rank.")
@click.option("--schedule", "name", type=click.Choice(["wavefront", "gpipe", "1f1b"]), default="wavefront",
              show_default=True)  # fmt: skip
@click.option("--forward", callback=numbers(float), default="1", show_default=True, metavar="SECONDS,...",
              help="Of a chunk: one number, or one for each stage.")  # fmt: skip
@click.option("--backward", callback=numbers(float), default="2", show_default=True, metavar="SECONDS,...",
              help="Likewise.")  # fmt: skip
@click.option("--latency", type=click.FloatRange(0), default=0.0, show_default=True, metavar="SECONDS",
              help="That a message between two ranks is under way.")  # fmt: skip
@click.option("--transfer", type=click.FloatRange(0), default=0.0, show_default=True, metavar="SECONDS",
              help="That a message occupies its link.")  # fmt: skip
@click.option("--plot", type=click.Path(dir_okay=False), help="Draw the timeline into FILE.")
@click.option("--json", "form", flag_value="json", help="Print one JSON document.")
@failing_readably
def simulate_pipeline(
    stages: int, chunks: int, virtual: int, name: str, forward: tuple[float, ...], backward: tuple[float, ...],
    latency: float, transfer: float, plot: str | None, form: str | None,
) -> None:  # fmt: skip
    """Simulate layers on several devices, which work on different chunks of a batch at once.

    Prints the makespan of a batch in seconds, the share of time that ranks are idle (bubble), what the formula for
    equal chunks and free messages says, the speed-up over one device, and how many chunks a rank keeps activations of.

    Such as: seqbatch simulate-pipeline --stages 4 --chunks 8 --latency 0.1 --plot pipeline.png
    """
    check_plot(plot)
    import pandas as pd

    from seqbatch.pipeline.schedules import schedule
    from seqbatch.pipeline.timeline import simulate

    table = schedule(name, stages=stages, chunks=chunks, virtual=virtual)
    line = simulate(
        table, _per_stage("--forward", forward, stages), _per_stage("--backward", backward, stages),
        latency=latency, transfer=transfer,
    )  # fmt: skip
    if plot is not None:
        from seqbatch.pipeline.gantt import draw

        figure: Any = draw(line).figure
        figure.savefig(plot, dpi=120)
        click.echo(f"wrote {plot}", err=True)
    print_rows(pd.DataFrame([_row(line, virtual)]), form)


def _per_stage(option: str, seconds: tuple[float, ...], stages: int) -> float | tuple[float, ...]:
    if any(value < 0 for value in seconds):
        raise click.BadParameter(f"seconds cannot be negative, got {_listed(seconds)}", param_hint=option)
    if len(seconds) not in (1, stages):
        raise click.BadParameter(
            f"expected one number, or {stages}, one for each stage; got {len(seconds)}: {_listed(seconds)}",
            param_hint=option,
        )
    return seconds[0] if len(seconds) == 1 else seconds


def _listed(seconds: tuple[float, ...]) -> str:
    return ",".join(f"{value:g}" for value in seconds)


def _row(line: "Timeline", virtual: int) -> dict[str, Any]:
    from seqbatch.pipeline.timeline import bubble_formula

    table = line.timetable
    known = virtual == 1 or table.units >= table.ranks
    return {
        "schedule": table.name, "ranks": table.ranks, "stages": table.stages, "chunks": table.units,
        "makespan": line.makespan, "bubble": line.bubble,
        "formula": bubble_formula(table.stages, table.units, virtual) if known else math.nan,
        "speedup": float(line.busy.sum()) / line.makespan if line.makespan else math.nan,
        "peak_chunks": max(line.peak),
    }  # fmt: skip
