"""experiments/char_lm: its text, its models, and that --full is the paper's configuration."""

import gzip
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pandas as pd
import pytest
import torch
from click.testing import CliRunner

from experiments.char_lm import run as char_lm
from experiments.char_lm import splicing
from experiments.char_lm.model import FULL, FULL_RATE, MODELS, Settings, bits, to_evaluate, train
from experiments.char_lm.splicing import SPLICED, Way, parts
from experiments.char_lm.text import ALPHABET, Text, crops, symbols, windows
from seqbatch import TokenArray

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = Settings(hidden=16, steps=10, batch=8, updates=30, every=15, population=4, test=1_600)


@pytest.fixture(scope="module")
def text() -> Text:
    """A text that is easy to learn: the alphabet again and again."""
    again = torch.arange(27, dtype=torch.uint8).repeat(150)
    return Text(again, again[:1000], again[:2000])


def test_text_is_whole_and_divided():
    """All symbols of the files, in order, once; no part shares one with another."""
    whole = Text.wikipedia()
    assert (len(whole.train) + len(whole.valid), len(whole.test)) == (2_434_675, 259_159)
    assert "".join(ALPHABET[i] for i in whole.train[:9]) == "anarchism"
    assert len(whole.valid) == 121_733
    assert int(whole.train.max()) == 26


def test_text8_is_divided_90_5_5(tmp_path: Path):
    """The parts of a file, in its order."""
    path = tmp_path / "text.gz"
    path.write_bytes(gzip.compress(b"a" * 90 + b"b" * 5 + b"c" * 5))
    whole = Text.of_file(path)
    assert [(len(part), set(part.tolist())) for part in (whole.train, whole.valid, whole.test)] == [
        (90, {1}),
        (5, {2}),
        (5, {3}),
    ]


def test_other_symbols_are_refused(tmp_path: Path):
    """An error that names the symbol and its place."""
    path = tmp_path / "text.txt"
    path.write_bytes(b"ab\ncd")
    with pytest.raises(ValueError, match=r"b'\\n' at 2"):
        symbols(path)


def test_windows_predict_every_symbol_once():
    """Whatever the length, the targets are the same symbols in the same order."""
    line = torch.arange(121)
    for steps in (5, 20, 60):
        assert windows(line, steps)[1:].T.flatten().tolist() == list(range(1, 121))


def test_crops_of_an_epoch_do_not_overlap():
    """The targets of an epoch's batches are disjoint runs of the text; the next epoch has another offset."""
    line = torch.arange(1000)
    epochs = crops(line, 10, 16, seed=0)
    first, second = (torch.cat(list(islice(epochs, 6)), 1) for _ in range(2))
    assert torch.equal(first - first[0], torch.arange(11)[:, None].expand(11, 96))
    assert len(first[1:].unique()) == first[1:].numel() == 960
    assert set((first[0] % 10).tolist()) != set((second[0] % 10).tolist())


@pytest.mark.parametrize("variant", MODELS)
def test_models_learn(text: Text, variant: str):
    """Bits fall far below those of a guess, log2(27) = 4.75, with the running statistics too."""
    curve = train(text, variant, 0.02, replace(TINY, updates=60, every=30))[1]
    assert [point["updates"] for point in curve] == [30, 60]
    assert curve[-1]["valid_bpc"] < 2.5 and curve[-1]["train_bpc"] < 2.5


def test_same_seed_same_start(text: Text):
    """Models differ by normalization only: the matrices start equal."""
    plain, normalized = (train(text, v, 0.0, replace(TINY, updates=1))[0].state_dict() for v in ("none", "bn"))
    assert plain.keys() < normalized.keys()
    assert all(torch.equal(plain[name], normalized[name]) for name in plain)


def test_statistics_to_evaluate_with(text: Text):
    """The trained model stays as it is; copies are finite on sequences five times as long."""
    model = train(text, "bn", 0.02, TINY)[0]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ready = to_evaluate(model, text.train, TINY)
    found = {kind: bits(one, text.test[:801], 50, 8) for kind, one in ready.items()}
    assert all(len(value) == 50 and value.isfinite().all() for value in found.values())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    averaged = ready["population, averaged over steps"].rnn.layers[0][0].norm_h
    assert (averaged.running_mean == averaged.running_mean[0]).all()
    assert not torch.equal(found["population"], found["batch"])


def test_age_does_not_see_the_lanes(monkeypatch: pytest.MonkeyPatch):
    """With statistics by age a sentence gets the same bits in spliced windows as by itself; by frame it does not."""
    settings = Settings(hidden=8, updates=2, population=1)
    training, held_out = (TokenArray.of_sequences([part[i] for i in range(64)]) for part in parts())
    monkeypatch.setattr(splicing, "parts", lambda: (training, held_out))
    assert int(held_out.tokens.max()) <= 26 and held_out.lengths.min() > 0
    age, frame = (splicing.run(Way("bn", kind, SPLICED), 0.01, settings, 0) for kind in ("age", "frame"))
    assert age["spliced"] == pytest.approx(age["alone"], abs=1e-5)
    assert abs(frame["spliced"] - frame["alone"]) > 1e-5


def test_full_is_the_papers():
    """text8 as in arXiv 1603.09025; it can be built, and asks for a text."""
    assert (FULL.hidden, FULL.steps, FULL.batch, FULL_RATE, FULL.clip, FULL.gamma) == (2000, 180, 128, 0.001, 1.0, 0.1)
    assert FULL.updates == 50 * (90_000_000 // 180 // 128)
    result = CliRunner().invoke(char_lm.main, ["--full"])
    assert result.exit_code == 2 and "--text" in result.output


@pytest.mark.skipif(not (char_lm.HERE / "rates.csv").exists(), reason="the rows are not there yet")
def test_rates_are_the_best_of_the_rows():
    """The learning rates in the code are those that short runs in rates.csv are lowest with."""
    rows = pd.read_csv(char_lm.HERE / "rates.csv")
    rows = rows[rows.updates == char_lm.RATE_UPDATES]
    best = rows.loc[rows.groupby("model").valid_bpc.idxmin()].set_index("model").lr
    assert {MODELS[variant]: lr for variant, lr in char_lm.RATES.items()} == best.to_dict()
