"""seqbatch: plan, measure and run batches of variable-length sequences.

The idea is that *a plan is data*: every batching strategy places pieces of sequences on grids of
steps by lanes, so one type, :class:`~seqbatch.plan.Plan`, is counted by the simulator, cut into
ranks and executed by a loader. Names are resolved on first use, so that importing the package (or
asking the command line for help) loads neither torch nor numba nor pandas.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0.dev0"

_HOME = {
    "BucketStream": "streams",
    "Bucketing": "bucketing",
    "Chunking": "chunking",
    "FlattenCollate": "collators",
    "PackStream": "streams",
    "Packing": "packing",
    "PadCollate": "collators",
    "Padding": "padding",
    "PairBatch": "pair_batch",
    "PieceDataset": "datasets",
    "Plan": "plan",
    "PlanBatchSampler": "sampler",
    "SequenceBatch": "batch",
    "SpliceCollate": "collators",
    "SpliceStream": "streams",
    "Splicing": "splicing",
    "StreamLoader": "stream_loader",
    "TokenArray": "datasets",
    "collate": "collating",
    "gather_lanes": "ranks",
    "global_loss_tokens": "ranks",
    "load_corpus": "lengths",
    "make_loader": "loader",
    "read_lengths": "lengths",
    "scatter_lanes": "ranks",
    "stitch": "stitching",
}

__all__ = [
    "BucketStream",
    "Bucketing",
    "Chunking",
    "FlattenCollate",
    "PackStream",
    "Packing",
    "PadCollate",
    "Padding",
    "PairBatch",
    "PieceDataset",
    "Plan",
    "PlanBatchSampler",
    "SequenceBatch",
    "SpliceCollate",
    "SpliceStream",
    "Splicing",
    "StreamLoader",
    "TokenArray",
    "__version__",
    "collate",
    "gather_lanes",
    "global_loss_tokens",
    "load_corpus",
    "make_loader",
    "read_lengths",
    "scatter_lanes",
    "stitch",
]

if TYPE_CHECKING:
    from seqbatch.batch import SequenceBatch
    from seqbatch.bucketing import Bucketing
    from seqbatch.chunking import Chunking
    from seqbatch.collating import collate
    from seqbatch.collators import FlattenCollate, PadCollate, SpliceCollate
    from seqbatch.datasets import PieceDataset, TokenArray
    from seqbatch.lengths import load_corpus, read_lengths
    from seqbatch.loader import make_loader
    from seqbatch.packing import Packing
    from seqbatch.padding import Padding
    from seqbatch.pair_batch import PairBatch
    from seqbatch.plan import Plan
    from seqbatch.ranks import gather_lanes, global_loss_tokens, scatter_lanes
    from seqbatch.sampler import PlanBatchSampler
    from seqbatch.splicing import Splicing
    from seqbatch.stitching import stitch
    from seqbatch.stream_loader import StreamLoader
    from seqbatch.streams import BucketStream, PackStream, SpliceStream
else:

    def __getattr__(name: str) -> object:
        if name in _HOME:
            return getattr(import_module(f"seqbatch.{_HOME[name]}"), name)
        if name == "rnn":
            return import_module("seqbatch.rnn")
        raise AttributeError(f"module 'seqbatch' has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted(__all__)
