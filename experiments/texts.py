"""The texts that lie in ``experiments/data``, as sequences."""

import gzip
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from seqbatch import TokenArray

__all__ = ["as_characters", "paragraphs", "sentences"]

DATA = Path(__file__).parent / "data"


def paragraphs(part: str) -> list[str]:
    """Return the paragraphs of WikiText-2's part ``"valid"`` or ``"test"``, headings and empty lines left out."""
    with gzip.open(DATA / f"wikitext2_{part}.txt.gz", "rt", encoding="utf-8") as file:
        lines = [line.strip() for line in file]
    return [line for line in lines if line and not line.startswith("=")]


def sentences(name: str) -> tuple[list[str], list[int]]:
    """Return the sentences of ``"mr"``, ``"cr"`` or ``"subj"`` and their classes, 0 or 1."""
    with gzip.open(DATA / f"{name}.tsv.gz", "rt", encoding="utf-8") as file:
        rows = [line.rstrip("\n").split("\t", 1) for line in file]
    return [text for _, text in rows], [int(label) for label, _ in rows]


def as_characters(texts: Sequence[str], alphabet: Sequence[str]) -> TokenArray:
    """Return texts as arrays of character numbers; a character that the alphabet lacks is ``len(alphabet)``.

    >>> as_characters(["ab", "b?"], "ab")[1]
    array([1, 2], dtype=int32)
    """
    number = {character: i for i, character in enumerate(alphabet)}
    tokens = np.array([number.get(c, len(alphabet)) for text in texts for c in text], dtype=np.int32)
    return TokenArray(tokens, np.cumsum([0, *map(len, texts)]))
