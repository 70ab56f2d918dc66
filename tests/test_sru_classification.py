"""experiments/sru_classification: what a sentence is given does not depend on who shares its batch."""

import pytest
import torch

from experiments.sru_classification.models import ENCODERS, Classifier
from seqbatch import Bucketing, make_loader

WORDS, SIZE = 40, 12


def sentences_and_model(name: str) -> tuple[list[dict], Classifier]:
    generator = torch.Generator().manual_seed(1)
    lengths = [1, 2, 3, 4, 5, 6, 9, 1, 17, 30]  # shorter than the widest window, and much longer
    items = [{"words": torch.randint(WORDS, (n,), generator=generator), "label": n % 2} for n in lengths]
    torch.manual_seed(0)
    return items, Classifier(name, WORDS, size=SIZE).double().eval()


def alone_and_together(name: str, break_mask: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits of each sentence by itself, and in batches of a loader, in the order of the data."""
    items, model = sentences_and_model(name)
    alone = torch.cat([model(item["words"][:, None], torch.ones(len(item["words"]), 1).bool()) for item in items])
    together = torch.full_like(alone, torch.nan)
    for batch in make_loader(items, Bucketing(batch_size=4), per_sequence=["label"]):
        mask = torch.ones_like(batch.mask) if break_mask else batch.mask
        who = torch.from_numpy(batch.placement.sequence)
        together[who] = model(batch.data["words"], mask)
        assert batch.per_sequence["label"].tolist() == [items[i]["label"] for i in who]
    return alone, together


@pytest.mark.parametrize("name", ENCODERS)
def test_batch_mates_do_not_matter(name):
    """Every sentence has the logits that it has alone, in float64."""
    alone, together = alone_and_together(name)
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ENCODERS)
def test_padding_read_as_words_is_noticed(name):
    """The test above can fail: a mask that takes padding for words changes logits."""
    alone, together = alone_and_together(name, break_mask=True)
    assert (together - alone).abs().max() > 1e-6


@pytest.mark.parametrize("name", ENCODERS)
def test_padding_gets_no_gradient(name):
    """The vector of a word that stands only in padding is not trained."""
    model = sentences_and_model(name)[1]
    words, mask = torch.tensor([[1, 2], [3, 0], [4, 0]]), torch.tensor([[1, 1], [1, 0], [1, 0]]).bool()
    model(words, mask).square().sum().backward()
    gradient = model.embed.weight.grad.abs().sum(1)
    assert gradient[0] == 0 and (gradient[1:5] > 0).all()
