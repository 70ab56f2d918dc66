"""Hugging Face datasets: lengths from the Arrow table, labels a sequence, and the tokens without a copy."""

import datasets
import numpy as np
import pytest
import torch
from integrations.text import SENTENCES, assert_epochs
from torch import nn

import seqbatch

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

LABELS = [sentence.count(b"e") % 3 for sentence in SENTENCES]


def make(first="input_ids"):
    """Return the sentences and a label for each."""
    columns = {first: [list(sentence) for sentence in SENTENCES], "label": LABELS}
    return datasets.Dataset.from_dict(columns)


def never(*_):
    """Stand in for reading an item."""
    raise AssertionError("an item was read")


def train(loader):
    """Train a classifier of sentences for two epochs; return the pieces of each batch."""
    torch.manual_seed(0)
    embed, rnn, head = nn.Embedding(256, 8), seqbatch_lstm(), nn.Linear(8, 3)
    optimizer = torch.optim.SGD([*embed.parameters(), *rnn.parameters(), *head.parameters()], lr=0.1)
    epochs = []
    for _ in range(2):
        epochs.append([])
        for batch in loader:
            tokens = batch.data["input_ids"]
            for index, piece in zip(batch.placement.sequence, batch.unbatch(tokens), strict=True):
                assert bytes(piece.tolist()) == SENTENCES[index]
            labels = batch.per_sequence["label"]
            assert labels.tolist() == [LABELS[index] for index in batch.placement.sequence]
            placement = batch.placement
            epochs[-1].append(np.stack([placement.sequence, placement.start, placement.length], 1).tolist())
            _, (last, _) = rnn(embed(batch.flatten(tokens)), cu_seqlens=batch.cu_seqlens)
            nn.functional.cross_entropy(head(last[-1]), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
    return epochs


def seqbatch_lstm():
    """Return the layer."""
    from seqbatch.rnn import LSTM

    return LSTM(8, 8)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("layout", ["time_major", "flat"])
def test_dataset(monkeypatch, layout, num_workers):
    """A dataset is taken as it is; its lengths come without reading an item."""
    dataset = make()
    with monkeypatch.context() as patch:
        patch.setattr(datasets.Dataset, "__getitem__", never)
        patch.setattr(datasets.Dataset, "__getitems__", never)
        loader = seqbatch.make_loader(
            dataset,
            seqbatch.Bucketing(max_tokens=600),
            per_sequence=["label"],
            layout=layout,
            num_workers=num_workers,
        )
    assert np.array_equal(loader.batch_sampler.lengths, [len(sentence) for sentence in SENTENCES])
    assert_epochs(train(loader))


def test_from_arrow():
    """The tokens' column becomes a TokenArray; in one chunk without a copy."""
    column = make().data.column("input_ids")
    data = seqbatch.TokenArray.from_arrow(column)
    assert [bytes(data[i].tolist()) for i in range(len(data))] == SENTENCES
    if column.num_chunks == 1:
        assert np.shares_memory(data.tokens, column.chunks[0].values.to_numpy())
    loader = seqbatch.make_loader(data, seqbatch.Bucketing(max_tokens=600))
    batches = [
        [[int(v) for v in row] for row in zip(b.placement.sequence, b.placement.start, b.placement.length, strict=True)]
        for _ in range(2)
        for b in loader
    ]
    half = len(batches) // 2
    assert_epochs([batches[:half], batches[half:]])


def test_rearranged_datasets():
    """Selected, shuffled, concatenated and formatted datasets have their own lengths."""
    whole = make()
    cases = {
        "selected": whole.select(range(10, 60)),
        "picked": whole.select([5, 3, 8]),
        "shuffled": whole.shuffle(seed=1),
        "joined": datasets.concatenate_datasets([whole, whole.select(range(7))]),
        "torch": whole.with_format("torch"),
        "numpy": whole.with_format("numpy"),
    }
    for name, dataset in cases.items():
        loader = seqbatch.make_loader(dataset, seqbatch.Padding(8), per_sequence=["label"])
        expected = [len(row) for row in dataset["input_ids"]]
        assert loader.batch_sampler.lengths.tolist() == expected, name
        for batch in loader:
            for i, piece in enumerate(batch.unbatch(batch.data["input_ids"])):
                item = dataset[int(batch.placement.sequence[i])]
                assert piece.tolist() == list(item["input_ids"]), name
                assert int(batch.per_sequence["label"][i]) == int(item["label"]), name


def test_label_before_tokens():
    """What is declared to be one value a sequence is not taken for the tokens, wherever its column stands."""
    columns = {"label": LABELS, "tokens": [list(sentence) for sentence in SENTENCES]}
    dataset = datasets.Dataset.from_dict(columns)
    loader = seqbatch.make_loader(dataset, seqbatch.Padding(8), per_sequence=["label"])
    assert np.array_equal(loader.batch_sampler.lengths, [len(sentence) for sentence in SENTENCES])


def test_length_column():
    """A column of the dataset may hold the lengths."""
    dataset = make().add_column("length", [len(sentence) for sentence in SENTENCES])
    options = {"per_sequence": ["label"], "fields": ["input_ids"]}
    loader = seqbatch.make_loader(dataset, seqbatch.Padding(8), lengths="length", **options)
    assert np.array_equal(loader.batch_sampler.lengths, [len(sentence) for sentence in SENTENCES])
    next(iter(loader))
