"""What the stages of a pipeline take on the devices at hand, and what a step should take by that."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from seqbatch.pipeline.calls import Call
from seqbatch.pipeline.costs import PartCost, Tuned, fit_cost, tune
from seqbatch.pipeline.links import Link
from seqbatch.pipeline.parts import Spec, run_layer, untouched
from seqbatch.pipeline.runner import Runner
from seqbatch.pipeline.schedules import schedule
from seqbatch.pipeline.stage import Stage, Step
from seqbatch.pipeline.timeline import Timeline, simulate
from seqbatch.pipeline.units import Units, cut

__all__ = ["part_costs", "timed_timeline", "tuned"]


class _Times(NamedTuple):
    """Seconds of a stage's units, each (units,)."""

    forward: list[float]
    backward: list[float]


def timed_timeline(runner: Runner, call: Call, repeats: int) -> Timeline:
    """Time every unit of every stage, and messages between ranks, on all ranks at once; the timeline that follows."""
    specs, numbers = runner.specs(call.batch, call.targets), runner.engine.numbers
    units = cut(call.batch, call.targets, runner.settings.mode, call.shape, call.fresh, runner.place.device)
    own = _agreed(runner, lambda: _stage_times(runner, units, specs, call.scale, repeats))
    wire = specs[1].empty(units.steps, units.lanes) if len(specs) > 1 else units.data[:0]
    latency, transfer = _hop(runner, wire, repeats)
    everyone = runner.council.gather((runner.place.replica, own, latency, transfer))
    mine = [rest for replica, *rest in everyone if replica == runner.place.replica]
    times = {number: stage for found, *_ in mine for number, stage in found.items()}
    forward, backward = ([times[n][way] for n in range(len(times))] for way in range(2))
    name = "1f1b" if runner.engine.alternates(units.count) else "wavefront"
    table = schedule(name, stages=len(times), chunks=units.count, virtual=len(numbers))
    hops = {"latency": max(rest[1] for rest in mine), "transfer": max(rest[2] for rest in mine)}
    return simulate(table, np.array(forward), np.array(backward), **hops)


def _stage_times(runner: Runner, units: Units, specs: Sequence[Spec], scale: float, repeats: int) -> dict[int, _Times]:
    own: dict[int, _Times] = {}
    for number, stage in zip(runner.engine.numbers, runner.stages, strict=True):
        x = units.data
        if number:
            x = specs[number].random(units.count * units.steps, units.lanes, runner.place.device)
        with _without_traces(stage, runner.place.device):
            rounds = [_unit_times(stage, x, units, scale) for _ in range(repeats + 1)][1:]
        own[number] = _Times(*([median(r[way][k] for r in rounds) for k in range(units.count)] for way in range(2)))
    return own


def _agreed(runner: Runner, measure: Callable[[], Any]) -> Any:
    """What is measured, where all ranks could."""
    found, error = None, None
    try:
        found = measure()
    except Exception as failure:  # whatever a layer raises, all ranks must stop
        error = failure
    runner.council.share({}, error)
    return found


def _unit_times(stage: Stage, x: Tensor, units: Units, scale: float) -> _Times:
    """One pass over all units as in training, each timed."""
    forward, backward, outputs = [], [], []
    step = Step(units.pieces, [None] * units.count, scale, (0, 0, 0))
    with torch.enable_grad(), stage.during(step):
        for part in torch.split(x, units.steps):
            leaf = part.detach().requires_grad_(part.is_floating_point())
            seconds, y = _timed(partial(stage, leaf), stage.device)
            outputs.append(y)
            forward.append(seconds)
        for y in reversed(outputs):
            seconds, _ = _timed(partial(y.backward, torch.ones_like(y)), stage.device)
            backward.append(seconds)
    return _Times(forward, backward[::-1])


