"""experiments/attentive_reader: the questions can be answered, and answers do not depend on batch mates or padding."""

from itertools import islice

import pytest
import torch

from experiments.attentive_reader.clozes import PLACEHOLDER, Cloze, Text, clozes, guesses, is_name
from experiments.attentive_reader.data import MARKERS, Batch, Examples, shuffle_markers
from experiments.attentive_reader.model import VARIANTS, AttentiveReader
from experiments.attentive_reader.run import Settings, full, train
from seqbatch import TokenArray
from seqbatch.rnn import estimate_population

WORDS, HIDDEN = MARKERS + 13, 6


def one_article(part: str = "train") -> Text:
    context = "In 1843 Ada Lovelace met Bob. The men whom Bob met liked Lovelace. Bob then went to Rome with the men."
    asked = [{"question": "Where did Bob go with the men?", "answers": [{"text": "Rome"}]}]
    return Text({"data": [{"part": part, "paragraphs": [{"context": context, "qas": asked}]}]}, common=0)


def examples(count: int = 24, most: int = 8) -> Examples:
    """Made-up examples: the answer is the marker that follows the question's word in the document."""
    generator = torch.Generator().manual_seed(0)
    documents, questions, answers = [], [], []
    for i in range(count):
        length = 1 + i % most
        markers = torch.randperm(MARKERS, generator=generator)[:length] + 1
        keys = torch.randperm(10, generator=generator)[:length] + MARKERS + 3
        which = int(torch.randint(length, (), generator=generator))
        documents.append(torch.stack([keys, markers], 1).flatten().tolist())
        questions.append(torch.cat([torch.full((1 + i % 4,), MARKERS + 1), keys[which : which + 1]]))
        answers.append(int(markers[which]) - 1)
    return Examples(TokenArray.of_sequences(documents), questions, torch.tensor(answers), WORDS, {})


def test_clozes_of_an_article():
    """Names are found and linked, and each kind of question is made; what cannot be answered is left out."""
    found = clozes(one_article(), "train", most_names=MARKERS, most_words=80, most_question=20)
    assert all(cloze.answer in cloze.document and len(cloze.names) > 1 for cloze in found)
    asked = {(" ".join(cloze.question), cloze.answer) for cloze in found}
    assert (f"where did {PLACEHOLDER} go with the men ?", "@Bob") in asked
    assert ("where did @Bob go with the men ? " + PLACEHOLDER, "@Rome") in asked
    assert (f"the men whom @Bob met liked {PLACEHOLDER} .", "@Ada Lovelace") in asked  # by her last name
    assert not any("went" in question and answer == "@Rome" for question, answer in asked)  # elsewhere there is no Rome
    assert not any(cloze.answer in cloze.question for cloze in found)
    assert clozes(one_article("dev"), "train", MARKERS, 80, 20) == []


def test_documents_are_the_nearest_sentences_that_fit():
    """A document has at most so many words, and the sentence like the question before others."""
    found = clozes(one_article(), "train", most_names=MARKERS, most_words=14, most_question=20)
    assert found
    assert max(len(cloze.document) for cloze in found) <= 14
    assert next(c for c in found if c.answer == "@Rome").document[-1] == "."


def test_guesses():
    """Wrong answers of those who do not read."""
    cloze = Cloze(["@A", "x", "@A", "@B"], [PLACEHOLDER, "@A"], "@B")
    assert guesses([cloze]) == {"any name": 50.0, "most frequent": 100.0, "most frequent, not in the question": 0.0}
    assert cloze.names == ["@A", "@B"]
    assert not is_name(PLACEHOLDER)


