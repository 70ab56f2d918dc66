"""The command line: what it prints, what it refuses, and how it ends."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from seqbatch.cli import main
from seqbatch.command_line import JSON_VERSION
from seqbatch.plan import Plan
from seqbatch.simulate import DEFAULT


def run(*arguments: str, input: str | bytes | None = None) -> Result:
    return CliRunner().invoke(main, list(arguments), input=input)


@pytest.fixture
def lengths(tmp_path: Path) -> str:
    path = tmp_path / "lengths.txt"
    path.write_text("".join(f"{1 + i * 7 % 40}\n" for i in range(300)))
    return str(path)


@pytest.mark.parametrize("command", [[], ["stats"], ["simulate"], ["compare"], ["plan"]])
def test_every_command_has_help(command: list[str]) -> None:
    """Both ways to ask for it."""
    for option in ("-h", "--help"):
        result = run(*command, option)
        assert result.exit_code == 0
        assert result.output.startswith("Usage:")


def test_help_loads_nothing_heavy() -> None:
    """Neither torch nor numpy nor pandas, so that it comes at once."""
    code = (
        "import sys; from click.testing import CliRunner; from seqbatch.cli import main\n"
        "import seqbatch; dir(seqbatch); CliRunner().invoke(main, ['simulate', '--help'])\n"
        "CliRunner().invoke(main, ['compare', '--help'])\n"
        "print([name for name in ('torch', 'numba', 'pandas', 'scipy', 'numpy') if name in sys.modules])"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout

    assert printed.strip() == "[]"


def test_json_has_a_version_and_rows(lengths: str) -> None:
    """One document on standard output, nothing else."""
    for command in (
        ["stats", lengths],
        ["simulate", lengths, "--batch-sizes", "2,8"],
        ["plan", lengths, "--strategy", "Padding(4)"],
    ):
        result = run(*command, "--json")
        assert result.exit_code == 0, result.stderr
        document = json.loads(result.stdout)
        assert document["version"] == JSON_VERSION
        assert document["rows"]


def test_csv_has_a_header_and_rows(lengths: str) -> None:
    """As many rows as JSON has."""
    result = run("simulate", lengths, "--batch-sizes", "2,8", "--csv")

    lines = result.stdout.splitlines()
    assert lines[0].startswith("strategy,batch_size,settings,padding_efficiency")
    assert 2 * len(DEFAULT) == len(lines) - 1
    named = run("simulate", lengths, "--batch-sizes", "8", "--strategies", "packing_optimal", "--csv")
    assert "packing_optimal,8," in named.stdout


def test_the_issue_table_of_padding(tmp_path: Path) -> None:
    """Gamma of shape 2 through the command, as printed."""
    result = run(
        "simulate", "--gamma", "2,10", "-n", "200000", "--batch-sizes", "2,32,256", "--strategies", "padding", "--json"
    )

    used = [row["padding_efficiency"] for row in json.loads(result.stdout)["rows"]]
    assert pytest.approx(used, abs=0.01) == [0.727, 0.334, 0.240]


def test_lengths_come_from_files_standard_input_and_corpora(lengths: str, tmp_path: Path) -> None:
    """The same lengths, the same output, gzipped or not."""
    content = Path(lengths).read_bytes()
    zipped = tmp_path / "lengths.txt.gz"
    zipped.write_bytes(gzip.compress(content))
    plain = run("stats", lengths, "--csv").stdout

    assert "count,300" in plain
    assert plain == run("stats", str(zipped), "--csv").stdout == run("stats", "-", "--csv", input=content).stdout
    assert "count,16622" in run("stats", "--corpus", "ud_en_ewt", "--csv").stdout
    assert "ud_en_ewt" in run("stats", "--list").stdout


def test_a_plan_is_written_and_shown(lengths: str, tmp_path: Path) -> None:
    """The file holds the plan that the same call in Python makes."""
    out = str(tmp_path / "plan.npz")
    written = run(
        "plan", lengths, "--strategy", "Bucketing(max_tokens=200, overlong='split')", "--out", out, "--epoch", "3"
    )
    shown = run("plan", "--show", out)

    assert (written.exit_code, shown.exit_code) == (0, 0)
    plan = Plan.load(out)
    assert plan.digest in written.stdout
    assert plan.digest in shown.stdout
    assert (plan.strategy, plan.epoch) == ("Bucketing(max_tokens=200, overlong='split')", 3)


def test_plots_are_written(lengths: str, tmp_path: Path) -> None:
    """Into a folder that is made, with every strategy that was asked for."""
    out = tmp_path / "new" / "plot.svg"
    result = run("simulate", lengths, "--batch-sizes", "2,8", "--plot", str(out))

    assert result.exit_code == 0, result.output
    assert f"wrote {out}" in result.stderr
    assert out.stat().st_size > 10_000


QUICK = ("--hidden", "4", "--batch-sizes", "4,8", "--strategies", "padding,splicing", "--seconds", "1")


def test_compare_prints_rows_and_a_recommendation(lengths: str) -> None:
    """As a table, as JSON with what the numbers rest on, and as CSV."""
    table = run("compare", lengths, *QUICK)
    document = json.loads(run("compare", lengths, *QUICK, "--json").stdout)
    csv = run("compare", lengths, *QUICK, "--csv").stdout.splitlines()

    assert table.exit_code == 0, table.output
    assert "Train with " in table.stdout
    assert "make_loader" in table.stdout
    assert [row["strategy"] for row in document["rows"]] == ["padding", "padding", "splicing", "splicing"]
    assert all(row["measured"] > 0 for row in document["rows"])
    assert document["recommendation"]["batch_size"] in (4, 8)
    assert len(document["calibration"]["points"]) >= 3
    assert "torch" in document["environment"]["versions"]
    assert (len(csv), csv[0][:28]) == (5, "strategy,batch_size,settings")


def test_compare_writes_a_figure_and_a_page(lengths: str, tmp_path: Path) -> None:
    """Into folders that are made."""
    plot, page = tmp_path / "a" / "figure.svg", tmp_path / "b" / "page.html"
    result = run("compare", lengths, *QUICK, "--plot", str(plot), "--html", str(page))

    assert result.exit_code == 0, result.output
    assert plot.stat().st_size > 10_000
    assert "Train with" in page.read_text()


@pytest.mark.parametrize("option", ["--html", "--plot"])
def test_compare_without_matplotlib_says_so_before_the_work(
    option: str, lengths: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what to install."""
    monkeypatch.setattr("seqbatch.command_line.find_spec", lambda name: None)
    monkeypatch.setattr("seqbatch.compare._Trial.run", None)
    result = run("compare", lengths, option, str(tmp_path / "a.svg"))

    assert result.exit_code == 1
    assert "pip install 'seqbatch[plot]'" in result.stderr


