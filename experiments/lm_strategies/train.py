"""How fast, and how far, each way to batch trains a language model; see README.md beside this file.

python -m experiments.lm_strategies.train --cell sru --seed 0 [--strategies NAME ...] [--lanes 1 4 ...] [--quick]
"""

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from experiments.lm_strategies.model import CELLS, DTYPES, CharacterLM, Corpus, Learner, evaluate, wikitext
from experiments.lm_strategies.plans import STRATEGIES, Way
from experiments.lm_strategies.rows import Elsewhere, append_rows, machine
from seqbatch import SequenceBatch, Splicing, make_loader
from seqbatch.loader import PlanLoader
from seqbatch.strategy import Strategy, check_choice

__all__ = ["LEARNING_RATES", "train"]

HERE = Path(__file__).parent
LEARNING_RATES = {"sru": 8e-3, "lstm": 8e-3, "nn.LSTM": 8e-3}  # the best for padding with 4k tokens an update
# Without those that differ from padding's few huge updates in speed alone.
TRAINED = [name for name in STRATEGIES if name not in ("pool sort", "buckets", "packing")]
SCHEDULES = ("linear", "constant")
LANES = 64  # for which the learning rate was chosen
Point = dict[str, float]


def train(
    strategy: str | Strategy | Way,
    cell: str,
    *,
    seconds: float | None = None,
    tokens: int | None = None,
    hidden: int = 256,
    layers: int = 1,
    lr: float | None = None,
    schedule: str = "linear",
    seed: int = 0,
    points: int = 10,
    corpus: Corpus | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    on_point: Callable[[Point], object] | None = None,
) -> list[Point]:
    """Train a character-level language model for some time or some tokens, and return its curve.

    Args:
        strategy: A name of :data:`~experiments.lm_strategies.plans.STRATEGIES`, a strategy, or a way to use one.
        cell: ``"sru"``, ``"lstm"`` or ``"nn.LSTM"``.
        seconds: Stop after so much time of training: loading and updates count, evaluation does not.
        tokens: Stop after so many real tokens; whichever of the two comes first.
        hidden: Features of the embedding and of each layer.
        layers: Recurrent layers.
        lr: Adam's learning rate, at the start; by default that of the cell.
        schedule: ``"linear"``, down to 0 at the end of the run, or ``"constant"``.
        seed: Of the weights and of the plan.
        points: How many evaluations there are after the first, which is of the untrained model.
        corpus: WikiText-2's paragraphs by default.
        device: Where the model is.
        dtype: ``"float32"``, or ``"bfloat16"`` for autocast.
        on_point: Called with each point of the curve.

    Returns:
        Points: real tokens, seconds and updates so far, and the loss in nats per held-out character.

    Raises:
        ValueError: Neither `seconds` nor `tokens`, or an unknown name.
    """
    if seconds is None and tokens is None:
        raise ValueError("give seconds or tokens, or both: the run ends at the first that is reached")
    check_choice("schedule", schedule, SCHEDULES)
    way, corpus = as_way(strategy), corpus or wikitext()
    _warm_up(way, cell, hidden, layers, device, dtype)
    lr = LEARNING_RATES[cell] if lr is None else lr
    torch.manual_seed(seed)
    model = CharacterLM(corpus.vocabulary, hidden, cell, layers).to(device)
    loader = make_loader(corpus.training, way.strategy, seed=seed, next_token=True)
    usual = loader.plan.tokens / len(loader.plan) if way.small_count_less else 0
    learner = Learner(model, lr, dtype=dtype, resets=way.resets, usual=usual)
    curve: list[Point] = []

    def note(*so_far: float) -> None:
        loss = evaluate(model, corpus.held_out)
        point = dict(zip(("tokens", "seconds", "updates", "loss"), (*so_far, loss), strict=True))
        curve.append(point)
        if on_point is not None:
            on_point(point)

    note(0, 0.0, 0)
    used, seen, updates, due = 0.0, 0, 0, 1
    batches = _epochs(loader)
    begin = time.perf_counter()
    while due <= points:
        batch = next(batches)
        learner.step(batch)
        seen, updates = seen + batch.placement.tokens, updates + 1
        now = used + time.perf_counter() - begin
        done = max(seen / tokens if tokens else 0.0, now / seconds if seconds else 0.0)
        if schedule == "linear":
            learner.set_lr(lr * max(1 - done, 0.0))
        if done * points >= due:
            if device == "cuda":
                torch.cuda.synchronize()
            used += time.perf_counter() - begin
            note(seen, used, updates)
            due = int(done * points) + 1
            begin = time.perf_counter()
    return curve


