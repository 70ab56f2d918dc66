"""What a pipeline would take: costs of its parts, links between devices, balanced splits, predicted throughput.

A prediction is no measurement: it is the simulation of a timetable with costs that were measured on one device and
with published numbers of links.
"""

from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import numpy as np

from seqbatch.pipeline.balance import balanced_split
from seqbatch.pipeline.links import LINKS, Link
from seqbatch.pipeline.schedules import schedule
from seqbatch.pipeline.timeline import Timeline, simulate
from seqbatch.strategy import check_choice, check_integer

__all__ = ["CHUNKS", "LINKS", "MODES", "Link", "PartCost", "Tuned", "balanced_split", "fit_cost", "predict",
           "stage_costs", "tune"]  # fmt: skip

CHUNKS = (1, 2, 4, 8, 16, 32, 64)
MODES = ("full", "truncated", "microbatch")


class PartCost(NamedTuple):
    """What a part of a model (embedding, layer or head) takes on one device.

    Seconds of a forward of `steps` steps and `lanes` lanes are ``call_f + steps * (step_f + lanes * cell_f)``, those
    of a backward likewise.

    Attributes:
        call_f, step_f, cell_f: Seconds per call, per step and per cell, forward.
        call_b, step_b, cell_b: Backward.
        parameter_bytes: Bytes of gradient that replicas average.
        output_width_bytes: Bytes per step and lane that go to the next part (and as gradient come back).

    >>> PartCost(1.0, 0.1, 0.01, 2.0, 0.2, 0.02).backward(steps=10, lanes=5)
    5.0
    """

    call_f: float
    step_f: float
    cell_f: float
    call_b: float
    step_b: float
    cell_b: float
    parameter_bytes: float = 0.0
    output_width_bytes: float = 0.0

    def forward(self, steps: int, lanes: int) -> float:
        """Seconds of a forward."""
        return self.call_f + steps * (self.step_f + lanes * self.cell_f)

    def backward(self, steps: int, lanes: int) -> float:
        """Seconds of a backward."""
        return self.call_b + steps * (self.step_b + lanes * self.cell_b)


def fit_cost(
    samples: Iterable[Sequence[float]], *, parameter_bytes: float = 0.0, output_width_bytes: float = 0.0
) -> PartCost:
    """Fit a part's costs, none negative, to measured times; the sum of squared *relative* errors is least.

    Args:
        samples: Rows (steps, lanes, seconds of a forward, seconds of a backward), 3 at least, of different steps and
            of different lanes.
        parameter_bytes: Passed on.
        output_width_bytes: Passed on.

    Raises:
        ValueError: too few rows or all alike, or a time is not positive.

    >>> rows = [(8, 1, 0.3, 0.7), (16, 1, 0.5, 1.2), (8, 4, 0.3, 0.7), (16, 4, 0.5, 1.2)]
    >>> [round(number, 4) for number in fit_cost(rows)[:6]]
    [0.1, 0.025, 0.0, 0.2, 0.0625, 0.0]
    """
    from scipy.optimize import nnls

    rows = np.array([tuple(row) for row in samples], np.float64)
    if rows.ndim != 2 or rows.shape[0] < 3 or rows.shape[1] != 4:
        raise ValueError(f"expected 3 rows or more of (steps, lanes, forward_s, backward_s), got {rows.tolist()}")
    if not (np.isfinite(rows) & (rows > 0)).all():
        raise ValueError(f"steps, lanes and seconds must be positive and finite, got {rows.tolist()}")
    steps, lanes = rows[:, 0], rows[:, 1]
    terms = np.stack([np.ones_like(steps), steps, steps * lanes], axis=1)
    terms_scale = np.linalg.norm(terms, axis=0)
    if np.linalg.matrix_rank(terms / terms_scale) < 3:
        raise ValueError(
            "three numbers need three grids of different steps and of different lanes, got "
            f"{sorted(set(zip(steps.tolist(), lanes.tolist(), strict=True)))}"
        )
    found: list[float] = []
    for seconds in rows[:, 2:].T:
        weighted = terms / seconds[:, None]
        scale = np.linalg.norm(weighted, axis=0)  # the terms differ by orders of magnitude
        numbers, _ = nnls(weighted / scale, np.ones(len(rows)))
        found += (numbers / scale).tolist()
    return PartCost(*found)._replace(parameter_bytes=parameter_bytes, output_width_bytes=output_width_bytes)


