"""The language model of experiments/lm_strategies: it learns, reads each paragraph by itself, and resets matter."""

import pytest
import torch

from experiments.lm_strategies.model import CharacterLM, Corpus, evaluate
from experiments.lm_strategies.plans import STRATEGIES, Way
from experiments.lm_strategies.speed import Sample, take
from experiments.lm_strategies.train import train
from seqbatch import Chunking, Padding, Splicing, TokenArray

pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS = [f"{i} times {i} is {i * i}, as {'everyone ' * (i % 4)}knows." for i in range(60)]
CORPUS = Corpus.of_texts(TEXTS[:50], TEXTS[50:])


def short_run(strategy, cell="sru", **options):
    """Two epochs of a tiny model."""
    options = {"tokens": 3000, "hidden": 16, "lr": 0.01, "points": 2, "corpus": CORPUS} | options
    return train(strategy, cell, **options)


@pytest.mark.parametrize("cell", ["sru", "lstm", "nn.LSTM"])
@pytest.mark.parametrize("strategy", [Padding(8), Splicing(4, 16), Chunking(4, 16, carry=True)])
def test_a_short_run_lowers_the_loss(strategy, cell):
    """Whole paragraphs, lanes and carried chunks; the stock LSTM only where it can tell no difference."""
    if cell == "nn.LSTM" and not isinstance(strategy, Padding):
        pytest.skip("nn.LSTM knows no pieces")
    first, *_, last = short_run(strategy, cell)
    assert last["loss"] < first["loss"] - 0.2
    assert last["tokens"] >= 3000 and last["updates"] > 0 and last["seconds"] > 0


@pytest.mark.parametrize("cell", ["sru", "lstm", "nn.LSTM"])
def test_a_paragraph_is_evaluated_by_itself(cell):
    """The sum over paragraphs is the same one by one and in batches, whoever their mates are."""
    torch.manual_seed(0)
    model = CharacterLM(CORPUS.vocabulary, 8, cell)
    counts = [int(n) - 1 for n in CORPUS.held_out.lengths]
    alone = [
        evaluate(model, TokenArray.of_sequences([text])) * n for text, n in zip(CORPUS.held_out, counts, strict=True)
    ]
    assert evaluate(model, CORPUS.held_out) == pytest.approx(sum(alone) / sum(counts), rel=1e-5)


@pytest.mark.parametrize("cell", ["sru", "lstm"])
def test_resets_matter(cell):
    """Where they are ignored, state leaks into the next paragraph, and the run is another one; one repeated is not."""
    runs = [short_run(way, cell)[-1]["loss"] for way in (Way(Splicing(4, 16)), Way(Splicing(4, 16), resets=False))]
    assert runs[0] != runs[1]
    assert short_run(Splicing(4, 16), cell)[-1]["loss"] == runs[0]


def test_a_run_ends_at_the_first_limit():
    """Time of training, or tokens; neither is an error."""
    assert short_run(Padding(8), tokens=None, seconds=0.05)[-1]["seconds"] >= 0.05
    assert len(short_run(Padding(8), seconds=1e6)) == 3
    with pytest.raises(ValueError, match="seconds or tokens"):
        short_run(Padding(8), tokens=None)
    with pytest.raises(ValueError, match="strategy must be one of"):
        short_run("no such strategy")
    with pytest.raises(ValueError, match="cell must be one of"):
        short_run(Padding(8), "gru")


@pytest.mark.parametrize("name", list(STRATEGIES))
def test_every_strategy_runs(name):
    """By its name, as the command line and the demo use it."""
    assert short_run(name, tokens=500, points=1)[-1]["tokens"] >= 500


def test_a_sample_stands_for_its_plan():
    """Batches of the plan, unchanged, and about as dense as the whole of it."""
    lengths = [10 + 37 * i % 500 for i in range(400)]
    plan = Padding(8).plan(lengths)
    sample = Sample(Padding(8), 20_000).plan(lengths)
    assert sample.padding_efficiency == pytest.approx(plan.padding_efficiency, abs=0.03)
    assert sample.tokens == pytest.approx(20_000, rel=0.2)
    part = take(plan, [1, 5])
    for mine, theirs in zip(part, (plan[1], plan[5]), strict=True):
        assert mine.sequence.tolist() == theirs.sequence.tolist() and mine.steps == theirs.steps