def as_way(strategy: str | Strategy | Way) -> Way:
    """Return what a name stands for; a strategy is used with resets."""
    if isinstance(strategy, Strategy):
        return Way(strategy)
    if isinstance(strategy, str):
        if strategy not in STRATEGIES:
            raise ValueError(f"strategy must be one of {', '.join(map(repr, STRATEGIES))}, got {strategy!r}")
        return STRATEGIES[strategy]
    return strategy


def _epochs(loader: PlanLoader) -> Iterator[SequenceBatch]:
    while True:
        yield from loader


def _warm_up(way: Way, cell: str, hidden: int, layers: int, device: str, dtype: str) -> None:
    """Run a few steps of another model: kernels are compiled, or read from disk, before the clock starts."""
    corpus = Corpus.of_texts(["abcdefgh" * 4] * 8, [])
    learner = Learner(CharacterLM(corpus.vocabulary, hidden, cell, layers).to(device), 1e-3, dtype=dtype)
    for batch, _ in zip(make_loader(corpus.training, way.strategy, next_token=True), range(2), strict=False):
        learner.step(batch)


def lane_runs(lanes: list[int]) -> dict[str, tuple[Way, float]]:
    """Batch or online: splicing with few lanes and many, the learning rate as it is or with the lanes' root."""
    runs: dict[str, tuple[Way, float]] = {}
    for number in lanes:
        way = Way(Splicing(number, 64))
        runs[f"splicing, {number} lanes"] = way, 1.0
        if number != LANES:
            runs[f"splicing, {number} lanes, lr ~ sqrt"] = way, (number / LANES) ** 0.5
    return runs


def run(name: str, way: Way, setting: dict[str, object], write: bool, **options: object) -> Point:
    """Train once, with a bar; append a row to results.csv and the curve to curves.csv."""
    elsewhere = Elsewhere()
    with tqdm(total=10, desc=f"{setting['cell']}, {name}, seed {setting['seed']}", mininterval=1.0) as bar:
        curve = train(way, on_point=lambda _: bar.update(), **(setting | options))  # type: ignore[arg-type]
    last = curve[-1]
    about = {"strategy": name, "settings": repr(way.strategy), "resets": way.resets} | setting
    numbers = {
        "tokens": last["tokens"],
        "updates": last["updates"],
        "tokens_per_s": round(last["tokens"] / last["seconds"]),
        "seconds": round(last["seconds"], 3),
        "final_loss": round(last["loss"], 4),
        "elsewhere": elsewhere.share(),
    }
    print(", ".join(f"{key} {value}" for key, value in (about | numbers).items()), flush=True)
    if write:
        append_rows(HERE / "results.csv", [machine(str(setting["device"])) | about | numbers])
        keys = {key: about[key] for key in ("strategy", "cell", "hidden", "schedule", "lr", "seed")}
        rounded = [{key: round(value, 4) for key, value in point.items()} for point in curve]
        append_rows(HERE / "curves.csv", [keys | point for point in rounded])
    return last


def main() -> None:
    """Train each strategy asked for, one row a run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cell", choices=tuple(CELLS), default="sru")
    parser.add_argument("--seed", type=int, nargs="+", default=[0])
    parser.add_argument("--strategies", nargs="*", choices=tuple(STRATEGIES), default=TRAINED, metavar="NAME")
    parser.add_argument("--lanes", nargs="+", type=int, help="splicing with so many lanes instead, two learning rates")
    parser.add_argument("--tokens", type=int, help="real tokens to train on; one epoch by default")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--lr", type=float, help="Adam's learning rate")
    parser.add_argument("--schedule", choices=SCHEDULES, default="linear", help="of the learning rate")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32")
    parser.add_argument("--dry", action="store_true", help="write nothing")
    parser.add_argument("--quick", action="store_true", help="60,000 tokens of the two strategies of the bar, no rows")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    lr = arguments.lr or LEARNING_RATES[arguments.cell]
    names = ["padding, 4k tokens", "splicing"] if arguments.quick else arguments.strategies
    runs = {name: (STRATEGIES[name], 1.0) for name in names}
    runs = lane_runs(arguments.lanes) if arguments.lanes else runs
    tokens = 60_000 if arguments.quick else arguments.tokens or len(wikitext().training.tokens)
    setting = {name: getattr(arguments, name) for name in ("cell", "hidden", "layers", "device", "dtype", "schedule")}
    for seed in arguments.seed:
        for name, (way, factor) in runs.items():
            write = not (arguments.quick or arguments.dry)
            run(name, way, setting | {"seed": seed, "lr": round(lr * factor, 6)}, write, tokens=tokens)


if __name__ == "__main__":
    main()