def _timed(function: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    _wait(device)
    begin = time.perf_counter()
    found = function()
    _wait(device)
    return time.perf_counter() - begin, found


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _without_traces(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Put gradients, buffers, modes and random numbers back."""
    gradients = [(parameter, parameter.grad) for parameter in module.parameters()]
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        with untouched([module], device):
            yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient


def _hop(runner: Runner, wire: Tensor, repeats: int) -> tuple[float, float]:
    """Seconds from rank to rank: of an empty message, and what the size of `wire` adds; 0 within one rank."""
    ranks, rank, group = runner.place.ranks, runner.place.rank, runner.place.group
    found = [0.0, 0.0]
    for first in range(len(ranks) - 1):
        if rank not in (first, first + 1):
            continue
        other = ranks[first + 1 if rank == first else first]
        for way, size in enumerate((1, max(wire.numel(), 1))):
            buffer = torch.zeros(size, dtype=wire.dtype, device=runner.place.device)
            rounds = []
            for _ in range(4 * repeats + 2):
                begin = time.perf_counter()
                for sends in (rank == first, rank != first):
                    (dist.send if sends else dist.recv)(buffer, other, group=group)
                _wait(runner.place.device)
                rounds.append((time.perf_counter() - begin) / 2)
            found[way] = max(found[way], median(rounds[2:]))
    return found[0], max(found[1] - found[0], 0.0)


def part_costs(runner: Runner, call: Call, repeats: int) -> dict[str, PartCost]:
    """Costs of every part of the network, from pieces of several sizes on the devices that hold them."""
    if not call.batch.loss_mask.any():
        raise ValueError("the batch has no token that carries loss, and the head is timed with some: take another one")
    own = _agreed(runner, lambda: _own_costs(runner, call, repeats))
    found: dict[str, PartCost] = {}
    for replica, parts in runner.council.gather((runner.place.replica, own)):
        found |= parts if replica == runner.place.replica else {}
    return found


def _own_costs(runner: Runner, call: Call, repeats: int) -> dict[str, PartCost]:
    steps, lanes = call.batch.placement.steps, call.batch.placement.lanes
    long = {max(steps // share, 1) for share in (1, 2, 4, 8)} | {2}
    wide = {lanes, max(lanes // 2, 1)} | ({2} if lanes == 1 else set())
    grids = sorted({(n, lanes) for n in long} | {(n, m) for n in (min(long), max(long)) for m in wide})
    specs = runner.specs(call.batch, call.targets)
    own: dict[str, PartCost] = {}
    for number, stage in zip(runner.engine.numbers, runner.stages, strict=True):
        spec = specs[number]
        for name, part in zip(stage.names, stage.parts, strict=True):
            run, last = _runner_of(stage, name, part, call), name == stage.names[-1] and stage.loss is not None
            with _without_traces(part, stage.device):
                out = run(spec.random(2, 1, stage.device))
                rows = [(*grid, *_part_times(run, spec.random(*grid, stage.device), repeats)) for grid in grids]
            size = sum(p.numel() * p.element_size() for p in part.parameters() if p.requires_grad)
            width = 0 if last else out.numel() // 2 * out.element_size()
            own[name] = fit_cost(rows, parameter_bytes=size, output_width_bytes=width)
            spec = spec if last else Spec.of(out)
    return own


def _runner_of(stage: Stage, name: str, part: nn.Module, call: Call) -> Callable[[Tensor], Tensor]:
    """A part as a function of its input; the last one with the loss."""

    def run(x: Tensor) -> Tensor:
        if name.startswith("layers."):
            y = run_layer(part, x, None, None, None)[0]
        else:
            y = part(x.flatten(0, 1) if name == "head" else x)
        if stage.loss is None or name != stage.names[-1]:
            return y
        rows = y if name == "head" else y.flatten(0, 1)
        targets = call.targets[call.batch.loss_mask][:1].to(stage.device)
        losses: Tensor = stage.loss(rows, targets.expand(len(rows), *targets.shape[1:]))
        return losses

    return run


def _part_times(run: Callable[[Tensor], Tensor], x: Tensor, repeats: int) -> tuple[float, float]:
    forward, backward = [], []
    for _ in range(repeats + 1):
        leaf = x.detach().requires_grad_(x.is_floating_point())
        with torch.enable_grad():
            seconds, y = _timed(partial(run, leaf), x.device)
            forward.append(seconds)
            seconds = 1e-9
            if y.requires_grad:
                seconds, _ = _timed(partial(y.backward, torch.ones_like(y)), x.device)
            backward.append(seconds)
    return median(forward[1:]), median(backward[1:])


def tuned(runner: Runner, call: Call, stages: int, repeats: int, chunks: Sequence[int]) -> Tuned:
    """The number of units and the split that the costs of all parts make fastest."""
    parts = part_costs(runner, call, repeats)
    steps, lanes = call.batch.placement.steps, call.batch.placement.lanes
    wire = runner.specs(call.batch, call.targets)[-1].empty(steps, lanes)
    latency, transfer = map(max, zip(*runner.council.gather(_hop(runner, wire, repeats)), strict=True))
    bandwidth = wire.numel() * wire.element_size() / transfer if transfer else float("inf")
    link = Link("measured", bandwidth, latency, "messages between the ranks of this pipeline")
    return tune(
        [cost for name, cost in parts.items() if name.startswith("layers.")],
        embed=parts.get("embed"),
        head=parts.get("head"),
        steps=steps,
        lanes=lanes,
        stages=stages,
        replicas=runner.place.replicas,
        link=link,
        network=link,
        chunks=chunks,
        mode=runner.settings.mode,
    )
