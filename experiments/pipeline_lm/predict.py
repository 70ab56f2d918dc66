"""What would a pipeline of many devices gain, by costs measured on one? See README.md beside this file.

python -m experiments.pipeline_lm.predict --device cpu|cuda [--model NAME ...] [--repeats 3] [--quick]
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import click
import pandas as pd
import torch
import torch.distributed as dist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from tqdm import tqdm

from experiments.pipeline_lm.cases import MODELS, Model, tiny
from experiments.pipeline_lm.model import Alone, Network, pipelined
from experiments.pipeline_lm.speed import TOLERANCE, batch_of, keep
from seqbatch.measure import Timing, environment, timed
from seqbatch.pipeline import LINKS, PartCost, predict
from seqbatch.pipeline.costs import fit_cost

HERE = Path(__file__).parent
CHUNKS = (1, 2, 4, 8)  # of the pipeline that is measured, all on one device
STAGES, REPLICAS, DEVICES = (1, 2, 4, 8, 16, 32, 64), (1, 2, 4, 8), 64
DEEP = 64  # layers of the network that is made up of copies of the measured ones
WIRES = {"cpu": ("ethernet", "ethernet"), "cuda": ("nvlink", "infiniband")}  # within a node, between nodes
MEASURED = [name for name in MODELS if name != "chen-late"]  # that one is the same model as "chen"


class Costs(NamedTuple):
    """What one device takes.

    Attributes:
        parts: Of embedding, layers and head, each by itself.
        whole, spliced: A step of the ordinary loop: a window without resets, as parts are measured, and with them.
        chunked: A step of the pipeline with all layers on this device, by the number of units; without resets.
    """

    parts: dict[str, PartCost]
    whole: Timing
    spliced: Timing
    chunked: dict[int, Timing]

    def parts_s(self, model: Model, chunks: int = 1) -> float:
        """Seconds of a step by the parts alone, one unit after the other."""
        grid = -(-model.steps // chunks), model.lanes
        return chunks * sum(part.forward(*grid) + part.backward(*grid) for part in self.parts.values())

    def overhead(self, model: Model) -> float:
        """Seconds of an action besides its parts: what more units cost the pipeline and not its parts."""
        last = CHUNKS[-1]
        more = self.chunked[last].median - self.chunked[1].median - self.parts_s(model, last) + self.parts_s(model)
        return max(more / (2 * (last - 1)), 0.0)  # each unit goes forward and backward


def mesh_of(device: str) -> DeviceMesh:
    """One rank on the device."""
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return init_device_mesh(device, (1,), mesh_dim_names=("pp",))


def measure(model: Model, mesh: DeviceMesh, repeats: int) -> Costs:
    """The ordinary loop, and the pipeline with few and many units, in turns; then each part."""
    device = mesh.device_type
    spliced, vocabulary = batch_of(model)
    calm = replace(spliced, reset=torch.zeros_like(spliced.loss_mask))

    def network() -> Network:
        return Network(model.cell, model.layers, model.hidden, vocabulary).to(device)

    windows = {"whole": calm.to(device), "spliced": spliced.to(device)}
    alone = {name: Alone(network()) for name in windows}
    pipes = {str(chunks): pipelined(network(), "full", chunks, model.steps, mesh=mesh) for chunks in CHUNKS}
    losses: dict[str, float] = {}

    def run(name: str) -> None:
        learner = alone[name].network if name in alone else pipes[name]
        learner.zero_grad()
        losses[name] = float(alone[name].step(windows[name])[0] if name in alone else pipes[name].step(calm).loss)

    took = timed({name: partial(run, name) for name in (*alone, *pipes)}, repeats, device=device)
    if any(abs(losses[name] - losses["whole"]) > TOLERANCE for name in pipes):
        raise AssertionError(f"the same batches must have the same loss in every way, got {losses}")
    parts = pipes["1"].costs(calm, repeats=repeats)
    return Costs(parts, took["whole"], took["spliced"], {n: took[str(n)] for n in CHUNKS})


def cost_rows(name: str, model: Model, costs: Costs, device: str) -> Iterator[dict[str, Any]]:
    """One for each part; what is of the whole network is in all of them."""
    took = {"whole": costs.whole, "spliced": costs.spliced} | {f"chunked_{n}": t for n, t in costs.chunked.items()}
    ends = ((f"{key}_s_{end}", getattr(time, end)) for key, time in took.items() for end in ("low", "high"))
    times = {f"{key}_s": time.median for key, time in took.items()} | dict(ends)
    for part, cost in costs.parts.items():
        yield {
            "model": name, "cell": model.cell, "layers": model.layers, "hidden": model.hidden, "steps": model.steps,
            "lanes": model.lanes, "part": part, **{key: f"{value:.4g}" for key, value in cost._asdict().items()},
            "part_s": round(cost.forward(model.steps, model.lanes) + cost.backward(model.steps, model.lanes), 6),
            "parts_s": round(costs.parts_s(model), 6), "overhead_s": round(costs.overhead(model), 6),
            **{key: round(seconds, 6) for key, seconds in times.items()}, "repeats": len(costs.whole.wall),
            **environment(device),
        }  # fmt: skip


def predicted_rows(name: str, model: Model, costs: Costs, device: str) -> Iterator[dict[str, Any]]:
    """Networks of layers that cost the median of the measured ones: as many, and DEEP."""
    layers = [cost for part, cost in costs.parts.items() if part.startswith("layers.")]
    grids = [(model.steps // cut, lanes) for cut in CHUNKS for lanes in (model.lanes, model.lanes // 2)]
    times = [(*g, median(c.forward(*g) for c in layers), median(c.backward(*g) for c in layers)) for g in grids]
    middle = PartCost(*fit_cost(times)[:6], *layers[0][6:])  # layers are alike, and one may have met a busy machine
    link, network = (LINKS[wire] for wire in WIRES[device])
    for kind, some in (("measured", [middle] * len(layers)), (f"{DEEP} copies", [middle] * DEEP)):
        for stages in (count for count in STAGES if count <= len(some) + 1):  # the head may be a stage by itself
            found = predict(
                some, embed=costs.parts["embed"], head=costs.parts["head"], steps=model.steps, lanes=model.lanes,
                stages=[stages], replicas=[n for n in REPLICAS if n * stages <= DEVICES], link=link, network=network,
                overhead=costs.overhead(model),
            )  # fmt: skip
            for row in found:
                row |= {key: f"{value:.4g}" for key, value in row.items() if isinstance(value, float)}
                row |= {"split": "-".join(map(str, row["split"])), "link": link.name, "between_nodes": network.name}
                yield {"model": name, "layers_are": kind, "layers": len(some), **row, **environment(device)}


def draw(ax: Axes, rows: pd.DataFrame, most: int) -> None:
    """Speed-up against devices, a line for each number of stages; its points are numbers of replicas."""
    ax.plot([1, most], [1, most], color="0.7", linewidth=0.8, label="devices")
    for stages, some in rows.groupby("stages"):
        ax.plot(some["devices"], some["speedup"], "o-", markersize=4, linewidth=1.2, label=str(stages))
    ticks = [2**n for n in range(most.bit_length())]
    for axis, scale in ((ax.xaxis, ax.set_xscale), (ax.yaxis, ax.set_yscale)):
        scale("log", base=2)
        axis.set_ticks(ticks, labels=list(map(str, ticks)))
    ax.set_xlabel("devices")


def picture(path: Path, device: str) -> None:
    """All rows of predicted-<device>.csv, a panel for each network."""
    rows = pd.read_csv(path)
    panels = list(rows.groupby(["model", "layers_are"], sort=False))
    figure = Figure(figsize=(0.8 + 3.3 * len(panels), 4.4), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for ax, ((name, kind), some) in zip(axes, panels, strict=True):
        draw(ax, some, int(rows["devices"].max()))
        made = f"{some['layers'].iloc[0]} layers" if kind == "measured" else f"{kind} of its layer"
        ax.set_title(f"{name}, {made}", fontsize="small")
    axes[0].set_ylabel("times the throughput of one device")
    found = {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(found.values(), found, title="stages", loc="outside right center", frameon=False, fontsize="small")
    wires = " and ".join(dict.fromkeys(WIRES[device]))
    machine = rows["gpu"].iloc[0] if device == "cuda" else f"thread of {rows['cpu'].iloc[0]}"
    figure.suptitle(f"PREDICTED, NOT MEASURED: layers timed on one {machine}; links assumed: {wires}", fontsize="small")
    figure.savefig(path.with_suffix(".png"), dpi=100)


def report(name: str, model: Model, costs: Costs, rows: Sequence[Mapping[str, Any]]) -> None:
    """What was measured and predicted, on the terminal."""
    chunked = ", ".join(f"{time.median:.4f} ({chunks})" for chunks, time in costs.chunked.items())
    tqdm.write(f"{name}: whole {costs.whole.median:.4f} s, parts {costs.parts_s(model):.4f}, chunked {chunked}")
    for row in (row for row in rows if row["replicas"] == 1):
        tqdm.write("  predicted: {layers} layers, {stages} stages: {speedup} times one device".format(**row))


@click.command()
@click.option("--device", type=click.Choice(list(WIRES)), default="cpu", show_default=True)
@click.option("--model", "names", type=click.Choice(MEASURED), multiple=True, default=["lstm-512", "sru-512"],
              show_default=True)  # fmt: skip
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True)
@click.option("--quick", is_flag=True, help="Tiny models; nothing is written but where --to says.")
@click.option("--to", type=click.Path(path_type=Path, file_okay=False, exists=True), help="A folder; this by default.")
def main(device: str, names: Sequence[str], repeats: int, quick: bool, to: Path | None) -> None:
    """Measure on one device (of a CPU: one thread), predict, and draw; rows are written when a model is done."""
    torch.set_num_threads(1)
    mesh = mesh_of(device)
    folder = to if to or quick else HERE
    for name in tqdm(names, desc="models"):
        model = tiny(MODELS[name]) if quick else MODELS[name]
        costs = measure(model, mesh, repeats)
        rows = list(predicted_rows(name, model, costs, device))
        report(name, model, costs, rows)
        if folder is not None:
            keep(folder / f"device-costs-{device}.csv", list(cost_rows(name, model, costs, device)))
            keep(folder / f"predicted-{device}.csv", rows)
            picture(folder / f"predicted-{device}.csv", device)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
