"""The examples are short, run as they stand, and learn something."""

import runpy

import pytest
from integrations.text import ROOT, run

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
# "7 squared is 49" in bytes: uniform guessing costs log(128) = 4.85 a byte.
LEARNT = 3.0

LAUNCH = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
MEAN = "float(found['losses'] * found['batch'].loss_scale)"
LOSSES = {
    "own_loop": MEAN,
    "pair_loop": "float(found['losses'] * found['target'].loss_scale)",
    "accelerate_loop": f"{MEAN} / found['accelerator'].num_processes",
    "pipeline": "float(found['result'].loss)",
    "trainer_loop": "found['trainer'].state.log_history[-2]['loss']",
}


def test_every_example_is_known():
    """A new example is tested too."""
    assert {path.stem for path in EXAMPLES} == {*LOSSES, "lightning_loop"}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_short(path):
    """Fifteen lines of code at most."""
    assert sum(bool(line.strip()) for line in path.read_text(encoding="utf-8").splitlines()) <= 15


@pytest.mark.parametrize(
    ("name", "launch"),
    [
        ("own_loop", ()),
        ("pair_loop", ()),
        ("trainer_loop", ()),
        ("accelerate_loop", ()),
        ("accelerate_loop", LAUNCH),
        ("pipeline", ()),
        ("pipeline", LAUNCH),
    ],
)
def test_learns(tmp_path, name, launch):
    """It runs in a process of its own, or in two, and its last loss is below guessing."""
    script = tmp_path / "script.py"
    source = f"found = runpy.run_path({str(ROOT / 'examples' / f'{name}.py')!r}, run_name='__main__')"
    script.write_text(f"import runpy\n{source}\nassert {LOSSES[name]} < {LEARNT}, {LOSSES[name]}\n")
    run(*launch, script, cwd=tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_lightning_learns(tmp_path, monkeypatch):
    """Its loss is seen by a callback, which the script does not have."""
    from lightning.pytorch import Trainer

    losses = []
    fit = Trainer.fit

    def watched(trainer, model):
        step = model.training_step
        model.training_step = lambda *batch: losses.append(step(*batch)) or losses[-1]
        return fit(trainer, model)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Trainer, "fit", watched)
    runpy.run_path(str(ROOT / "examples" / "lightning_loop.py"), run_name="__main__")
    assert len(losses) == 75
    assert losses[-1] < LEARNT
