"""Draw a timeline: a row per rank, a box per action."""

from typing import TYPE_CHECKING, Any

from seqbatch.pipeline.timeline import Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw"]

_FORWARD = ("#bcd7ec", "#7fb2d9", "#4a8fc4", "#2f689b")
_BACKWARD = ("#fbd9ad", "#f5b06a", "#e58a35", "#b9611a")
"""From a rank's first stage to its last; stages beyond the fourth begin anew."""
_ALONE = 1  # the shade where each rank has one stage
_DARK = 2  # from this shade on numbers are white
_IDLE: dict[str, Any] = {"facecolor": "#f6f6f4", "edgecolor": "0.82", "hatch": "////", "linewidth": 0}
_ROW = 0.84  # height of a box
_TEXT = 6.0, 9.0  # points: least size that can be read, and largest
_INCHES = 11.0, 0.42


def draw(timeline: Timeline, ax: "Axes | None" = None) -> "Axes":
    """Draw when each rank does what: forwards blue, backwards orange, the number of the unit in each, idle hatched.

    A rank's later stages are darker. Numbers are left out where boxes are too narrow for them. The axis counts mean
    forwards of a stage if forwards of all stages take as long, else seconds or milliseconds.

    Args:
        timeline: Of `simulate`, or one that was measured.
        ax: Where to draw; None makes a figure.

    Raises:
        ModuleNotFoundError: matplotlib, of the extra ``plot``, is missing.

    >>> from seqbatch.pipeline.schedules import schedule
    >>> from seqbatch.pipeline.timeline import simulate
    >>> draw(simulate(schedule("wavefront", stages=4, chunks=8), 1.0, 2.0)).get_title(loc="left")
    "wavefront: 4 stages, 8 chunks; idle 27.3%; 0.34 of one device's time"
    """
    from seqbatch.command_line import check_matplotlib

    check_matplotlib("draw()")
    table = timeline.timetable
    ax = ax if ax is not None else _new_axes(table.ranks)
    scale, unit = _axis(timeline)
    unit += "; darker: a rank's later stages" if table.stages > table.ranks else ""
    total = timeline.makespan / scale
    ax.set(xlim=(0, total or 1), ylim=(table.ranks - 0.5, -0.5), xlabel=unit, yticks=range(table.ranks))
    ax.set_yticklabels([_row(timeline, rank) for rank in range(table.ranks)])
    ax.tick_params(axis="y", length=0)
    ax.spines[["top", "right", "left"]].set_visible(False)
    for rank in range(table.ranks):
        ax.barh(rank, total, height=_ROW, zorder=0, **_IDLE)
    for backward in (False, True):
        for stage in range(table.stages):
            _draw_stage(ax, timeline, stage, backward, scale)
    _write_numbers(ax, timeline, scale)
    ax.set_title(_title(timeline), loc="left", fontsize=10)
    _legend(ax, timeline)
    return ax


def _draw_stage(ax: "Axes", timeline: Timeline, stage: int, backward: bool, scale: float) -> None:
    """The boxes of a stage one way, with white edges that leave most of a narrow box."""
    start, end = (times[int(backward), stage] / scale for times in (timeline.start, timeline.end))
    width = _points(ax, ax.bbox.width) * float((end - start).mean()) * scale / (timeline.makespan or 1)
    ax.barh([timeline.rank_of(stage)] * len(start), end - start, left=start, height=_ROW, edgecolor="white",
            color=_colour(timeline, stage, backward), linewidth=min(0.7, 0.12 * width), zorder=1)  # fmt: skip


def _colour(timeline: Timeline, stage: int, backward: bool) -> str:
    return (_BACKWARD if backward else _FORWARD)[_shade(timeline, stage)]


def _shade(timeline: Timeline, stage: int) -> int:
    table = timeline.timetable
    return stage // table.ranks % len(_FORWARD) if table.stages > table.ranks else _ALONE


def _write_numbers(ax: "Axes", timeline: Timeline, scale: float) -> None:
    """The number of the unit in each box that has room for it."""
    table = timeline.timetable
    across = _points(ax, ax.bbox.width) / (timeline.makespan or 1) * (timeline.end - timeline.start)
    most = min(0.8 * _points(ax, ax.bbox.height) * _ROW / table.ranks, _TEXT[1])
    sizes = (1.45 * across / len(str(table.units - 1))).clip(0, most)
    for action in (action for order in table.orders for action in order):
        place = int(action.backward), action.stage, action.unit
        if sizes[place] < _TEXT[0]:
            continue
        middle = float(timeline.start[place] + timeline.end[place]) / 2 / scale
        dark = _shade(timeline, action.stage) >= _DARK
        ax.text(middle, timeline.rank_of(action.stage), str(action.unit), ha="center", va="center_baseline",
                fontsize=float(sizes[place]), color="white" if dark else "0.15", zorder=2)  # fmt: skip


def _points(ax: "Axes", pixels: float) -> float:
    figure: Any = ax.figure
    return float(pixels * 72 / figure.dpi)


def _axis(timeline: Timeline) -> tuple[float, str]:
    """Seconds of one tick of the axis, and what it counts."""
    forward = (timeline.end - timeline.start)[0]
    each = float(forward.mean())
    if each > 0 and float(forward.max() - forward.min()) < 1e-9 * timeline.makespan:
        return each, "time, in forwards of one stage and unit"
    return (1.0, "time (s)") if timeline.makespan >= 1 else (1e-3, "time (ms)")


def _row(timeline: Timeline, rank: int) -> str:
    stages = [str(stage) for stage in range(timeline.timetable.stages) if timeline.rank_of(stage) == rank]
    if len(stages) == 1:
        return f"rank {rank}"
    return f"rank {rank}\nstages {', '.join(stages)}" if len(stages) <= 4 else f"rank {rank}"


def _title(timeline: Timeline) -> str:
    table, work = timeline.timetable, float(timeline.busy.sum())
    looped = f" on {table.ranks} ranks" if table.ranks != table.stages else ""
    share = timeline.makespan / work if work else 1.0
    return (
        f"{table.name}: {table.stages} stages{looped}, {table.units} chunks; idle {timeline.bubble:.1%}; {share:.2f} "
        "of one device's time"
    )


def _legend(ax: "Axes", timeline: Timeline) -> None:
    """What the colours are, beside the title."""
    from matplotlib.legend_handler import HandlerTuple
    from matplotlib.patches import Patch

    firsts = range(0, timeline.timetable.stages, timeline.timetable.ranks)[: len(_FORWARD)]
    handles: list[Any] = [
        tuple(Patch(color=_colour(timeline, stage, backward)) for stage in firsts) for backward in (False, True)
    ]
    handles.append(Patch(**_IDLE))
    ax.legend(
        handles, ["forward", "backward", "idle"], ncols=3, loc="lower right", bbox_to_anchor=(1.005, 1.0),
        frameon=False, fontsize=9, borderaxespad=0.2, columnspacing=1.2, handletextpad=0.5,
        handler_map={tuple: HandlerTuple(ndivide=None, pad=0)},
    )  # fmt: skip


def _new_axes(ranks: int) -> "Axes":
    from matplotlib.figure import Figure

    return Figure(figsize=(_INCHES[0], _INCHES[1] * max(ranks, 2) + 1.1), layout="constrained").subplots()
