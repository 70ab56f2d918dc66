"""Train a language model whose layers lie on several processes; see README.md beside this file.

torchrun --standalone --nproc-per-node 2 -m experiments.pipeline_lm.train --cell lstm --layers 4 --mode full --chunks 4
python -m experiments.pipeline_lm.train [--plain]
"""

import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import torch
import torch.distributed as dist

from experiments.pipeline_lm.model import CELLS, TEXTS, Alone, Network, held_out_loss, loaders, pipelined, train
from seqbatch.loader import PlanLoader
from seqbatch.pipeline import LayerPipeline

__all__ = ["connect", "newest", "resume", "run", "save"]


def connect(threads: int) -> tuple[int, int]:
    """Rank and number of processes; those that torchrun started are connected."""
    torch.set_num_threads(threads)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("gloo")
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def newest(folder: Path) -> Path | None:
    """The last checkpoint that was finished, if there is any."""
    found = [path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdigit()]
    return max(found, key=lambda path: path.name, default=None)


def save(
    folder: Path, pipe: LayerPipeline, optimizer: torch.optim.Optimizer, loader: PlanLoader, batch: object, done: int
) -> None:
    """After an update with `batch`."""
    pipe.save(folder / f"step-{done:08d}", optimizer, loader=loader.state_dict(after=batch, lanes=()), done=done)


def resume(folder: Path, pipe: LayerPipeline, optimizer: torch.optim.Optimizer, loader: PlanLoader) -> int:
    """Go on from the newest checkpoint, if there is one; the updates that are done."""
    path = newest(folder)
    if path is None:
        return 0
    kept = pipe.load(path, optimizer)
    loader.load_state_dict(kept["loader"])
    return int(kept["done"])


class Meter:
    """Prints, on the first rank, the mean loss and real tokens per second since it printed last."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.again()

    def again(self) -> None:
        """Start the clock, after what is not training."""
        self.losses: list[float] = []
        self.tokens, self.begin = 0, time.perf_counter()

    def add(self, loss: float, tokens: int) -> None:
        """Count an update."""
        self.losses.append(loss)
        self.tokens += tokens

    def show(self, done: int) -> None:
        """Print a line."""
        if self.rank == 0 and self.losses:
            speed = self.tokens / (time.perf_counter() - self.begin)
            mean = sum(self.losses) / len(self.losses)
            print(f"update {done}: loss {mean:.6f}, {speed:.0f} real tokens/s", flush=True)


@click.command()
@click.option("--cell", type=click.Choice(list(CELLS)), default="lstm", show_default=True)
@click.option("--layers", default=4, show_default=True)
@click.option("--hidden", default=256, show_default=True)
@click.option("--text", type=click.Choice(list(TEXTS)), default="characters", show_default=True)
@click.option("--lanes", default=32, show_default=True, help="Lanes of a batch.")
@click.option("--window", default=64, show_default=True, help="Steps of a batch.")
@click.option("--mode", type=click.Choice(["full", "truncated", "microbatch"]), default="full", show_default=True)
@click.option("--chunks", default=4, show_default=True, help="Units that a batch is cut into.")
@click.option("--layout", type=click.Choice(["auto", "chen"]), default="auto", show_default=True,
              help="auto balances multiplications; chen: the softmax alone on the last of two stages.")  # fmt: skip
@click.option("--virtual", default=1, show_default=True, help="Stages of each process.")
@click.option("--plain", is_flag=True, help="An ordinary loop in one process, without a pipeline.")
@click.option("--steps", default=200, show_default=True, help="Updates in all, those before a resume included.")
@click.option("--lr", default=2e-3, show_default=True, help="Adam's learning rate.")
@click.option("--seed", default=0, show_default=True)
@click.option("--print-every", default=10, show_default=True, help="Updates.")
@click.option("--evaluate-every", default=100, show_default=True, help="Updates.")
@click.option("--checkpoint", type=click.Path(path_type=Path), help="A folder of checkpoints; goes on from the newest.")
@click.option("--every", default=100, show_default=True, help="Updates between checkpoints.")
@click.option("--threads", default=1, show_default=True, help="Of each process.")
def main(**options: Any) -> None:
    """Train, and print the loss and real tokens per second."""
    chosen = SimpleNamespace(**options)
    rank, ranks = connect(chosen.threads)
    if chosen.plain and (ranks > 1 or chosen.checkpoint):
        raise click.UsageError("--plain is one process, without checkpoints")
    corpus = TEXTS[chosen.text]()
    network = Network(chosen.cell, chosen.layers, chosen.hidden, corpus.vocabulary, chosen.seed)
    if chosen.plain:
        run(Alone(network), *loaders(corpus, chosen.lanes, chosen.window, chosen.seed), chosen, rank)
    else:
        chen = chosen.layout == "chen"
        virtual = 2 if chen and ranks == 1 else chosen.virtual  # two stages, on whatever there is
        pipe = pipelined(network, chosen.mode, chosen.chunks, chosen.window, chen=chen, virtual=virtual)
        run(pipe, *loaders(corpus, chosen.lanes, chosen.window, chosen.seed, mesh=pipe.mesh), chosen, rank)
    if dist.is_initialized():
        dist.destroy_process_group()


def run(learner: Alone | LayerPipeline, loader: PlanLoader, held_out: PlanLoader, chosen: Any, rank: int) -> None:
    """All updates, with evaluations and checkpoints between them."""
    optimizer = torch.optim.Adam(learner.parameters(), lr=chosen.lr)
    kept = learner if isinstance(learner, LayerPipeline) and chosen.checkpoint else None
    before = 0 if kept is None else resume(chosen.checkpoint, kept, optimizer, loader)
    if before and rank == 0:
        print(f"goes on after update {before}")
    meter = Meter(rank)
    for done, (batch, loss) in zip(
        range(before + 1, chosen.steps + 1), train(learner, optimizer, loader), strict=False
    ):
        meter.add(loss, batch.placement.tokens)
        evaluating = done % chosen.evaluate_every == 0 or done == chosen.steps
        saving = kept is not None and (done % chosen.every == 0 or done == chosen.steps)
        if not (evaluating or saving or done % chosen.print_every == 0):
            continue
        meter.show(done)
        if evaluating:
            score = held_out_loss(learner, held_out)
            if rank == 0:
                print(f"update {done}: held out {score:.6f} nats", flush=True)
        if kept is not None and saving:
            save(chosen.checkpoint, kept, optimizer, loader, batch, done)
        meter.again()


if __name__ == "__main__":
    main()
