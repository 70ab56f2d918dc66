"""Training, loss and translations of one model with one way to batch."""

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from experiments.translation.bleu import bleu
from experiments.translation.model import Translator
from experiments.translation.pairs import Corpus, Part
from seqbatch import Bucketing, Padding, PairBatch, make_loader
from seqbatch.loader import PlanLoader
from seqbatch.strategy import Strategy

__all__ = ["PADDING", "STRATEGIES", "Learner", "Settings", "evaluate", "pair_loader", "train", "translations"]

PADDING = "padding"
LARGEST_NORM = 5.0  # gradients are clipped to this
STRATEGIES: dict[str, Strategy] = {  # all have about as many real tokens an update
    PADDING: Padding(64),
    "token budget": Bucketing(max_tokens=1290),
    "16 pair buckets": Bucketing(max_tokens=1385, num_buckets=16),
}
RATES = {"SRU": 5e-3, "LSTM": 1e-2}  # by validation losses after the first epoch, see README.md


@dataclass(frozen=True)
class Settings:
    """Of a run, the same for all strategies.

    Attributes:
        size: Of embeddings and layers.
        epochs: Over the training part.
        lr: Adam's first learning rate, which falls to 0 in proportion to the tokens seen; None takes that of RATES.
        dropout: As :class:`Translator` has it.
    """

    size: int = 128
    epochs: int = 6
    lr: float | None = None
    dropout: float = 0.1


class Learner:
    """A model and its optimizer; one update a batch, for the mean loss over its real target tokens."""

    def __init__(self, model: Translator, lr: float) -> None:
        self.model, self.lr = model, lr
        self.optimizer = torch.optim.Adam(model.parameters(), lr, fused=True)

    @staticmethod
    def of(corpus: Corpus, rnn: str, settings: Settings, seed: int = 0) -> "Learner":
        """With a new model."""
        torch.manual_seed(seed)
        words = len(corpus.source.entries), len(corpus.target.entries)
        model = Translator(rnn, *words, size=settings.size, dropout=settings.dropout)
        return Learner(model, settings.lr or RATES[rnn])

    def step(self, batch: PairBatch, done: float = 0.0) -> float:
        """Train on a batch, `done` (0 to 1) of the training being over; return the sum of its losses."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * (1 - done)
        losses = self.model.losses(batch["source"], batch["target"])
        (losses * batch.loss_scale).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), LARGEST_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return losses.item()


def pair_loader(part: Part, strategy: Strategy, *, seed: int = 0, train: bool = True) -> PlanLoader:
    """Batches of pairs, to train on or, in the order of the data, to evaluate."""
    return make_loader(
        part.dataset, strategy, lengths=part.lengths, next_token="target", seed=seed, train=train
    )  # fmt: skip


@torch.no_grad()
def evaluate(model: Translator, part: Part) -> float:
    """Return nats per target token, </s> counted."""
    model.eval()
    losses, count = 0.0, 0
    for batch in pair_loader(part, Bucketing(max_tokens=4096), train=False):
        losses += model.losses(batch["source"], batch["target"]).item()
        count += batch.loss_tokens
    return losses / count


def translations(model: Translator, corpus: Corpus, part: Part) -> list[str]:
    """Return the model's greedy translation of each sentence."""
    model.eval()
    found = [""] * len(part.texts)
    for batch in pair_loader(part, Bucketing(max_tokens=4096), train=False):
        source = batch["source"]
        for i, lane in zip(source.placement.sequence, model.translate(source.data, source.mask), strict=True):
            found[i] = corpus.text(lane)
    return found


def train(
    corpus: Corpus, rnn: str, strategy: str, settings: Settings, seed: int = 0
) -> tuple[dict[str, Any], list[dict[str, Any]], list[str]]:
    """Train a model, with a bar.

    Returns:
        The row of the run, those of its epochs, and the test part's translations. Seconds are those of training, making
        batches included, evaluation not.
    """
    part, test = corpus.parts["train"], corpus.parts["test"]
    loader = pair_loader(part, STRATEGIES[strategy], seed=seed)
    efficiency, per_epoch = loader.plan.padding_efficiency, int(part.lengths.sum())
    learner, curve = Learner.of(corpus, rnn, settings, seed), []
    total, tokens, updates, wall, cpu = per_epoch * settings.epochs, 0, 0, 0.0, 0.0
    with tqdm(total=total, desc=f"{rnn}, {strategy}, seed {seed}", unit="tok", mininterval=1.0, disable=None) as bar:
        for epoch in range(1, settings.epochs + 1):
            learner.model.train()
            losses, count, begin = 0.0, 0, (time.perf_counter(), time.process_time())
            for batch in loader:
                losses += learner.step(batch, tokens / total)
                seen = sum(batch[side].placement.tokens for side in ("source", "target"))
                tokens, count, updates = tokens + seen, count + batch.loss_tokens, updates + 1
                bar.update(seen)
            wall, cpu = wall + time.perf_counter() - begin[0], cpu + time.process_time() - begin[1]
            valid = evaluate(learner.model, corpus.parts["valid"])
            spent = {"seconds": round(wall, 2), "cpu_seconds": round(cpu, 2)}
            loss = {"train_loss": round(losses / count, 4), "valid_loss": round(valid, 4)}
            curve.append({"epoch": epoch, "updates": updates, "tokens": tokens} | spent | loss)
            bar.set_postfix_str(f"train {losses / count:.3f}, valid {valid:.3f}")
    found = translations(learner.model, corpus, test)
    score, signature = bleu(test.texts, found)
    row = {"epochs": settings.epochs, "updates": updates, "tokens_per_update": round(tokens / updates, 1)}
    row |= {"valid_loss": curve[-1]["valid_loss"], "test_loss": round(evaluate(learner.model, test), 4)}
    row |= {"bleu": round(score, 2), "seconds": curve[-1]["seconds"], "cpu_seconds": curve[-1]["cpu_seconds"]}
    row |= {"padding_efficiency": round(efficiency, 4), "settings": repr(STRATEGIES[strategy])}
    row |= {"size": settings.size, "dropout": settings.dropout, "signature": signature}
    row["parameters"] = sum(p.numel() for p in learner.model.parameters())
    return row, curve, found
