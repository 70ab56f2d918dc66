"""Tables, in Markdown, and the figure of the rows that run.py and speed.py have written.

python -m experiments.translation.report
"""

from pathlib import Path

import pandas as pd

from experiments.lm_strategies.report import table
from experiments.translation.train import PADDING, RATES, STRATEGIES

__all__ = ["QUIET", "report", "speed_table"]

HERE = Path(__file__).parent
QUIET = 0.3  # turns of one thread during which others used more of the two cores are left out
STYLES = {PADDING: ("#1b1b1b", "o"), "token budget": ("#c44e00", "s"), "16 pair buckets": ("#00629b", "^")}


def quiet(speeds: pd.DataFrame, limit: float = QUIET) -> pd.DataFrame:
    """Return the turns in which no row met more of other processes than `limit`, so that rows share their turns."""
    return speeds[speeds.groupby("turn")["elsewhere"].transform("max") <= limit]


def speed_table(speeds: pd.DataFrame, limit: float = QUIET) -> str:
    """Real tokens a second, median and range; ratios to zero padding with the same layers, turn by turn."""
    kept = quiet(speeds, limit)
    by_turn = kept.pivot(index="turn", columns=["model", "strategy"], values="tokens_per_s")
    lines = []
    for (model, strategy), rows in kept.groupby(["model", "strategy"], sort=False):
        own, ratio = rows["tokens_per_s"] / 1e3, by_turn[model, strategy] / by_turn[model, PADDING]
        lines.append({
            "": f"{model}, {strategy}",
            "turns": str(len(rows)),
            "padding efficiency: plan (sample)": f"{rows['plan_efficiency'].iloc[0]:.3f} "
            f"({rows['tokens'].sum() / rows['cells'].sum():.3f})",
            "tokens an update": f"{rows['tokens'].sum() / rows['batches'].sum():,.0f}",
            "k real tokens/s": f"{own.median():.2f} ({own.min():.2f}-{own.max():.2f})",
            "/ padding": f"{ratio.median():.2f} ({ratio.min():.2f}-{ratio.max():.2f})",
            "data path": f"{100 * rows['data_seconds'].sum() / rows['seconds'].sum():.1f} %",
        })  # fmt: skip
    return table(lines)


def training_table(results: pd.DataFrame, speeds: pd.DataFrame) -> str:
    """Losses and BLEU of each configuration, and the seconds that its tokens take at the speed measured apart."""
    rate = quiet(speeds).groupby(["model", "strategy"])["tokens_per_s"].median()
    lines = []
    order = {"model": list(RATES), "strategy": list(STRATEGIES)}
    ranked = {name: results[name].map(order[name].index) for name in order}
    ranked |= {"other": results["lr"] != results["model"].map(RATES)}
    results = results.loc[pd.DataFrame(ranked).sort_values(["other", "model", "strategy"]).index]
    for (model, strategy, lr), rows in results.groupby(["model", "strategy", "lr"], sort=False):
        tokens = rows["updates"] * rows["tokens_per_update"]
        lines.append({
            "": f"{model}, {strategy}",
            "rate": f"{lr:g}",
            "updates": f"{rows['updates'].mean():,.0f}",
            "validation": spread(rows["valid_loss"], 3),
            "test": spread(rows["test_loss"], 3),
            "BLEU": spread(rows["bleu"], 1),
            "seconds": f"{(tokens / rate[model, strategy]).mean():,.0f}",
        })  # fmt: skip
    return table(lines)


def spread(values: pd.Series, digits: int) -> str:
    """The mean, and the range where there are several."""
    text = f"{values.mean():.{digits}f}"
    return text + (f" ({values.min():.{digits}f}-{values.max():.{digits}f})" if len(values) > 1 else "")


def draw(curves: pd.DataFrame, speeds: pd.DataFrame, path: Path) -> None:
    """One panel a kind of layer: validation loss after each epoch, against what its tokens take at the quiet speed."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    rate = quiet(speeds).groupby(["model", "strategy"])["tokens_per_s"].median()
    models = list(dict.fromkeys(curves["model"]))
    figure, axes = plt.subplots(
        1, len(models), squeeze=False, figsize=(4.6 * len(models), 3.4), sharey=True, layout="constrained"
    )
    for model, ax in zip(models, axes[0], strict=True):
        for strategy in STRATEGIES:
            colour, marker = STYLES[strategy]
            own = curves[(curves["model"] == model) & (curves["strategy"] == strategy)]
            for i, (_, curve) in enumerate(own.groupby("seed")):
                seconds, label = curve["tokens"] / rate[model, strategy], None if i else strategy
                ax.plot(seconds, curve["valid_loss"], color=colour, marker=marker, markersize=4, label=label)
        ax.set_title(model, loc="left")
        ax.set(xlabel="seconds of training", xlim=(0, None))
        ax.grid(color="0.9")
        ax.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("validation loss, nats a target token")
    axes[0][0].legend(frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    print(f"wrote {path}")


def sample_table(samples: pd.DataFrame) -> str:
    """Sentences, references and each model's translation with the token budget."""
    some = samples[(samples["strategy"] == "token budget") & (samples["seed"] == samples["seed"].min())]
    wide = some.pivot(index=["source", "reference"], columns="model", values="translation").reset_index()
    wide = wide.sort_values("source", key=lambda column: column.str.len())
    return table(wide[["source", "reference", *dict.fromkeys(some["model"])]].fillna("").to_dict("records"))


def report(results: pd.DataFrame, curves: pd.DataFrame, speeds: pd.DataFrame, samples: pd.DataFrame) -> None:
    """Print the tables and draw figure.png, curves and samples with the learning rates of RATES."""
    curves, samples = (rows[rows["lr"] == rows["model"].map(RATES)] for rows in (curves, samples))
    for text in (speed_table(speeds), training_table(results, speeds), sample_table(samples)):
        print(f"\n{text}\n")
    draw(curves, speeds, HERE / "figure.png")


if __name__ == "__main__":
    report(*(pd.read_csv(HERE / f"{name}.csv") for name in ("results", "curves", "speeds", "samples")))
