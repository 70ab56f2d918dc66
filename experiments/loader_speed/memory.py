"""Resident memory over a stream of ten million sequences; see README.md beside this file.

python -m experiments.loader_speed.memory [--sequences N]
"""

import argparse
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

from experiments.common import write_rows
from experiments.planning.run import lengths
from seqbatch import BucketStream, PackStream, SpliceStream, StreamLoader
from seqbatch.measure import environment

HERE = Path(__file__).parent
MARKS = (0.02, 0.1, 0.5, 1.0)


def resident() -> float:
    """MiB of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    return float("nan")


def source(count: int) -> Iterator[np.ndarray]:
    """Rows of gamma(2, 12) tokens, made on the way."""
    tokens = np.arange(512, dtype=np.int32)
    for size in np.resize(lengths("a", 100_000), count).tolist():
        yield tokens[:size]


def run(kind: str, count: int) -> dict[str, object]:
    """Run one stream to its end and note the memory at the marks."""
    torch.set_num_threads(1)
    make = {
        "BucketStream": lambda: BucketStream(lambda epoch: source(count), max_tokens=16_384),
        "PackStream": lambda: PackStream(lambda epoch: source(count), capacity=2048, rows=8),
        "SpliceStream": lambda: SpliceStream(lambda epoch: source(count), num_lanes=256, chunk_size=64),
    }[kind]
    total = int(np.resize(lengths("a", 100_000), count).sum())
    marks, seen = list(MARKS), 0
    row: dict[str, object] = {"stream": kind, "sequences": count}
    for batch in StreamLoader(make()):
        seen += batch.placement.tokens
        while marks and seen >= marks[0] * total:
            row[f"MiB at {marks.pop(0):.0%}"] = round(resident(), 1)
    assert seen == total, "tokens were lost"
    return row


def main() -> None:
    """Measure the three streams, each in a process of its own, and write memory.csv."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--sequences", type=int, default=10_000_000)
    arguments = parser.parse_args()
    kinds = ("BucketStream", "PackStream", "SpliceStream")
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        rows = list(pool.map(run, kinds, [arguments.sequences] * 3))
    for row in rows:
        print(row)
    if arguments.sequences >= 10_000_000:
        write_rows(HERE / "memory.csv", [row | environment() for row in rows])


if __name__ == "__main__":
    main()
