"""What a cell written as one step costs, against a loop over it and against layers written by hand; see README.md.

python -m experiments.step_graph.run [--quick]
"""

import argparse
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from experiments.common import write_rows
from experiments.rnn_speed.run import Job, Timer, inference, training
from seqbatch.measure import environment
from seqbatch.rnn import SRU, cells, parallelize

HERE = Path(__file__).parent
STEPS, LANES, WIDTHS = 128, (1, 2, 4, 8, 16, 32, 64, 128), (128, 512)
ALL = [getattr(cells, name) for name in cells.__all__ if name != "Cell"]
AT = (8, 128)  # lanes and width at which every cell is measured

# cell, lanes, width; what against what; at most, or if negative at least. Forward and backward.
BARS = [
    ("SRUv1", (32,), 512, "parallelize", "by hand", 1.2),
    ("SRUv1", (32,), 512, "loop", "parallelize", -2.5),
    ("LSTM", (1, 2, 4, 8), 512, "loop", "parallelize", -1.5),
    ("LSTM", (64,), 512, "loop", "parallelize", -1.0),
]


class Loop(nn.Module):
    """The step in a loop over time, as one writes it."""

    def __init__(self, cell: cells.Cell) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        """(T, B, D) -> (T, B, H)."""
        state = tuple(x.new_zeros(x.shape[1], self.cell.hidden_size) for _ in range(self.cell.states))
        outputs = []
        for row in x.unbind():
            y, *state = self.cell(row, *state)
            outputs.append(y)
        return torch.stack(outputs)


def by_hand(name: str, width: int) -> nn.Module | None:
    """The layer that computes the same, where the library or torch has one."""
    return {"SRUv1": lambda: SRU(width, width, version="v1"), "LSTM": lambda: nn.LSTM(width, width)}.get(
        name, lambda: None
    )()


def jobs(kind: type[cells.Cell], lanes: int, width: int) -> dict[str, Job]:
    """Forward alone and forward with backward, of each way to run the cell."""
    torch.manual_seed(0)
    cell = kind(width, width)
    ways: dict[str, nn.Module | None] = {"loop": Loop(cell), "parallelize": parallelize(cell, example=cell.example())}
    ways["by hand"] = by_hand(kind.__name__, width)
    x = torch.randn(STEPS, lanes, width)
    found: dict[str, Job] = {}
    for name, module in ways.items():
        if module is not None:
            found[f"{name} forward"] = inference(module, x.clone())
            found[f"{name} both"] = training(module, x.clone())
    return found


def measured(kind: type[cells.Cell], lanes: int, width: int, turns: int) -> Iterator[dict[str, object]]:
    """A row for each way and direction, with the ratio of the loop's time to its own, turn by turn."""
    timer, work = Timer("cpu"), jobs(kind, lanes, width)
    found: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(turns + 1):
        for name, job in work.items():
            seconds = timer(job)
            if turn:  # the first warms up
                found[name].append(seconds)
    for name, seconds in found.items():
        way, direction = name.rsplit(" ", 1)
        ratios = [a / b for a, b in zip(found[f"loop {direction}"], seconds, strict=True)]
        row: dict[str, object] = {"cell": kind.__name__, "steps": STEPS, "lanes": lanes, "width": width, "way": way}
        row |= {"direction": direction, "ms": round(1e3 * statistics.median(seconds), 3)}
        row |= {"low": round(1e3 * min(seconds), 3), "high": round(1e3 * max(seconds), 3)}
        row |= {"loop_over_it": round(statistics.median(ratios), 3)}
        row |= {"ratio_low": round(min(ratios), 3), "ratio_high": round(max(ratios), 3)}
        yield row


def tracing(kind: type[cells.Cell]) -> dict[str, object]:
    """Seconds to trace a cell, try it out, find its components and write its programs; median of five."""
    cell, seconds = kind(512, 512), []
    for _ in range(5):
        begin = time.perf_counter()
        layer = parallelize(cell, example=cell.example())
        passes = layer.passes(True)
        seconds.append(time.perf_counter() - begin)
    kinds = ", ".join(one.kind for one in passes)
    return {"cell": kind.__name__, "way": f"tracing: {kinds}", "ms": round(1e3 * statistics.median(seconds), 1)}


def bars(rows: list[dict[str, object]]) -> Iterator[dict[str, object]]:
    """A row for each bar: the ratio of the medians."""
    place = {(r["cell"], r.get("lanes"), r.get("width"), r["way"]): r for r in rows if r.get("direction") == "both"}
    for cell, many, width, one, other, bar in BARS:
        for lanes in many:
            a, b = (place[cell, lanes, width, way]["ms"] for way in (one, other))
            ratio = float(a) / float(b)  # type: ignore[arg-type]
            row: dict[str, object] = {"cell": cell, "steps": STEPS, "lanes": lanes, "width": width}
            row |= {"way": f"{one} / {other}", "direction": "both", "loop_over_it": round(ratio, 3)}
            row |= {"bar": f"{'at least' if bar < 0 else 'at most'} {abs(bar)}"}
            yield row | {"reached": ratio >= -bar if bar < 0 else ratio <= bar}


def main() -> None:
    """Measure, write rows and draw speed-up against lanes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one turn of few cases, nothing written")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    turns, lanes, widths = (1, (1, 32), (128,)) if arguments.quick else (7, LANES, WIDTHS)
    cases = [(kind, n, width) for width in widths for kind in (cells.LSTM, cells.SRUv1) for n in lanes]
    cases += [(kind, *AT) for kind in ALL if kind not in (cells.LSTM, cells.SRUv1)]
    rows = [tracing(kind) for kind in ALL]
    for case in tqdm(cases, disable=None):
        rows += measured(*case, turns)
    if arguments.quick:
        for row in rows:
            print(", ".join(f"{name} {value}" for name, value in row.items()))
        return
    rows += bars(rows)
    record = environment() | {"torch": torch.__version__}
    write_rows(HERE / "results-cpu.csv", [record | row for row in rows])


if __name__ == "__main__":
    main()
