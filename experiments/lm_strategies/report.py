"""Tables, in Markdown, and the figure of the rows that speed.py and train.py have written.

python -m experiments.lm_strategies.report [--target 1.9]
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from experiments.lm_strategies.train import TRAINED

HERE = Path(__file__).parent
BASELINE = "nn.LSTM", "padding"
QUIET = 0.1  # turns during which other processes used more of the cores are left out
COLOURS = ("#1b1b1b", "#8a8a8a", "#c44e00", "#8c6d1f", "#00629b", "#5aa9d6", "#00b3b3", "#6a3d9a", "#2c7a2c", "#a0205a")
DASHES = ("-", "--", "-", "--", "-", "--", ":", "-", "--", "-.")


def table(rows: list[dict[str, str]]) -> str:
    """Markdown of rows that share their columns; the first column is left-aligned."""
    names = list(rows[0])
    lines = [f"| {' | '.join(names)} |", f"|---|{'---:|' * (len(names) - 1)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row[name] for name in names)} |" for row in rows)])


def speed_tables(frame: pd.DataFrame) -> None:
    """Print, for each size and allocator setting, the speed of each row and the bars; ratios are turn by turn."""
    frame["turn"] = frame.groupby(["hidden", "malloc", "cell", "strategy"]).cumcount()
    kept = frame["elsewhere"] < QUIET
    print(f"\n{len(frame) - kept.sum()} of {len(frame)} turns left out: others used over {QUIET:.0%} of the cores")
    for (hidden, malloc), part in frame[kept].groupby(["hidden", "malloc"]):
        speeds = part.pivot(index="turn", columns=["cell", "strategy"], values="tokens_per_s")
        lines = []
        for (cell, name), rows in part.groupby(["cell", "strategy"], sort=False):
            own, sums = rows["tokens_per_s"] / 1e3, rows.sum(numeric_only=True)
            ratio = (speeds[cell, name] / speeds[BASELINE]).median()
            lines.append({
                "row": f"{name} + {cell}",
                "turns": str(len(rows)),
                "efficiency: plan (sample)": f"{rows['plan_efficiency'].iloc[0]:.3f} "
                f"({sums['tokens'] / sums['cells']:.3f})",
                "tokens an update": f"{sums['tokens'] / sums['batches']:,.0f}",
                "k real tokens/s (range)": f"{own.median():.1f} ({own.min():.1f}-{own.max():.1f})",
                "/ padding + nn.LSTM": f"{ratio:.2f}",
                "data path": f"{100 * sums['data_seconds'] / sums['seconds']:.2f} %",
            })  # fmt: skip
        print(f"\nhidden {hidden}, {malloc or 'allocator as it is'}\n\n{table(lines)}\n")
        for cell, against in (("sru", "sru"), ("lstm", "lstm"), ("lstm", "nn.LSTM")):
            print_ratio(part, cell, against)


def print_ratio(part: pd.DataFrame, cell: str, against: str) -> None:
    """Print splicing / padding of a cell, turn by turn, beside the ratio of their efficiencies in the same turns."""
    fast = part[(part["cell"] == cell) & (part["strategy"] == "splicing")].set_index("turn")
    slow = part[(part["cell"] == against) & (part["strategy"] == "padding")].set_index("turn")
    ratio = (fast["tokens_per_s"] / slow["tokens_per_s"]).dropna()
    expected = (fast["tokens"] / fast["cells"]) / (slow["tokens"] / slow["cells"])
    print(
        f"splicing + {cell} / padding + {against}: {ratio.median():.2f} ({ratio.min():.2f}-{ratio.max():.2f}); "
        f"of the ratio of efficiencies in the same turns: {(ratio / expected).median():.2f}"
    )


def floor_table(frame: pd.DataFrame) -> None:
    """Print the step beside its matrix products, and the profile's shares."""
    for hidden, part in frame.groupby("hidden"):
        turns = part[part["turn"] != "profile"].pivot(index="turn", columns="what", values="ms")
        ratio, middle = turns["step"] / turns["matrix products"], turns.median()
        print(
            f"\nhidden {hidden}: step {middle['step']:.1f} ms, matrix products {middle['matrix products']:.1f} ms, "
            f"ratio {ratio.median():.2f} ({ratio.min():.2f}-{ratio.max():.2f})"
        )
        profiled = part[part["turn"] == "profile"]
        print("; ".join(f"{what} {ms:.2f}" for what, ms in zip(profiled["what"], profiled["ms"], strict=True)))


