"""The attentive reader with four ways to normalize, beside LSTM, on cloze questions; see README.md beside this file.

python -m experiments.attentive_reader.run [--model BN-LSTM] [--seed 0] [--quick] [--full] [--plot]
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import click
import pandas as pd
import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from experiments.attentive_reader.data import Batch, Examples, load
from experiments.attentive_reader.figure import PAPER, draw
from experiments.attentive_reader.model import VARIANTS, AttentiveReader
from seqbatch.measure import environment
from seqbatch.rnn import estimate_population

HERE = Path(__file__).parent
KEY = ["model", "seed", "device"]
POPULATION = 10  # training batches that the statistics of an evaluation come from


@dataclass(frozen=True)
class Settings:
    """How to train.

    Attributes:
        hidden: Units of a direction, and the size of word vectors.
        batch: Examples of a batch.
        rate: Adam's.
        clip: Largest norm of a gradient.
        drop: Dropout.
        updates: How many.
        every: Updates between two evaluations.
        most_words: Of a document.
        most_question: Words of a question.
        least: How often a word must stand in the training part to have a vector of its own.
    """

    hidden: int = 48
    batch: int = 64
    rate: float = 1e-2
    clip: float = 10.0
    drop: float = 0.0
    updates: int = 300
    every: int = 50
    most_words: int = 40
    most_question: int = 20
    least: int = 3


def full(name: str) -> Settings:
    """The paper's settings of a model (arXiv 1603.09025, appendix D; dropout from its code, updates from figure 4)."""
    star = "*" in name
    return Settings(
        hidden=240,
        batch=40 if star else 64,
        rate=8e-4 if star else 8e-5,
        clip=10.0,
        drop=0.5,
        updates=800_000,
        every=1000,
        most_words=400,
        most_question=100,
        least=1,
    )


@torch.no_grad()
def evaluate(model: AttentiveReader, batches: Iterable[Batch]) -> tuple[float, float]:
    """Percent of wrong answers, and the mean loss."""
    model.eval()
    wrong = count = total = 0.0
    for batch in batches:
        logits = model(batch)
        wrong += float((logits.argmax(1) != batch.answer).sum())
        total += float(cross_entropy(logits, batch.answer, reduction="sum"))
        count += len(batch.answer)
    return 100 * wrong / count, total / count


def train(
    name: str, parts: tuple[Examples, Examples], settings: Settings, seed: int, device: str = "cpu"
) -> tuple[dict[str, Any], list[dict[str, Any]], AttentiveReader]:
    """Train a model; evaluate it with statistics of the population as it goes.

    Returns:
        The row of the run, the rows of its evaluations, and the model.
    """
    torch.manual_seed(seed)
    examples, held_out = parts
    model = AttentiveReader(VARIANTS[name], examples.words, examples.longest, settings.hidden, settings.drop).to(device)
    optimizer = torch.optim.Adam(model.parameters(), settings.rate, fused=True)
    stream = (batch.to(device) for batch in examples.batches(settings.batch, seed))
    population = [batch.to(device) for batch in islice(examples.batches(settings.batch, seed=1000), POPULATION)]
    valid = [batch.to(device) for batch in held_out.batches(128, train=False)]
    curve: list[dict[str, Any]] = []
    losses: list[torch.Tensor] = []
    begin, spent = time.perf_counter(), 0.0
    for update, batch in enumerate(islice(stream, settings.updates), 1):
        model.train()
        loss = cross_entropy(model(batch), batch.answer)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        if update % settings.every and update != settings.updates:
            continue
        mean = float(torch.stack(losses).mean())  # waits for the device
        spent += time.perf_counter() - begin
        if VARIANTS[name].cell:
            estimate_population(model, population)
        error, cost = evaluate(model, valid)
        curve.append({"update": update, "train_loss": mean, "valid_loss": cost, "valid_error": error})
        losses, begin = [], time.perf_counter()
    best = min(curve, key=lambda row: row["valid_error"])
    row = {
        "best_error": round(best["valid_error"], 2),
        "best_update": best["update"],
        "last_error": round(curve[-1]["valid_error"], 2),
        "last_train_loss": round(curve[-1]["train_loss"], 4),
        "ms_per_update": round(1e3 * spent / settings.updates, 1),
        "parameters": sum(p.numel() for p in model.parameters()) - model.embed.weight.numel(),
    }
    return row, [{k: round(v, 4) for k, v in point.items()} for point in curve], model