def stage_costs(
    layers: Sequence[PartCost], split: Sequence[int], *, embed: PartCost | None = None, head: PartCost | None = None
) -> tuple[PartCost, ...]:
    """Return the costs of stages: sums of their parts', but what they send is as wide as their last part's output.

    Args:
        layers: Of each layer.
        split: Layers of each stage.
        embed: What the first stage has before its layers.
        head: What the last stage has after its layers.
    """
    if sum(split) != len(layers):
        raise ValueError(f"a split of {len(layers)} layers must sum to that, got {tuple(split)}")
    cuts = list(accumulate(split, initial=0))
    parts = [list(layers[begin:end]) for begin, end in pairwise(cuts)]
    parts[0][:0] = [embed] if embed else []
    parts[-1] += [head] if head else []
    if not all(parts):
        raise ValueError(f"each stage needs a layer, or the head as the last one, got the split {tuple(split)}")
    totals = [PartCost(*map(sum, zip(*some, strict=True))) for some in parts]
    return tuple(
        total._replace(output_width_bytes=some[-1].output_width_bytes)
        for total, some in zip(totals, parts, strict=True)
    )


class Tuned(NamedTuple):
    """The fastest way found to run a model on some stages.

    Attributes:
        chunks: Units that a batch is cut into.
        split: Layers of each stage.
        step_s: Seconds of a step, averaging gradients included.
        bubble: Idle share before gradients are averaged.
    """

    chunks: int
    split: tuple[int, ...]
    step_s: float
    bubble: float


