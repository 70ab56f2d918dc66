"""PyTorch Lightning: epochs, checkpoints in the middle of one, and several processes."""

from itertools import pairwise

import pytest
import torch
from integrations.lightning_module import OPTIONS, Callback, Module, Trainer
from integrations.text import DATA, assert_epochs, assert_ranks, pieces_of, run_ranks

import seqbatch

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*treespec"),
]


def make(strategy, **options):
    """Return a loader of next tokens."""
    return seqbatch.make_loader(DATA, strategy, next_token=True, **options)


@pytest.mark.parametrize("strategy", [seqbatch.Padding(16), seqbatch.Packing(400, rows=2)], ids=repr)
def test_epochs(strategy):
    """The loader is handed to fit; Lightning moves it on through its batch sampler."""
    module = Module()
    Trainer(max_epochs=2, **OPTIONS).fit(module, make(strategy))
    assert_epochs(module.epochs)
    assert len(module.epochs) == 2


def test_epochs_of_unequal_length():
    """Where epochs differ in batches, Lightning must be asked to count anew every epoch."""
    strategy = seqbatch.Splicing(6, chunk_size=40)
    counts = [len(strategy.plan(DATA.lengths, epoch=epoch)) for epoch in range(4)]
    assert len(set(counts)) > 1
    module = Module(lambda: make(strategy))
    Trainer(max_epochs=4, reload_dataloaders_every_n_epochs=1, **OPTIONS).fit(module)
    assert [len(batches) for batches in module.epochs] == counts
    assert_epochs(module.epochs)


class SaveAt(Callback):
    """Saves a checkpoint after some steps."""

    def __init__(self, steps, path):
        self.steps, self.path = steps, path

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.steps:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("steps", [5, 20])
def test_resume(tmp_path, steps, num_workers):
    """A checkpoint inside an epoch is gone on from at the very next batch, and ends where the first run ended."""
    strategy, path = seqbatch.Padding(16), tmp_path / "saved.ckpt"
    first = Module()
    Trainer(max_epochs=2, callbacks=[SaveAt(steps, path)], **OPTIONS).fit(
        first, make(strategy, num_workers=num_workers)
    )
    expected = [batch for batches in first.epochs for batch in batches][steps:]

    second = Module()
    Trainer(max_epochs=2, **OPTIONS).fit(second, make(strategy), ckpt_path=path, weights_only=False)
    assert [batch for batches in second.epochs for batch in batches] == expected
    assert all(map(torch.equal, first.parameters(), second.parameters()))

    saved = torch.load(path, weights_only=False)
    by_hand = make(strategy)
    by_hand.load_state_dict(saved["loader_by_hand"])
    assert [pieces_of(batch) for batch in by_hand] == expected[: len(by_hand) - steps % len(by_hand)]
    assert saved["loops"]["fit_loop"]["state_dict"]["combined_loader"] == [saved["loader_by_hand"]]


def test_resume_between_epochs(tmp_path):
    """A checkpoint after the last batch of an epoch is gone on from at the next epoch."""
    strategy, path = seqbatch.Padding(16), tmp_path / "saved.ckpt"
    first, second = Module(), Module()
    Trainer(max_epochs=2, callbacks=[SaveAt(len(make(strategy)), path)], **OPTIONS).fit(first, make(strategy))
    Trainer(max_epochs=2, **OPTIONS).fit(second, make(strategy), ckpt_path=path, weights_only=False)
    assert [batches for batches in second.epochs if batches] == first.epochs[1:]


def test_carried_state_in_a_checkpoint(tmp_path):
    """A carried plan is resumed with the state of its lanes in the loader's own entry of the checkpoint."""
    strategy, path = seqbatch.Splicing(6, chunk_size=40), tmp_path / "saved.ckpt"

    class Carrying(Module):
        def on_save_checkpoint(self, checkpoint):
            state = self.trainer.train_dataloader.state_dict(after=self.last, lanes=self.state)
            checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"] = [state]

        def on_load_checkpoint(self, checkpoint):
            self.state = checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"][0]["lanes"]

    first, second = Carrying(), Carrying()
    Trainer(max_epochs=1, callbacks=[SaveAt(7, path)], **OPTIONS).fit(first, make(strategy))
    Trainer(max_epochs=1, **OPTIONS).fit(second, make(strategy), ckpt_path=path, weights_only=False)
    assert second.epochs[-1] == first.epochs[0][7:]
    assert all(map(torch.equal, first.parameters(), second.parameters()))


def test_two_processes(tmp_path):
    """Under DDP each rank takes its share; the ranks' weights stay equal."""
    ranks = run_ranks("ranks_lightning.py", tmp_path, 2)
    for name in ranks[0]:
        assert_ranks([rank[name]["epochs"] for rank in ranks])
        assert ranks[0][name]["weights"] == ranks[1][name]["weights"]
        for one, other in pairwise(ranks[0][name]["epochs"]):
            assert one != other
