"""BLEU by its reference implementation, with every translation that the test part has of a sentence."""

from collections.abc import Sequence
from itertools import zip_longest

from experiments.translation.pairs import words

__all__ = ["bleu"]


def bleu(texts: Sequence[tuple[str, str]], translations: Sequence[str]) -> tuple[float, str]:
    """Return BLEU, 0 to 100, of translations into Chinese, and sacrebleu's signature, which says how it was computed.

    Args:
        texts: Pairs of a sentence and its translation. A sentence that stands there several times counts once, and all
            its translations are references.
        translations: A model's, one for each pair.
    """
    from sacrebleu.metrics import BLEU

    of = {" ".join(words(source)): translation for (source, _), translation in zip(texts, translations, strict=True)}
    references: dict[str, list[str]] = {source: [] for source in of}
    for source, target in texts:
        references[" ".join(words(source))].append(target)
    metric = BLEU(tokenize="zh")
    score = metric.corpus_score(list(of.values()), [list(stream) for stream in zip_longest(*references.values())])
    return score.score, str(metric.get_signature())
