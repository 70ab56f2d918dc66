"""A character-level language model, its text, and one step of its training."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from experiments.texts import as_characters, paragraphs
from seqbatch import Bucketing, SequenceBatch, TokenArray, make_loader
from seqbatch.rnn import LSTM, SRU

__all__ = ["CELLS", "CharacterLM", "Corpus", "Learner", "evaluate", "wikitext"]

CELLS = {"nn.LSTM": nn.LSTM, "lstm": LSTM, "sru": SRU}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
RARE = 10  # a character that occurs less often in the training text shares one number with all such
HELD_OUT = 100_000  # characters to evaluate on
DENSE = 0.8  # share of cells that carry loss above which the head takes them all: gathering costs more than it saves
LARGEST_NORM = 1.0


@dataclass(frozen=True)
class Corpus:
    """Paragraphs to train on, others to evaluate on, and how many characters there are."""

    training: TokenArray
    held_out: TokenArray
    vocabulary: int

    @classmethod
    def of_texts(cls, training: Sequence[str], held_out: Sequence[str], rare: int = 1) -> "Corpus":
        """Number the characters that occur at least `rare` times in the training text, and one for the rest."""
        counts = Counter(character for text in training for character in text)
        alphabet = sorted(character for character, count in counts.items() if count >= rare)
        return cls(as_characters(training, alphabet), as_characters(held_out, alphabet), len(alphabet) + 1)


@cache
def wikitext() -> Corpus:
    """WikiText-2: the paragraphs of its part "valid" to train on, the first 100,000 characters of "test" held out."""
    test = paragraphs("test")
    enough = int(np.searchsorted(np.cumsum([len(text) for text in test]), HELD_OUT)) + 1
    return Corpus.of_texts(paragraphs("valid"), test[:enough], RARE)


class CharacterLM(nn.Module):
    """Embedding, recurrent layers and a softmax over the next character.

    Args:
        vocabulary: Characters.
        hidden: Features of the embedding and of each layer.
        cell: ``"sru"``, ``"lstm"`` (seqbatch's) or ``"nn.LSTM"``, which is told nothing of padding and pieces.
        layers: Recurrent layers.
    """

    def __init__(self, vocabulary: int, hidden: int, cell: str, layers: int = 1) -> None:
        super().__init__()
        if cell not in CELLS:
            raise ValueError(f"cell must be one of {', '.join(CELLS)}, got {cell!r}")
        self.embed = nn.Embedding(vocabulary, hidden)
        self.rnn = CELLS[cell](hidden, hidden, num_layers=layers)
        self.head = nn.Linear(hidden, vocabulary)
        self.knows_pieces = cell != "nn.LSTM"

    def forward(self, batch: SequenceBatch, state: Any = None, *, resets: bool = True) -> tuple[Tensor, Any]:
        """Return the sum of the losses in nats and the state after the batch; without `resets` state leaks on."""
        flags = self._flags(batch, resets) if self.knows_pieces else {}
        output, state = self.rnn(self.embed(batch.data), batch.carry_in(state), **flags)
        output, targets = output.flatten(0, 1), batch.targets.flatten()
        if batch.loss_tokens < DENSE * len(targets):  # the head on what carries loss only
            rows = torch.nonzero_static(batch.loss_mask.flatten(), size=batch.loss_tokens)[:, 0]
            output, targets = output.index_select(0, rows), targets[rows]
        return cross_entropy(self.head(output), targets.long(), reduction="sum"), state

    def _flags(self, batch: SequenceBatch, resets: bool) -> dict[str, Tensor]:
        """What the layers must be told; nothing where they start from zero and no cell is empty."""
        placement = batch.placement
        flags = {}
        if resets and (placement.carry or not placement.single):
            flags["reset"] = batch.reset
        if placement.tokens < placement.steps * placement.lanes:
            flags["mask"] = batch.mask
        return flags


class Learner:
    """A model and its optimizer: Adam with gradient clipping, one update a batch, state carried where the plan does.

    Args:
        model: On its device.
        lr: Learning rate.
        dtype: ``"bfloat16"`` runs the model under autocast.
        resets: Whether lanes are cleared where a paragraph begins.
        usual: Tokens of a usual batch. One that holds less - the end of a spliced epoch, where few lanes are left -
            counts as much less; with 0 it counts as much as any, and Adam takes as long a step.
    """

    def __init__(
        self, model: CharacterLM, lr: float, *, dtype: str = "float32", resets: bool = True, usual: float = 0
    ) -> None:
        self.model, self.resets, self.usual, self.state = model, resets, usual, None
        self.device = next(model.parameters()).device
        self.optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
        self.autocast = torch.autocast(self.device.type, DTYPES[dtype], enabled=dtype != "float32")

    def set_lr(self, lr: float) -> None:
        """Take steps of this length from now on."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def step(self, batch: SequenceBatch) -> None:
        """Train on a batch, which may lie elsewhere."""
        batch = batch.to(self.device, non_blocking=True)
        with self.autocast:
            loss, self.state = self.model(batch, self.state, resets=self.resets)
        share = min(batch.loss_tokens / self.usual, 1.0) if self.usual else 1.0
        (loss * batch.loss_scale * share).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), LARGEST_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()


@torch.no_grad()
def evaluate(model: CharacterLM, data: TokenArray) -> float:
    """Return nats per predicted character, each paragraph read whole and by itself."""
    device, loss, count = next(model.parameters()).device, 0.0, 0
    loader = make_loader(data, Bucketing(max_tokens=16_384, overlong="alone"), train=False, next_token=True)
    for batch in loader:
        loss += model(batch.to(device))[0].item()
        count += batch.loss_tokens
    return loss / count
