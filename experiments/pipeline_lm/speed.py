"""How much faster are two processes than one, and as fast as simulated? See README.md beside this file.

torchrun --standalone --nproc-per-node 2 -m experiments.pipeline_lm.speed [--model NAME ...] [--rounds 5] [--quick]
"""

import csv
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice, repeat
from operator import truediv
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import click
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from tqdm import tqdm

from experiments.common import write_rows
from experiments.pipeline_lm.cases import MODELS, WAYS, Model, Way, tiny
from experiments.pipeline_lm.model import TEXTS, Alone, Network, loaders, pipelined
from experiments.pipeline_lm.stale import in_one_process, on_two_processes
from experiments.pipeline_lm.train import connect
from seqbatch import SequenceBatch
from seqbatch.measure import environment
from seqbatch.pipeline import LayerPipeline

HERE = Path(__file__).parent
LARGEST_SLOWDOWN = 1.15  # of two independent processes; beyond it the machine is not quiet
LATE_BUNCHES = 8  # under way in one job of "late", so that the first and the last count little
TOLERANCE = 1e-4


class Job(NamedTuple):
    """What is timed.

    Attributes:
        run: Returns the loss.
        processes: 1: on rank 0, while rank 1 sleeps; 2: on both.
        steps: How many forward and backward passes it is.
        forget: Drops the gradients, before the clock starts.
    """

    run: Callable[[], float]
    processes: int
    steps: int = 1
    forget: Callable[[], object] = lambda: None


def seconds(job: Job, rank: int) -> float:
    """Of a step of a job, on rank 0's clock, until the last of its ranks is done."""
    job.forget()
    gc.collect()
    dist.barrier()
    begin = time.perf_counter()
    if rank < job.processes:
        job.run()
    if job.processes == 1:
        took = time.perf_counter() - begin
        dist.barrier()
        return took / job.steps
    dist.barrier()
    return (time.perf_counter() - begin) / job.steps


def make_probe() -> Callable[[int], float]:
    """How much slower two independent processes are at the same time than each while the other sleeps."""
    layer, x = nn.LSTM(256, 256), torch.randn(64, 16, 256)

    def work() -> float:
        begin = time.perf_counter()
        for _ in range(4):
            layer(x)[0].sum().backward()
        return time.perf_counter() - begin

    def probe(rank: int) -> float:
        alone = 0.0
        for turn in range(2):
            dist.barrier()
            if turn == rank:
                alone = work()
        dist.barrier()
        slowdown = torch.tensor(work() / alone)
        dist.all_reduce(slowdown, dist.ReduceOp.MAX)
        return float(slowdown)

    work()
    return probe


def batch_of(model: Model) -> tuple[SequenceBatch, int]:
    """The second spliced window, which is full, and the size of the vocabulary."""
    corpus = TEXTS[model.text]()
    loader, _ = loaders(corpus, model.lanes, model.steps)
    (batch,) = islice(loader, 1, 2)
    assert batch.placement.tokens == model.steps * model.lanes, "a window in the middle has no empty cell"
    return batch, corpus.vocabulary


def alone_job(model: Model, vocabulary: int, batch: SequenceBatch) -> Job:
    """The ordinary loop."""
    alone = Alone(Network(model.cell, model.layers, model.hidden, vocabulary))
    return Job(lambda: float(alone.step(batch)[0]), 1, forget=alone.network.zero_grad)


def pipeline_job(pipe: LayerPipeline, way: Way, batch: SequenceBatch) -> Job:
    """A step of a pipeline."""
    return Job(lambda: float(pipe.step(batch).loss), way.processes, forget=pipe.zero_grad)


def late_jobs(model: Model, vocabulary: int, batch: SequenceBatch) -> tuple[Job, Job]:
    """Chen+15's training, updates included, and the exact one in one process."""
    one, two = (Network(model.cell, model.layers, model.hidden, vocabulary) for _ in range(2))  # each learns on
    bunches = list(repeat(batch, LATE_BUNCHES))
    alone = Job(lambda: in_one_process(one, bunches, 0.01, late=False)[0], 1, LATE_BUNCHES)
    return alone, Job(lambda: on_two_processes(two, bunches, 0.01)[0], 2, LATE_BUNCHES)


class Measured(NamedTuple):
    """Of each round: seconds of each job, the probe's slow-down, and what each way should take by simulation."""

    seconds: list[list[float]]
    probes: list[float]
    simulated: list[list[float]]
    splits: list[str]


