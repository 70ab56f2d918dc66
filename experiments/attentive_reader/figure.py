"""Validation error against updates, as figure 4a of the paper shows it."""

from pathlib import Path

import pandas as pd

__all__ = ["PAPER", "draw"]

PAPER = {"LSTM": 50.3, "BN-LSTM": 49.5, "BN-everywhere": 50.0, "BN-e*": 47.1, "BN-e**": 43.9}  # section 5.4

_STYLES = {
    "LSTM": ("#1b1b1b", "-"),
    "BN-LSTM": ("#00629b", "-"),
    "BN-everywhere": ("#2a8c4a", "-"),
    "BN-e*": ("#c44e00", "-"),
    "BN-e**": ("#8a2be2", "-"),
    "BN-e**, wrap": ("#8a2be2", ":"),
    "LSTM, bidirectional": ("#1b1b1b", ":"),
    "BN-everywhere, padding counted": ("#2a8c4a", ":"),
}


def draw(curves: pd.DataFrame, path: Path) -> None:
    """Two panels, validation error and training loss: the mean over seeds, with their range as a band."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10.5, 4.2), layout="constrained")
    panels = (("valid_error", "validation error, %"), ("train_loss", "training loss"))
    for ax, (column, label) in zip(axes, panels, strict=True):
        for model, (colour, line) in _STYLES.items():
            groups = curves[curves.model == model].groupby("update")[column]
            mean = groups.mean()
            if len(mean):
                ax.plot(mean.index, mean, line, color=colour, label=model)
                ax.fill_between(mean.index, groups.min(), groups.max(), color=colour, alpha=0.1, linewidth=0)
        ax.set(xlabel="updates", xlim=(0, None))
        ax.set_title(label, loc="left")
        ax.grid(color="0.9")
        ax.spines[["top", "right"]].set_visible(False)
    axes[1].legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)
