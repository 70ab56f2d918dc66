"""LSTM against BN-LSTM on MNIST read pixel by pixel; see README.md beside this file.

python -m experiments.sequential_mnist.run [--order permuted] [--quick]
"""

import copy
import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from experiments.sequential_mnist.data import MNIST, ORDERS, Part, load
from experiments.sequential_mnist.figure import draw_curves
from experiments.sru_classification.run import record
from seqbatch.measure import environment
from seqbatch.rnn import BNLSTM, estimate_population

HERE = Path(__file__).parent
MODELS = ("LSTM", "BN-LSTM")
KEY = ["order", "model", "seed", "device"]


@dataclass(frozen=True)
class Settings:
    """The task and how it is trained on; the defaults are the small one of README.md.

    Attributes:
        side: An image is `side` by `side` pixels, a sequence side ** 2 steps.
        train_images, valid_images, test_images: Images of the parts.
        every: Updates between two points of the curves.
        lr, decay, momentum: Of RMSProp; `decay` is that of the mean square.
        clip: Largest norm of the gradient.
        gamma: Initial gamma.
        noise: On BN-LSTM's h0 where pixels come in order: the first ones are black in all images.
        running: Least weight of a batch in the running statistics.
        estimate: Images of the training part that a point's population statistics are taken over; the last ones are
            taken over all.
    """

    side: int = 14
    train_images: int = 8000
    valid_images: int = 500
    test_images: int = 2000
    hidden: int = 64
    batch: int = 50
    updates: int = 420
    every: int = 60
    lr: float = 5e-3
    decay: float = 0.9
    momentum: float = 0.0
    clip: float = 1.0
    gamma: float = 0.1
    noise: float = 0.1
    running: float = 0.1
    estimate: int = 1000


# arXiv 1603.09025, section 5.1, and the released code: 200 epochs of 500 batches
FULL = Settings(
    side=28,
    train_images=50_000,
    valid_images=10_000,
    test_images=10_000,
    hidden=100,
    batch=100,
    updates=100_000,
    lr=1e-3,
    every=500,
    running=0.01,
    estimate=5_000,
)


class Classifier(nn.Module):
    """An LSTM or BN-LSTM that reads pixels, one a step, and a linear layer on its last state."""

    def __init__(self, model: str, settings: Settings, order: str) -> None:
        super().__init__()
        normalized = model == "BN-LSTM"
        self.rnn = BNLSTM(
            1,
            settings.hidden,
            variant="bn" if normalized else "none",
            max_steps=settings.side**2,
            gamma=settings.gamma,
            momentum=settings.running,
            noise=settings.noise if normalized and order == "in order" else 0.0,
            init="identity",
        )
        self.output = nn.Linear(settings.hidden, 10)
        nn.init.orthogonal_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, 10) of images (T, B, 1)."""
        return self.output(self.rnn(x)[1][0][-1])


@torch.no_grad()
def evaluate(model: Classifier, part: Part, batch: int, statistics: str = "running") -> tuple[float, float]:
    """Loss and accuracy in percent, with ``"running"`` or ``"batch"`` statistics; the model stays as it is."""
    judged = copy.deepcopy(model).train(statistics == "batch")
    with torch.random.fork_rng():  # the noise on h0
        logits = torch.cat([judged(x) for x, _ in part.batches(batch)])
    accuracy = 100 * float((logits.argmax(1) == part.y).float().mean())
    return round(float(cross_entropy(logits, part.y)), 4), round(accuracy, 2)


def forever(part: Part, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Epoch after epoch of full batches, the same for all models with a seed."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from (batch for batch in part.batches(size, generator) if len(batch[1]) == size)


def train(
    name: str, order: str, seed: int, settings: Settings, parts: tuple[Part, Part, Part]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Train one model; judge it where its validation accuracy was best, by population statistics.

    Returns:
        Rows of the result, one for each kind of statistics, and rows of the curve.
    """
    torch.manual_seed(seed)
    model = Classifier(name, settings, order).to(parts[0].y.device)
    optimizer = torch.optim.RMSprop(
        model.parameters(), settings.lr, settings.decay, eps=1e-5, momentum=settings.momentum
    )
    batches, curve, losses = forever(parts[0], settings.batch, seed), [], []
    best, kept, spent = -1, copy.deepcopy(model), 0.0
    for update in tqdm(range(1, settings.updates + 1), desc=f"{order}, {name}, seed {seed}", disable=None, leave=False):
        begin, (x, y) = time.perf_counter(), next(batches)
        model.train()
        error = cross_entropy(model(x), y)
        optimizer.zero_grad()
        error.backward()
        nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        optimizer.step()
        losses.append(error.detach())
        spent += time.perf_counter() - begin
        if update % settings.every and update != settings.updates:
            continue
        row = {"update": update, "train_loss": round(float(torch.stack(losses).mean()), 4)}
        for statistics, judged in known(model, parts[0], settings, settings.estimate):
            ending = "" if statistics in ("none", "population") else f"_{statistics}"
            loss, accuracy = evaluate(judged, parts[1], settings.batch, statistics)
            row |= {f"valid_loss{ending}": loss, f"valid_accuracy{ending}": accuracy}
        losses.clear()
        curve.append(row)
        if row["valid_accuracy"] > best:
            best, kept, best_update = row["valid_accuracy"], copy.deepcopy(model), update
    ended = {"best_update": best_update, "s_per_update": round(spent / settings.updates, 4)}
    rows = []
    for statistics, judged in known(kept, parts[0], settings, settings.train_images):
        found: dict[str, Any] = {"statistics": statistics}
        for part_name, part in (("valid", parts[1]), ("test", parts[2])):
            loss, accuracy = evaluate(judged, part, settings.batch, statistics)
            found |= {f"{part_name}_loss": loss, f"{part_name}_accuracy": accuracy}
        rows.append(found | ended)
    return rows, curve


