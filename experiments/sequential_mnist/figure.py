"""The curves of both models, as in the paper's figure 2, and gradients over time, as in its figure 1 (a)."""

from pathlib import Path
from typing import Any

import pandas as pd

__all__ = ["draw_curves", "draw_gradients"]

LINES = (  # model, column's ending, label, colour, style
    ("LSTM", "", "LSTM", "#00629b", "-"),
    ("BN-LSTM", "", "BN-LSTM, population", "#c44e00", "-"),
    ("BN-LSTM", "_batch", "BN-LSTM, batch", "#c44e00", ":"),
    ("BN-LSTM", "_running", "BN-LSTM, running", "#7a7a7a", "--"),
)
FORMS = {"sum": "tanh(BN(W_h h + W_x x))", "terms": "tanh(BN(W_h h) + BN(W_x x))"}


def draw_curves(curves: pd.DataFrame, path: Path) -> None:
    """Validation accuracy above, loss below, one column an order; mean and range of the seeds."""
    orders = list(dict.fromkeys(curves.order))
    plt = _pyplot()
    figure, axes = plt.subplots(2, len(orders), figsize=(4.4 * len(orders), 6), squeeze=False, layout="constrained")
    for i, order in enumerate(orders):
        for row, column in zip(axes, ("valid_accuracy", "valid_loss"), strict=True):
            for model, ending, label, colour, style in LINES:
                one = curves[(curves.order == order) & (curves.model == model)]
                if one.empty:
                    continue
                seeds = one.groupby("update")[column + ending].agg(["mean", "min", "max"])
                row[i].plot(seeds.index, seeds["mean"], style, color=colour, label=label, linewidth=1.6)
                row[i].fill_between(seeds.index, seeds["min"], seeds["max"], color=colour, alpha=0.15, linewidth=0)
            _tidy(row[i], xlim=(0, None))
        axes[0][i].set(ylim=(0, 100))
        axes[0][i].set_title(f"pixels {order}, {curves.seed.nunique()} seeds", loc="left")
        axes[1][i].set(ylim=(0, 2.6), xlabel="updates")
    axes[0][0].set_ylabel("validation accuracy, %")
    axes[1][0].set_ylabel("validation loss, nats")
    axes[1][0].legend(frameon=False, loc="lower left")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_gradients(rows: pd.DataFrame, path: Path) -> None:
    """One row of panels an order of pixels, one panel a form of the RNN, one line a gamma."""
    plt = _pyplot()
    orders, gammas = list(dict.fromkeys(rows.order)), sorted(set(rows.gamma))
    forms = list(dict.fromkeys(zip(rows.form, rows.recurrent, strict=True)))
    colours = plt.get_cmap("viridis")([0.9 * i / max(len(gammas) - 1, 1) for i in range(len(gammas))])
    size = (3 * len(forms), 2.9 * len(orders))
    figure, axes = plt.subplots(
        len(orders), len(forms), figsize=size, squeeze=False, sharex=True, sharey=True, layout="constrained"
    )
    for order, line in zip(orders, axes, strict=True):
        for (form, recurrent), ax in zip(forms, line, strict=True):
            panel = rows[(rows.order == order) & (rows.form == form) & (rows.recurrent == recurrent)]
            for gamma, colour in zip(gammas, colours, strict=True):
                one = panel[panel.gamma == gamma]
                ax.plot(one.step, one.norm, color=colour, label=f"{gamma:g}", linewidth=1.4)
                ax.fill_between(one.step, one.low, one.high, color=colour, alpha=0.15, linewidth=0)
            _tidy(ax, yscale="log", xlim=(0, rows.step.max()), ylim=(1e-30, 1e30))
            ax.set_title(f"{FORMS[form]}\nW_h {recurrent}, pixels {order}", loc="left", fontsize="small")
        line[0].set_ylabel("|dL/dh_t|, mean over images")
    for ax in axes[-1]:
        ax.set_xlabel("t")
    axes[0][0].legend(frameon=False, title="initial gamma", fontsize="small", ncols=2)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot


def _tidy(ax: Any, **settings: Any) -> None:
    ax.set(**settings)
    ax.grid(color="0.9")
    ax.spines[["top", "right"]].set_visible(False)
