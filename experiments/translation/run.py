"""SRU and LSTM translate English into Chinese, each with three ways to batch pairs; see README.md beside this file.

python -m experiments.translation.run [--rnn SRU] [--strategy "token budget"] [--quick]
"""

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import click
import pandas as pd
import torch

from experiments.lm_strategies.rows import Elsewhere, machine
from experiments.sru_classification.run import record
from experiments.translation.model import RNNS
from experiments.translation.pairs import PAIRS, Corpus
from experiments.translation.report import report
from experiments.translation.train import RATES, STRATEGIES, Settings, train

HERE = Path(__file__).parent
KEY = ["model", "strategy", "lr", "seed"]
SAMPLES = 12  # test sentences whose translations are kept, evenly over the lengths


@click.command()
@click.option("--rnn", "rnns", multiple=True, type=click.Choice(list(RNNS)), help="Only this; may be repeated.")
@click.option("--strategy", "strategies", multiple=True, type=click.Choice(list(STRATEGIES)), help="Only this.")
@click.option("--seed", "seeds", multiple=True, type=int, default=(0,), show_default=True, help="May be repeated.")
@click.option("--epochs", default=Settings.epochs, show_default=True)
@click.option("--size", default=Settings.size, show_default=True, help="Of embeddings and layers.")
@click.option("--lr", type=float, help="Adam's first learning rate; by default what was chosen for each kind of layer.")
@click.option(
    "--pairs",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Other pairs than English and Chinese: gzipped lines of source, tab, target. Writes nothing.",
)
@click.option("--quick", is_flag=True, help="Two epochs over a tenth of the pairs, half the size; writes nothing.")
def main(
    rnns: tuple[str, ...],
    strategies: tuple[str, ...],
    seeds: tuple[int, ...],
    epochs: int,
    size: int,
    lr: float | None,
    pairs: Path | None,
    quick: bool,
) -> None:
    """Train on one thread, one run at a time; add rows to results.csv, curves.csv and samples.csv as runs finish."""
    if find_spec("sacrebleu") is None:  # said now, not after the first training
        raise click.ClickException("BLEU needs sacrebleu: pip install -c constraints.txt '.[integrations]'")
    torch.set_num_threads(1)
    settings = Settings(size=size, epochs=epochs, lr=lr)
    if quick:
        settings = replace(settings, size=size // 2, epochs=2)
    corpus = Corpus.read(pairs or PAIRS, every=10 if quick else 1)
    test = corpus.parts["test"]
    stride = max(len(test.texts) // SAMPLES, 1)
    shown = range(stride // 2, len(test.texts), stride)
    for seed in seeds:
        for rnn in rnns or RNNS:
            for strategy in strategies or STRATEGIES:
                elsewhere = Elsewhere()
                row, curve, found = train(corpus, rnn, strategy, settings, seed)
                key = {"model": rnn, "strategy": strategy, "lr": lr or RATES[rnn], "seed": seed}
                row |= {"elsewhere": elsewhere.share()}
                print(", ".join(f"{name} {value}" for name, value in (key | row).items()), flush=True)
                if quick or pairs:
                    continue
                texts = [{"source": test.texts[i][0], "reference": test.texts[i][1]} for i in shown]
                samples = [key | text | {"translation": found[i]} for text, i in zip(texts, shown, strict=True)]
                record(HERE / "results.csv", [key | row | machine("cpu")], KEY)
                record(HERE / "curves.csv", [key | point for point in curve], [*KEY, "epoch"])
                record(HERE / "samples.csv", samples, [*KEY, "source", "reference"])
    if not quick and not pairs and (HERE / "speeds.csv").exists():
        report(*(pd.read_csv(HERE / f"{name}.csv") for name in ("results", "curves", "speeds", "samples")))


if __name__ == "__main__":
    main()