def known(model: Classifier, part: Part, settings: Settings, images: int) -> Iterator[tuple[str, Classifier]]:
    """The kinds of statistics to judge a model with, and the model, which for the population's is a copy."""
    if model.rnn.variant == "none":
        yield "none", model
        return
    yield "running", model
    yield "batch", model
    exact, some = copy.deepcopy(model), Part(part.x[:, :images], part.y[:images])
    with torch.random.fork_rng():
        estimate_population(exact, (x for x, _ in some.batches(settings.batch)))
    yield "population", exact


def summary(results: pd.DataFrame) -> pd.DataFrame:
    """Mean and range of the seeds."""
    groups = results.groupby(["order", "model", "statistics"], sort=False)
    return groups.agg(
        seeds=("seed", "nunique"),
        test=("test_accuracy", "mean"),
        test_low=("test_accuracy", "min"),
        test_high=("test_accuracy", "max"),
        test_loss=("test_loss", "mean"),
        valid=("valid_accuracy", "mean"),
        valid_low=("valid_accuracy", "min"),
        valid_high=("valid_accuracy", "max"),
        valid_loss=("valid_loss", "mean"),
        s_per_update=("s_per_update", "median"),
    ).round(3)


def machine(device: str) -> dict[str, Any]:
    """What numbers depend on besides the code."""
    found = environment()
    return found | ({"cpu": torch.cuda.get_device_name()} if device == "cuda" else {})


def changed(full: bool, **options: float | None) -> Settings:
    """The small settings or the paper's, with those that were given."""
    given = {name: value for name, value in options.items() if value is not None}
    return dataclasses.replace(FULL if full else Settings(), **given)  # type: ignore[arg-type]


@click.command()
@click.option("--order", "orders", multiple=True, type=click.Choice(ORDERS), help="Only this; may be repeated.")
@click.option("--model", "models", multiple=True, type=click.Choice(MODELS), help="Only this; may be repeated.")
@click.option("--seed", "seeds", multiple=True, type=int, default=(0, 1, 2), show_default=True, help="May be repeated.")
@click.option("--full", is_flag=True, help="The paper's task: 784 steps, 200 epochs; give --data and --device cuda.")
@click.option("--data", default=MNIST, type=click.Path(exists=True, dir_okay=False, path_type=Path), help="An .npz.")
@click.option("--device", default="cpu", show_default=True, type=click.Choice(["cpu", "cuda"]))
@click.option("--updates", type=int)
@click.option("--hidden", type=int)
@click.option("--lr", type=float)
@click.option("--decay", type=float, help="Of RMSProp's mean square: 0.9; the released code has 0.5.")
@click.option("--momentum", type=float, help="Of RMSProp: 0.")
@click.option("--gamma", type=float)
@click.option("--noise", type=float)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of the rows; by default only the default run's are kept.",
)
@click.option("--quick", is_flag=True, help="One seed, 20 updates; writes nothing.")
@click.option("--plot", is_flag=True, help="Only draw the figure again, from the rows.")
def main(
    orders: tuple[str, ...],
    models: tuple[str, ...],
    seeds: tuple[int, ...],
    full: bool,
    data: Path,
    device: str,
    out: Path | None,
    quick: bool,
    plot: bool,
    **options: float | None,
) -> None:
    """Train all models, one run at a time; add rows to results.csv and curves.csv; draw curves.png."""
    torch.set_num_threads(1)
    settings = changed(full, **options)
    if quick:
        settings, seeds = dataclasses.replace(settings, updates=20, every=10), (0,)
    if quick or (out is None and settings == Settings()):
        out = None if quick else HERE
    rows = []
    for order in [] if plot else orders or ORDERS:
        parts = load(
            data, settings.side, order, (settings.train_images, settings.valid_images, settings.test_images), device
        )
        for seed in seeds:
            for name in models or MODELS:  # the models take turns, so that drift hits all alike
                found, curve = train(name, order, seed, settings, parts)
                key = {"order": order, "model": name, "seed": seed, "device": device}
                rows += [key | row for row in found]
                print(*rows[-1].values(), sep=" | ", flush=True)
                if out is not None:
                    out.mkdir(exist_ok=True, parents=True)
                    more = dataclasses.asdict(settings) | machine(device)
                    record(out / "results.csv", [key | row | more for row in found], [*KEY, "statistics"])
                    record(out / "curves.csv", [key | row for row in curve], [*KEY, "update"])
    frame = pd.DataFrame(rows) if out is None else pd.read_csv(out / "results.csv").query("device == @device")
    print(summary(frame).to_string())
    if out is not None:
        draw_curves(pd.read_csv(out / "curves.csv").query("device == @device"), out / "curves.png")


if __name__ == "__main__":
    main()
