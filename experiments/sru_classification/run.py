"""SRU, LSTM and a convolution on three sets of sentences, accuracy and time; see README.md beside this file.

python -m experiments.sru_classification.run [--dataset mr] [--quick]
"""

import copy
import statistics
import time
from collections import Counter
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import click
import numpy as np
import pandas as pd
import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from experiments.sru_classification.figure import draw
from experiments.sru_classification.models import ENCODERS, Classifier
from experiments.texts import sentences
from seqbatch import Bucketing, Padding, make_loader
from seqbatch.loader import PlanLoader
from seqbatch.measure import environment

HERE = Path(__file__).parent
DATASETS = ("cr", "subj", "mr")
STRATEGY = Bucketing(batch_size=32, window=1024)
KEY = ["dataset", "model", "seed", "device"]


@dataclass
class Parts:
    """One random division of a data set into training, validation and test part, words as numbers."""

    parts: dict[str, list[dict[str, Any]]]
    words: int

    @staticmethod
    def of(name: str, seed: int, share: float = 1.0) -> "Parts":
        """Divide 80/10/10; words that the training part has only once, or never, are word 0."""
        texts, labels = sentences(name)
        order = np.random.Generator(np.random.Philox(seed)).permutation(len(texts))[: round(share * len(texts))]
        split = [text.split() for text in texts]
        cuts = np.split(order, [int(0.8 * len(order)), int(0.9 * len(order))])
        counts = Counter(word for i in cuts[0] for word in split[i])
        number = {word: n for n, word in enumerate((w for w, count in counts.items() if count > 1), 1)}
        parts = {
            part: [
                {"words": torch.tensor([number.get(word, 0) for word in split[i]]), "label": labels[i]} for i in where
            ]
            for part, where in zip(("train", "valid", "test"), cuts, strict=True)
        }
        return Parts(parts, len(number) + 1)

    def loader(self, part: str, seed: int = 0) -> PlanLoader:
        """Batches of 32 similar lengths to train on; of 128, in the order of the data, to evaluate."""
        items, train = self.parts[part], part == "train"
        strategy = STRATEGY if train else Bucketing(batch_size=128)
        lengths = [len(item["words"]) for item in items]
        return make_loader(items, strategy, lengths=lengths, per_sequence=["label"], seed=seed, train=train)


def train_epoch(model: Classifier, loader: PlanLoader, optimizer: torch.optim.Optimizer, device: str) -> float:
    """Train one epoch; return its seconds, batches made included."""
    model.train()
    begin = time.perf_counter()
    for batch in (batch.to(device) for batch in loader):
        loss = cross_entropy(model(batch.data["words"], batch.mask), batch.per_sequence["label"])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


@torch.no_grad()
def accuracy(model: Classifier, loader: PlanLoader, device: str) -> float:
    """Percent of sentences whose class is right."""
    model.eval()
    right = count = 0
    for batch in (batch.to(device) for batch in loader):
        labels = batch.per_sequence["label"]
        right += int((model(batch.data["words"], batch.mask).argmax(1) == labels).sum())
        count += len(labels)
    return 100 * right / count


def encoder_ms(model: Classifier, loader: PlanLoader, device: str, batches: int = 64) -> float:
    """Median milliseconds that the encoder alone takes forward and backward on a batch."""
    model.train()
    spent = []
    for batch in (batch.to(device) for batch in islice(loader, batches)):
        x = torch.randn(*batch.mask.shape, model.embed.embedding_dim, device=device, requires_grad=True)
        if device == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        model.encoder(x, batch.mask).sum().backward()
        if device == "cuda":
            torch.cuda.synchronize()
        spent.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(spent)


def run(data: Parts, name: str, seed: int, device: str, epochs: int, patience: int) -> tuple[dict[str, Any], Any]:
    """Train until the validation part has not been better for `patience` epochs; test the best epoch's model.

    Returns:
        The row of the run, and rows of its epochs.
    """
    torch.manual_seed(seed)
    model = Classifier(name, data.words).to(device)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3, fused=True)
    train, valid = data.loader("train", seed), data.loader("valid")
    curve, best, kept = [], 0, {}
    efficiency = train.plan.padding_efficiency
    for epoch in range(1, epochs + 1):
        seconds = train_epoch(model, train, optimizer, device)
        curve.append({"epoch": epoch, "seconds": round(seconds, 3), "valid": round(accuracy(model, valid, device), 2)})
        if not best or curve[-1]["valid"] > curve[best - 1]["valid"]:
            best, kept = epoch, copy.deepcopy(model.state_dict())
        if epoch - best == patience:
            break
    model.load_state_dict(kept)
    spent = [row["seconds"] for row in curve]
    row = {
        "epochs": len(curve),
        "best_epoch": best,
        "valid": curve[best - 1]["valid"],
        "test": round(accuracy(model, data.loader("test"), device), 2),
        "s_per_epoch": round(statistics.median(spent), 3),
        "s_per_epoch_low": min(spent),
        "s_per_epoch_high": max(spent),
        "encoder_ms": round(encoder_ms(model, train, device), 2),
        "sentences": len(data.parts["train"]),
        "words": data.words,
        "parameters": sum(p.numel() for p in model.parameters()) - model.embed.weight.numel(),
        "padding_efficiency": round(efficiency, 3),
        "random_padding_efficiency": round(Padding(32).plan(train.batch_sampler.lengths).padding_efficiency, 3),
    }
    return row, curve


