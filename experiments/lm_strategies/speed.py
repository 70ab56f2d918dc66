"""How many real tokens a second each way to batch trains; see README.md beside this file.

python -m experiments.lm_strategies.speed [--hidden 256] [--turns 3] [--rows NAME ...] [--floor] [--quick]
"""

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import ArrayLike
from tqdm import tqdm

from experiments.lm_strategies.model import DTYPES, CharacterLM, Learner, wikitext
from experiments.lm_strategies.plans import STRATEGIES, Way
from experiments.lm_strategies.rows import Elsewhere, append_rows, machine
from seqbatch import Plan, SequenceBatch, make_loader
from seqbatch.ordering import IntArray
from seqbatch.strategy import Strategy

HERE = Path(__file__).parent
TOKENS = 76_000  # a turn of a row: two padded batches of 64 paragraphs
LEFT_OUT = ("splicing without resets", "splicing, small windows in full")  # run as splicing does
ROWS = [
    ("nn.LSTM", "padding"),
    *((cell, name) for name in STRATEGIES if name not in LEFT_OUT for cell in ("lstm", "sru")),
]


@dataclass(frozen=True, repr=False)
class Sample(Strategy):
    """Some batches of another strategy's plan, spread over its good and bad ones.

    Args:
        whole: The strategy.
        tokens: About as many real tokens.
        shuffle: As all strategies have.
    """

    whole: Strategy
    tokens: int
    shuffle: bool = True

    at_least: ClassVar[dict[str, int]] = {"tokens": 1}

    def plan(self, lengths: ArrayLike, *, seed: int = 0, epoch: int = 0) -> Plan:
        plan = self.whole.plan(lengths, seed=seed, epoch=epoch)
        return take(plan, spread_batches(plan, self.tokens))


def spread_batches(plan: Plan, tokens: int) -> IntArray:
    """Return the numbers of batches that hold about `tokens`, every k-th from the shortest to the longest.

    Where counting begins is chosen so that their padding efficiency comes nearest, their tokens within a tenth.
    """
    real, cells = plan.to_frame()["tokens"].to_numpy(), plan.steps * plan.lanes
    count = max(min(round(tokens * len(plan) / plan.tokens), len(plan)), 1)
    stride, order = len(plan) / count, np.lexsort((real, plan.steps))

    def distance(chosen: IntArray) -> float:
        total = real[chosen].sum()
        missed = max(abs(total / tokens - 1) - 0.1, 0.0)
        return abs(total / cells[chosen].sum() / plan.padding_efficiency - 1) + missed

    begins = [order[(begin + stride * np.arange(count)).astype(int)] for begin in np.arange(0, stride, stride / 16)]
    return np.sort(min(begins, key=distance))


def take(plan: Plan, batches: IntArray) -> Plan:
    """Return the plan of these batches alone."""
    counts = np.diff(plan.batch_ptr)[batches]
    pieces = np.concatenate([np.arange(*plan.batch_ptr[b : b + 2]) for b in batches])
    names = ("sequence", "start", "length", "step", "lane")
    return Plan(
        **{name: getattr(plan, name)[pieces] for name in names},
        batch_ptr=np.append(0, np.cumsum(counts)),
        steps=plan.steps[batches],
        lanes=plan.lanes[batches],
        carry=plan.carry,
        strategy=plan.strategy,
        seed=plan.seed,
        epoch=plan.epoch,
        shuffle=False,
    )


class Job:
    """A cell and a way to batch, ready to be timed; every turn takes batches of another epoch."""

    def __init__(self, cell: str, way: Way, hidden: int, tokens: int, device: str, dtype: str) -> None:
        torch.manual_seed(0)
        corpus = wikitext()
        self.whole = way.strategy.plan(corpus.training.lengths)
        model = CharacterLM(corpus.vocabulary, hidden, cell).to(device)
        self.learner = Learner(model, 1e-3, dtype=dtype, resets=way.resets)
        self.loader = make_loader(corpus.training, Sample(way.strategy, tokens), next_token=True)
        self.learner.step(next(iter(self.loader)))  # warm: kernels compiled, the optimizer's state there

    def turn(self) -> dict[str, float]:
        """Train on the sample once, the way a loop does."""
        plan, wait = self.loader.plan, torch.cuda.synchronize if self.learner.device.type == "cuda" else _nothing
        data, batches = 0.0, iter(self.loader)
        wait()
        elsewhere = Elsewhere()
        begin = now = time.perf_counter()
        while (batch := next(batches, None)) is not None:
            data += time.perf_counter() - now
            self.learner.step(batch)
            now = time.perf_counter()
        wait()
        seconds = time.perf_counter() - begin
        return {
            "batches": len(plan),
            "tokens": plan.tokens,
            "cells": plan.cells,
            "seconds": round(seconds, 4),
            "data_seconds": round(data, 5),
            "tokens_per_s": round(plan.tokens / seconds),
            "elsewhere": elsewhere.share(),
        }


def _nothing() -> None:
    pass