def tune(
    layers: Sequence[PartCost], *, head: PartCost | None = None, embed: PartCost | None = None, steps: int, lanes: int,
    stages: int, link: Link, network: Link, replicas: int = 1, per_node: int = 8, chunks: Sequence[int] = CHUNKS,
    mode: str = "full", overhead: float = 0.0,
) -> Tuned:  # fmt: skip
    """Return the number of chunks and the split with the shortest step; of equal ones, the fewest chunks.

    Arguments are those of `predict`, but for one number of stages and of replicas.

    Raises:
        ValueError: more stages than layers can fill, or no number of chunks that the batch can be cut into.

    >>> layer = PartCost(0, 1e-4, 0, 0, 2e-4, 0)
    >>> wires = {"link": LINKS["nvlink"], "network": LINKS["infiniband"]}
    >>> tune([layer] * 4, steps=64, lanes=8, stages=4, overhead=5e-5, **wires)[:2]
    (32, (1, 1, 1, 1))
    """
    for what, value in (("steps", steps), ("lanes", lanes), ("stages", stages), ("replicas", replicas),
                        ("per_node", per_node)):  # fmt: skip
        check_integer(what, value, at_least=1)
    check_choice("mode", mode, MODES)
    whole, best = lanes if mode == "microbatch" else steps, None
    for count in sorted(set(chunks)):
        if check_integer("chunks", count, at_least=1) > whole:
            break
        piece = -(-whole // count)
        grid = (steps, piece) if mode == "microbatch" else (piece, lanes)
        first, *middle, last = (_seconds(part, grid) for part in (embed, *layers, head))
        split = balanced_split(middle, stages, head=first, tail=last)
        parts = stage_costs(layers, split, embed=embed, head=head)
        every = _hops(stages, replicas, per_node, link, network)
        lines = [_timeline(parts, grid, count, mode, overhead, hops) for hops in every]
        slowest = max(lines, key=lambda line: line.makespan)
        average = _all_reduce(parts, replicas, link if stages * replicas <= per_node else network)
        one = Tuned(count, split, slowest.makespan + average, slowest.bubble)
        if best is None or one.step_s < best.step_s * (1 - 1e-9):  # not by rounding alone
            best = one
    if best is None:
        what = "lanes" if mode == "microbatch" else "steps"
        raise ValueError(f"{whole} {what} cannot be cut into any of chunks={list(chunks)}: name a smaller number")
    return best


def predict(
    layers: Sequence[PartCost], *, head: PartCost | None = None, embed: PartCost | None = None, steps: int, lanes: int,
    stages: Sequence[int], replicas: Sequence[int], link: Link, network: Link, per_node: int = 8,
    chunks: Sequence[int] = CHUNKS, mode: str = "full", overhead: float = 0.0,
) -> list[dict[str, Any]]:  # fmt: skip
    """Predict the throughput of layers over `stages` devices, on `replicas` such pipelines.

    Stages of a pipeline are neighbours; `per_node` devices in turn make a node. Gradients are averaged after backward,
    by a ring over the replicas of the largest stage, on `link` if all devices are on one node, else on `network`.
    Memory, sharing of a node's adapters, and loading of data are left out.

    Args:
        layers: Costs of the layers.
        head: Cost of what follows the last layer, on the last stage.
        embed: Cost of what comes before the first layer, on the first stage.
        steps: Steps of a batch.
        lanes: Lanes of a batch of *each* replica.
        stages: Numbers of devices of a pipeline to try.
        replicas: Numbers of pipelines to try.
        link: Between devices of a node.
        network: Between nodes.
        per_node: Devices on a node.
        chunks: Numbers of units to try; those beyond the steps or lanes that are cut are left out.
        mode: "full": chunks of steps, exact gradients (wavefront). "truncated": chunks of steps, gradients cut between
            them. "microbatch": chunks of lanes. These two run 1f1b, or gpipe with fewer chunks than stages. The last
            chunk is as long as the others, padded if need be.
        overhead: Seconds that each action takes besides (launching it, and its messages).

    Returns:
        A row for each number of stages and of replicas: stages, replicas, devices, chunks and split (the fastest),
        step_s, tokens_per_s (steps * lanes * replicas a step), speedup over one device that runs whole batches,
        efficiency (speedup per device), bubble.

    >>> layer = PartCost(0, 1e-4, 0, 0, 2e-4, 0)
    >>> rows = predict([layer] * 4, steps=64, lanes=8, stages=[1, 4], replicas=[1], link=LINKS["nvlink"],
    ...                network=LINKS["infiniband"])
    >>> [(row["devices"], row["chunks"], round(row["speedup"], 1)) for row in rows]
    [(1, 1, 1.0), (4, 64, 3.8)]
    """

    def best(count: int, copies: int, sizes: Sequence[int]) -> Tuned:
        return tune(layers, head=head, embed=embed, steps=steps, lanes=lanes, stages=count, link=link, network=network,
                    replicas=copies, per_node=per_node, chunks=sizes, mode=mode, overhead=overhead)  # fmt: skip

    alone, rows = best(1, 1, (1,)).step_s, list[dict[str, Any]]()
    for count in stages:
        for copies in replicas:
            found, devices = best(count, copies, chunks), count * copies
            speedup = copies * alone / found.step_s
            rows.append({
                "stages": count, "replicas": copies, "devices": devices, "chunks": found.chunks, "split": found.split,
                "step_s": found.step_s, "tokens_per_s": copies * steps * lanes / found.step_s, "speedup": speedup,
                "efficiency": speedup / devices, "bubble": found.bubble,
            })  # fmt: skip
    return rows


def _seconds(part: PartCost | None, grid: tuple[int, int]) -> float:
    return part.forward(*grid) + part.backward(*grid) if part else 0.0


def _timeline(
    parts: Sequence[PartCost], grid: tuple[int, int], chunks: int, mode: str, overhead: float, hops: Sequence[Link]
) -> Timeline:
    """Simulate stages over units of a grid of (steps, lanes)."""
    wide = "1f1b" if chunks >= len(parts) else "gpipe"
    table = schedule("wavefront" if mode == "full" else wide, stages=len(parts), chunks=chunks)
    return simulate(
        table,
        [overhead + part.forward(*grid) for part in parts],
        [overhead + part.backward(*grid) for part in parts],
        latency=[hop.latency for hop in hops],
        transfer=[
            grid[0] * grid[1] * part.output_width_bytes / hop.bandwidth
            for part, hop in zip(parts, hops, strict=False)  # the last sends nothing
        ],
    )


def _hops(stages: int, replicas: int, per_node: int, link: Link, network: Link) -> list[tuple[Link, ...]]:
    """The links between the stages of each pipeline, which differ by where a pipeline crosses from node to node."""
    nodes = ([(first + stage) // per_node for stage in range(stages)] for first in range(0, stages * replicas, stages))
    hops = (tuple(link if here == there else network for here, there in pairwise(node)) for node in nodes)
    return list(dict.fromkeys(hops))


def _all_reduce(parts: Sequence[PartCost], replicas: int, link: Link) -> float:
    """Seconds of averaging the largest stage's gradients in a ring (Patarasuk and Yuan 2009)."""
    largest = max(part.parameter_bytes for part in parts)
    return 2 * (replicas - 1) * (largest / replicas / link.bandwidth + link.latency)
