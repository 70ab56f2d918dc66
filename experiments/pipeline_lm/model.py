"""Language models to be pipelined, their text, and the loop that trains one without a pipeline."""

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.functional import cross_entropy

from experiments.lm_strategies.model import Corpus, wikitext
from experiments.texts import as_characters, paragraphs
from seqbatch import SequenceBatch, Splicing, make_loader
from seqbatch.loader import PlanLoader
from seqbatch.pipeline import LayerPipeline
from seqbatch.rnn import LSTM, SRU
from seqbatch.tensors import detach_state

__all__ = ["CELLS", "TEXTS", "Alone", "Network", "held_out_loss", "loaders", "losses", "pipelined", "train", "words"]

CELLS = {"lstm": LSTM, "sru": SRU}
VOCABULARY = 10_000
HELD_OUT = 50  # paragraphs of "test"
LARGEST_NORM = 1.0


@cache
def words(vocabulary: int = VOCABULARY) -> Corpus:
    """WikiText-2 in words: "valid" to train on, 50 paragraphs of "test" held out; rare words share a number."""
    training = [text.split() for text in paragraphs("valid")]
    held_out = [text.split() for text in paragraphs("test")[:HELD_OUT]]
    counts = Counter(word for text in training for word in text)
    known = [word for word, _ in counts.most_common(vocabulary - 1)]
    return Corpus(as_characters(training, known), as_characters(held_out, known), vocabulary)


TEXTS = {"characters": wikitext, "words": words}


def losses(scores: Tensor, targets: Tensor) -> Tensor:
    """(N, vocabulary) and (N,) -> (N,) nats."""
    return cross_entropy(scores, targets.long(), reduction="none")


class Network(nn.Module):
    """Embedding, recurrent layers one by one and a softmax; parameters are called as in a pipeline.

    Args:
        cell: ``"lstm"`` or ``"sru"``.
        layers: How many.
        hidden: Features of the embedding and of each layer.
        vocabulary: Words or characters.
        seed: Of the weights.
    """

    def __init__(self, cell: str, layers: int, hidden: int, vocabulary: int, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(vocabulary, hidden)
        self.layers = nn.ModuleDict({str(number): CELLS[cell](hidden, hidden) for number in range(layers)})
        self.head = nn.Linear(hidden, vocabulary)

    def hidden(self, batch: SequenceBatch, states: Sequence[Any]) -> tuple[Tensor, list[Any]]:
        """All but the softmax: (T, B, hidden), and the states after the batch, without gradient."""
        assert batch.reset is not None and batch.mask is not None
        reset = batch.reset if batch.reset.any() else None  # layers are faster where there is nothing to be told
        mask = None if batch.mask.all() else batch.mask
        x, after = self.embed(batch.data), []
        for layer, state in zip(self.layers.values(), states, strict=True):
            x, state = layer(x, state, reset=reset, mask=mask)
            after.append(detach_state(state))
        return x, after

    def score(self, x: Tensor, batch: SequenceBatch) -> Tensor:
        """The softmax of the cells that carry loss: () sum of losses in nats."""
        x, targets = x.flatten(0, 1), batch.targets.flatten()  # type: ignore[union-attr]
        if not batch.loss_mask.all():
            rows = batch.loss_mask.flatten().nonzero().squeeze(1)
            x, targets = x.index_select(0, rows), targets[rows]
        return losses(self.head(x), targets).sum()


class Alone:
    """A network in one process and an ordinary loop: what a pipeline is compared with. States go from batch to batch.

    It has the methods of :class:`seqbatch.pipeline.LayerPipeline` that `train` calls, and none of its code.
    """

    def __init__(self, network: Network) -> None:
        self.network = network
        self._states: list[Any] = [None] * len(network.layers)
        self._states_in_evaluation: list[Any] = list(self._states)

    def step(self, batch: SequenceBatch) -> tuple[Tensor, int]:
        """Forward and backward; the mean loss and how many tokens carry it."""
        x, self._states = self.network.hidden(batch, self._states)
        total = self.network.score(x, batch)
        (total * batch.loss_scale).backward()
        return total.detach().double() / max(batch.loss_tokens, 1), batch.loss_tokens

    @torch.no_grad()
    def evaluate(self, batch: SequenceBatch) -> tuple[Tensor, int]:
        """Forward alone, with states of its own."""
        x, self._states_in_evaluation = self.network.hidden(batch, self._states_in_evaluation)
        return self.network.score(x, batch).double() / max(batch.loss_tokens, 1), batch.loss_tokens

    def parameters(self) -> Iterator[nn.Parameter]:
        """All of them."""
        return self.network.parameters()

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Over all parameters."""
        return nn.utils.clip_grad_norm_(self.parameters(), max_norm)


def pipelined(
    network: Network, mode: str, chunks: int, window: int, *, chen: bool = False, mesh: DeviceMesh | None = None,
    virtual: int = 1,
) -> LayerPipeline:  # fmt: skip
    """The network on the ranks of `mesh`, or on all.

    Args:
        network: Each rank keeps its part of it.
        mode: As of ``LayerPipeline``.
        chunks: Units of a batch: time chunks, or micro-batches.
        window: Steps of a batch.
        chen: As Chen+15 place it: all layers on the first of two stages, the softmax alone on the last.
        mesh: As of ``LayerPipeline``.
        virtual: Stages of a rank.
    """
    cut = {"num_microbatches": chunks} if mode == "microbatch" else {"chunk_size": -(-window // chunks)}
    split = [len(network.layers), 0] if chen else "auto"
    return LayerPipeline(
        list(network.layers.values()), embed=network.embed, head=network.head, loss=losses, mesh=mesh,
        split=split, mode=mode, virtual=virtual, **cut,
    )  # type: ignore[arg-type]  # fmt: skip


def loaders(corpus: Corpus, lanes: int, window: int, seed: int = 0, **ranks: Any) -> tuple[PlanLoader, PlanLoader]:
    """Spliced windows of (window, lanes) to train on, and of held-out text.

    Args:
        corpus: The text.
        lanes: Lanes of a batch.
        window: Steps of a batch.
        seed: Of the order of paragraphs.
        **ranks: ``mesh=pipe.mesh``, or nothing for one process.
    """
    ranks = ranks or {"rank": 0, "num_replicas": 1}
    options = {"strategy": Splicing(lanes, window), "seed": seed, "next_token": True, **ranks}
    return make_loader(corpus.training, **options), make_loader(corpus.held_out, train=False, **options)


def train(
    learner: Alone | LayerPipeline, optimizer: torch.optim.Optimizer, loader: PlanLoader
) -> Iterator[tuple[SequenceBatch, float]]:
    """Update after update, epoch after epoch, with gradients clipped at norm 1; yields each batch and its mean loss."""
    while True:
        for batch in loader:
            loss, _ = learner.step(batch)
            learner.clip_grad_norm_(LARGEST_NORM)
            optimizer.step()
            optimizer.zero_grad()
            yield batch, float(loss)


def held_out_loss(learner: Alone | LayerPipeline, loader: PlanLoader) -> float:
    """Nats per token."""
    found = [learner.evaluate(batch) for batch in loader]
    return sum(float(loss) * tokens for loss, tokens in found) / max(sum(tokens for _, tokens in found), 1)
