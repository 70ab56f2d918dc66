"""How many real tokens a second each way to batch pairs trains; see README.md beside this file.

python -m experiments.translation.speed [--turns 7] [--quick]
"""

import time
from itertools import islice
from pathlib import Path

import click
import pandas as pd
import torch
from tqdm import tqdm

from experiments.lm_strategies.rows import Elsewhere, append_rows, machine
from experiments.translation.model import RNNS
from experiments.translation.pairs import Corpus
from experiments.translation.report import QUIET, speed_table
from experiments.translation.train import STRATEGIES, Learner, Settings, pair_loader

HERE = Path(__file__).parent


class Job:
    """A model and a way to batch, ready to be timed; every turn goes on in the plan, whose order is random."""

    def __init__(self, corpus: Corpus, rnn: str, strategy: str, settings: Settings) -> None:
        self.learner = Learner.of(corpus, rnn, settings)
        self.loader = pair_loader(corpus.parts["train"], STRATEGIES[strategy])
        self.efficiency = self.loader.plan.padding_efficiency
        self.batches = iter(self.loader)
        for batch in islice(self.batches, 2):  # kernels compiled, the optimizer's state there
            self.learner.step(batch)

    def turn(self, batches: int) -> dict[str, object]:
        """Train on so many batches, the way a loop does."""
        tokens, cells, lanes, data = 0, 0, 0, 0.0
        elsewhere, begin = Elsewhere(), (time.perf_counter(), time.process_time())
        for _ in range(batches):
            now = time.perf_counter()
            batch = next(self.batches)
            data += time.perf_counter() - now
            self.learner.step(batch)
            sides = [batch[side].placement for side in ("source", "target")]
            tokens, cells = tokens + sum(p.tokens for p in sides), cells + sum(p.steps * p.lanes for p in sides)
            lanes += sides[0].lanes
        seconds, cpu = time.perf_counter() - begin[0], time.process_time() - begin[1]
        row = {"batches": batches, "pairs": lanes, "tokens": tokens, "cells": cells, "seconds": round(seconds, 4)}
        row |= {"cpu_seconds": round(cpu, 4), "data_seconds": round(data, 5), "tokens_per_s": round(tokens / seconds)}
        return row | {"plan_efficiency": round(self.efficiency, 4), "elsewhere": elsewhere.share()}


@click.command()
@click.option("--turns", default=7, show_default=True, help="Of each row.")
@click.option("--batches", default=24, show_default=True, help="Of a turn.")
@click.option("--size", default=Settings.size, show_default=True, help="Of embeddings and layers.")
@click.option("--quick", is_flag=True, help="One turn of six batches; writes nothing.")
def main(turns: int, batches: int, size: int, quick: bool) -> None:
    """Time all rows in turns in one process, on one thread; append a row a turn to speeds.csv."""
    torch.set_num_threads(1)
    turns, batches = (1, 6) if quick else (turns, batches)
    corpus, settings = Corpus.read(), Settings(size=size)
    keys = [(rnn, strategy) for rnn in RNNS for strategy in STRATEGIES]
    jobs = {key: Job(corpus, *key, settings) for key in tqdm(keys, desc="warming up", disable=None)}
    rows, before = [], 0
    if (HERE / "speeds.csv").exists() and not quick:
        before = int(pd.read_csv(HERE / "speeds.csv")["turn"].max()) + 1
    for turn in tqdm(range(before, before + turns), desc="turns", disable=None):
        for (rnn, strategy), job in jobs.items():
            key = {"model": rnn, "strategy": strategy, "size": size, "turn": turn}
            rows.append(key | job.turn(batches))
            if not quick:
                append_rows(HERE / "speeds.csv", [rows[-1] | machine("cpu")])
    print(speed_table(pd.DataFrame(rows) if quick else pd.read_csv(HERE / "speeds.csv"), 1.0 if quick else QUIET))


if __name__ == "__main__":
    main()
