"""Draw speed-up over a loop against the number of lanes; reads results-cpu.csv, writes lanes.png.

python -m experiments.step_graph.plot
"""

from pathlib import Path

import pandas as pd

HERE = Path(__file__).parent


def main() -> None:
    """One panel for each cell."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = pd.read_csv(HERE / "results-cpu.csv")
    rows = rows[(rows.direction == "both") & rows.ms.notna() & rows.way.isin(["parallelize", "by hand"])]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    for axis, (cell, hand) in zip(axes, (("LSTM", "nn.LSTM"), ("SRUv1", "seqbatch.rnn.SRU")), strict=True):
        for way, style in (("parallelize", "-o"), ("by hand", "--s")):
            for width, colour in ((128, "tab:blue"), (512, "tab:red")):
                some = rows[(rows.cell == cell) & (rows.way == way) & (rows.width == width)].sort_values("lanes")
                label = f"{way if way == 'parallelize' else hand}, {width} units"
                axis.plot(some.lanes, some.loop_over_it, style, color=colour, label=label, markersize=4)
                if way == "parallelize":
                    axis.fill_between(some.lanes, some.ratio_low, some.ratio_high, color=colour, alpha=0.15, lw=0)
        axis.set_xscale("log", base=2)
        axis.set_xticks([1, 2, 4, 8, 16, 32, 64, 128], [str(n) for n in (1, 2, 4, 8, 16, 32, 64, 128)])
        axis.set(title=f"{cell}, {128} steps, forward and backward", xlabel="lanes")
        axis.axhline(1, color="black", lw=0.8)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    axes[0].set_ylabel("times as fast as a loop over the step")
    axes[0].set_ylim(bottom=0)
    figure.savefig(HERE / "lanes.png", dpi=130)
    print(f"wrote {HERE / 'lanes.png'}")


if __name__ == "__main__":
    main()