def reached(curve: pd.DataFrame, target: float, axis: str) -> float:
    """Where a curve first reaches the target, on the line between two points; NaN if it does not."""
    loss, along = curve["loss"].to_numpy(), curve[axis].to_numpy()
    below = np.flatnonzero(loss <= target)
    if not len(below):
        return float("nan")
    i = below[0]
    if i == 0:
        return float(along[0])
    return float(along[i - 1] + (along[i] - along[i - 1]) * (loss[i - 1] - target) / (loss[i - 1] - loss[i]))


def training_table(results: pd.DataFrame, curves: pd.DataFrame, target: float) -> str:
    """A row a strategy: mean over seeds, and half the range as spread."""
    lines = []
    for name, rows in results.groupby("strategy", sort=False):
        own = curves[curves["strategy"] == name]
        to = {
            axis: [reached(curve, target, axis) for _, curve in own.groupby("seed")]
            for axis in ("seconds", "updates", "tokens")
        }
        lines.append({
            "strategy": str(name),
            "seeds": str(len(rows)),
            "updates": f"{rows['updates'].mean():,.0f}",
            "k real tokens/s": spread(rows["tokens_per_s"] / 1e3, 1),
            "final loss": spread(rows["final_loss"], 3),
            f"seconds to {target}": spread(to["seconds"], 1),
            f"updates to {target}": spread(to["updates"], 0),
            f"k tokens to {target}": spread(np.array(to["tokens"]) / 1e3, 0),
        })  # fmt: skip
    return table(lines)


def spread(values: Any, digits: int) -> str:
    """The mean, and half the range where there are several; a dash where some run has no value."""
    values = np.asarray(values, float)
    if not len(values) or np.isnan(values).any():
        return "not reached"
    half = (values.max() - values.min()) / 2
    return f"{values.mean():,.{digits}f}" + (f" ± {half:,.{digits}f}" if len(values) > 1 else "")


def draw(curves: pd.DataFrame, path: Path) -> None:
    """Loss against seconds and against tokens, a row of panels for each cell, the mean over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cells = [cell for cell in ("sru", "lstm") if (curves["cell"] == cell).any()]
    figure, panels = plt.subplots(len(cells), 2, figsize=(9, 3.4 * len(cells)), squeeze=False, sharey="row")
    for row, cell in zip(panels, cells, strict=True):
        for name, colour, dash in zip(TRAINED, COLOURS, DASHES, strict=True):
            own = curves[(curves["cell"] == cell) & (curves["strategy"] == name)]
            points = own[own["tokens"] > 0]
            points = points.assign(point=points.groupby("seed").cumcount()).groupby("point").mean(numeric_only=True)
            for panel, axis, unit in zip(row, ("seconds", "tokens"), (1, 1e3), strict=True):
                panel.plot(points[axis] / unit, points["loss"], dash, color=colour, linewidth=1.3, label=name)
        ticks = (1, 2, 5, 10, 20, 50), (100, 200, 500, 1000)
        for panel, label, at in zip(row, ("seconds of training", "thousand real tokens"), ticks, strict=True):
            panel.set(xlabel=label, xscale="log", ylim=(1.55, 2.6))
            panel.set_xticks(at, [str(tick) for tick in at])
            panel.minorticks_off()
            panel.grid(color="0.92")
        row[0].set_ylabel("nats / held-out character")
        row[0].set_title(cell.upper(), loc="left")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="lower center", ncols=4, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.09, 1, 1))
    figure.savefig(path, dpi=90)
    print(f"wrote {path}")


def main() -> None:
    """Print every table there are rows for, and draw the curves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=float, default=1.9, help="loss whose time is asked for, nats a character")
    parser.add_argument("--figure", type=Path, default=HERE / "curves.png")
    arguments = parser.parse_args()
    if (HERE / "speed.csv").exists():
        speed_tables(pd.read_csv(HERE / "speed.csv", keep_default_na=False))
    if (HERE / "floor.csv").exists():
        floor_table(pd.read_csv(HERE / "floor.csv"))
    if not (HERE / "results.csv").exists():
        return
    results, curves = pd.read_csv(HERE / "results.csv"), pd.read_csv(HERE / "curves.csv")
    results["group"], curves["group"] = (
        frame["cell"]
        + ", learning rate "
        + frame["schedule"]
        + np.where(frame["strategy"].isin(TRAINED), "", ", lanes")
        for frame in (results, curves)
    )
    for group, rows in results.groupby("group", sort=False):
        print(f"\n{group}\n\n{training_table(rows, curves[curves['group'] == group], arguments.target)}")
    curves = curves[curves["schedule"] == "linear"]
    draw(curves, arguments.figure)


if __name__ == "__main__":
    main()
