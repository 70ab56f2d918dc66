"""The language models of experiments/pipeline_lm: pipelined and alone they learn the same, and a run can be resumed."""

import pytest
import torch

from experiments.lm_strategies.model import Corpus
from experiments.pipeline_lm.model import Alone, Network, held_out_loss, loaders, pipelined, train
from experiments.pipeline_lm.stale import hidden_parameters, in_one_process
from experiments.pipeline_lm.train import newest, resume, save

pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS = [f"{i} times {i} is {i * i}, as {'everyone ' * (i % 4)}knows." for i in range(60)]
CORPUS = Corpus.of_texts(TEXTS[:50], TEXTS[50:])
LANES, WINDOW, LAYERS = 4, 16, 3


def network(cell="lstm"):
    return Network(cell, LAYERS, 12, CORPUS.vocabulary)


def curve(learner, steps):
    """The losses of some updates, and that of the held-out text after them."""
    where = {} if isinstance(learner, Alone) else {"mesh": learner.mesh}
    loader, held_out = loaders(CORPUS, LANES, WINDOW, **where)
    optimizer = torch.optim.Adam(learner.parameters(), lr=0.01)
    found = [loss for _, (_, loss) in zip(range(steps), train(learner, optimizer, loader), strict=False)]
    return [*found, held_out_loss(learner, held_out)]


@pytest.mark.parametrize(("cell", "mode"), [("lstm", "full"), ("sru", "full"), ("lstm", "microbatch")])
def test_a_pipeline_learns_what_one_process_learns(cell, mode):
    """To 1e-4 after 30 updates, over the end of an epoch."""
    alone = curve(Alone(network(cell)), 30)
    assert alone[29] < alone[0] - 0.3
    assert curve(pipelined(network(cell), mode, 2, WINDOW, virtual=2), 30) == pytest.approx(alone, abs=1e-4)


def test_the_softmax_alone_on_the_last_stage():
    """As Chen+15 place it."""
    pipe = pipelined(network(), "full", 2, WINDOW, chen=True, virtual=2)
    assert pipe.split == [LAYERS, 0]
    assert curve(pipe, 5) == pytest.approx(curve(Alone(network()), 5), abs=1e-4)


def test_a_run_goes_on_from_its_newest_checkpoint(tmp_path):
    """Within an epoch, with the states of the lanes."""

    def run(steps, keep=None):
        pipe = pipelined(network(), "full", 2, WINDOW, virtual=2)
        loader, _ = loaders(CORPUS, LANES, WINDOW, mesh=pipe.mesh)
        optimizer = torch.optim.Adam(pipe.parameters(), lr=0.01)
        before = resume(tmp_path, pipe, optimizer, loader) if keep else 0
        found = []
        for done, (batch, loss) in zip(range(before + 1, steps + 1), train(pipe, optimizer, loader), strict=False):
            found.append(loss)
            if keep and done % keep == 0:
                save(tmp_path, pipe, optimizer, loader, batch, done)
        return found

    whole = run(9)
    assert run(5, keep=2) == whole[:5]
    assert newest(tmp_path).name == "step-00000004"
    assert run(9, keep=2) == whole[4:]


def test_late_gradients_are_one_update_late():
    """Two updates move the hidden layers where one update in time does; the softmax is always in time."""
    batches = list(loaders(CORPUS, LANES, WINDOW)[0])[:3]
    exact, late, more = network(), network(), network()
    one = in_one_process(exact, batches[:1], 0.5, late=False)
    two = in_one_process(late, batches[:2], 0.5, late=True)
    assert two[0] == one[0]
    for mine, theirs in zip(hidden_parameters(late), hidden_parameters(exact), strict=True):
        assert torch.equal(mine, theirs)
    assert in_one_process(more, batches, 0.5, late=False)[1] != two[1]
