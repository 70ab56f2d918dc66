"""Figures: what strategies use and what lanes bring (Unno's 2015 talk), and what the numbers rest on.

Each draws into a matplotlib axes. A strategy keeps its own marker and line style, so that the figures
read without colour.
"""

from collections.abc import Iterable
from itertools import cycle
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from seqbatch.plan import BatchPlan, Plan
    from seqbatch.simulate import DeviceModel

__all__ = ["plot_batches", "plot_efficiency", "plot_lengths", "plot_measured", "plot_prediction", "plot_throughput"]

_MARKERS = "os^Dv<>PX*p"
_LINES = ("-", "--", "-.", ":")
_COLOURS = ("#1b1b1b", "#c44e00", "#00629b", "#6a3d9a", "#2c7a2c", "#8c6d1f")
_POINTS: dict[str, Any] = {"markersize": 5, "markerfacecolor": "white"}
_SHADES = ("#1f4e79", "#7fb2d9", "#3f80b5", "#bcd7ec", "#2f689b")
_MOST_BATCHES = 16
"""Batches drawn where none are named: many narrow windows say no more than some, and take space."""
_BAND = 0.15
"""The share by which a prediction may be off to lie in the band that is drawn."""
_BINS = 60


def plot_efficiency(frame: "pd.DataFrame", *, lengths: ArrayLike | None = None, ax: "Axes | None" = None) -> "Axes":
    """Draw padding efficiency against batch size, simulated as points, zero padding's theory as a line.

    Args:
        frame: Rows of `simulate`, or any with the columns strategy, batch_size and padding_efficiency.
        lengths: The lengths simulated, for the line of theory, which there is none of pairs; None leaves it out.
        ax: Where to draw; None makes a figure.
    """
    from seqbatch.distributions import expected_efficiency

    ax = ax or _new_axes()
    sizes = sorted(frame["batch_size"].dropna().unique())
    if lengths is not None and np.ndim(lengths) == 1 and sizes:
        theory = [expected_efficiency(lengths, int(size)) for size in sizes]
        ax.plot(sizes, theory, color="0.6", linewidth=5, solid_capstyle="round", label="padding, exact expectation",
                zorder=1)  # fmt: skip
    _draw(ax, frame, "padding_efficiency")
    ax.set(xlabel="batch size (lanes of mean length)", ylabel="real tokens / cells", ylim=(0, 1.04))
    ax.set_title("What is computed and what is used", loc="left")
    return ax


def plot_throughput(frame: "pd.DataFrame", *, device: "DeviceModel | None" = None, ax: "Axes | None" = None) -> "Axes":
    """Draw predicted real tokens per second against batch size.

    Args:
        frame: Rows of `simulate`, or any with the columns strategy, batch_size and tokens_per_s.
        device: The model that predicted them, to mark its knee; None leaves the mark out.
        ax: Where to draw; None makes a figure.
    """
    ax = ax or _new_axes()
    _draw(ax, frame.assign(kilo=frame["tokens_per_s"] / 1e3), "kilo")
    _mark_knee(ax, device)
    ax.set(xlabel="batch size (lanes of mean length)", ylabel="predicted thousand real tokens / s")
    ax.set_ylim(bottom=0)
    ax.set_title("What more lanes bring", loc="left")
    return ax