def measure(
    rows: list[tuple[str, str]], hidden: int, turns: int, tokens: int, device: str, dtype: str
) -> Iterator[dict[str, object]]:
    """Yield one row for each turn of each job, the jobs taking turns."""
    warming = tqdm(rows, desc="warming up")
    jobs = {(cell, name): Job(cell, STRATEGIES[name], hidden, tokens, device, dtype) for cell, name in warming}
    record = machine(device)
    for turn in range(turns):
        for (cell, name), job in tqdm(jobs.items(), desc=f"turn {turn + 1} of {turns}"):
            setting = {"hidden": hidden, "dtype": dtype, "cell": cell, "strategy": name}
            setting |= {"settings": repr(STRATEGIES[name].strategy), "turn": turn}
            efficiency = {"plan_efficiency": round(job.whole.padding_efficiency, 4)}
            yield record | setting | efficiency | job.turn()


def floor(hidden: int, turns: int, steps: int, device: str, dtype: str) -> list[dict[str, object]]:
    """Time the best row's step beside its bare matrix products, in turns; and say where the step's time goes."""
    from torch.profiler import profile

    corpus, way = wikitext(), STRATEGIES["splicing"]
    learner = Learner(CharacterLM(corpus.vocabulary, hidden, "sru").to(device), 1e-3, dtype=dtype)
    loader = make_loader(corpus.training, way.strategy, next_token=True)
    batches = [batch.to(device) for batch, _ in zip(loader, range(steps), strict=False)]
    bare, rows = Products(batches[0], hidden, corpus.vocabulary, device, DTYPES[dtype]), []
    for turn in range(turns + 1):
        seconds, elsewhere = {}, Elsewhere()
        for name, job in (("step", learner.step), ("matrix products", bare)):
            begin = time.perf_counter()
            for batch in batches:
                job(batch)
            if device == "cuda":
                torch.cuda.synchronize()
            seconds[name] = (time.perf_counter() - begin) / steps
        if turn:  # the first one warms up
            share = elsewhere.share()
            rows += [
                {"what": name, "turn": turn, "ms": round(1e3 * s, 3), "elsewhere": share} for name, s in seconds.items()
            ]
    elsewhere = Elsewhere()
    with profile() as profiled:
        for batch in batches:
            learner.step(batch)
    times = {event.key: event.self_cpu_time_total / 1e3 / steps for event in profiled.key_averages()}
    most = sorted(times, key=times.__getitem__, reverse=True)[:14]
    share = elsewhere.share()
    rows += [{"what": name, "turn": "profile", "ms": round(times[name], 3), "elsewhere": share} for name in most]
    return [machine(device) | {"hidden": hidden, "dtype": dtype} | row for row in rows]


class Products:
    """The matrix products of a step - SRU's and the head's, one forward and two backward - into memory at hand."""

    def __init__(self, batch: SequenceBatch, hidden: int, vocabulary: int, device: str, dtype: torch.dtype) -> None:
        rows = batch.placement.steps * batch.placement.lanes
        self.x = torch.randn(rows, hidden, device=device, dtype=dtype)
        self.dx = torch.empty_like(self.x)
        self.weights = [
            torch.randn(columns, hidden, device=device, dtype=dtype) for columns in (3 * hidden, vocabulary)
        ]
        self.dweights = [torch.empty_like(weight) for weight in self.weights]
        self.outputs = [self.x.new_empty(rows, len(weight)) for weight in self.weights]

    def __call__(self, batch: SequenceBatch) -> None:
        for weight, dweight, out in zip(self.weights, self.dweights, self.outputs, strict=True):
            torch.mm(self.x, weight.T, out=out)
            torch.mm(out.T, self.x, out=dweight)
            torch.mm(out, weight, out=self.dx)


def main() -> None:
    """Measure, print a line a row, append to speed.csv or floor.csv."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--rows", nargs="+", choices=[f"{cell}/{name}" for cell, name in ROWS], help="these rows only")
    parser.add_argument("--floor", action="store_true", help="the best row beside its bare matrix products")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32")
    parser.add_argument("--quick", action="store_true", help="one turn of the two rows of the bar, nothing written")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    setting = {"hidden": arguments.hidden, "device": arguments.device, "dtype": arguments.dtype}
    turns = 1 if arguments.quick else arguments.turns
    if arguments.floor:
        rows, path = iter(floor(turns=turns, steps=4 if arguments.quick else 16, **setting)), HERE / "floor.csv"
    else:
        wanted = [tuple(row.split("/")) for row in arguments.rows or ()] or ROWS
        wanted = [("nn.LSTM", "padding"), ("sru", "splicing")] if arguments.quick else wanted
        rows, path = measure(wanted, turns=turns, tokens=TOKENS, **setting), HERE / "speed.csv"
    record = machine(arguments.device)
    for row in rows:
        tqdm.write(", ".join(f"{name} {value}" for name, value in row.items() if name not in record))
        if not arguments.quick:
            append_rows(path, [row])


if __name__ == "__main__":
    main()
