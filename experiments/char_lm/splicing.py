"""Sentences in spliced lanes: what "per time step" should mean where lanes hold sequences of different age."""

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from experiments.char_lm.model import CharacterLM, Settings
from experiments.char_lm.text import ALPHABET
from experiments.texts import as_characters, sentences
from seqbatch import Bucketing, SequenceBatch, Splicing, TokenArray, make_loader
from seqbatch.rnn import SequenceBatchNorm, estimate_population
from seqbatch.rnn.bnlstm import Variant
from seqbatch.strategy import Strategy

__all__ = ["WAYS", "Way", "run"]

SPLICED = Splicing(64, 100)
PADDED = Bucketing(batch_size=48, window=960)  # about as many real symbols as a spliced window


@dataclass(frozen=True)
class Way:
    """How sentences are batched in training, and over what, and for how many steps, statistics are taken."""

    variant: Variant
    statistics: str
    strategy: Strategy
    max_steps: int = 100


WAYS = {
    "LSTM, spliced": Way("none", "frame", SPLICED),
    "BN-LSTM frame, spliced": Way("bn", "frame", SPLICED),
    "BN-LSTM age, spliced": Way("bn", "age", SPLICED),
    "BN-LSTM age up to 25, spliced": Way("bn", "age", SPLICED, 25),
    "BN-LSTM frame, padded": Way("bn", "frame", PADDED),
}


@cache
def parts() -> tuple[TokenArray, TokenArray]:
    """SUBJ's sentences in 27 symbols: nine tenths to train on, the rest held out."""
    texts = [" ".join(re.sub("[^a-z]", " ", text.lower()).split()) for text in sentences("subj")[0]]
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()
    cut = 9 * len(texts) // 10
    return tuple(as_characters([texts[i] for i in some], ALPHABET) for some in (order[:cut], order[cut:]))  # type: ignore[return-value]


def run(
    way: Way, lr: float, settings: Settings, seed: int, on_update: Callable[[], object] = lambda: None
) -> dict[str, Any]:
    """Train on sentences; return the bits per held-out character in spliced windows and of each sentence by itself."""
    torch.manual_seed(seed)
    training, held_out = parts()
    options = {"statistics": way.statistics, "gamma": settings.gamma, "momentum": settings.momentum}
    model = CharacterLM(settings.hidden, way.variant, max_steps=way.max_steps, **options)
    optimizer = torch.optim.Adam(model.parameters(), lr, fused=True)
    loader = make_loader(training, way.strategy, seed=seed, next_token=True)
    reader, seen = Reader(), 0
    for batch in islice(_epochs(loader), settings.updates):
        (reader(model, batch) * batch.loss_scale).backward()
        nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        optimizer.step()
        optimizer.zero_grad()
        seen += batch.loss_tokens
        on_update()
    spliced = make_loader(held_out, SPLICED, train=False, next_token=True)
    alone = make_loader(held_out, Bucketing(batch_size=100), train=False, next_token=True)
    row: dict[str, Any] = {"symbols": seen}
    _estimate(model, islice(loader, settings.population))
    row |= {"spliced": bits(model, spliced), "alone": bits(model, alone)}
    _estimate(model, islice(make_loader(training, PADDED, seed=seed), settings.population))
    return row | {"alone_anew": bits(model, alone)}


def _estimate(model: CharacterLM, batches: Iterable[SequenceBatch]) -> None:
    if any(isinstance(module, SequenceBatchNorm) for module in model.modules()):
        estimate_population(model, batches, Reader().read)


class Reader:
    """Runs a model over batches; the state is carried where the plan carries it."""

    def __init__(self) -> None:
        self.state: Any = None

    def read(self, model: nn.Module, batch: SequenceBatch) -> torch.Tensor:
        """Logits (T, B, 27)."""
        flags = {"reset": batch.reset, "mask": batch.mask}
        logits, self.state = model(batch.data, batch.carry_in(self.state), **flags)
        return logits

    def __call__(self, model: nn.Module, batch: SequenceBatch) -> torch.Tensor:
        """The sum of the losses in nats."""
        logits = self.read(model, batch)
        return cross_entropy(logits.flatten(0, 1), batch.targets.flatten().long(), reduction="sum")


@torch.no_grad()
def bits(model: CharacterLM, batches: Iterable[SequenceBatch]) -> float:
    """Bits per character with the running statistics."""
    model.eval()
    reader, total, count = Reader(), 0.0, 0
    for batch in batches:
        total += float(reader(model, batch))
        count += batch.loss_tokens
    model.train()
    return total / count / math.log(2)


def _epochs(loader: Iterable[SequenceBatch]) -> Iterable[SequenceBatch]:
    while True:
        yield from loader