def test_shuffled_markers_say_the_same():
    """New markers are a renaming of the old ones, one for each example; words and padding stay."""
    batch = next(examples().batches(24, train=False))
    new = shuffle_markers(batch, torch.Generator().manual_seed(3))
    for old_words, new_words in ((batch.document, new.document), (batch.question, new.question)):
        marker = (old_words > 0) & (old_words <= MARKERS)
        assert torch.equal(new_words[~marker], old_words[~marker])
    for lane, answer in enumerate(batch.answer + 1):
        pairs = set(zip(batch.document[:, lane].tolist(), new.document[:, lane].tolist(), strict=True))
        assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})
        assert (int(answer), int(new.answer[lane]) + 1) in pairs
    assert not torch.equal(new.document, batch.document)


def test_batches_hold_every_example_once():
    """Documents meet their own questions and answers."""
    data = examples()
    seen = []
    for batch in data.batches(5, train=False):
        for lane, answer in enumerate(batch.answer.tolist()):
            document = batch.document[batch.document_mask[:, lane], lane].tolist()
            key = int(batch.question[batch.question_mask[:, lane], lane][-1])
            assert document[document.index(key) + 1] == answer + 1
            seen.append(tuple(document))
    assert sorted(seen) == sorted(tuple(data.documents[i].tolist()) for i in range(24))


def reader(name: str) -> tuple[AttentiveReader, Examples]:
    data = examples(12)
    torch.manual_seed(0)
    model = AttentiveReader(VARIANTS[name], WORDS, data.longest, HIDDEN, drop=0.5).double()
    if VARIANTS[name].cell:
        estimate_population(model, islice(data.batches(12, seed=1), 4))
    return model.eval(), data


def padded(batch: Batch, steps: int) -> Batch:
    more = [torch.cat([part, part.new_zeros(steps, part.shape[1])]) for part in batch[:4]]
    return Batch(*more, batch.answer)


@pytest.mark.parametrize("name", VARIANTS)
def test_batch_mates_and_padding_do_not_matter(name):
    """In evaluation every example has the logits that it has alone, whatever the padding, in float64."""
    model, data = reader(name)
    together = torch.cat([model(batch) for batch in data.batches(5, train=False)])
    alone = torch.cat([model(batch) for batch in data.batches(1, train=False)])
    more = torch.cat([model(padded(batch, 9)) for batch in data.batches(24, train=False)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-10)
    torch.testing.assert_close(more, alone, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", VARIANTS)
def test_padding_in_training(name):
    """Padding changes neither logits nor statistics, except in the variant that counts it, which shows that it can."""
    model, data = reader(name)
    batch = next(data.batches(24, train=False))
    model.drop = 0.0
    before = model.train()(batch)
    after = model(padded(batch, 9))
    if VARIANTS[name].padding:
        assert (after - before).abs().max() > 1e-6
    else:
        torch.testing.assert_close(after, before, rtol=0, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["LSTM", "BN-e**"])
def test_training_lowers_the_loss(name):
    """A tiny run: finite numbers, and a lower loss at its end."""
    data = examples(60, most=1)  # one marker in each document: to be copied
    settings = Settings(hidden=24, batch=20, rate=3e-2, updates=40, every=20)
    row, curve, _ = train(name, (data, data), settings, seed=0)
    assert [point["update"] for point in curve] == [20, 40]
    assert all(0 <= point["valid_error"] <= 100 and point["valid_loss"] > 0 for point in curve)
    assert curve[-1]["train_loss"] < curve[0]["train_loss"] - 0.3
    assert row["best_error"] == min(round(point["valid_error"], 2) for point in curve)


def test_full_settings_are_the_papers():
    """Cooijmans et al., appendix D."""
    plain, star = full("BN-everywhere"), full("BN-e**")
    assert (plain.hidden, plain.batch, plain.rate, plain.clip) == (240, 64, 8e-5, 10)
    assert (star.hidden, star.batch, star.rate, star.clip) == (240, 40, 8e-4, 10)
    assert full("LSTM") == full("BN-LSTM") == plain
    assert full("BN-e*") == star
    model = AttentiveReader(VARIANTS["BN-e**"], 65829, (400, 30), star.hidden, star.drop)
    assert model.document.hidden_size == 240
    assert model.document.bidirectional