def test_compare_prints_its_rows_whatever_becomes_of_the_page(
    lengths: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five minutes of measuring are not lost to a full disk."""

    def full(*arguments: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("seqbatch.report.write_page", full)
    result = run("compare", lengths, *QUICK, "--html", str(tmp_path / "page.html"))

    assert result.exit_code == 1
    assert "Train with" in result.stdout
    assert "no space left" in result.stderr


def test_compare_that_is_interrupted_prints_what_it_has(lengths: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And ends with 130, as a shell expects of Ctrl-C."""
    from seqbatch.compare import _Trial

    def interrupted(self: _Trial, row: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(_Trial, "_measure", interrupted)
    result = run("compare", lengths, *QUICK, "--csv")

    assert result.exit_code == 130
    assert len(result.stdout.splitlines()) == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--html", "BELOW/page.html"], "cannot write"),
        (["--plot", "BELOW/figure.png"], "cannot write"),
        (["--device", "cuda:99"], "is not there: torch"),
        (["--device", "abacus"], "device must be cpu, cuda or cuda:N, got 'abacus'"),
    ],
)
def test_what_compare_cannot_do_is_told_before_the_work(
    options: list[str], message: str, lengths: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not after minutes of measuring."""
    monkeypatch.setattr("seqbatch.compare._Trial.run", None)
    result = run("compare", lengths, *[option.replace("BELOW", lengths) for option in options])

    assert result.exit_code == 1, result.output
    assert message in result.stderr


USAGE = {
    "give either a file of LENGTHS or --corpus": [["stats"], ["stats", "FILE", "--corpus", "ud_en_ewt"]],
    "does not exist": [["stats", "nothing.txt"], ["plan", "--show", "nothing.npz"]],
    "is a directory": [["stats", "."]],
    "is none of": [
        ["stats", "--corpus", "ud"],
        ["simulate", "FILE", "--strategies", "padding,none"],
        ["compare", "FILE", "--strategies", "padding,none"],
    ],
    "expected 2 numbers": [["simulate", "--gamma", "2"], ["simulate", "--lognormal", "a,b"]],
    "expected whole numbers": [["simulate", "FILE", "--batch-sizes", "1,x"], ["simulate", "FILE", "--batch-sizes", ""]],
    "expected numbers from 1 up": [["simulate", "FILE", "--batch-sizes", "0,2"]],
    "expected finite numbers": [["simulate", "FILE", "--cost", "nan,0"]],
    "must end in .png, .svg or .pdf": [[c, "FILE", "--plot", "plot.exe"] for c in ("simulate", "compare")],
    "'gru' is not one of": [["compare", "FILE", "--cell", "gru"]],
    "give either a file": [["compare"]],
    "give one of LENGTHS": [
        ["simulate", "FILE", "--gamma", "2,10"],
        ["simulate", "--gamma", "2,10", "--lognormal", "1,1"],
    ],
    "say how to batch": [["plan", "FILE"]],
    "--show describes": [["plan", "--show", "FILE", "--corpus", "ud_en_ewt"]],
    "max_tokens must be at least 1, got 0": [["plan", "FILE", "--strategy", "Bucketing(max_tokens=0)"]],
    "give either max_tokens or batch_size": [["plan", "FILE", "--strategy", "Bucketing(max_tokens=8, batch_size=8)"]],
    "expected a call of one of Padding": [
        ["plan", "FILE", "--strategy", s] for s in ("Pading(3)", "3", "Padding", "os.system('a')")
    ],
    "--strategy": [
        ["plan", "FILE", "--strategy", s] for s in ("Padding(", "Padding(open('x'))", "Padding(**{})", "Padding(a=1)")
    ],
    "No such option": [["stats", "FILE", "--nothing"]],
}


@pytest.mark.parametrize(("message", "command"), [(m, c) for m, many in USAGE.items() for c in many], ids=str)
def test_what_is_not_understood_ends_with_2(message: str, command: list[str], lengths: str) -> None:
    """And a message on standard error, no traceback."""
    result = run(*[lengths if part == "FILE" else part for part in command])

    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert not result.stdout


FAILURES = {
    "line 2: '3.5' is not a non-negative integer": b"3\n3.5\n4\n",
    "line 3: 'x' is not a non-negative integer": b"3\n4\nx\n",
    "'-4' is not a non-negative integer": b"-4\n",
    "is empty": b"",
    "looks binary": bytes(range(256)),
    "corrupt or truncated": gzip.compress(b"3\n4\n" * 100)[:-12],
}


@pytest.mark.parametrize("message", FAILURES)
def test_what_cannot_be_read_ends_with_1(message: str, tmp_path: Path) -> None:
    """Naming the file, and the line where there is one."""
    path = tmp_path / "lengths.txt"
    path.write_bytes(FAILURES[message])
    result = run("stats", str(path))

    assert result.exit_code == 1, result.output
    assert message in result.stderr
    assert str(path) in result.stderr


def test_lengths_that_cannot_be_planned_end_with_1(lengths: str, tmp_path: Path) -> None:
    """A sequence over the budget, nothing but empty ones, a broken plan."""
    assert "allows at most 10" in run("plan", lengths, "--strategy", "Bucketing(max_tokens=10)").stderr
    assert run("plan", lengths, "--strategy", "Bucketing(max_tokens=10)").exit_code == 1
    assert "every sequence is empty" in run("simulate", "-", input="0\n0\n").stderr
    broken = tmp_path / "plan.npz"
    broken.write_bytes(b"PK\x03\x04 nothing")
    result = run("plan", "--show", str(broken))
    assert result.exit_code == 1
    assert "not a plan file" in result.stderr


def test_equal_lengths_are_described_without_a_fit() -> None:
    """Nothing to fit is a note, not a failure."""
    result = run("stats", "-", input="7\n7\n7\n")

    assert result.exit_code == 0
    assert "no distribution fitted: all" in result.stderr


def test_a_closed_pipe_is_no_traceback(lengths: str) -> None:
    """`seqbatch ... | head -1` ends quietly."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "seqbatch", "plan", lengths, "--strategy", "Padding(1)"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)

    assert "Traceback" not in done.stderr
    assert "Error" not in done.stderr


def test_the_version_is_the_packages() -> None:
    """One home for it."""
    import seqbatch

    assert seqbatch.__version__ in run("--version").output