def measure(model: Model, ways: Sequence[Way], rounds: int, rank: int, bar: tqdm) -> Measured:
    """Run the ordinary loop and every way once to warm up, then in turns, with a probe in each round."""
    batch, vocabulary = batch_of(model)
    each = DeviceMesh("cpu", [[0], [1]], mesh_dim_names=("each", "pp"))["pp"]  # every rank by itself
    pipes: list[LayerPipeline | None] = []
    if ways[0].mode == "late":
        alone, *others = late_jobs(model, vocabulary, batch)
        pipes = [None]
    else:
        alone, others = alone_job(model, vocabulary, batch), []
        for way in ways:
            network = Network(model.cell, model.layers, model.hidden, vocabulary)
            mesh = each if way.processes == 1 else None
            pipe = pipelined(network, way.mode, way.chunks, model.steps, chen=way.chen, mesh=mesh)
            pipes.append(pipe)
            others.append(pipeline_job(pipe, way, batch))
    jobs = [alone, *others]
    losses = []
    for job in jobs:
        dist.barrier()
        losses.append(job.run() if rank < job.processes else float("nan"))
        dist.barrier()
        bar.update()
    if rank == 0 and max(abs(loss - losses[0]) for loss in losses) > TOLERANCE:
        raise AssertionError(f"the same batch must have the same loss in every way, got {losses}")
    probe, probes = make_probe(), []
    found: list[list[float]] = [[] for _ in jobs]
    simulated: list[list[float]] = [[] for _ in ways]
    for _ in range(rounds):
        probes.append(probe(rank))
        for job, times in zip(jobs, found, strict=True):
            times.append(seconds(job, rank))
            bar.update()
        for pipe, way, times in zip(pipes, ways, simulated, strict=True):
            dist.barrier()
            if pipe is not None and rank < way.processes:
                times.append(pipe.simulate(batch, repeats=1).makespan)
    splits = ["-".join(map(str, pipe.split)) if pipe is not None else "1-0" for pipe in pipes]
    return Measured(found, probes, simulated, splits)


def rows_of(name: str, model: Model, ways: Sequence[Way], measured: Measured) -> Iterator[dict[str, Any]]:
    """One for each way."""
    alone, *others = measured.seconds
    probe = median(measured.probes)
    for way, times, simulated, split in zip(ways, others, measured.simulated, measured.splits, strict=True):
        ratios = list(map(truediv, alone, times))
        yield {
            "model": name, "cell": model.cell, "layers": model.layers, "hidden": model.hidden, "steps": model.steps,
            "lanes": model.lanes, "text": model.text, "mode": way.mode, "chunks": way.chunks,
            "processes": way.processes, "split": split, "rounds": len(alone),
            **_spread("alone_s", alone), **_spread("pipeline_s", times), **_spread("speedup", ratios),
            "simulated_s": round(median(simulated), 5) if simulated else "",
            "simulated_speedup": round(median(map(truediv, alone, simulated)), 3) if simulated else "",
            "probe": round(probe, 3), "probe_high": round(max(measured.probes), 3),
            "noisy": probe > LARGEST_SLOWDOWN, **environment(),
        }  # fmt: skip


def _spread(name: str, values: Sequence[float]) -> dict[str, float]:
    return {
        name: round(median(values), 5), f"{name}_low": round(min(values), 5), f"{name}_high": round(max(values), 5)
    }  # fmt: skip


def keep(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows, in place of those of the same models that an earlier run wrote."""
    before: list[dict[str, Any]] = []
    if path.exists():
        with open(path, newline="") as file:
            before = list(csv.DictReader(file))
    new = {row["model"] for row in rows}
    write_rows(path, [*(row for row in before if row["model"] not in new), *rows])


@click.command()
@click.option("--model", "names", type=click.Choice(list(MODELS)), multiple=True, default=list(MODELS))
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
@click.option("--quick", is_flag=True, help="Tiny models, two rounds; nothing is written but where --to says.")
@click.option("--to", type=click.Path(path_type=Path), help="A CSV file; results-cpu.csv by default.")
def main(names: Sequence[str], rounds: int, quick: bool, to: Path | None) -> None:
    """Measure on two processes of one thread each; rows are written when a model is done."""
    rank, ranks = connect(threads=1)
    if ranks != 2:
        raise click.UsageError("start it with torchrun --standalone --nproc-per-node 2")
    rounds = 2 if quick else rounds
    path = to if to or quick else HERE / "results-cpu.csv"
    for name in names:
        model = tiny(MODELS[name]) if quick else MODELS[name]
        total = (rounds + 1) * (1 + len(WAYS[name]))
        with tqdm(total=total, desc=name, disable=rank > 0, mininterval=1.0) as bar:
            measured = measure(model, WAYS[name], rounds, rank, bar)
        if rank > 0:
            continue
        rows = list(rows_of(name, model, WAYS[name], measured))
        for row in rows:
            print(
                f"{name}, {row['mode']}, {row['chunks']} chunks on {row['processes']}: {row['pipeline_s']} s, alone "
                f"{row['alone_s']} s, {row['speedup']:.3f} times as fast ({row['speedup_low']:.3f}-"
                f"{row['speedup_high']:.3f}), simulated {row['simulated_speedup']}",
                flush=True,
            )
        if rows[0]["noisy"]:
            print(
                f"{name}: two independent processes take {rows[0]['probe']} times as long as one, so that something "
                f"else runs here: rows are marked; run again on a quiet machine"
            )
        if path is not None:
            keep(path, rows)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