def plot_measured(frame: "pd.DataFrame", *, device: "DeviceModel | None" = None, ax: "Axes | None" = None) -> "Axes":
    """Draw real tokens per second against batch size: predicted as lines, measured as points with their range.

    Args:
        frame: Rows with the columns strategy, batch_size, predicted, measured, low and high, all four in real
            tokens per second; NaN where nothing was measured.
        device: The model that predicted them, to mark its knee; None leaves the mark out.
        ax: Where to draw; None makes a figure.
    """
    ax = ax or _new_axes()
    for name, (marker, colour, line) in _styles(frame).items():
        rows = frame[frame["strategy"] == name].dropna(subset="batch_size")
        if not len(rows):
            continue
        ax.plot(rows["batch_size"], rows["predicted"] / 1e3, color=colour, linestyle=line, linewidth=1.2)
        rows = rows.dropna(subset="measured")
        middle = rows["measured"] / 1e3
        spread = np.nan_to_num([middle - rows["low"] / 1e3, rows["high"] / 1e3 - middle])  # no range if measured once
        ax.errorbar(rows["batch_size"], middle, np.maximum(spread, 0), fmt=marker, color=colour, capsize=2, **_POINTS)
        ax.plot([], [], marker=marker, color=colour, linestyle=line, label=_spaced(name), linewidth=1.2, **_POINTS)
    _size_axis(ax, frame)
    _mark_knee(ax, device)
    ax.set(xlabel="batch size (lanes of mean length)", ylabel="thousand real tokens / s")
    ax.set_ylim(bottom=0)
    ax.set_title("What more lanes bring", loc="left")
    return ax


def plot_prediction(frame: "pd.DataFrame", points: "pd.DataFrame | None" = None, *, ax: "Axes | None" = None) -> "Axes":
    """Draw predicted against measured tokens per second: on the diagonal the model is right, in the band to 15 %.

    Args:
        frame: Rows with the columns strategy, batch_size, predicted and measured; those not measured are left out.
        points: What the device model was calibrated by: full grids with the columns steps, lanes, seconds,
            predicted (seconds) and fitted (whether the fit used it); None leaves them out.
        ax: Where to draw; None makes a figure.
    """
    ax = ax or _new_axes()
    if points is not None:
        cells = points["steps"] * points["lanes"]
        for fitted, marker, label in ((True, "+", "full grids, fitted"), (False, "x", "full grids, held out")):
            some = points["fitted"].astype(bool) == fitted
            if some.any():
                ax.plot((cells / points["seconds"])[some], (cells / points["predicted"])[some], marker, color="0.35",
                        markersize=6, label=label)  # fmt: skip
    for name, (marker, colour, _) in _styles(frame).items():
        rows = frame[frame["strategy"] == name].dropna(subset=["measured", "predicted"])
        if len(rows):
            ax.plot(rows["measured"], rows["predicted"], marker, color=colour, label=_spaced(name), **_POINTS)
    seen = np.concatenate([np.asarray(line.get_xydata(), float).ravel() for line in ax.lines] or [np.empty(0)])
    seen = seen[np.isfinite(seen) & (seen > 0)]
    low, high = (seen.min() / 1.3, seen.max() * 1.3) if len(seen) else (1.0, 10.0)
    ends = np.array([low, high])
    ax.fill_between(ends, ends * (1 - _BAND), ends * (1 + _BAND), color="0.9", zorder=0, label=f"within {_BAND:.0%}")
    ax.plot(ends, ends, color="0.6", linewidth=1, zorder=1)
    ax.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
    ticks = [n * 10.0**e for e in range(-3, 12) for n in (1, 2, 5) if low <= n * 10.0**e <= high]
    labels = [f"{tick / 1e3:g}k" if tick >= 1e3 else f"{tick:g}" for tick in ticks]
    ax.set_xticks(ticks, labels)
    ax.set_yticks(ticks, labels)
    ax.minorticks_off()
    ax.set(xlabel="measured real tokens / s", ylabel="predicted real tokens / s")
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_title("How far predictions can be trusted", loc="left")
    return ax


