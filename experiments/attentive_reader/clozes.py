"""Cloze questions from SQuAD's paragraphs: names become markers, and one name of the question is to be found.

A made-up paragraph of two sentences, "Ada met Bob." and "Bob met Ada in Rome.", gives among others the question
"@placeholder met Bob in Rome" with the answer Ada, and the document "Ada met Bob". The model never sees the names, only
markers whose numbers mean nothing from one example to the next (Hermann et al. 2015, arXiv 1506.03340).
"""

import gzip
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["PLACEHOLDER", "Cloze", "Text", "clozes", "guesses", "is_name", "nearest"]

PLACEHOLDER = "@"
_SOURCE = Path(__file__).parents[1] / "data" / "squad_v1.1_dev.json.gz"
_WORD = re.compile(r"\d+(?:[.,]\d+)*|\w+(?:[-.&]\w+)*|['’]\w+|[^\w\s@]")
_END = re.compile(r"(?<=[a-z0-9)\]\"”%]{2}[.!?])\s+(?=[A-Z\"“])")  # not after "U.S." nor after "St."


@dataclass(frozen=True)
class Cloze:
    """A document and a question whose missing name stands in the document; names are words that begin with "@"."""

    document: list[str]
    question: list[str]
    answer: str

    @property
    def names(self) -> list[str]:
        """All names, each once, in the order of the document and the question."""
        return list(dict.fromkeys(word for word in self.document + self.question if is_name(word)))


def is_name(word: str) -> bool:
    """Whether a word is a name, and not the placeholder."""
    return len(word) > 1 and word[0] == "@"


class Text:
    """Articles of SQuAD by part, as sentences of words in small letters, with runs of capitalised words as one name.

    A capitalised word belongs to a name if it is more often capitalised inside sentences than written small. The
    most common small words (`common` of them) do not say which sentence is near a question.
    """

    def __init__(self, source: Mapping[str, Any] | None = None, common: int = 100) -> None:
        if source is None:
            with gzip.open(_SOURCE, "rt", encoding="utf-8") as file:
                source = json.load(file)
        self.articles = source["data"]
        texts = [sentence for article in self.articles for sentence in _sentences(article)]
        self._large: Counter[str] = Counter(w.lower() for words in texts for w in words[1:] if w[0].isupper())
        self._small: Counter[str] = Counter(w for words in texts for w in words if not w[0].isupper())
        self.common = frozenset(word for word, _ in self._small.most_common(common))

    def words(self, sentence: list[str]) -> list[str]:
        """Put small letters, and one word for a name."""
        found: list[str] = []
        run: list[str] = []
        for word in [*sentence, ""]:
            if word[:1].isupper() and self._large[word.lower()] > self._small[word.lower()]:
                run.append(word)
                continue
            if run:
                found.append("@" + " ".join(run))
                run = []
            if word:
                found.append(word.lower())
        return found

    def paragraphs(self, part: str) -> Iterator[tuple[list[list[str]], list[tuple[list[str], str]]]]:
        """Yield the sentences of each paragraph of a part, and its questions, each with its answer's text as words."""
        for article in self.articles:
            for paragraph in article["paragraphs"] if article["part"] == part else []:
                sentences = [self.words(_WORD.findall(s)) for s in _END.split(paragraph["context"])]
                asked = [
                    (self.words(_WORD.findall(qa["question"])), self.words(_WORD.findall(qa["answers"][0]["text"])))
                    for qa in paragraph["qas"]
                ]
                everything = [*sentences, *(words for question in asked for words in question)]
                same = _linked({word for words in everything for word in words if is_name(word)})
                yield (
                    [_renamed(sentence, same) for sentence in sentences],
                    [(_renamed(question, same), " ".join(_renamed(answer, same))) for question, answer in asked],
                )


def clozes(text: Text, part: str, most_names: int, most_words: int, most_question: int) -> list[Cloze]:
    """Make all questions of a part that can be answered.

    Three kinds: a sentence of a paragraph without one of its names, to be answered by the other sentences; a question
    of SQuAD without one of its names; and a question of SQuAD whose answer is a name, with the placeholder at its end.

    Args:
        text: The articles.
        part: ``"train"`` or ``"dev"``.
        most_names: In an example: so many markers are there.
        most_words: Of a document: at most four sentences, those nearest to the question, as many as fit.
        most_question: Words of a question.
    """
    found = []
    for sentences, asked in text.paragraphs(part):
        for i, sentence in enumerate(sentences):
            found += _without_a_name(text, sentence, sentences[:i] + sentences[i + 1 :], most_words)
        for question, answer in asked:
            found += _without_a_name(text, question, sentences, most_words)
            if is_name(answer) and answer not in question:
                document = nearest(question, sentences, most_words, text.common)
                found.append(Cloze(document, [*question, PLACEHOLDER], answer))
    return [
        cloze
        for cloze in found
        if cloze.answer in cloze.document
        and len({word for word in cloze.document if is_name(word)}) > 1
        and len(cloze.names) <= most_names
        and len(cloze.question) <= most_question
    ]


def nearest(question: list[str], sentences: list[list[str]], most_words: int, common: frozenset[str]) -> list[str]:
    """Of at most four sentences the words, in order: those that share most words with the question, as many as fit."""
    wanted = set(question) - common
    order = sorted(range(len(sentences)), key=lambda i: (-len(wanted & set(sentences[i])), i))
    kept, words = [], 0
    for i in order:
        if words + len(sentences[i]) <= most_words and len(kept) < 4:
            kept.append(i)
            words += len(sentences[i])
    return [word for i in sorted(kept) for word in sentences[i]]


def guesses(examples: list[Cloze]) -> dict[str, float]:
    """Percent of wrong answers without reading: any name, the most frequent, that among those not in the question."""
    wrong = {"any name": 0.0, "most frequent": 0.0, "most frequent, not in the question": 0.0}
    for cloze in examples:
        counts = Counter(word for word in cloze.document if is_name(word))
        others = Counter({name: n for name, n in counts.items() if name not in cloze.question})
        wrong["any name"] += 1 - 1 / len(counts)
        wrong["most frequent"] += 1 - _share(counts, cloze.answer)
        wrong["most frequent, not in the question"] += 1 - _share(others, cloze.answer)
    return {how: round(100 * count / len(examples), 1) for how, count in wrong.items()}


def _share(counts: Counter[str], answer: str) -> float:
    """How probable the answer is if one of the most frequent names is drawn."""
    best = [name for name, n in counts.items() if n == max(counts.values())]
    return (answer in best) / len(best)


def _without_a_name(text: Text, words: list[str], sentences: list[list[str]], most_words: int) -> Iterator[Cloze]:
    for name in dict.fromkeys(word for word in words if is_name(word)):
        question = [PLACEHOLDER if word == name else word for word in words]
        yield Cloze(nearest(question, sentences, most_words, text.common), question, name)


def _sentences(article: Mapping[str, Any]) -> Iterator[list[str]]:
    for paragraph in article["paragraphs"]:
        for text in [*_END.split(paragraph["context"]), *(qa["question"] for qa in paragraph["qas"])]:
            if words := _WORD.findall(text):
                yield words


def _renamed(words: list[str], names: Mapping[str, str]) -> list[str]:
    return [names.get(word, word) for word in words]


def _linked(names: set[str]) -> dict[str, str]:
    """Each name's longest form: one that ends with it, as "Peyton Manning" does with "Manning"."""
    order = sorted(names, key=lambda name: (-len(name), name))
    return {name: next(other for other in order if other == name or other.endswith(" " + name[1:])) for name in names}
