"""``seqbatch simulate-pipeline``: what it prints and draws, and how it refuses; what a drawing holds."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from seqbatch.cli import main
from seqbatch.pipeline.schedules import schedule
from seqbatch.pipeline.timeline import simulate


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["simulate-pipeline", *arguments])


def test_one_line_of_numbers() -> None:
    """4 stages of 1 s and 2 s, 8 chunks: (8 + 3) * 3 s where one device takes 96."""
    result = run("--stages", "4", "--chunks", "8")

    assert (result.exit_code, result.stderr) == (0, "")
    names, values = (line.split() for line in result.stdout.splitlines())
    assert dict(zip(names, values, strict=True)) == {
        "schedule": "wavefront", "ranks": "4", "stages": "4", "chunks": "8", "makespan": "33.000", "bubble": "0.273",
        "formula": "0.273", "speedup": "2.909", "peak_chunks": "8",
    }  # fmt: skip


def test_json_of_unequal_stages_and_slow_messages() -> None:
    """As the simulator has it."""
    result = run("--stages", "3", "--chunks", "5", "--schedule", "1f1b", "--forward", "1,2,1", "--backward", "2,3,4",
                 "--latency", "0.5", "--transfer", "0.25", "--json")  # fmt: skip
    line = simulate(schedule("1f1b", stages=3, chunks=5), [1, 2, 1], [2, 3, 4], latency=0.5, transfer=0.25)

    (row,) = json.loads(result.stdout)["rows"]
    assert (row["schedule"], row["ranks"], row["peak_chunks"]) == ("1f1b", 3, 3)
    assert (row["makespan"], row["bubble"]) == pytest.approx((line.makespan, line.bubble))
    assert row["speedup"] == pytest.approx(5 * 13 / line.makespan)
    assert row["formula"] == pytest.approx(2 / 7)


def test_numbers_that_are_not_known_are_left_out() -> None:
    """No formula for fewer chunks than ranks when looped; no speed-up where nothing takes time."""
    looped = run("--stages", "8", "--chunks", "2", "--virtual", "2")
    assert looped.stdout.splitlines()[1].split() == ["wavefront", "4", "8", "2", "27.000", "0.556", "-", "1.778", "4"]

    (row,) = json.loads(run("--stages", "1", "--chunks", "1", "--forward", "0", "--backward", "0", "--json").stdout)[
        "rows"
    ]
    assert (row["makespan"], row["bubble"], row["speedup"]) == (0, 0, None)


@pytest.mark.parametrize("more", [[], ["--virtual", "2"], ["--forward", "0.001,0,0.002,0.001"]])
def test_a_drawing(tmp_path: Path, more: list[str]) -> None:
    """Into a new folder, said on standard error."""
    pytest.importorskip("matplotlib")
    plot = tmp_path / "new" / "pipeline.png"
    result = run("--stages", "4", "--chunks", "4", *more, "--plot", str(plot))

    assert result.exit_code == 0, result.output
    assert plot.read_bytes()[:4] == b"\x89PNG"
    assert result.stderr == f"wrote {plot}\n"


def test_boxes_and_numbers_of_a_drawing() -> None:
    """One box per action where it ran, its number if there is room; the axis counts forwards."""
    pytest.importorskip("matplotlib")
    from seqbatch.pipeline.gantt import draw

    line = simulate(schedule("wavefront", stages=4, chunks=3, virtual=2), 0.5, 1.0)
    ax = draw(line)
    boxes = {(round(box.get_x(), 6), round(box.get_y() + box.get_height() / 2), round(box.get_width(), 6))
             for box in ax.patches if box.get_zorder() == 1}  # fmt: skip

    assert boxes == {(row.start / 0.5, row.rank, 2.0 if row.backward else 1.0) for row in line.to_frame().itertuples()}
    assert sorted(text.get_text() for text in ax.texts) == sorted("012" * 8)
    assert ax.get_xlim() == (0, line.makespan / 0.5) and "in forwards" in ax.get_xlabel()
    assert [label.get_text() for label in ax.get_yticklabels()] == ["rank 0\nstages 0, 2", "rank 1\nstages 1, 3"]
    assert len({box.get_facecolor() for box in ax.patches if box.get_zorder() == 1}) == 4


def test_narrow_boxes_have_no_numbers_and_unequal_stages_an_axis_of_time() -> None:
    """The forwards of 64 chunks leave no room for one."""
    pytest.importorskip("matplotlib")
    from seqbatch.pipeline.gantt import draw

    assert not draw(simulate(schedule("wavefront", stages=2, chunks=64), 1, 2)).texts
    uneven = draw(simulate(schedule("gpipe", stages=2, chunks=2), [0.001, 0.002], 0.01))
    assert uneven.get_xlabel() == "time (ms)" and uneven.get_xlim() == (0, pytest.approx(35))
    assert draw(simulate(schedule("gpipe", stages=2, chunks=2), [1, 2], 1)).get_xlabel() == "time (s)"


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--chunks", "4"], 2, "Missing option '--stages'"),
        (["--stages", "4", "--chunks", "0"], 2, "0 is not in the range x>=1"),
        (["--stages", "4", "--chunks", "4", "--forward", "1,2"], 2, "one number, or 4, one for each stage; got 2: 1,2"),
        (
            ["--stages", "4", "--chunks", "4", "--backward", "-1"],
            2,
            "for --backward: seconds cannot be negative, got -1",
        ),
        (["--stages", "4", "--chunks", "4", "--forward", "1,x"], 2, "got '1,x'"),
        (["--stages", "4", "--chunks", "4", "--schedule", "dualpipe"], 2, "is not one of 'wavefront', 'gpipe', '1f1b'"),
        (["--stages", "4", "--chunks", "4", "--plot", "x.txt"], 2, "FILE must end in .png"),
        (["--stages", "4", "--chunks", "3", "--schedule", "1f1b"], 1, "1f1b needs at least as many chunks as stages"),
        (["--stages", "4", "--chunks", "4", "--virtual", "3"], 1, "must divide stages, got virtual=3 and stages=4"),
        (["--stages", "4", "--chunks", "4", "--virtual", "2", "--schedule", "gpipe"], 1, "only the wavefront"),
    ],
)
def test_what_cannot_be_simulated(arguments: list[str], code: int, said: str) -> None:
    """One line that says what is wrong, and nothing on standard output."""
    result = run(*arguments)

    assert (result.exit_code, result.stdout) == (code, "")
    assert said in result.stderr.splitlines()[-1]


def test_neither_help_nor_a_run_loads_torch() -> None:
    """Help loads nothing heavy at all."""
    code = (
        "import sys; from click.testing import CliRunner; from seqbatch.cli import main\n"
        "def loaded(*names): print([name for name in names if name in sys.modules])\n"
        "assert CliRunner().invoke(main, ['simulate-pipeline', '-h']).output.startswith('Usage:')\n"
        "loaded('torch', 'numpy', 'scipy', 'matplotlib', 'pandas')\n"
        "assert CliRunner().invoke(main, ['simulate-pipeline', '--stages', '2', '--chunks', '2']).exit_code == 0\n"
        "import seqbatch.pipeline.costs, seqbatch.pipeline.gantt\n"
        "loaded('torch', 'matplotlib')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout == "[]\n[]\n"
