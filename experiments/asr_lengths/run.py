"""What a bidirectional speech encoder costs in each form of batching; see README.md beside this file.

python -m experiments.asr_lengths.run [--device cpu|cuda] [--dtype float32|bfloat16] [--quick]
"""

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from experiments.asr_lengths.forms import ROWS, Batches, Encoder, Row, Utterances, deviations, loss_of
from experiments.common import peak_mib, write_rows
from seqbatch import load_corpus
from seqbatch.measure import environment
from seqbatch.placement import Placement

HERE = Path(__file__).parent
CLASSES, MELS, THREADS, BATCHES = 64, 80, 2, 3
CHECKED_UNITS = 64  # of a direction where outputs are compared in float64


@dataclass(frozen=True)
class Setting:
    """What all rows share."""

    device: str = "cpu"
    dtype: str = "float32"
    subsample: int = 4
    utterances: int = 16
    units: int = 256
    denormals: str = "flushed"

    @property
    def features(self) -> int:
        """Values a frame after stacking."""
        return MELS * self.subsample

    def lengths(self) -> NDArray[np.int64]:
        """Frames of each utterance after stacking."""
        return -(-load_corpus("librispeech_devtest_clean") // self.subsample)


class Training:
    """The training of one row: a step is forward, backward and SGD on one batch."""

    def __init__(self, row: Row, batches: Batches, setting: Setting) -> None:
        torch.manual_seed(0)
        self.row, self.batches, self.setting = row, batches, setting
        self.encoder = Encoder(row.cell, setting.features, setting.units, CLASSES).to(setting.device)
        self.optimizer = torch.optim.SGD(self.encoder.parameters(), lr=0.01)

    def step(self, number: int) -> tuple[float, float]:
        """Train on a batch; return the seconds of making (and moving) it and of all."""
        begin = time.perf_counter()
        batch = self.batches[number].to(self.setting.device)
        self._wait()
        made = time.perf_counter()
        half = self.setting.dtype == "bfloat16"
        with torch.autocast(self.setting.device, torch.bfloat16, enabled=half):
            loss = loss_of(self.encoder, batch, self.row.form)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._wait()
        return made - begin, time.perf_counter() - begin

    def _wait(self) -> None:
        if self.setting.device == "cuda":
            torch.cuda.synchronize()


def balanced_sample(placements: list[Placement], count: int) -> list[int]:
    """Return as many batches, one of each stratum of cells, whose mean frames, cells and steps are the epoch's.

    The best of 2,000 draws, so that few batches stand for all.
    """
    columns = np.array([(p.tokens, p.steps * p.lanes, p.steps) for p in placements], float)
    strata = np.array_split(np.argsort(columns[:, 1], kind="stable"), count)
    random = np.random.default_rng(0)
    draws = np.stack([random.choice(stratum, 2000) for stratum in strata], axis=1)
    off = np.abs(columns[draws].mean(1) / columns.mean(0) - 1).max(1)
    return [int(number) for number in draws[off.argmin()]]


def take_turns(trainings: list[Training], samples: list[list[int]], turns: int) -> list[list[tuple[float, float]]]:
    """Return seconds (data, all) of each row's sample, the rows taking turns; the first turn is not counted."""
    found: list[list[tuple[float, float]]] = [[] for _ in trainings]
    with tqdm(total=(turns + 1) * len(trainings), desc="turns", disable=None) as bar:
        for turn in range(turns + 1):
            for seconds, training, sample in zip(found, trainings, samples, strict=True):
                gc.collect()
                data, whole = np.sum([training.step(number) for number in sample], axis=0)
                if turn:
                    seconds.append((float(data), float(whole)))
                bar.update()
    return found


def timed_rows(trainings: list[Training], samples: list[list[int]], turns: int) -> list[dict[str, Any]]:
    """A row of numbers for each training; ratios are turn by turn against the first."""
    found, rows = take_turns(trainings, samples, turns), []
    rates = []
    for training, sample, seconds in zip(trainings, samples, found, strict=True):
        placements = [training.batches.placements[number] for number in sample]
        frames, cells = sum(p.tokens for p in placements), sum(p.steps * p.lanes for p in placements)
        rates.append([frames / whole for _, whole in seconds])
        ratios = [mine / base for mine, base in zip(rates[-1], rates[0], strict=True)]
        rows.append(
            {"plan": training.row.plan, "form": training.row.form, "cell": training.row.cell}
            | {"batches": len(sample), "frames": frames, "steps": sum(p.steps for p in placements)}
            | {"plan_efficiency": round(training.batches.loader.plan.padding_efficiency, 4)}
            | {"computed_efficiency": round(frames / cells, 4) if training.row.pads else 1.0}
            | _spread("frames_per_s", rates[-1], 0)
            | _spread("ratio", ratios, 3)
            | {"frames_per_s_without_data": round(frames / statistics.median(whole - data for data, whole in seconds))}
            | _spread("data_share", [data / whole for data, whole in seconds], 5)
        )
    return rows


def _spread(name: str, values: list[float], digits: int) -> dict[str, float]:
    return {
        name: round(statistics.median(values), digits),
        f"{name}_low": round(min(values), digits),
        f"{name}_high": round(max(values), digits),
    }


def checked(row: Row, data: Utterances, setting: Setting, utterances: int) -> dict[str, Any]:
    """How far the outputs of one mean batch are from those of each utterance alone, float64, both directions apart."""
    batches = Batches(row, data, utterances)
    mean = np.mean([p.tokens for p in batches.placements])
    number = int(np.argmin([abs(p.tokens - mean) for p in batches.placements]))
    result: dict[str, Any] = {}
    for layers in (1, 2):
        torch.manual_seed(0)
        encoder = Encoder(row.cell, setting.features, CHECKED_UNITS, CLASSES, layers, torch.float64).to(setting.device)
        batch, sequences = batches[number].to(setting.device), batches.placements[number].sequence.tolist()
        off = list(deviations(encoder, batch, row.form, sequences, data))
        for direction, half in zip(("forward", "reverse"), torch.cat(off).chunk(2, -1), strict=True):
            result[f"off_{layers}_layers_{direction}"] = float(f"{float(half.max()):.2e}")
    result["frames_off_by_0.001"] = round(float((torch.cat(off).amax(-1) > 1e-3).double().mean()), 4)
    return result


def peak_job(row: Row, setting: Setting) -> Callable[[], object]:
    """Warm up on three short utterances and return a step on the epoch's largest batch, the same for all forms."""
    torch.set_num_threads(THREADS)
    small = Utterances(np.array([9, 5, 7]), setting.features, CLASSES)
    training = Training(row, Batches(row, small, 16), setting)
    training.step(0)
    training.batches = Batches(row, Utterances(setting.lengths(), setting.features, CLASSES), setting.utterances)
    largest = int(np.argmax([p.steps * p.lanes for p in training.batches.placements]))
    return partial(training.step, largest)


def peak(row: Row, setting: Setting) -> float | None:
    """MiB by which that step raises the memory in use."""
    if setting.device != "cuda":
        return peak_mib(partial(peak_job, row, setting))
    job = peak_job(row, setting)
    gc.collect()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    job()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def show(row: dict[str, Any]) -> str:
    """One line of the table."""
    name = Row(row["plan"], row["form"], row["cell"]).name
    rate = "{frames_per_s:>9,.0f} frames/s ({frames_per_s_low:,.0f}-{frames_per_s_high:,.0f}) x{ratio:.2f}"
    off = "off {off_2_layers_forward:.1e} {off_2_layers_reverse:.1e}"
    return f"{name:42} {rate}, efficiency {{plan_efficiency:.3f}}, data {{data_share:.1%}}, {off}".format(**row)


def measure_memory(chosen: list[Row], setting: Setting) -> Iterator[dict[str, Any]]:
    """Yield peak memory growth of each row."""
    for row in tqdm(chosen, desc="memory", disable=None):
        mib = peak(row, setting)
        mib = None if mib is None else round(mib, 1)
        print(f"{row.name:42} {mib} MiB")
        yield {"plan": row.plan, "form": row.form, "cell": row.cell, "peak_mib": mib}


def measure_time(chosen: list[Row], setting: Setting, turns: int, quick: bool) -> Iterator[dict[str, Any]]:
    """Yield speed and exactness of each row."""
    data, double = (
        Utterances(setting.lengths(), setting.features, CLASSES, dtype) for dtype in (torch.float32, torch.float64)
    )
    trainings = [Training(row, Batches(row, data, setting.utterances), setting) for row in chosen]
    samples = [balanced_sample(training.batches.placements, 1 if quick else BATCHES) for training in trainings]
    rows = timed_rows(trainings, samples, turns)
    for row, found in zip(chosen, tqdm(rows, desc="checks", disable=None), strict=True):
        found |= checked(row, double, setting, 4 if quick else setting.utterances)
        print(show(found))
        yield found


@click.command(help=__doc__)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", help="bfloat16: autocast.")
@click.option("--subsample", type=click.IntRange(1), default=4, show_default=True, help="Frames stacked into one.")
@click.option("--utterances", type=click.IntRange(1), default=16, show_default=True, help="Of mean length, a batch.")
@click.option("--turns", type=click.IntRange(1), default=5, show_default=True)
@click.option("--memory", is_flag=True, help="Peak memory in place of speed.")
@click.option("--keep-denormals", is_flag=True, help="Compute with denormal numbers, as torch does by default.")
@click.option("--form", "forms", multiple=True, help='Only rows of this form, such as "mask"; may be repeated.')
@click.option("--quick", is_flag=True, help="Small layers, one batch, one turn; writes nothing.")
def main(quick: bool, turns: int, memory: bool, keep_denormals: bool, forms: tuple[str, ...], **options: Any) -> None:
    """Measure every row and write results-<device>.csv."""
    torch.set_num_threads(THREADS)
    if not keep_denormals:  # before the first parallel work: new threads do as this one
        torch.set_flush_denormal(True)
    kept = "kept" if keep_denormals else "flushed"
    setting = Setting(**options, units=32 if quick else 256, denormals=kept)
    chosen = [row for row in ROWS if not forms or row.form in forms]
    if not chosen:
        raise click.UsageError(f"no row has one of the forms {forms}: choose from {sorted({r.form for r in ROWS})}")
    where = "cpu" if setting.device == "cpu" else torch.cuda.get_device_name().replace(" ", "-").lower()
    others = {"dtype": setting.dtype, "subsample": setting.subsample, "denormals": kept}
    usual = {"dtype": "float32", "subsample": 4, "denormals": "flushed"}
    name = "-".join(
        ["memory" if memory else "results", where, *(f"{k}-{v}" for k, v in others.items() if v != usual[k])]
    )
    record = asdict(setting) | environment() | {"torch": torch.__version__, "threads": THREADS, "where": where}
    found = measure_memory(chosen, setting) if memory else measure_time(chosen, setting, 1 if quick else turns, quick)
    rows: list[dict[str, Any]] = []
    try:
        for row in found:
            rows.append(row | record)
    finally:  # Ctrl-C leaves the rows that are finished
        if rows and not quick:
            write_rows(HERE / f"{name}.csv", rows)


if __name__ == "__main__":
    main()
