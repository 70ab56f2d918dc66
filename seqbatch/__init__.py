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
    "Bucketing": "bucketing",
    "Chunking": "chunking",
    "Packing": "packing",
    "Padding": "padding",
    "Plan": "plan",
    "Splicing": "splicing",
    "load_corpus": "lengths",
    "read_lengths": "lengths",
}

__all__ = [
    "Bucketing",
    "Chunking",
    "Packing",
    "Padding",
    "Plan",
    "Splicing",
    "__version__",
    "load_corpus",
    "read_lengths",
]

if TYPE_CHECKING:
    from seqbatch.bucketing import Bucketing
    from seqbatch.chunking import Chunking
    from seqbatch.lengths import load_corpus, read_lengths
    from seqbatch.packing import Packing
    from seqbatch.padding import Padding
    from seqbatch.plan import Plan
    from seqbatch.splicing import Splicing
else:

    def __getattr__(name: str) -> object:
        if name in _HOME:
            return getattr(import_module(f"seqbatch.{_HOME[name]}"), name)
        raise AttributeError(f"module 'seqbatch' has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted(__all__)
