"""Draw results-cpu.csv: prediction against measurement, and speed against lanes; print the bars.

python -m experiments.prediction.figure [--device cpu]
"""

from pathlib import Path

import click
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

HERE = Path(__file__).parent
MARKERS = {"sru": ("o", "#1b1b1b"), "lstm": ("s", "#c44e00"), "nn.LSTM": ("^", "#00629b")}
LINES = {"padding": ("o", ":"), "token_budget": ("s", "--"), "splicing": ("^", "-")}


def draw_prediction(ax: Axes, frame: pd.DataFrame) -> None:
    """Every row, on logarithmic axes, with the diagonal and 15 and 30 % around it."""
    ends = np.array([frame["measured"].min() / 1.3, frame["measured"].max() * 1.3])
    for width, shade in ((0.3, "0.93"), (0.15, "0.85")):
        ax.fill_between(
            ends, ends * (1 - width), ends * (1 + width), color=shade, zorder=0, label=f"within {width:.0%}"
        )
    for (cell, corpus), rows in frame.groupby(["cell", "corpus"], sort=False):
        marker, colour = MARKERS[cell]
        face = {"E": "white", "L": colour, "W": "0.75"}[corpus[0]]
        label = f"{cell}, {corpus.split(' ')[0]}"
        ax.plot(
            rows["measured"], rows["predicted"], marker, color=colour, markerfacecolor=face, markersize=5, label=label
        )
    ax.set(xscale="log", yscale="log", xlabel="measured real tokens / s", ylabel="predicted real tokens / s")
    ax.legend(frameon=False, fontsize="x-small")


def draw_lanes(ax: Axes, frame: pd.DataFrame, cell: str) -> None:
    """Measured speed against lanes, with ranges; the prediction as a thin line."""
    for name, rows in frame[frame["cell"] == cell].groupby("strategy", sort=False):
        marker, line = LINES[name]
        scaled = rows[["measured", "low", "high", "predicted"]] / 1e3
        errors = [scaled["measured"] - scaled["low"], scaled["high"] - scaled["measured"]]
        label = name.replace("_", " ")
        ax.errorbar(rows["batch_size"], scaled["measured"], errors, marker=marker, linestyle=line, color="#1b1b1b",
                    markerfacecolor="white", label=label)  # fmt: skip
        ax.plot(rows["batch_size"], scaled["predicted"], line, color="#c44e00", linewidth=0.8)
    ax.set_xscale("log", base=2)
    ax.set(xlabel="batch size (lanes of mean length)", ylabel="thousand real tokens / s", title=f"{cell}, 128 units")
    ax.set_ylim(bottom=0)
    ax.legend(frameon=False, fontsize="small")


@click.command()
@click.option("--device", default="cpu", show_default=True)
def main(device: str) -> None:
    """Draw both figures beside the rows and print the errors and the recommendations' distance from the best."""
    frame = pd.read_csv(HERE / f"results-{device}.csv").dropna(subset=["measured", "predicted"])
    rows, lanes = frame[frame["part"] == "prediction"], frame[frame["part"] == "lanes"]
    for part, some in (("prediction", rows), ("lanes", lanes)):
        for (corpus, cell), group in some.groupby(["corpus", "cell"], sort=False):
            error, best = group["error"].abs(), group.loc[group["strategy"] != "chunking", "measured"].max()
            chosen = group.loc[group["recommended"], "measured"].iloc[0]
            print(
                f"{part}, {corpus}, {cell}: {len(group)} rows, error median {error.median():.1%}, "
                f"worst {error.max():.1%}; within 30 %: {(error <= 0.3).mean():.0%}; "
                f"recommended / best {chosen / best:.3f}"
            )
    error = rows["error"].abs()
    print(f"all: median {error.median():.1%}, worst {error.max():.1%}, within 30 %: {(error <= 0.3).mean():.0%}")
    figure = Figure(figsize=(6, 5.5), layout="constrained")
    draw_prediction(figure.subplots(), rows)
    figure.savefig(HERE / f"prediction-{device}.png", dpi=100)
    cells = list(lanes["cell"].unique())
    figure = Figure(figsize=(5 * len(cells), 4), layout="constrained")
    for ax, cell in zip(np.atleast_1d(figure.subplots(1, len(cells))), cells, strict=True):
        draw_lanes(ax, lanes, cell)
    figure.savefig(HERE / f"lanes-{device}.png", dpi=100)


if __name__ == "__main__":
    main()
