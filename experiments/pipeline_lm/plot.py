"""Draw results-cpu.csv: speed-ups measured and simulated side by side; print the table of the README.

python -m experiments.pipeline_lm.plot [--rows results-cpu.csv] [--to results-cpu.png]
"""

from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

HERE = Path(__file__).parent
CHEN = 1.6  # times one GPU, on two: Chen+15, abstract
WIDTH = 0.38
TITLES = {
    "lstm-512": "4 LSTM layers of 512\n256 steps, 32 lanes",
    "lstm-256": "4 LSTM layers of 256\n256 steps, 8 lanes",
    "sru-512": "6 SRU layers of 512\n256 steps, 32 lanes",
    "chen": "LSTM 512 | softmax of 10,000\n64 steps, 32 lanes",
    "chen-late": "the same,\nlate gradients",
}


def label(row: "pd.Series[object]") -> str:
    """What a bar is."""
    if row["mode"] == "late":
        return "late"
    name = "" if row["mode"] == "full" else f"{row['mode']}\n"
    where = "" if row["processes"] == 2 else "\n1 process"
    return f"{name}M = {row['chunks']}{where}"


def draw(ax: Axes, rows: pd.DataFrame) -> None:
    """One model: a pair of bars for each way, ranges on the measured ones."""
    x = np.arange(len(rows))
    spread = [rows["speedup"] - rows["speedup_low"], rows["speedup_high"] - rows["speedup"]]
    bars = ax.bar(x - WIDTH / 2, rows["speedup"], WIDTH, yerr=spread, color="#1b1b1b", ecolor="0.6", label="measured")
    for bar, noisy in zip(bars, rows["noisy"], strict=True):
        bar.set_hatch("//" if noisy else "")
        bar.set_edgecolor("white")
    simulated = rows["simulated_speedup"].fillna(0.0)
    ax.bar(x + WIDTH / 2, simulated, WIDTH, color="#c44e00", label="simulated")
    ax.axhline(1, color="0.5", linewidth=0.8)
    ax.axhline(CHEN, color="#00629b", linewidth=1, linestyle="--")
    ax.set_xticks(x, [label(row) for _, row in rows.iterrows()], fontsize="x-small")
    ax.set_xlim(-0.6, len(rows) - 0.4)
    ax.set_title(TITLES.get(rows["model"].iloc[0], rows["model"].iloc[0]), fontsize="small")


def table(frame: pd.DataFrame) -> Iterator[str]:
    """Lines of Markdown."""
    yield "| model | mode | chunks | processes | alone, s | pipeline, s | speed-up (range) | simulated | probe |"
    yield "|---|---|---:|---:|---:|---:|---:|---:|---:|"
    for _, row in frame.iterrows():
        simulated = "" if pd.isna(row["simulated_speedup"]) else f"{row['simulated_speedup']:.2f}"
        yield (
            f"| {row['model']} | {row['mode']} | {row['chunks']} | {row['processes']} | {row['alone_s']:.3f} | "
            f"{row['pipeline_s']:.3f} | {row['speedup']:.2f} ({row['speedup_low']:.2f}-{row['speedup_high']:.2f}) | "
            f"{simulated} | {row['probe']:.2f}{' (noisy)' if row['noisy'] else ''} |"
        )


@click.command()
@click.option("--rows", type=click.Path(exists=True, path_type=Path), default=HERE / "results-cpu.csv")
@click.option("--to", type=click.Path(path_type=Path), default=HERE / "results-cpu.png")
def main(rows: Path, to: Path) -> None:
    """Draw and print."""
    frame = pd.read_csv(rows)
    groups = [group for _, group in frame.groupby("model", sort=False)]
    figure = Figure(figsize=(1.5 + 0.8 * len(frame), 4.2), layout="constrained")
    ratios = {"width_ratios": [len(group) + 0.5 for group in groups]}
    axes = figure.subplots(1, len(groups), sharey=True, squeeze=False, gridspec_kw=ratios)[0]
    for ax, group in zip(axes, groups, strict=True):
        draw(ax, group)
    axes[0].set_ylabel("times as fast as one process, no pipeline")
    axes[0].text(
        -0.5, CHEN + 0.02, f"Chen+15: {CHEN} on two GPUs", color="#00629b", fontsize="small", verticalalignment="bottom"
    )
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(to, dpi=100)
    print("\n".join(table(frame)))
    if frame["noisy"].any():
        print("hatched bars and (noisy) rows: two independent processes slowed each other down by more than 15 %")
    print(f"wrote {to}")


if __name__ == "__main__":
    main()
