"""torchdata's StatefulDataLoader over the parts of a loader: exact resume with and without workers."""

import pytest
from integrations.text import DATA, assert_epochs, pieces_of
from torchdata.stateful_dataloader import StatefulDataLoader

import seqbatch

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated"),
]

STRATEGY = seqbatch.Bucketing(max_tokens=600)


def make(num_workers=0, strategy=STRATEGY):
    """Return a stateful loader and its batch sampler."""
    sampler = seqbatch.PlanBatchSampler(strategy, DATA.lengths)
    dataset = seqbatch.PieceDataset(DATA)
    return StatefulDataLoader(
        dataset, batch_sampler=sampler, collate_fn=seqbatch.collate, num_workers=num_workers
    ), sampler


def test_epochs():
    """Each epoch holds all tokens once."""
    loader, sampler = make()
    epochs = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        epochs.append([pieces_of(batch) for batch in loader])
    assert_epochs(epochs)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("steps", [1, 7, 25])
@pytest.mark.parametrize("epoch", [0, 1])
def test_resume(steps, num_workers, epoch):
    """The state of the loader, whatever its workers have read, is gone on from at the next batch."""
    loader, sampler = make(num_workers)
    sampler.set_epoch(epoch)
    whole, state = [], None
    for batch in loader:
        whole.append(pieces_of(batch))
        if len(whole) == steps:
            state = loader.state_dict()
    assert len(whole) > steps

    again, sampler = make(num_workers)
    again.load_state_dict(state)
    assert [pieces_of(batch) for batch in again] == whole[steps:]
    assert sampler.epoch == epoch

    sampler.set_epoch(epoch + 1)
    following, _ = make()
    following.batch_sampler.set_epoch(epoch + 1)
    assert [pieces_of(batch) for batch in again] == [pieces_of(batch) for batch in following]
