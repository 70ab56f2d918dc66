"""LSTM against BN-LSTM on characters, and on longer sequences than trained on; see README.md beside this file.

python -m experiments.char_lm.run [--part rates|curves|splicing] [--quick]
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import pandas as pd
import torch
from tqdm import tqdm

from experiments.char_lm.figure import draw
from experiments.char_lm.model import (
    FULL,
    FULL_RATE,
    MODELS,
    SMALL,
    CharacterLM,
    Settings,
    bits,
    to_evaluate,
    train,
)
from experiments.char_lm.splicing import WAYS
from experiments.char_lm.splicing import run as run_spliced
from experiments.char_lm.text import Text
from experiments.sru_classification.run import record
from seqbatch.measure import environment
from seqbatch.rnn.bnlstm import Variant

HERE = Path(__file__).parent
PARTS = ("rates", "curves", "splicing")
GRIDS = dict.fromkeys(MODELS, (0.005, 0.01, 0.02, 0.04, 0.08))
GRIDS["bn"] += (0.16,)  # since the best of the others was the largest
RATES: dict[Variant, float] = {"none": 0.04, "bn": 0.08, "bn1": 0.04, "bn2": 0.04}  # by the rows of --part rates
CHECKS: dict[Variant, tuple[float, ...]] = {"none": (0.01, 0.02, 0.04), "bn": (0.02, 0.04, 0.08)}  # in full length
RATE_UPDATES, RATE_SEED, SPLICED_UPDATES = 100, 100, 150
QUICK = Settings(hidden=32, steps=50, batch=16, updates=20, every=10, population=5, test=8_000)
LENGTHS = (0.5, 1, 2, 5, 10)  # test sequences, in lengths of training
EDGES = (0, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)  # steps whose bits are given apart, in lengths of training


class Rows:
    """Rows of the tables, with the machine; written as they come, in place of those with the same key.

    Args:
        device: Where the models are.
        suffix: Of the files' names; None writes nothing.
    """

    def __init__(self, device: str, suffix: str | None) -> None:
        self.machine, self.device, self.suffix = environment(device), device, suffix

    def add(self, table: str, rows: list[dict[str, Any]], key: list[str], machine: bool = False) -> None:
        """Add rows to a table."""
        rows = [
            {name: round(x, 4) if isinstance(x, float) and x > 0.1 else x for name, x in row.items()} for row in rows
        ]
        if self.suffix is None:
            return print(pd.DataFrame(rows).to_string(index=False))
        more = self.machine | {"device": self.device} if machine else {}
        record(HERE / f"{table}{self.suffix}.csv", [row | more for row in rows], key)
        return None


def rates(text: Text, settings: Settings, rows: Rows, bar: tqdm) -> None:
    """Each model with each learning rate of its grid in a short run; some again in a long one."""
    for variant, lr, updates in rate_runs(settings):
        ends = replace(settings, updates=updates, every=updates)
        point = train(text, variant, lr, ends, seed=RATE_SEED, on_update=bar.update)[1][-1]
        rows.add("rates", [{"model": MODELS[variant], "lr": lr} | point], ["model", "lr", "updates"], machine=True)


def rate_runs(settings: Settings) -> list[tuple[Variant, float, int]]:
    """Model, learning rate and updates of the runs that learning rates are chosen by."""
    short = min(RATE_UPDATES, settings.updates)
    runs = [(variant, lr, short) for variant, grid in GRIDS.items() for lr in grid]
    return runs + [(variant, lr, settings.updates) for variant, grid in CHECKS.items() for lr in grid]


def curves(
    text: Text, settings: Settings, rates: dict[Variant, float], seeds: tuple[int, ...], rows: Rows, bar: tqdm
) -> None:
    """Each model with its learning rate: its curve, and its bits on the test part in sequences of several lengths."""
    for seed in seeds:
        for variant, lr in rates.items():
            key = {"model": MODELS[variant], "seed": seed}
            model, curve = train(text, variant, lr, settings, seed=seed, on_update=bar.update)
            rows.add("curves", [key | {"lr": lr} | point for point in curve], [*key, "updates"])
            found = list(lengths(model, text, settings, seed))
            rows.add("lengths", [key | row for row in found], [*key, "statistics", "steps", "first", "last"])
            row = key | {"hidden": settings.hidden, "steps": settings.steps, "batch": settings.batch, "lr": lr}
            row |= curve[-1] | {"parameters": sum(p.numel() for p in model.parameters())}
            whole = {
                row["statistics"]: row["bpc"] for row in found if (row["first"], row["last"]) == (0, settings.steps)
            }
            row |= {"test_bpc": whole.get("population", whole.get("none")), "test_bpc_batch": whole.get("batch")}
            rows.add("results", [row], list(key), machine=True)


def lengths(model: CharacterLM, text: Text, settings: Settings, seed: int) -> Iterator[dict[str, Any]]:
    """Bits on the same symbols of the test part, cut into sequences of several lengths; of the longest also by step."""
    steps = [round(length * settings.steps) for length in LENGTHS]
    block = steps[-1] * settings.batch
    count = min(settings.test, len(text.test) - 1) // block * block
    if not count:
        raise ValueError(
            f"the test part has {len(text.test)} symbols, {block + 1} are needed: a smaller batch, or more text"
        )
    for kind, ready in to_evaluate(model, text.train, settings, seed).items():
        for length in steps:
            found = bits(ready, text.test[: count + 1], length, settings.batch)
            name = {"statistics": kind, "steps": length}
            yield name | {"first": 0, "last": length, "bpc": float(found.mean())}
            if length == steps[-1]:
                for first, last in pairwise(round(edge * settings.steps) for edge in EDGES):
                    yield name | {"first": first, "last": last, "bpc": float(found[first:last].mean())}


def splicing(settings: Settings, seeds: tuple[int, ...], rows: Rows, bar: tqdm) -> None:
    """Sentences in spliced lanes and padded."""
    settings = replace(settings, updates=min(SPLICED_UPDATES, settings.updates))
    for seed in seeds:
        for name, way in WAYS.items():
            row = run_spliced(way, RATES[way.variant], settings, seed, bar.update)
            rows.add("splicing", [{"way": name, "seed": seed} | row], ["way", "seed"], machine=True)


@click.command()
@click.option(
    "--part",
    "parts",
    multiple=True,
    type=click.Choice(PARTS),
    help="Only this; may be repeated. By default all but rates.",
)
@click.option("--seed", "seeds", multiple=True, type=int, default=(0, 1, 2), show_default=True, help="May be repeated.")
@click.option("--device", default="cpu", show_default=True, type=click.Choice(["cpu", "cuda"]))
@click.option("--full", is_flag=True, help="The paper's settings for text8: LSTM and BN-LSTM, a GPU's work.")
@click.option(
    "--text", "path", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="With --full: text8."
)
@click.option("--quick", is_flag=True, help="Tiny models, few updates, one seed; writes nothing.")
@click.option("--plot", is_flag=True, help="Only draw figure.png again, from the rows.")
def main(
    parts: tuple[str, ...], seeds: tuple[int, ...], device: str, full: bool, path: Path | None, quick: bool, plot: bool
) -> None:
    """Run the parts, one thread, one run at a time; add rows to the tables; draw figure.png."""
    if full and path is None:
        raise click.UsageError("--full needs --text: a file of a to z and blanks, such as text8 unpacked")
    torch.set_num_threads(1)
    settings = QUICK if quick else FULL if full else SMALL
    seeds = (0,) if quick else seeds
    parts = ("curves",) if full else parts or PARTS[1:]
    chosen: dict[Variant, float] = {"none": FULL_RATE, "bn": FULL_RATE} if full else RATES
    updates = {
        "rates": sum(updates for _, _, updates in rate_runs(settings)),
        "curves": len(seeds) * len(chosen) * settings.updates,
        "splicing": len(seeds) * len(WAYS) * min(SPLICED_UPDATES, settings.updates),
    }
    if not plot:
        text = (Text.of_file(path) if path else Text.wikipedia()).to(device)
        rows = Rows(device, None if quick else "-full" if full else "")
        with tqdm(total=sum(updates[part] for part in parts), desc="char_lm", disable=None) as bar:
            if "rates" in parts:
                rates(text, settings, rows, bar)
            if "curves" in parts:
                curves(text, settings, chosen, seeds, rows, bar)
            if "splicing" in parts:
                splicing(settings, seeds, rows, bar)
    if not quick and not full and (HERE / "lengths.csv").exists():
        draw(pd.read_csv(HERE / "curves.csv"), pd.read_csv(HERE / "lengths.csv"), HERE / "figure.png")


if __name__ == "__main__":
    main()
