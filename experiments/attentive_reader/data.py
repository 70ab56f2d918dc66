"""Clozes as numbers, and batches of them."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from experiments.attentive_reader.clozes import PLACEHOLDER, Cloze, Text, clozes, guesses, is_name
from seqbatch import Padding, SequenceBatch, TokenArray, make_loader

__all__ = ["MARKERS", "Batch", "Examples", "load", "shuffle_markers"]

MARKERS = 16  # numbers 1 to 16; 0 is padding
_PLACEHOLDER, _UNKNOWN = MARKERS + 1, MARKERS + 2


class Batch(NamedTuple):
    """Documents (T, B) and questions (T', B) with their masks, and the answers (B,), marker numbers less 1."""

    document: Tensor
    document_mask: Tensor
    question: Tensor
    question_mask: Tensor
    answer: Tensor

    def to(self, device: str) -> "Batch":
        """On a device."""
        return Batch(*(part.to(device) for part in self))


@dataclass
class Examples:
    """The examples of a part: documents and questions as numbers, markers drawn for each example.

    Attributes:
        documents: Words as numbers.
        questions: For each document.
        answers: (N,) marker numbers less 1.
        words: How many numbers there are.
        guesses: What share is wrong without reading.
    """

    documents: TokenArray
    questions: list[Tensor]
    answers: Tensor
    words: int
    guesses: dict[str, float]

    @property
    def longest(self) -> tuple[int, int]:
        """Steps of the longest document and question."""
        return int(self.documents.lengths.max()), max(map(len, self.questions))

    def batches(self, size: int, seed: int = 0, train: bool = True) -> Iterator[Batch]:
        """Yield batches: to train on without end, each epoch in a new order with new markers; else once, in order."""
        loader = make_loader(self.documents, Padding(size, drop_last=train), seed=seed, train=train)
        generator = torch.Generator().manual_seed(seed)
        while True:
            for batch in loader:
                who = torch.from_numpy(batch.placement.sequence)
                asked = SequenceBatch.of_sequences([self.questions[i] for i in who.tolist()])
                plain = Batch(batch.data.long(), batch.mask, asked.data, asked.mask, self.answers[who])
                yield shuffle_markers(plain, generator) if train else plain
            if not train:
                return


def shuffle_markers(batch: Batch, generator: torch.Generator) -> Batch:
    """Give the markers of each example other numbers, the same in its document, question and answer."""
    new = torch.rand(MARKERS, len(batch.answer), generator=generator).argsort(0) + 1

    def renamed(words: Tensor) -> Tensor:
        return torch.where((words > 0) & (words <= MARKERS), new.gather(0, (words - 1).clamp(0, MARKERS - 1)), words)

    return batch._replace(
        document=renamed(batch.document),
        question=renamed(batch.question),
        answer=new.gather(0, batch.answer[None])[0] - 1,
    )


@cache
def load(most_words: int, most_question: int, least: int) -> tuple[Examples, Examples]:
    """The training and the validation part.

    Args:
        most_words: Of a document.
        most_question: Words of a question.
        least: How often the training part must have a word for it to have a number of its own.
    """
    text = Text()
    train, valid = (clozes(text, part, MARKERS, most_words, most_question) for part in ("train", "dev"))
    counts = Counter(word for cloze in train for word in cloze.document + cloze.question if not is_name(word))
    counts.pop(PLACEHOLDER, None)
    known = [word for word, count in counts.items() if count >= least]
    numbers = {PLACEHOLDER: _PLACEHOLDER} | {word: i for i, word in enumerate(known, _UNKNOWN + 1)}
    return _encode(train, numbers), _encode(valid, numbers)


def _encode(examples: list[Cloze], numbers: dict[str, int]) -> Examples:
    random = np.random.Generator(np.random.Philox(1))
    documents, questions, answers = [], [], []
    for cloze in examples:
        markers = dict(zip(cloze.names, (random.permutation(MARKERS) + 1).tolist(), strict=False))
        table = numbers | markers
        documents.append([table.get(word, _UNKNOWN) for word in cloze.document])
        questions.append(torch.tensor([table.get(word, _UNKNOWN) for word in cloze.question]))
        answers.append(markers[cloze.answer] - 1)
    words = _UNKNOWN + len(numbers)  # the placeholder is among them
    return Examples(TokenArray.of_sequences(documents), questions, torch.tensor(answers), words, guesses(examples))
