"""The ways to batch that are compared."""

from dataclasses import dataclass

from seqbatch import Bucketing, Chunking, Packing, Padding, Splicing
from seqbatch.strategy import Strategy

__all__ = ["STRATEGIES", "Way"]


@dataclass(frozen=True)
class Way:
    """A strategy and how it is used.

    Args:
        strategy: How to batch.
        resets: Whether the model clears its state where a paragraph begins.
        small_count_less: Whether a batch with fewer tokens than usual moves the model less.
    """

    strategy: Strategy
    resets: bool = True
    small_count_less: bool = True


# A paragraph has 595 characters in the mean, 2,207 at most: 64 of them are 38,000 characters, 7 are 4,096.
STRATEGIES = {
    "padding": Way(Padding(64)),
    "padding, 4k tokens": Way(Padding(7)),
    "pool sort": Way(Bucketing(batch_size=64)),
    "pool sort, 4k tokens": Way(Bucketing(max_tokens=4096)),
    "buckets": Way(Bucketing(max_tokens=38_000, num_buckets=8)),
    "buckets, 4k tokens": Way(Bucketing(max_tokens=4096, num_buckets=8)),
    "splicing": Way(Splicing(64, 64)),
    "splicing without resets": Way(Splicing(64, 64), resets=False),
    "splicing, small windows in full": Way(Splicing(64, 64), small_count_less=False),
    "chunks": Way(Chunking(64, 64)),
    "chunks, carried": Way(Chunking(64, 64, carry=True)),
    "packing": Way(Packing(2304, rows=16)),
    "packing, 4k tokens": Way(Packing(2304, rows=2)),
}
