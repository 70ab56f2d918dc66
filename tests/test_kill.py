"""Processes that are killed with SIGKILL and go on from their last checkpoint lose nothing and repeat nothing."""

import json
import multiprocessing as mp
import os
import random
import signal
import sys
from collections import Counter
from pathlib import Path

import pytest
from killed import EPOCHS, EVERY, train
from loaders import expected, load

KILLS = 10
PLACES = ("before", "after", "saved")

pytestmark = pytest.mark.slow


def run_once(folder: Path, name: str, num_replicas: int, run: int, kill: tuple[int, int, str] | None) -> list[int]:
    """Run all ranks; once one is killed the others get the same. Return the exit codes."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["killed"])
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))  # the server of Python 3.11 has no other path
    ranks = [
        context.Process(target=train, args=(str(folder), name, rank, num_replicas, run, kill), daemon=True)
        for rank in range(num_replicas)
    ]
    for process in ranks:
        process.start()
    victim = ranks[kill[1]] if kill is not None else ranks[0]
    victim.join(120)
    for process in ranks:
        if victim.exitcode != 0:
            process.kill()
        process.join(120)
    return [process.exitcode for process in ranks]


def draw(chance: random.Random, num_replicas: int) -> tuple[int, int, str]:
    """A step, a rank and a place in the step: before training on the batch, after it, after the checkpoint."""
    place = chance.choice(PLACES)
    return EVERY if place == "saved" else chance.randint(2, 5), chance.randrange(num_replicas), place


def history(folder: Path, runs: int) -> dict[int, Counter[int]]:
    """What was trained on in each epoch: every run up to the checkpoint that the next one started from."""
    lines = {path.name: [json.loads(line) for line in path.read_text().splitlines()] for path in folder.glob("seen*")}
    counts = {epoch: Counter() for epoch in range(EPOCHS)}
    label: list[int] | None = None
    for run in reversed(range(runs)):
        starts: list[list[int]] = []
        if label is None or label[0] == run:
            for name in (name for name in lines if name.startswith(f"seen{run}.")):
                for line in lines[name]:
                    if "from" in line:
                        starts.append(line["from"])
                    elif label is None or line["step"] <= label[1]:
                        counts[line["epoch"]].update(line["tokens"])
            label = starts[0] if starts else [-1, 0]
    return counts


@pytest.mark.parametrize("name", ["token budget", "splicing"])
def test_killed_ten_times_with_changing_ranks(tmp_path: Path, name: str) -> None:
    """Alternating 1 and 2 ranks, killed at random steps and places: the tokens of each epoch are exact."""
    chance = random.Random(name)
    for run in range(KILLS):
        num_replicas = 1 + run % 2
        kill = draw(chance, num_replicas)
        codes = run_once(tmp_path, name, num_replicas, run, kill)
        assert codes[kill[1]] == -signal.SIGKILL
    assert run_once(tmp_path, name, 1, KILLS, None) == [0]

    plan = load(name, seed=1).plan
    for epoch, count in history(tmp_path, KILLS + 1).items():
        assert count == expected(plan), epoch


@pytest.mark.parametrize(("name", "num_replicas"), [("token budget", 1), ("splicing", 2)])
def test_killed_runs_end_like_the_uninterrupted_one(tmp_path: Path, name: str, num_replicas: int) -> None:
    """At equal ranks every loss of the run is that of the run that nobody killed, to the bit."""
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    assert not any(run_once(tmp_path / "whole", name, num_replicas, 0, None))
    chance = random.Random(name)
    for run in range(4):
        kill = draw(chance, num_replicas)
        run_once(tmp_path / "killed", name, num_replicas, run, kill)
    assert not any(run_once(tmp_path / "killed", name, num_replicas, 4, None))

    losses = [json.loads((tmp_path / kind / "done.json").read_text()) for kind in ("whole", "killed")]
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][0]
