"""How fast batches are made, resumed and streamed; see README.md beside this file.

python -m experiments.loader_speed.run [--quick]
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from subprocess import run
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from experiments.common import write_rows
from experiments.planning.run import lengths
from seqbatch import Bucketing, Packing, TokenArray, make_loader
from seqbatch.measure import environment
from seqbatch.stream_plans import Open, plan_pool, plan_windows

HERE = Path(__file__).parent
STRATEGY = Bucketing(max_tokens=16_384)
SEQUENCES, BATCHES = 1_000_000, 400
STARTS = {
    "first batch, new process (loads numba)": "s",
    "first batch, second loader of the process": "s",
    "resume at 90 %, beyond planning": "s",
    "state": "bytes",
}


def tokens_of(name: str, count: int = SEQUENCES) -> TokenArray:
    """A flat int32 array of as many sequences, with token numbers below 30,000."""
    sizes = lengths(name, count)
    tokens = np.random.default_rng(1).integers(0, 30_000, int(sizes.sum()), dtype=np.int32)
    return TokenArray(tokens, np.append(0, np.cumsum(sizes)))


def rate(jobs: dict[str, Callable[[], Iterator[int]]], batches: int, repeats: int) -> dict[str, list[float]]:
    """Return real tokens per second of each job, the jobs taking turns; a job yields the tokens of each batch."""
    rates: dict[str, list[float]] = {name: [] for name in jobs}
    for repeat in range(repeats + 1):
        for name, job in jobs.items():
            source = job()
            next(source)
            begin, count = time.perf_counter(), sum(islice(source, batches))
            if repeat:
                rates[name].append(count / (time.perf_counter() - begin))
    return rates


def batches_of(name: str, batches: int, repeats: int) -> list[dict[str, Any]]:
    """Tokens per second into (T, B) batches with mask and reset, beside pad_sequence and other collators."""
    from transformers import DataCollatorWithFlattening

    data = tokens_of(name)
    plan = STRATEGY.plan(data.lengths)
    indices = [plan[i].sequence.tolist() for i in range(batches + 1)]
    need = sorted({index for batch in indices for index in batch})
    tensors = {index: torch.from_numpy(data[index].astype(np.int64)) for index in need}
    lists = {index: {"input_ids": tensors[index].tolist()} for index in need}
    flatten = DataCollatorWithFlattening(return_tensors="pt")

    def seqbatch_loader(**options: Any) -> Iterator[int]:
        for batch in make_loader(data, STRATEGY, **options):
            yield batch.placement.tokens

    def padded() -> Iterator[int]:
        for batch in indices:
            rows = [tensors[index] for index in batch]
            sizes = torch.tensor([len(row) for row in rows])
            out = pad_sequence(rows)
            _ = torch.arange(len(out))[:, None] < sizes  # the mask
            yield int(sizes.sum())

    def concatenated() -> Iterator[int]:
        for batch in indices:
            rows = [data[index] for index in batch]
            sizes = np.array([len(row) for row in rows])
            mask = np.arange(int(sizes.max()))[None] < sizes[:, None]
            out = np.zeros(mask.shape, np.int64)
            out[mask] = np.concatenate(rows)
            yield int(sizes.sum())

    def flattened() -> Iterator[int]:
        for batch in indices:
            yield flatten([lists[index] for index in batch])["input_ids"].shape[1]

    jobs = {
        "make_loader(TokenArray)": seqbatch_loader,
        "make_loader(TokenArray), next_token": lambda: seqbatch_loader(next_token=True),
        "make_loader(TokenArray), flat": lambda: seqbatch_loader(layout="flat"),
        "make_loader(TokenArray), 2 workers": lambda: seqbatch_loader(num_workers=2),
        "numpy concatenate and mask": concatenated,
        "pad_sequence of a list of tensors, mask": padded,
        "transformers DataCollatorWithFlattening": flattened,
    }
    rates = rate(jobs, batches, repeats)
    base = rates["pad_sequence of a list of tensors, mask"]
    return [
        {
            "row": "tokens per second",
            "data": name,
            "case": case,
            "value": round(statistics.median(found) / 1e6, 2),
            "unit": "M tokens/s",
            "low": round(min(found) / 1e6, 2),
            "high": round(max(found) / 1e6, 2),
            "ratio": round(statistics.median(a / b for a, b in zip(found, base, strict=True)), 2),
        }
        for case, found in rates.items()
    ]


def starts() -> dict[str, float]:
    """Seconds from making a loader of a million known lengths to its first batch, twice, and to resume."""
    data = tokens_of("a")
    sizes, firsts = data.lengths, []
    for _ in range(2):
        begin = time.perf_counter()
        loader = make_loader(data, STRATEGY, lengths=sizes)
        next(iter(loader))
        firsts.append(time.perf_counter() - begin)
    at = int(0.9 * len(loader.plan))
    last = next(islice(loader.batch_sampler, at - 1, None))
    state = loader.batch_sampler.state_dict(after=last.placement)
    plans, resumes = [], []
    for _ in range(5):
        begin = time.perf_counter()
        STRATEGY.plan(sizes)
        plans.append(time.perf_counter() - begin)
        fresh = make_loader(data, STRATEGY, lengths=sizes)
        begin = time.perf_counter()
        fresh.load_state_dict(state)
        next(iter(fresh))
        resumes.append(time.perf_counter() - begin)
    extra = statistics.median(resumes) - statistics.median(plans)
    return dict(zip(STARTS, (*firsts, extra, len(json.dumps(state))), strict=True))


class Slow:
    """Items that keep the processor busy for 200 microseconds each."""

    def __init__(self, rows: TokenArray) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> np.ndarray:
        end = time.perf_counter() + 200e-6
        row = self.rows[index]
        while time.perf_counter() < end:
            pass
        return row


def workers(repeats: int) -> list[dict[str, Any]]:
    """Batches of slow items with 0 and 2 workers."""
    data = tokens_of("a", 40_000)
    slow = Slow(data)

    def loader(num_workers: int) -> Iterator[int]:
        for batch in make_loader(slow, Bucketing(max_tokens=4096), lengths=data.lengths, num_workers=num_workers):
            yield batch.placement.tokens

    rates = rate({"0 workers": lambda: loader(0), "2 workers": lambda: loader(2)}, 60, repeats)
    ratios = [two / none for two, none in zip(rates["2 workers"], rates["0 workers"], strict=True)]
    row = {"row": "items of 200 us", "data": "a", "case": "2 workers / 0 workers", "unit": "times"}
    return [
        row
        | {"value": round(statistics.median(ratios), 2), "low": round(min(ratios), 2), "high": round(max(ratios), 2)}
    ]


def stream_planning(repeats: int) -> list[dict[str, Any]]:
    """Lengths in, placements out, in pools of a bounded buffer: sequences per second."""
    sizes = lengths("a", 2 * SEQUENCES)
    ends = np.cumsum(sizes)

    def pools(strategy: Any, buffer: int) -> None:
        begin = pool = 0
        while begin < len(sizes):
            end = int(np.searchsorted(ends, (ends[begin - 1] if begin else 0) + buffer)) + 1
            numbers = np.arange(begin, min(end, len(sizes)))
            for _ in plan_pool(strategy, numbers, sizes[begin:end], key=(0, 0, 0, 1), pool=pool).placements():
                pass
            begin, pool = end, pool + 1

    def lanes(num_lanes: int, chunk_size: int, buffer: int) -> None:
        numbers, opened, at = np.empty(0, np.int64), Open.nothing(), 0
        while at < len(sizes):
            more = min(at + max(buffer // 24 - len(numbers), 1), len(sizes))
            numbers, at = np.append(numbers, np.arange(at, more)), more
            windows, last = 0, at == len(sizes)
            found = plan_windows(numbers, sizes[numbers], num_lanes, chunk_size, opened=opened, final=last)
            for _ in found.placements():
                opened, windows = found.open_after(windows), windows + 1
            numbers = numbers[int(np.searchsorted(found.begin, windows * chunk_size)) :]

    jobs = {
        "BucketStream, 16,384 tokens, buffer of 1 M tokens": lambda: pools(STRATEGY, 2**20),
        "PackStream, 4 rows of 2,048, buffer of 1 M tokens": lambda: pools(Packing(2048, rows=4), 2**20),
        "SpliceStream, 64 lanes of 35, buffer of 1 M tokens": lambda: lanes(64, 35, 2**20),
        "SpliceStream, 64 lanes of 35, buffer of 36 k tokens": lambda: lanes(64, 35, 64 * 35 * 16),
    }
    rows = []
    for case, job in jobs.items():
        seconds = []
        for repeat in range(repeats + 1):
            begin = time.perf_counter()
            job()
            if repeat:
                seconds.append(time.perf_counter() - begin)
        found = [len(sizes) / second / 1e6 for second in seconds]
        row = {"row": "planning of streams", "data": "a", "case": case, "unit": "M sequences/s"}
        values = {"value": statistics.median(found), "low": min(found), "high": max(found)}
        rows.append(row | {key: round(value, 2) for key, value in values.items()})
    return rows


def main() -> None:
    """Measure everything and write results.csv."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="fewer batches and repeats; writes nothing")
    parser.add_argument("--starts", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.starts:
        print(json.dumps(starts()))
        return
    batches, repeats = (50, 2) if arguments.quick else (BATCHES, 7)
    rows: list[dict[str, Any]] = []
    with tqdm(total=5, desc="loader_speed", disable=None) as bar:
        for name in ("a", "b"):
            rows += batches_of(name, batches, repeats)
            bar.update()
        found = [fresh_process() for _ in range(2 if arguments.quick else 5)]
        for case, unit in STARTS.items():
            values = sorted(one[case] for one in found)
            row = {"row": "a plan of 1 M sequences", "data": "a", "case": case, "unit": unit}
            row |= {"value": statistics.median(values), "low": values[0], "high": values[-1]}
            rows.append({key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()})
        bar.update()
        rows += workers(repeats)
        bar.update()
        rows += stream_planning(min(repeats, 5))
        bar.update()
    for row in rows:
        print(*row.values(), sep=" | ")
    if not arguments.quick:
        record = environment()
        record["versions"] += f", torch {torch.__version__}"
        write_rows(HERE / "results.csv", [row | record for row in rows])


def fresh_process() -> dict[str, float]:
    """`starts` in a process of its own."""
    command = [sys.executable, "-m", "experiments.loader_speed.run", "--starts"]
    return json.loads(run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