def record(path: Path, rows: list[dict[str, Any]], key: list[str]) -> None:
    """Add rows to a file, in place of those with the same key."""
    frame = pd.DataFrame(rows)
    if path.exists():
        frame = pd.concat([pd.read_csv(path), frame])
    frame.drop_duplicates(key, keep="last").to_csv(path, index=False)


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """Mean and range of the seeds, and how much longer an epoch takes than with SRU, seed by seed."""
    sru = frame[frame.model == "SRU"].set_index(["dataset", "seed"]).s_per_epoch
    encoder = frame[frame.model == "SRU"].set_index(["dataset", "seed"]).encoder_ms
    keys = list(zip(frame.dataset, frame.seed, strict=True))
    ratio = frame.s_per_epoch / [sru[key] for key in keys]
    alone = frame.encoder_ms / [encoder[key] for key in keys]
    groups = frame.assign(ratio=ratio, alone=alone).groupby(["dataset", "model"], sort=False)
    table = groups.agg(
        test=("test", "mean"),
        low=("test", "min"),
        high=("test", "max"),
        valid=("valid", "mean"),
        best_epoch=("best_epoch", "mean"),
        s_per_epoch=("s_per_epoch", "median"),
        times_sru=("ratio", "median"),
        ratio_low=("ratio", "min"),
        ratio_high=("ratio", "max"),
        encoder_ms=("encoder_ms", "median"),
        encoder_times_sru=("alone", "median"),
    )
    return table.assign(s_per_100_epochs=100 * table.s_per_epoch).round(2)


def warm_up(data: Parts, device: str) -> None:
    """Train each model on a few batches, so that no run pays for kernels that are compiled or read from disk."""
    few = Parts({part: items[:96] for part, items in data.parts.items()}, data.words)
    for name in ENCODERS:
        run(few, name, 0, device, 1, 1)


@click.command()
@click.option("--dataset", "datasets", multiple=True, type=click.Choice(DATASETS), help="Only this; may be repeated.")
@click.option("--seeds", default=3, show_default=True, help="Runs of each model, each with a division of its own.")
@click.option("--epochs", default=5, show_default=True, help="At most.")
@click.option("--patience", default=2, show_default=True, help="Epochs without a better validation part to stop after.")
@click.option("--device", default="cpu", show_default=True, type=click.Choice(["cpu", "cuda"]))
@click.option("--quick", is_flag=True, help="One seed, two epochs, 15 % of the sentences; writes nothing.")
@click.option("--plot", is_flag=True, help="Only draw figure.png again, from the rows.")
def main(
    datasets: tuple[str, ...], seeds: int, epochs: int, patience: int, device: str, quick: bool, plot: bool
) -> None:
    """Train all models, one run at a time; add rows to results.csv and epochs.csv; draw figure.png."""
    torch.set_num_threads(2)
    seeds, epochs, share = (1, 2, 0.15) if quick else (seeds, epochs, 1.0)
    record_of_machine = environment() | {"threads": torch.get_num_threads()}
    record_of_machine["versions"] += f", torch {torch.__version__}"
    if device == "cuda":
        record_of_machine["cpu"] = torch.cuda.get_device_name()
    runs = [(name, seed) for name in datasets or DATASETS for seed in range(seeds)]
    rows = []
    with tqdm(total=0 if plot else len(runs) * len(ENCODERS), desc="sru_classification", disable=None) as bar:
        for name, seed in [] if plot else runs:
            data = Parts.of(name, seed, share)
            if not rows:
                warm_up(data, device)
            for model in ENCODERS:  # the models take turns, so that drift hits all alike
                key = {"dataset": name, "model": model, "seed": seed, "device": device}
                row, curve = run(data, model, seed, device, epochs, patience)
                rows.append(key | row)
                if not quick:
                    record(HERE / "results.csv", [rows[-1] | record_of_machine], KEY)
                    record(HERE / "epochs.csv", [key | epoch for epoch in curve], [*KEY, "epoch"])
                bar.set_postfix_str(f"{name} {model} {row['test']:.1f} %")
                bar.update()
    frame = pd.DataFrame(rows) if quick else pd.read_csv(HERE / "results.csv").query("device == @device")
    print(summary(frame).to_string())
    if not quick:
        draw(frame, pd.read_csv(HERE / "epochs.csv").query("device == @device"), HERE / "figure.png")


if __name__ == "__main__":
    main()
