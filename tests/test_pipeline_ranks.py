"""Pipelines over several processes, connected by gloo: equality, checkpoints, and errors on all ranks."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "pipeline_ranks.py"
RESTART = SCRIPT.with_name("pipeline_restart.py")
SECONDS = 150
# Without it torch's restarted ranks may read the addresses of those that are gone from the store of the first attempt.
RESTARTS = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def start(
    world: int,
    *arguments: object,
    script: Path = SCRIPT,
    launcher: tuple[str, ...] = (),
    alone: bool = True,
    **more: str,
) -> subprocess.Popen[str]:
    """Start processes under torchrun, each with one thread."""
    paths = os.pathsep.join([str(SCRIPT.parents[1]), str(SCRIPT.parent)])
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={world}", *launcher]
    command += ["--standalone"] if alone else []
    return subprocess.Popen(
        [*command, str(script), *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"} | RESTARTS | more,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def free_port() -> int:
    """One that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Its exit status and output; no process is left behind."""
    try:
        output, _ = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        pytest.fail(f"still running after {SECONDS} s:\n{output}")
    return process.returncode, output


def run(world: int, suite: str, folder: Path) -> list[str]:
    """The cases of a suite that passed on all ranks."""
    status, output = finish(start(world, suite, folder))
    assert status == 0, output
    return re.findall(r"^passed (\w+)$", output, re.MULTILINE)


def test_two_ranks(tmp_path):
    """All cases; see pipeline_ranks.py."""
    assert len(run(2, "two", tmp_path)) == 21


@pytest.mark.slow
def test_four_ranks(tmp_path):
    """The same over four stages, and two pipelines of two stages beside each other."""
    assert len(run(4, "four", tmp_path)) == 19


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 3, 4])
def test_another_number_of_stages(tmp_path, world):
    """Two stages' checkpoint, with AdamW and carried states, goes on as if nothing had happened."""
    assert run(2, "write", tmp_path) == ["write_for_others"]
    assert run(world, "read", tmp_path) == ["read_of_others"]


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("how", ["killed", "failed"])
def test_a_rank_that_is_gone(tmp_path, how, world):
    """Killed, or failed by an error of the user's; without a launcher, which would stop the others."""
    port = str(free_port())
    paths = os.pathsep.join([str(SCRIPT.parents[1]), str(SCRIPT.parent)])
    every = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), how, str(tmp_path)],
            env=os.environ | every | {"RANK": str(rank), "WORLD_SIZE": str(world)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        for rank in range(world)
    ]
    found = [finish(process) for process in ranks]
    for rank, (status, output) in enumerate(found[:-1]):
        assert status == 0, output
        assert (tmp_path / f"raised{rank}").exists(), output
    assert found[-1][0] == (-signal.SIGKILL if how == "killed" else 1)


@pytest.mark.slow
def test_a_killed_rank_is_started_again(tmp_path):
    """By torchrun, from the newest checkpoint; the end is that of the uninterrupted run."""
    status, output = finish(start(2, tmp_path, script=RESTART, launcher=("--max-restarts=1",)))
    assert status == 0, output
    for rank in range(2):
        assert (tmp_path / f"started-{rank}.txt").read_text() == "2 0\n2 2\n", output
        assert (tmp_path / f"equal-{rank}").exists(), output


@pytest.mark.slow
def test_a_machine_that_is_gone(tmp_path):
    """One of two agents dies with its rank: the other goes on alone, with both stages."""
    port = free_port()
    launcher = (
        "--nnodes=1:2",
        "--max-restarts=3",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint=localhost:{port}",
        "--rdzv-id=shrink",
    )
    agents = [start(1, tmp_path, script=RESTART, launcher=launcher, alone=False, AGENT_DIES="no")]
    while True:  # the first one holds the store
        with contextlib.suppress(ConnectionError), socket.create_connection(("localhost", port)):
            break
    agents.append(start(1, tmp_path, script=RESTART, launcher=launcher, alone=False, AGENT_DIES="yes"))
    found = [finish(agent) for agent in agents]
    (status, output), (died, _) = found
    assert status == 0, output
    assert died == -signal.SIGKILL
    assert (tmp_path / "started-0.txt").read_text() == "2 0\n1 2\n", output
    assert (tmp_path / "equal-0").exists()
