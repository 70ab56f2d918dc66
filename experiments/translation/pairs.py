"""English sentences and their Chinese translations as numbers, divided into training, validation and test part."""

import gzip
import hashlib
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor
from torch.utils.data import StackDataset

from seqbatch import TokenArray
from seqbatch.ordering import IntArray

__all__ = ["BOS", "EOS", "UNKNOWN", "Corpus", "Part", "words"]

PAIRS = Path(__file__).parent.parent / "data" / "tatoeba_en_zh.tsv.gz"
UNKNOWN, BOS, EOS = 0, 1, 2  # of both vocabularies; the source uses UNKNOWN alone
HELD_OUT = 3  # per cent of the sentences for each of the validation and the test part
WORD = re.compile(r"\w+(?:'\w+)*|[^\w\s]")


def words(text: str) -> list[str]:
    """Return lower-cased words and punctuation marks; a contraction is one word.

    >>> words("I'll pay -- the Bill!")
    ["i'll", 'pay', '-', '-', 'the', 'bill', '!']
    """
    return WORD.findall(text.lower().replace("’", "'"))


def characters(text: str) -> list[str]:
    """Return all characters but blanks."""
    return [c for c in text if not c.isspace() and c != "\u200b"]


def part_of(source: list[str]) -> str:
    """Return the part of a sentence; it depends on the words alone, so equal sentences stand in one part."""
    number = int.from_bytes(hashlib.sha256(" ".join(source).encode()).digest()[:8], "big") % 100
    return "test" if number < HELD_OUT else "valid" if number < 2 * HELD_OUT else "train"


@dataclass(frozen=True)
class Vocabulary:
    """Words that occur often enough in the training part; all others are UNKNOWN."""

    entries: tuple[str, ...]

    @staticmethod
    def of(texts: Iterable[list[str]], at_least: int) -> "Vocabulary":
        """Take every word that occurs at least so often, the most frequent first."""
        counts = Counter(word for text in texts for word in text)
        return Vocabulary(("<unk>", "<s>", "</s>", *(w for w, n in counts.most_common() if n >= at_least)))

    def numbers(self, texts: Iterable[list[str]]) -> list[list[int]]:
        """Return texts as numbers."""
        of = {word: i for i, word in enumerate(self.entries)}
        return [[of.get(word, UNKNOWN) for word in text] for text in texts]


@dataclass(frozen=True)
class Part:
    """Pairs as numbers, beside their texts."""

    texts: list[tuple[str, str]]
    source: TokenArray
    target: TokenArray

    @property
    def dataset(self) -> StackDataset[dict[str, Tensor]]:
        """Items with the fields source and target."""
        return StackDataset(source=self.source, target=self.target)  # type: ignore[arg-type]

    @property
    def lengths(self) -> IntArray:
        """(N, 2) int64, words of the source and characters of the target, its <s> and </s> counted."""
        return np.stack([self.source.lengths, self.target.lengths], axis=1)


@dataclass(frozen=True)
class Corpus:
    """The parts, and the vocabularies of the training part: words and characters that it has at least three times."""

    parts: dict[str, Part]
    source: Vocabulary
    target: Vocabulary

    @staticmethod
    def read(path: Path = PAIRS, every: int = 1, at_least: int = 3) -> "Corpus":
        """Read lines of source, target and whatever else, separated by tabs.

        Args:
            path: The gzipped file.
            every: Take every so many lines only.
            at_least: Rarer words and characters are unknown.
        """
        with gzip.open(path, "rt", encoding="utf-8") as file:
            texts = [(line[0], line[1]) for line in (row.rstrip("\n").split("\t") for row in file)][::every]
        pairs = [(words(source), characters(target)) for source, target in texts]
        where: dict[str, list[int]] = {"train": [], "valid": [], "test": []}
        for i, (source, target) in enumerate(pairs):
            if source and target:
                where[part_of(source)].append(i)
        vocabularies = [Vocabulary.of((pairs[i][side] for i in where["train"]), at_least) for side in (0, 1)]
        parts = {}
        for name, chosen in where.items():
            source, target = (v.numbers(pairs[i][side] for i in chosen) for side, v in enumerate(vocabularies))
            target = [[BOS, *numbers, EOS] for numbers in target]
            sides = (TokenArray.of_sequences(side) for side in (source, target))
            parts[name] = Part([texts[i] for i in chosen], *sides)
        return Corpus(parts, *vocabularies)

    def text(self, numbers: Iterable[int]) -> str:
        """Return a target's characters."""
        return "".join(self.target.entries[i] for i in numbers)
