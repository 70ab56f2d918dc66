"""The talk's strategies side by side with the expected values; see README.md beside this file.

python -m experiments.strategies.run
"""

from pathlib import Path

import numpy as np

from experiments.common import write_rows
from seqbatch import Bucketing, Chunking, Padding, Splicing
from seqbatch.distributions import expected_efficiency, gamma
from seqbatch.ordering import IntArray
from seqbatch.strategy import Strategy

HERE = Path(__file__).parent
SIZES = (8, 32, 64, 128, 256)
SEEDS = 100
SENTENCES = 20_480
EDGES = (5, 10, 20, 40, 80)

# Used slots / all slots for integer gamma lengths of shape 2 and mean 20, 20,480 sentences.
EXPECTED: dict[str, tuple[float, ...]] = {
    "pad, random batches": (0.460, 0.335, 0.296, 0.265, 0.240),
    "sort inside pools of 20 batches": (0.908, 0.870, 0.852, 0.834, 0.811),
    "fixed buckets 5/10/20/40/80": (0.709, 0.710, 0.710, 0.710, 0.711),
    "chunks of 10": (0.815,) * 5,
    "chunks of 20": (0.671, 0.667, 0.667, 0.667, 0.667),
    "splice, round robin": (0.982, 0.939, 0.922, 0.892, 0.838),
    "splice, first free": (0.999, 0.998, 0.995, 0.988, 0.972),
}
# E[L] / E[max of B] for gamma of shape 2 (the talk's slide 8).
PADDING = dict(
    zip((2, 4, 8, 16, 32, 64, 128, 256), (0.727, 0.564, 0.459, 0.387, 0.334, 0.295, 0.264, 0.240), strict=True)
)


def strategy(name: str, size: int) -> Strategy:
    """The strategy of a row of the table at a batch size."""
    match name:
        case "pad, random batches":
            return Padding(size)
        case "sort inside pools of 20 batches":
            return Bucketing(batch_size=size, window=20 * size)
        case "fixed buckets 5/10/20/40/80":
            # Padded to the edge, whole batches only: empty lanes of a bucket's last batch are not in the table.
            return Bucketing(batch_size=size, bucket_edges=EDGES, static_shapes=True, drop_last=True, overlong="alone")
        case "chunks of 10":
            return Chunking(size, 10)
        case "chunks of 20":
            return Chunking(size, 20)
        case "splice, round robin":
            return Splicing(size, 35, assign="round_robin")
    return Splicing(size, 35)


def sentences(seed: int) -> IntArray:
    """Integer gamma lengths, shape 2, mean 20, at least 1."""
    lengths: IntArray = gamma(2, 10).lengths(SENTENCES, seed=seed)
    return lengths


def main() -> None:
    """Print both tables and write their rows."""
    rows: list[dict[str, object]] = []
    corpora = [sentences(seed) for seed in range(SEEDS)]
    print(f"{'used / all slots (expected)':34}" + "".join(f"{'B=' + str(size):>16}" for size in SIZES))
    for name, expected in EXPECTED.items():
        line, note = "", ""
        for size, wanted in zip(SIZES, expected, strict=True):
            got = [strategy(name, size).plan(drawn, seed=s).padding_efficiency for s, drawn in enumerate(corpora)]
            mean, std = float(np.mean(got)), float(np.std(got, ddof=1))
            line += f"{mean:8.3f} ({wanted:.3f})"
            if abs(mean - wanted) > 0.01:
                note += (
                    f"  B={size}: the expected value is one draw, {(wanted - mean) / std:+.1f} standard deviations off"
                )
            rows.append({"table": "strategies", "strategy": name, "batch_size": size, "expected": wanted,
                         "simulated_mean": round(mean, 4), "simulated_std": round(std, 4),
                         "simulated_min": round(min(got), 4), "simulated_max": round(max(got), 4)})  # fmt: skip
        print(f"{name:34}{line}{note}")
    print("\npadding, gamma(2, 10), 200,000 sentences: theory of the drawn set / of the distribution / table")
    drawn: IntArray = gamma(2, 10).lengths(200_000, seed=0)
    for size, wanted in PADDING.items():
        got = [Padding(size).plan(drawn, seed=s).padding_efficiency for s in range(10)]
        exact, continuous = expected_efficiency(drawn, size), gamma(2, 10).expected_efficiency(size)
        mean, std = float(np.mean(got)), float(np.std(got, ddof=1))
        print(f"B={size:<4} simulated {mean:.4f}  exact {exact:.4f}  distribution {continuous:.4f}  table {wanted}")
        rows.append({"table": "padding", "strategy": "padding", "batch_size": size, "expected": wanted,
                     "simulated_mean": round(mean, 5), "simulated_std": round(std, 5),
                     "exact_for_these_lengths": round(exact, 5), "distribution": round(continuous, 5)})  # fmt: skip
    write_rows(HERE / "results.csv", rows)


if __name__ == "__main__":
    main()
