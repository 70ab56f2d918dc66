"""experiments/translation: what a pair gets depends neither on batch mates nor on their padding, on either side."""

import gzip
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import StackDataset

from experiments.translation.bleu import bleu
from experiments.translation.model import RNNS, Translator
from experiments.translation.pairs import BOS, EOS, Corpus, part_of, words
from experiments.translation.train import STRATEGIES, Learner, Settings, evaluate, train, translations
from seqbatch import Padding, SequenceBatch, TokenArray, make_loader

pytestmark = pytest.mark.usefixtures("one_thread")

SOURCES, TARGETS, SIZE = 30, 20, 8
LENGTHS = [(5, 3), (1, 9), (9, 4), (4, 12), (9, 2), (2, 5)]  # the longest source has not the longest target


def pairs() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Pairs of different lengths on both sides."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for source, target in LENGTHS:
        inner = torch.randint(3, TARGETS, (target,), generator=generator)
        ends = torch.tensor([BOS]), torch.tensor([EOS])
        made.append((torch.randint(SOURCES, (source,), generator=generator), torch.cat([ends[0], inner, ends[1]])))
    return made


def together(some: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[SequenceBatch, SequenceBatch]:
    """The padded batch of all pairs, as a loader makes it."""
    source, target = (TokenArray.of_sequences(side) for side in zip(*some, strict=True))
    dataset = StackDataset(source=source, target=target)
    lengths = [(len(s), len(t)) for s, t in some]
    strategy = Padding(len(some), shuffle=False)
    (batch,) = make_loader(dataset, strategy, lengths=lengths, next_token="target", train=False)
    return batch["source"], batch["target"]


def translator(name: str) -> Translator:
    torch.manual_seed(0)
    return Translator(name, SOURCES, TARGETS, size=SIZE).double().eval()


def traced(model: Translator, some: list, break_mask: bool = False) -> list[tuple[torch.Tensor, ...]]:
    """Logits, and gradients with respect to both sides' embeddings, of each pair: the real steps of its lane."""
    source, target = together(some)
    vectors = model.embed_source(source.data).detach(), model.embed_target(target.data).detach()
    x, y = (v.requires_grad_() for v in vectors)
    mask = torch.ones_like(source.mask) if break_mask else source.mask
    logits = model.head(model.decode_vectors(y, target.mask, model.encode_vectors(x, mask))[0])
    cross_entropy(logits.mT, target.targets, reduction="sum").backward()
    return [(logits[: len(t), i], x.grad[: len(s), i], y.grad[: len(t), i]) for i, (s, t) in enumerate(some)]


@pytest.mark.usefixtures("pieces_of_time")
@pytest.mark.parametrize("name", RNNS)
def test_batch_mates_do_not_matter(name):
    """Logits and gradients of each pair are those that it has alone, in float64."""
    model = translator(name)
    for pair, inside in zip(pairs(), traced(model, pairs()), strict=True):
        for found, alone in zip(inside, traced(model, [pair])[0], strict=True):
            torch.testing.assert_close(found, alone, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", RNNS)
def test_padding_read_as_words_is_noticed(name):
    """The test above can fail: a mask that takes padding for words changes logits."""
    model = translator(name)
    differ = [
        (found[0] - alone[0]).abs().max() > 1e-6
        for found, alone in zip(traced(model, pairs(), break_mask=True), traced(model, pairs()), strict=True)
    ]
    assert differ == [source < 9 for source, _ in LENGTHS]


@pytest.mark.usefixtures("pieces_of_time")
@pytest.mark.parametrize("name", RNNS)
def test_a_pair_changes_itself_alone(name):
    """Another pair in one lane, of the same lengths, leaves all other lanes' logits and gradients to the bit."""
    model, some, changed = translator(name), pairs(), 3
    other = [*some]
    source, target = some[changed]
    other[changed] = ((source + 1) % SOURCES, torch.cat([target[:1], target[1:-1].flip(0), target[-1:]]))
    for i, (before, after) in enumerate(zip(traced(model, some), traced(model, other), strict=True)):
        assert all(map(torch.equal, before, after)) == (i != changed)


@pytest.mark.parametrize("name", RNNS)
def test_loss_counts_real_targets(name):
    """The loss of a batch is the sum of its pairs' losses, which is that over all logits with padding ignored."""
    model = translator(name)
    source, target = together(pairs())
    losses = model.losses(source, target)
    logits = model(source.data, source.mask, target.data, target.mask)
    torch.testing.assert_close(losses, cross_entropy(logits.mT, target.targets, reduction="sum"))
    torch.testing.assert_close(losses, sum(model.losses(*together([pair])) for pair in pairs()))
    assert target.loss_tokens == sum(target + 1 for _, target in LENGTHS)


@pytest.mark.parametrize("name", RNNS)
def test_translations_do_not_depend_on_the_batch(name):
    """A model that has learnt some pairs translates them, alone and in a batch; as one that sees all steps at once."""
    torch.manual_seed(0)
    model = Translator(name, SOURCES, TARGETS, size=32, dropout=0.0)
    source, target = together(pairs())
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(80):
        (model.losses(source, target) * target.loss_scale).backward()
        optimizer.step()
        optimizer.zero_grad()
    found = model.double().translate(source.data, source.mask)
    assert found == [t[1:-1].tolist() for _, t in pairs()]
    assert found == [model.translate(s[:, None], torch.ones(len(s), 1).bool())[0] for s, _ in pairs()]
    logits = model(source.data, source.mask, target.data, target.mask)
    assert torch.equal(logits.argmax(-1)[target.loss_mask], target.targets[target.loss_mask])


def test_translations_are_in_the_order_of_the_data(tmp_path):
    """Whatever batches a part is translated in, each pair gets its own translation; losses are those pair by pair."""
    corpus = Corpus.read(small_corpus(tmp_path), at_least=1)
    part, model = corpus.parts["valid"], Learner.of(corpus, "SRU", Settings(size=SIZE)).model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 3
    found = translations(model, corpus, part)
    for i in range(len(found)):
        source = torch.as_tensor(part.source[i]).long()[:, None]
        assert found[i] == corpus.text(model.translate(source, torch.ones_like(source).bool())[0])
    alone = [
        together([(torch.as_tensor(s), torch.as_tensor(t))]) for s, t in zip(part.source, part.target, strict=True)
    ]
    losses = sum(model.losses(*pair).item() for pair in alone) / (part.lengths[:, 1] - 1).sum()
    assert evaluate(model, part) == pytest.approx(losses)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_training_learns(strategy, tmp_path):
    """Each way to batch trains on every token of every epoch, and the loss falls."""
    pytest.importorskip("sacrebleu")
    corpus = Corpus.read(small_corpus(tmp_path), at_least=1)
    row, curve, found = train(corpus, "SRU", strategy, Settings(size=16, epochs=3))
    tokens = int(corpus.parts["train"].lengths.sum())
    assert [point["tokens"] for point in curve] == [tokens, 2 * tokens, 3 * tokens]
    assert curve[-1]["valid_loss"] < curve[0]["valid_loss"]
    assert len(found) == len(corpus.parts["test"].texts) and row["updates"] == curve[-1]["updates"]


def small_corpus(folder: Path) -> Path:
    """A file of pairs that are easy to learn, of many lengths."""
    path = folder / "pairs.tsv.gz"
    with gzip.open(path, "wt", encoding="utf-8") as file:
        for i in range(300):
            numbers = [str(i // 10**n % 10) for n in range(1 + i % 7)]
            file.write(f"{' '.join(numbers)} .\t{''.join('零一二三四五六七八九'[int(n)] for n in numbers)}。\n")
    return path


def test_corpus_is_whole_and_divided():
    """All pairs are in one part, and no English sentence in two."""
    corpus = Corpus.read()
    parts = {name: {" ".join(words(s)) for s, _ in part.texts} for name, part in corpus.parts.items()}
    assert sum(len(part.texts) for part in corpus.parts.values()) == 29_154
    assert {name: len(part.texts) for name, part in corpus.parts.items()} == {
        "train": 27_366,
        "valid": 900,
        "test": 888,
    }
    assert (
        not parts["train"] & parts["test"]
        and not parts["train"] & parts["valid"]
        and not parts["valid"] & parts["test"]
    )
    part = corpus.parts["train"]
    assert (part.lengths[:, 1] >= 3).all() and (part.lengths[:, 0] >= 1).all()
    assert part.target[0][0] == BOS and part.target[0][-1] == EOS
    item = part.dataset[5]
    assert (len(item["source"]), len(item["target"])) == tuple(part.lengths[5])


def test_vocabulary_is_of_the_training_part(tmp_path):
    """A word that the training part has too seldom, or that only others have, is unknown; texts come back otherwise."""
    sentences = [f"number {i} ." for i in range(200)]
    held_out = next(s for s in sentences if part_of(s.split()) == "test")
    path = tmp_path / "pairs.tsv.gz"
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(f"{s}\t數 {i % 5}。\tsomebody\n" for i, s in enumerate(sentences))
    corpus = Corpus.read(path, at_least=2)
    assert corpus.source.numbers([held_out.split()])[0] == [*corpus.source.numbers([["number"]])[0], 0, 4]
    target = corpus.parts["test"].target[0]
    assert corpus.text(target[1:-1]) == "".join(corpus.parts["test"].texts[0][1].split())


def test_bleu_takes_all_references_of_a_sentence():
    """A sentence that stands twice in the test part is translated once, and either translation is right."""
    pytest.importorskip("sacrebleu")
    texts = [("Hi!", "你好嗎朋友。"), ("No.", "不是這樣的。"), ("hi !", "嗨我的朋友。")]
    score, signature = bleu(texts, ["嗨我的朋友。", "不是這樣的。", "嗨我的朋友。"])
    assert score == pytest.approx(100) and "zh" in signature
    assert bleu(texts, ["嗨我的朋友。", "朋友。", "嗨我的朋友。"])[0] < 90