def plot_lengths(lengths: ArrayLike, *, ax: "Axes | None" = None) -> "Axes":
    """Draw a histogram of lengths and the three families fitted to them.

    Empty sequences are left out, and where few are far longer than the others, so is the longest 1 %, which the
    axis then says. Lengths that no family can be fitted to are drawn alone, with a note.

    Args:
        lengths: (N,) integers, at least one above 0.
        ax: Where to draw; None makes a figure.
    """
    from seqbatch.fitting import fit
    from seqbatch.lengths import as_lengths

    ax = ax or _new_axes()
    array = as_lengths(lengths)
    array = array[array > 0]
    longest, most = int(array.max()), int(np.quantile(array, 0.99, method="higher"))
    cut = longest > 2 * most
    width = max(1, -(-(most if cut else longest) // _BINS))
    edges = np.arange(0, (most if cut else longest) + width, width) + 0.5
    share = np.histogram(array, edges)[0] / len(array)
    ax.bar(edges[:-1] + width / 2, 100 * share, width=0.9 * width, color="#bcd7ec", label="lengths")
    try:
        for found, line, colour in zip(fit(array), _LINES, _COLOURS, strict=False):
            expected = np.diff(found.distribution.length_cdf(edges - 0.5))
            ax.plot(edges[:-1] + width / 2, 100 * expected, line, color=colour, linewidth=1.2,
                    label=f"{found.distribution}, KS {found.ks_distance:.3f}")  # fmt: skip
    except ValueError:
        ax.annotate("no distribution fitted", (0.98, 0.95), xycoords="axes fraction", ha="right", va="top")
    if array.mean() < edges[-1]:
        ax.axvline(array.mean(), color="0.6", linewidth=1, label="mean")
    ax.set_xlabel(f"length (1 % are longer, up to {longest:,})" if cut else "length")
    ax.set_ylabel(f"% of sequences in {width} lengths" if width > 1 else "% of sequences")
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_title(f"{len(array):,} lengths, mean {array.mean():.4g}", loc="left")
    return ax


def plot_batches(
    plan: "Plan", batches: Iterable[int] | None = None, *, steps: int = 200, lanes: int = 24, ax: "Axes | None" = None
) -> "Axes":
    """Draw batches as grids, steps rightwards and lanes downwards: pieces in shades, padding hatched.

    Neighbours in a lane differ in shade; a sequence that goes on in a later batch keeps its own. Context, which
    is computed but carries no loss, is veiled.

    Args:
        plan: Any plan.
        batches: Their numbers; None takes the first ones in the order in which one rank trains, at most 16.
        steps: Room for this many steps; what is beyond is cut off, and marked "...".
        lanes: Lanes drawn of a batch. Below it is its whole shape, steps × lanes, where there is room.
        ax: Where to draw; None makes a figure.
    """
    if plan.pairs:
        raise ValueError("a plan of pairs has two grids a batch: draw one side, plan.sides[0] or plan.sides[1]")
    ax = ax or _new_axes()
    gap = max(1, steps // 50)
    begin = tallest = 0
    shades: dict[int, int] = {}
    for number in plan.assign(0, 1)[0][:_MOST_BATCHES] if batches is None else batches:
        if begin + gap > steps:
            break
        batch = plan[number]
        room = _Room(begin, min(batch.steps, steps - begin), min(batch.lanes, lanes))
        _draw_grid(ax, batch, room, shades)
        shape, cut = f"{batch.steps}×{batch.lanes}", "⋮ " * (room.lanes < batch.lanes)
        below = cut + shape if room.steps > 0.014 * steps * len(cut + shape) else cut
        ax.annotate(below, (begin, room.lanes), (0, -2), textcoords="offset points", va="top", fontsize="x-small")
        if room.steps < batch.steps:
            ax.annotate("...", (steps, room.lanes / 2), (2, 0), textcoords="offset points", annotation_clip=False)
        begin, tallest = begin + room.steps + gap, max(tallest, room.lanes)
    ax.set(xlim=(-0.5, steps + 0.5), ylim=(tallest + 0.2, -0.2), xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    ax.set_title(f"{plan.strategy or 'plan'}: {plan.padding_efficiency:.1%} used", loc="left")
    return ax


class _Room(NamedTuple):
    """Where a batch is drawn, and how much of it."""

    begin: int
    steps: int
    lanes: int


def _draw_grid(ax: "Axes", batch: "BatchPlan", room: _Room, shades: dict[int, int]) -> None:
    """Draw one batch; `shades` says which sequences have a shade already."""
    from matplotlib.patches import Rectangle

    ax.add_patch(Rectangle((room.begin, 0), room.steps, room.lanes, facecolor="white", edgecolor="0.55", hatch="/////",
                           linewidth=0.5))  # fmt: skip
    boxes: dict[int, list[tuple[float, ...]]] = {}
    context: list[tuple[float, ...]] = []
    last_lane, last_shade, fresh = -1, -1, len(shades)
    for piece in np.lexsort((batch.step, batch.lane)):
        lane, step, sequence = int(batch.lane[piece]), int(batch.step[piece]), int(batch.sequence[piece])
        if lane >= room.lanes or step >= room.steps:
            continue
        if sequence not in shades:
            fresh += lane == last_lane and fresh % len(_SHADES) == last_shade
            shades[sequence] = fresh % len(_SHADES)
            fresh += 1
        last_lane, last_shade = lane, shades[sequence]
        end = min(step + int(batch.length[piece]), room.steps)
        boxes.setdefault(last_shade, []).append((room.begin + step, lane, room.begin + end, lane + 1))
        left, right = (0 if c is None else int(c[piece]) for c in (batch.left_context, batch.right_context))
        for first, after in ((step, step + left), (step + int(batch.length[piece]) - right, end)):
            if first < min(after, end):
                context.append((room.begin + first, lane + 0.1, room.begin + min(after, end), lane + 0.9))
    for shade, corners in sorted(boxes.items()):
        ax.add_patch(_boxes(corners, facecolor=_SHADES[shade], edgecolor="white", linewidth=0.6))
    if context:
        ax.add_patch(_boxes(context, facecolor="white", alpha=0.65, linewidth=0))


def _boxes(corners: list[tuple[float, ...]], **style: Any) -> Any:
    """One path of many rectangles (left, top, right, bottom), which takes a third of the bytes of as many patches."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    points = [point for x, y, u, v in corners for point in ((x, y), (u, y), (u, v), (x, v), (x, y))]
    codes = [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY]
    return PathPatch(Path(points, codes * len(corners)), **style)


def _styles(frame: "pd.DataFrame") -> dict[str, tuple[str, str, str]]:
    """The marker, colour and line of each strategy, the same in all figures of a frame."""
    looks = zip(cycle(_MARKERS), cycle(_COLOURS), cycle(_LINES), strict=False)
    return dict(zip(frame["strategy"].unique(), looks, strict=False))


def _draw(ax: "Axes", frame: "pd.DataFrame", column: str) -> None:
    """Draw a line for each strategy that was sized, over a logarithmic axis of batch sizes."""
    for name, (marker, colour, line) in _styles(frame).items():
        rows = frame[frame["strategy"] == name].dropna(subset="batch_size")
        if not len(rows):
            continue
        ax.plot(rows["batch_size"], rows[column], marker=marker, color=colour, linestyle=line, label=_spaced(name),
                linewidth=1.2, **_POINTS)  # fmt: skip
    _size_axis(ax, frame)


def _size_axis(ax: "Axes", frame: "pd.DataFrame") -> None:
    sizes = sorted(frame["batch_size"].dropna().unique())
    ax.set_xscale("log", base=2)
    ax.set_xticks(sizes, [f"{size:g}" for size in sizes])
    ax.minorticks_off()
    ax.grid(axis="y", color="0.9")
    ax.spines[["top", "right"]].set_visible(False)


def _mark_knee(ax: "Axes", device: "DeviceModel | None") -> None:
    """Mark the knee where it lies within or near the sizes drawn; far out it would squeeze the lines."""
    low, high = ax.get_xlim()
    if device is None or not low / 4 < device.knee < 4 * high:
        return
    ax.axvline(device.knee, color="0.6", linewidth=1)
    side, name = (-1, "right") if device.knee**2 > low * high else (1, "left")  # so that the label stays inside
    ax.annotate(f"knee: {device.knee:.0f} lanes", (device.knee, 0.02), (4 * side, 0), ha=name, fontsize="small",
                color="0.35", xycoords=("data", "axes fraction"), textcoords="offset points")  # fmt: skip


def _spaced(name: str) -> str:
    return name.replace("_", " ")


def _new_axes() -> "Axes":
    from matplotlib.figure import Figure

    return Figure(figsize=(6, 4), layout="constrained").subplots()