def record(path: Path, rows: list[dict[str, Any]], key: list[str]) -> None:
    """Add rows to a file, in place of those with the same key."""
    frame = pd.DataFrame(rows)
    if path.exists():
        frame = pd.concat([pd.read_csv(path), frame])
    frame.drop_duplicates(key, keep="last").to_csv(path, index=False)


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """Means and ranges over the seeds, beside the paper's minima."""
    order = [name for name in VARIANTS if name in set(frame.model)]
    table = frame.groupby("model").agg(
        seeds=("seed", "count"),
        best_error=("best_error", "mean"),
        low=("best_error", "min"),
        high=("best_error", "max"),
        best_update=("best_update", "mean"),
        last_error=("last_error", "mean"),
        train_loss=("last_train_loss", "mean"),
        ms_per_update=("ms_per_update", "median"),
    )
    return table.loc[order].assign(paper=[PAPER.get(name) for name in order]).round(2)


def describe(parts: tuple[Examples, Examples]) -> None:
    """Print the sizes of the parts, and how much is wrong without reading."""
    for name, part in zip(("train", "valid"), parts, strict=True):
        mean = part.documents.lengths.mean()
        print(
            f"{name}: {len(part.questions)} questions, documents of {mean:.1f} words on average and "
            f"{part.longest[0]} at most, {part.words} words; wrong without reading: {part.guesses}"
        )


@click.command()
@click.option("--model", "models", multiple=True, type=click.Choice(list(VARIANTS)), help="Only this; may be repeated.")
@click.option("--seed", "seeds", multiple=True, type=int, default=(0, 1, 2), show_default=True)
@click.option("--rate", type=float, help="Another learning rate; writes nothing.")
@click.option("--device", default="cpu", show_default=True, type=click.Choice(["cpu", "cuda"]))
@click.option("--quick", is_flag=True, help="One seed, 60 updates; writes nothing.")
@click.option("--full", "as_paper", is_flag=True, help="The paper's sizes and settings, for a GPU.")
@click.option("--plot", is_flag=True, help="Only draw figure.png again, from the rows.")
def main(
    models: tuple[str, ...],
    seeds: tuple[int, ...],
    rate: float | None,
    device: str,
    quick: bool,
    as_paper: bool,
    plot: bool,
) -> None:
    """Train all models, one run at a time; add rows to results.csv and curves.csv; draw figure.png."""
    torch.set_num_threads(1)
    machine = environment(device)
    names, rows = models or tuple(VARIANTS), []
    seeds = seeds[:1] if quick else seeds
    results, curves = (HERE / f"{kind}{'-full' if as_paper else ''}.csv" for kind in ("results", "curves"))
    with tqdm(total=0 if plot else len(names) * len(seeds), desc="attentive_reader", disable=None) as bar:
        for seed in () if plot else seeds:
            for name in names:  # the models take turns, so that drift hits all alike
                settings = full(name) if as_paper else Settings()
                if rate or quick:
                    settings = replace(settings, rate=rate or settings.rate, updates=60 if quick else settings.updates)
                parts = load(settings.most_words, settings.most_question, settings.least)
                if not rows:
                    describe(parts)
                row, curve, _ = train(name, parts, settings, seed, device)
                key = {"model": name, "seed": seed, "device": device}
                rows.append(key | row)
                if not quick and not rate:
                    record(results, [rows[-1] | vars(settings) | machine], KEY)
                    record(curves, [key | point for point in curve], [*KEY, "update"])
                bar.set_postfix_str(f"{name} {row['best_error']:.1f} %")
                bar.update()
    writes = not quick and not rate
    print(summary(pd.read_csv(results).query("device == @device") if writes else pd.DataFrame(rows)).to_string())
    if writes:
        draw(pd.read_csv(curves).query("device == @device"), HERE / f"figure{'-full' if as_paper else ''}.png")


if __name__ == "__main__":
    main()
