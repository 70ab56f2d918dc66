"""Curves of training, and bits per character of longer sequences than trained on."""

from pathlib import Path
from typing import Any

import pandas as pd

__all__ = ["draw"]

COLOURS = {"LSTM": "#1b1b1b", "BN-LSTM": "#c44e00", "BN-1": "#00629b", "BN-2": "#5b8c2a"}
STYLES = {
    "none": ("-", "o"),
    "population": ("-", "o"),
    "batch": ("--", "s"),
    "population, averaged over steps": (":", "^"),
}
LABELS = {
    "none": "",
    "population": ", per step",
    "batch": ", of the batch",
    "population, averaged over steps": ", averaged",
}


def draw(curves: pd.DataFrame, lengths: pd.DataFrame, path: Path) -> None:
    """Three panels: validation against updates; test against the length of sequences; by step in the longest."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(12.5, 3.9), layout="constrained")
    seeds = curves.seed.nunique()
    for model, colour in COLOURS.items():
        _line(axes[0], curves[curves.model == model], "updates", "valid_bpc", colour, ("-", "o"), model)
    axes[0].set_title(f"validation part, mean and range of {seeds} seeds", loc="left", fontsize=10)
    axes[0].set(xlabel="updates", ylabel="bits per character")
    two = lengths[lengths.model.isin(["LSTM", "BN-LSTM"])]
    longest, trained = int(two.steps.max()), int(two.steps.max() / 10)
    whole = two[(two["first"] == 0) & (two["last"] == two.steps)]
    for (model, kind), some in whole.groupby(["model", "statistics"], sort=False):
        _line(axes[1], some, "steps", "bpc", COLOURS[model], STYLES[kind], model + LABELS[kind])
    inner = two[(two.steps == longest) & (two["last"] - two["first"] < longest)]
    best = inner[inner.statistics == "population"].set_index(["seed", "first"]).bpc
    more = inner.bpc.to_numpy() - best.loc[list(zip(inner.seed, inner["first"], strict=True))].to_numpy()
    inner = inner.assign(step=(inner["first"] + inner["last"]) / 2, more=more)
    for (model, kind), some in inner[inner.statistics != "population"].groupby(["model", "statistics"], sort=False):
        _line(axes[2], some, "step", "more", COLOURS[model], STYLES[kind], model + LABELS[kind])
    axes[1].set_title("test part, cut into sequences of so many steps", loc="left", fontsize=10)
    axes[2].set_title(f"sequences of {longest}: bits more than BN-LSTM, per step", loc="left", fontsize=10)
    axes[2].axhline(0, color="0.6", linewidth=1)
    for ax, name, ticks in (
        (axes[1], "steps of a test sequence", sorted(two.steps.unique())),
        (axes[2], "step", (3, 10, 30, 100, 300, 1000)),
    ):
        ax.set(xscale="log", xlabel=name)
        ax.set_xticks(ticks, ticks)
        ax.minorticks_off()
        ax.axvline(trained, color="0.6", linewidth=1, linestyle="--", zorder=0)
        ax.annotate(" longest in training", (trained, 0.01), xycoords=("data", "axes fraction"), fontsize=8)
    for ax in axes:
        ax.grid(color="0.9")
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    print(f"wrote {path}")


def _line(ax: Any, rows: pd.DataFrame, x: str, y: str, colour: str, style: tuple[str, str], label: str) -> None:
    """The mean over the seeds as a line, their range as a band."""
    if not len(rows):
        return
    found = rows.groupby(x)[y].agg(["mean", "min", "max"])
    line, marker = style
    ax.plot(found.index, found["mean"], line, color=colour, marker=marker, markersize=4, linewidth=1.4, label=label)
    ax.fill_between(found.index, found["min"], found["max"], color=colour, alpha=0.15, linewidth=0)
