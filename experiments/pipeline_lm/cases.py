"""What is measured: models, and the ways to run each on two processes or in one."""

from dataclasses import dataclass, replace
from typing import NamedTuple

__all__ = ["MODELS", "WAYS", "Model", "Way", "tiny"]


@dataclass(frozen=True)
class Model:
    """A language model and its batch.

    Attributes:
        cell, layers, hidden: Of the recurrent layers.
        steps, lanes: Of a batch.
        text: ``"characters"`` with a small softmax, or ``"words"`` with one of 10,000.
    """

    cell: str
    layers: int
    hidden: int
    steps: int
    lanes: int
    text: str = "characters"


class Way(NamedTuple):
    """How a model is run beside the ordinary loop.

    Attributes:
        mode: Of the pipeline; ``"late"``: Chen+15's training with gradients one update late, not a pipeline of ours.
        chunks: Units of a batch.
        processes: 1 or 2.
        chen: Whether the softmax is alone on the last stage.
    """

    mode: str
    chunks: int
    processes: int = 2
    chen: bool = False


FULL = [Way("full", chunks) for chunks in (1, 2, 4, 8)]
MODELS = {
    "lstm-512": Model("lstm", 4, 512, 256, 32),
    "lstm-256": Model("lstm", 4, 256, 256, 8),
    "sru-512": Model("sru", 6, 512, 256, 32),
    "chen": Model("lstm", 1, 512, 64, 32, "words"),
    "chen-late": Model("lstm", 1, 512, 64, 32, "words"),
}
WAYS = {
    "lstm-512": [*FULL, Way("full", 4, 1), Way("full", 1, 1), Way("truncated", 4), Way("microbatch", 4)],
    "lstm-256": [*FULL[1:], Way("full", 1, 1)],
    "sru-512": [*FULL[1:], Way("full", 1, 1)],
    "chen": [way._replace(chen=True) for way in FULL[1:]],
    "chen-late": [Way("late", 1, chen=True)],
}


def tiny(model: Model) -> Model:
    """The same kind of model, small enough for a look."""
    return replace(model, hidden=32, steps=32, lanes=8)
