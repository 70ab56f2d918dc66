"""Draw a table of rows as dots: python -m experiments.asr_lengths.figure [results-cpu.csv]."""

from pathlib import Path

import click
import pandas as pd
from matplotlib.figure import Figure

from experiments.asr_lengths.forms import Row

HERE = Path(__file__).parent
MARKS = {"nn.LSTM": ("s", "#1b1b1b"), "LSTM": ("o", "#c44e00"), "SRU": ("^", "#00629b")}


@click.command(help=__doc__)
@click.argument("table", type=click.Path(exists=True, path_type=Path), default=HERE / "results-cpu.csv")
def main(table: Path) -> None:
    """Write a PNG beside the table."""
    rows = pd.read_csv(table)
    axes = Figure(figsize=(7.6, 4), layout="constrained").subplots()
    for place, row in rows.iterrows():
        marker, colour = MARKS[row["cell"]]
        rate, low, high = (row[f"frames_per_s{end}"] / 1e3 for end in ("", "_low", "_high"))
        axes.plot([low, high], [place, place], color=colour, linewidth=1.5)
        axes.plot(rate, place, marker=marker, color=colour, markersize=7, linestyle="none", markerfacecolor="white")
        axes.annotate(
            f"{row['ratio']:.2f}",
            (high, place),
            (9, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
        )
    axes.axvline(rows["frames_per_s"][0] / 1e3, color="0.6", linewidth=1, linestyle="--")
    axes.set_yticks(range(len(rows)), [Row(r.plan, r.form, r.cell).name for r in rows.itertuples()])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12 * rows["frames_per_s_high"].max() / 1e3)
    axes.set_xlabel("thousand real frames / s: median, range, ratio to the first row")
    axes.figure.suptitle("Training a bidirectional encoder on LibriSpeech's lengths", x=0.02, ha="left", fontsize=11)
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.figure.savefig(table.with_suffix(".png"), dpi=90)
    print(f"wrote {table.with_suffix('.png')}")


if __name__ == "__main__":
    main()
