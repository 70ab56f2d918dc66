"""Accuracy against training time, as the published library's README shows it."""

from pathlib import Path

import pandas as pd

__all__ = ["draw"]

STYLES = {"SRU": ("#c44e00", "o"), "LSTM": ("#00629b", "s"), "CNN": ("#1b1b1b", "^")}


def draw(runs: pd.DataFrame, epochs: pd.DataFrame, path: Path) -> None:
    """One panel a data set: validation accuracy of each run after each epoch, the epochs chosen marked."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    names = list(dict.fromkeys(runs.dataset))
    figure, axes = plt.subplots(1, len(names), figsize=(3.6 * len(names), 3.2), squeeze=False, layout="constrained")
    for name, ax in zip(names, axes[0], strict=True):
        for model, (colour, marker) in STYLES.items():
            for run in runs[(runs.dataset == name) & (runs.model == model)].itertuples():
                curve = epochs[(epochs.dataset == name) & (epochs.model == model) & (epochs.seed == run.seed)]
                spent = curve.seconds.cumsum()
                ax.plot(spent, curve.valid, color=colour, linewidth=1, alpha=0.6)
                best = curve.epoch == run.best_epoch
                label = model if run.seed == 0 else None
                ax.plot(spent[best], curve.valid[best], marker, color=colour, label=label, markersize=6)
        ax.set_title(f"{name.upper()}, 3 seeds" if name == names[0] else name.upper(), loc="left")
        ax.set(xlabel="seconds of training", xlim=(0, None))
        ax.grid(color="0.9")
        ax.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("validation accuracy, %")
    axes[0][0].legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=110)
    plt.close(figure)
