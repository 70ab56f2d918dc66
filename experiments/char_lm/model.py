"""A character-level language model on LSTM or BN-LSTM: its training, and its bits per character."""

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from experiments.char_lm.text import ALPHABET, Text, crops, windows
from seqbatch.rnn import BNLSTM, SequenceBatchNorm, estimate_population
from seqbatch.rnn.bnlstm import Variant

__all__ = ["FULL", "MODELS", "SMALL", "CharacterLM", "Settings", "bits", "to_evaluate", "train"]

MODELS: dict[Variant, str] = {"none": "LSTM", "bn": "BN-LSTM", "bn1": "BN-1", "bn2": "BN-2"}


@dataclass(frozen=True)
class Settings:
    """What a run depends on besides the text, the model, its learning rate and the seed.

    Attributes:
        hidden: Units.
        steps: Predictions of a training sequence.
        batch: Sequences of an update.
        updates: In all.
        every: Updates between two looks at the validation part.
        clip: Largest norm of a gradient.
        gamma: Initial gamma of every normalization.
        momentum: Of the running statistics.
        population: Batches of the population pass at the end.
        valid: Symbols of the validation part for each point of the curve, at most.
        test: Symbols of the test part, at most.
    """

    hidden: int = 96
    steps: int = 100
    batch: int = 64
    updates: int = 270
    every: int = 30
    clip: float = 1.0
    gamma: float = 0.1
    momentum: float = 0.05
    population: int = 40
    valid: int = 38_400
    test: int = 64_000


SMALL = Settings()
# text8 as in arXiv 1603.09025; its released script has 50 epochs, an epoch of 90 M symbols is 3,906 batches.
FULL = Settings(2000, 180, 128, updates=50 * 3906, every=3906, population=3906, valid=5_000_000, test=5_000_000)
FULL_RATE = 0.001


class CharacterLM(nn.Module):
    """One-hot symbols, one recurrent layer, a softmax over the next symbol.

    Args:
        hidden: Units.
        variant: ``"none"`` (LSTM), ``"bn"``, ``"bn1"`` or ``"bn2"``; all start from the same orthogonal matrices.
        **options: Of :class:`~seqbatch.rnn.bnlstm.BNLSTM`.
    """

    def __init__(self, hidden: int, variant: Variant, **options: Any) -> None:
        super().__init__()
        self.rnn = BNLSTM(len(ALPHABET), hidden, variant=variant, **options)
        self.head = nn.Linear(hidden, len(ALPHABET))
        nn.init.orthogonal_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, symbols: Tensor, state: Any = None, **flags: Any) -> tuple[Tensor, Any]:
        """Return logits (T, B, 27) for symbols (T, B), and the state after them."""
        x = one_hot(symbols.long(), len(ALPHABET)).to(self.head.weight.dtype)
        output, state = self.rnn(x, state, **flags)
        return self.head(output), state


def train(
    text: Text,
    variant: Variant,
    lr: float,
    settings: Settings = SMALL,
    *,
    seed: int = 0,
    on_update: Callable[[], object] = lambda: None,
) -> tuple[CharacterLM, list[dict[str, float]]]:
    """Train a model on the text's device; return it with the points of its curve.

    A point has the updates, the seconds of training so far, the bits per character of the batches since the last point
    (with batch statistics) and those of the validation part with the running statistics.
    """
    device = text.train.device
    torch.manual_seed(seed)
    options = {"max_steps": settings.steps, "gamma": settings.gamma, "momentum": settings.momentum}
    model = CharacterLM(settings.hidden, variant, **options).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr, fused=True)
    seconds, curve = 0.0, []
    begin, losses = time.perf_counter(), []
    batches = crops(text.train, settings.steps, settings.batch, seed)
    for update, batch in enumerate(islice(batches, settings.updates), 1):
        loss = cross_entropy(model(batch[:-1])[0].flatten(0, 1), batch[1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        on_update()
        if update % settings.every == 0 or update == settings.updates:
            found = float(torch.stack(losses).mean()) / math.log(2)  # on a GPU, waits for the updates
            seconds += time.perf_counter() - begin
            valid = float(bits(model.eval(), text.valid[: settings.valid + 1], settings.steps, settings.batch).mean())
            curve.append({"updates": update, "seconds": seconds, "train_bpc": found, "valid_bpc": valid})
            model.train()
            begin, losses = time.perf_counter(), []
    return model, curve


@torch.no_grad()
def bits(model: CharacterLM, text: Tensor, steps: int, lanes: int) -> Tensor:
    """(steps,): bits per character at each step of the text's sequences, in the model's mode, `lanes` side by side."""
    rows = windows(text, steps)
    total = torch.zeros(steps, device=rows.device, dtype=torch.float64)
    for some in rows.split(lanes, 1):
        loss = cross_entropy(model(some[:-1])[0].flatten(0, 1), some[1:].flatten(), reduction="none")
        total += loss.view(steps, -1).double().sum(1)
    return total / rows.shape[1] / math.log(2)


def to_evaluate(model: CharacterLM, text: Tensor, settings: Settings, seed: int = 0) -> dict[str, CharacterLM]:
    """Copies of a trained model, each with other statistics; of a model without any only ``"none"``.

    ``"population"``: those of the steps, found anew over batches of the training part `text`. ``"batch"``: those of
    whatever is evaluated together. ``"population, averaged over steps"``: one mean and one variance for all steps.
    """
    if model.rnn.variant == "none":
        return {"none": copy.deepcopy(model).eval()}
    population, of_batch = copy.deepcopy(model).eval(), copy.deepcopy(model).train()
    batches = crops(text, settings.steps, settings.batch, seed + 1_000_000)
    estimate_population(population, (batch[:-1] for batch in islice(batches, settings.population)))
    averaged = copy.deepcopy(population)
    for norm in averaged.modules():
        if isinstance(norm, SequenceBatchNorm):
            for running in (norm.running_mean, norm.running_var):
                running.copy_(running.mean(0).expand_as(running))
    return {"population": population, "batch": of_batch, "population, averaged over steps": averaged}
