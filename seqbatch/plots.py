"""The two figures of Unno's 2015 talk: what padding uses, and what more lanes bring.

Both take the frame of :func:`seqbatch.simulate.simulate` and draw into a matplotlib axes. Each strategy
keeps its own marker and line style, so that the figures read without colour.
"""

from itertools import cycle
from typing import TYPE_CHECKING, Any

from numpy.typing import ArrayLike

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from seqbatch.simulate import DeviceModel

__all__ = ["plot_efficiency", "plot_throughput"]

_MARKERS = "os^Dv<>PX*p"
_LINES = ("-", "--", "-.", ":")
_COLOURS = ("#1b1b1b", "#c44e00", "#00629b", "#6a3d9a", "#2c7a2c", "#8c6d1f")


def plot_efficiency(frame: "pd.DataFrame", *, lengths: ArrayLike | None = None, ax: "Axes | None" = None) -> "Axes":
    """Draw padding efficiency against batch size, simulated as points, zero padding's theory as a line.

    Args:
        frame: Rows of `simulate`.
        lengths: The lengths simulated, for the line of theory; None leaves it out.
        ax: Where to draw; None makes a figure.
    """
    from seqbatch.distributions import expected_efficiency

    ax = ax or _new_axes()
    sizes = sorted(frame["batch_size"].dropna().unique())
    if lengths is not None and sizes:
        theory = [expected_efficiency(lengths, int(size)) for size in sizes]
        ax.plot(
            sizes,
            theory,
            color="0.6",
            linewidth=5,
            solid_capstyle="round",
            label="padding, exact expectation",
            zorder=1,
        )
    _draw(ax, frame, "padding_efficiency")
    ax.set(xlabel="batch size (lanes of mean length)", ylabel="real tokens / cells", ylim=(0, 1.04))
    ax.set_title("What is computed and what is used", loc="left")
    return ax


def plot_throughput(frame: "pd.DataFrame", *, device: "DeviceModel | None" = None, ax: "Axes | None" = None) -> "Axes":
    """Draw predicted real tokens per second against batch size.

    Args:
        frame: Rows of `simulate`.
        device: The model that predicted them, to mark its knee; None leaves the mark out.
        ax: Where to draw; None makes a figure.
    """
    ax = ax or _new_axes()
    _draw(ax, frame.assign(kilo=frame["tokens_per_s"] / 1e3), "kilo")
    if device is not None and 0 < device.knee < float("inf"):
        ax.axvline(device.knee, color="0.6", linewidth=1)
        ax.annotate(f"knee: {device.knee:.0f} lanes", (device.knee, 0.02), (4, 0), xycoords=("data", "axes fraction"),
                    textcoords="offset points", color="0.35", fontsize="small")  # fmt: skip
    ax.set(xlabel="batch size (lanes of mean length)", ylabel="predicted thousand real tokens / s")
    ax.set_ylim(bottom=0)
    ax.set_title("What more lanes bring", loc="left")
    return ax


def _draw(ax: "Axes", frame: "pd.DataFrame", column: str) -> None:
    """Draw a line for each strategy that was sized, over a logarithmic axis of batch sizes."""
    styles: Any = zip(_MARKERS, cycle(_COLOURS), cycle(_LINES), strict=False)
    for (marker, colour, line), (name, rows) in zip(
        styles, frame.dropna(subset="batch_size").groupby("strategy", sort=False), strict=False
    ):
        ax.plot(rows["batch_size"], rows[column], marker=marker, color=colour, linestyle=line, linewidth=1.2,
                markersize=5, markerfacecolor="white", label=name.replace("_", " "))  # fmt: skip
    sizes = sorted(frame["batch_size"].dropna().unique())
    ax.set_xscale("log", base=2)
    ax.set_xticks(sizes, [f"{size:g}" for size in sizes])
    ax.minorticks_off()
    ax.grid(axis="y", color="0.9")
    ax.spines[["top", "right"]].set_visible(False)


def _new_axes() -> "Axes":
    from matplotlib.figure import Figure

    return Figure(figsize=(6, 4), layout="constrained").subplots()
