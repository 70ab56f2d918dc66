"""``seqbatch explain``: what it prints and writes, and how it refuses."""

import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from seqbatch.cli import main

MODULE = """
import torch
from torch import nn

LIMIT = 3

def decay(x, c):
    c = torch.sigmoid(x) * c + x
    return c, c

def branches(x, c):
    if x.sum() > 0:
        c = c + x
    return c, c

class Leaky(nn.Module):
    def __init__(self, size, leak=0.5):
        super().__init__()
        self.linear, self.leak = nn.Linear(size, size), leak
    def forward(self, x, c):
        c = self.leak * c + self.linear(x)
        return c, c

class Picky(nn.Module):
    def __init__(self, size):
        raise ValueError("size must be\\neven")

leaky = Leaky(4)
"""


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["explain", *arguments])


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module in the current folder, under a name that only this test has."""
    name = f"cells_of_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    (tmp_path / f"{name}_broken.py").write_text("import no_such_module_anywhere\n")
    (tmp_path / f"{name}_failing.py").write_text("raise RuntimeError('not\\ntoday')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [part for part in sys.path if part])
    return name


def test_a_cell_of_the_library() -> None:
    """The table on standard output, and nothing else."""
    result = run("seqbatch.rnn.cells:SRUv1", "--sizes", "8,8")

    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.startswith("SRUv1 runs in 2 passes: rows, scan.\n")
    assert "14 in a plain loop, 2 after" in result.stdout


def test_files_of_the_graph_and_of_the_drawing(tmp_path: Path) -> None:
    """Two cells: two graphs in one text, two drawings in one picture."""
    pytest.importorskip("matplotlib")
    dot, plot = tmp_path / "graph.dot", tmp_path / "new" / "graph.png"
    names = ["seqbatch.rnn.cells:LSTM", "seqbatch.rnn.cells:GRU"]
    result = run(*names, "--sizes", "3,2", "--dot", str(dot), "--plot", str(plot))

    assert result.exit_code == 0, result.output
    assert result.stdout.index("LSTM runs in") < result.stdout.index("GRU runs in")
    assert dot.read_text().count("digraph") == 2
    assert plot.read_bytes()[:4] == b"\x89PNG"
    assert result.stderr == f"wrote {dot}\nwrote {plot}\n"


@pytest.mark.parametrize(
    "arguments",
    [["decay", "--widths", "2,2"], ["leaky", "--widths", "4,4"], ["Leaky", "--sizes", "4", "--widths", "4,4"]],
)
def test_a_function_an_instance_and_a_class_of_ones_own(mine: str, arguments: list[str]) -> None:
    """From the current folder."""
    result = run(f"{mine}:{arguments[0]}", *arguments[1:])

    assert result.exit_code == 0, result.output
    assert "lowered to a scan, since it is affine and element-wise in c" in result.stdout


def test_the_current_folder_is_importable_from_the_command(mine: str) -> None:
    """The installed script does not put it on the path by itself."""
    code = "import sys; sys.path.remove(''); from seqbatch.cli import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, "explain", f"{mine}:decay", "--widths", "2,2"]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={"PYTHONPATH": str(root)})

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("decay runs in 1 pass")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["seqbatch.rnn.cells"], "expected MODULE:CELL, such as seqbatch.rnn.cells:SRUv1, got 'seqbatch.rnn.cells'"),
        (["no_such_module:Cell"], "no module 'no_such_module'"),
        (["seqbatch.no_such.cells:Cell"], "no module 'seqbatch.no_such'"),
        (["seqbatch.rnn.cells:Sru"], "'seqbatch.rnn.cells' has no 'Sru'; it has BNLSTM"),
        (["seqbatch.rnn.cells:SRUv1"], "(input_size: int, hidden_size: int)"),
        (["seqbatch.rnn.cells:SRUv1", "--sizes", "8"], "such as --sizes 8,16; got 8"),
        (["seqbatch.rnn.cells:SRUv1", "--sizes", "8,x"], "got '8,x'"),
        (["{mine}:decay"], "give the widths of x and of each state, such as --widths 8,16"),
        (["{mine}:decay", "--sizes", "8", "--widths", "8,8"], "is none: leave it out"),
        (["{mine}:LIMIT", "--widths", "8,8"], "is a int, not a cell"),
        (["{mine}:decay", "--widths", "2,2", "--plot", "graph.txt"], "FILE must end in .png, .svg or .pdf"),
        ([], "Missing argument"),
    ],
)
def test_what_is_not_understood_ends_with_2(mine: str, arguments: list[str], said: str) -> None:
    """And says what is, in one line after the usage."""
    result = run(*[part.format(mine=mine) for part in arguments])

    assert result.exit_code == 2, result.output
    assert said in result.stderr.splitlines()[-1]
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{mine}:branches", "--widths", "2,2"], "if x.sum() > 0"),
        (["{mine}:decay", "--widths", "2,2,2"], "the cell takes (x, c), and example has 3 tensors"),
        (["{mine}:leaky", "--widths", "5,4"], "fails on tensors of shapes (4, 5), (4, 4)"),
        (["{mine}:Picky", "--sizes", "3"], "cannot be made (ValueError: size must be even)"),
        (["{mine}_broken:decay"], "No module named 'no_such_module_anywhere'"),
        (["{mine}_failing:decay"], "failed: RuntimeError: not today"),
        (["{mine}:decay", "--widths", "2,2", "--dot", "{mine}.py/graph.dot"], "cannot write"),
    ],
)
def test_what_cannot_be_explained_ends_with_1(mine: str, arguments: list[str], said: str) -> None:
    """In one line, without a traceback."""
    result = run(*[part.format(mine=mine) for part in arguments])

    assert result.exit_code == 1, result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("Error: ") and said in line
    assert result.stdout == ""


def test_help_loads_nothing_heavy() -> None:
    """Neither torch nor numpy nor matplotlib."""
    code = (
        "import sys; from click.testing import CliRunner; from seqbatch.cli import main\n"
        "assert CliRunner().invoke(main, ['explain', '-h']).output.startswith('Usage:')\n"
        "print([name for name in ('torch', 'numpy', 'scipy', 'matplotlib') if name in sys.modules])"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout

    assert printed.strip() == "[]"
