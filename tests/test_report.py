"""The page of a comparison: what it says, that it needs no other file, and that text cannot become markup."""

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from seqbatch import Chunking, Packing, Padding
from seqbatch.files import check_writable
from seqbatch.plots import plot_batches, plot_lengths, plot_measured, plot_prediction
from seqbatch.report import comparison_section, write_page
from seqbatch.simulate import DeviceModel, simulate

LENGTHS = np.random.default_rng(0).integers(1, 30, 120)
NAMES = ("padding", "token_budget", "splicing", "packing")


def compared(lengths: np.ndarray = LENGTHS, sizes: tuple[int, ...] = (2, 8), **changes: object) -> SimpleNamespace:
    """What `seqbatch.compare` returns, with every second row measured, 10 % below its prediction."""
    device = DeviceModel(200, 20, 400)
    frame = simulate(lengths, strategies=NAMES, batch_sizes=sizes, device=device)
    frame["predicted"] = frame["tokens_per_s"]
    frame["measured"] = (0.9 * frame["predicted"]).where(frame.index % 2 == 0)
    frame["low"], frame["high"] = 0.95 * frame["measured"], 1.05 * frame["measured"]
    frame["error"] = frame["predicted"] / frame["measured"] - 1
    frame["memory_mib"], frame["loader_share"] = 12.5, 0.031
    frame["batches_measured"], frame["note"] = 20, ""
    points = pd.DataFrame({"steps": [8, 8, 32], "lanes": [1, 8, 8], "seconds": [0.4, 0.5, 0.9]})
    points = points.assign(predicted=points["seconds"] * 1.02, fitted=[True, True, False])
    advice = SimpleNamespace(
        strategy="splicing", batch_size=8, settings="Splicing(8, 35)", sentence="Use Splicing(8, 35).",
        code="strategy = seqbatch.Splicing(8, 35)",
    )  # fmt: skip
    parts = {
        "frame": frame, "lengths": lengths, "calibration": SimpleNamespace(device=device, points=points),
        "setting": {"cell": "LSTM", "chunk_size": 35, "seed": 0}, "environment": {"cpu": "a <processor>"},
        "recommendation": advice,
    }  # fmt: skip
    return SimpleNamespace(**(parts | changes))


def ids(page: str) -> list[str]:
    return re.findall(r'\sid="([^"]+)"', page)


def test_a_section_says_what_to_use_and_every_row() -> None:
    """The advice with its code comes before the table, which has all rows, one of them marked."""
    comparison = compared()
    section = comparison_section(comparison, "Lengths")

    assert section.index("Use Splicing(8, 35).") < section.index("strategy = seqbatch.Splicing(8, 35)")
    assert section.index("strategy = seqbatch") < section.index("<table>")
    for settings in comparison.frame["settings"]:
        assert f"<code>{settings}</code>" in section
    assert section.count("<strong>fastest measured</strong>") == 1
    assert "+11.1\u00a0%" in section
    assert section.count('role="img"') == 2 + 4 + 2
    assert "a &lt;processor&gt;" in section


def test_what_was_not_measured_is_a_dash() -> None:
    """No NaN reaches the page, whether some or all rows lack a measurement, or one lacks a batch size."""
    comparison = compared()
    comparison.frame.loc[0, "batch_size"] = np.nan
    assert "<td>-</td>" in comparison_section(comparison, "some")
    comparison.frame[["measured", "low", "high", "error", "memory_mib", "loader_share"]] = np.nan
    comparison.recommendation = None
    section = comparison_section(comparison, "none")

    assert "Nothing was measured" in section
    assert "No recommendation" in section
    assert "fastest measured" not in section
    assert "nan" not in section.lower()


def test_without_a_calibration_there_is_still_a_page() -> None:
    """Where the weights did not fit nothing was fitted either."""
    comparison = compared(calibration=None, recommendation=None)
    comparison.frame[["predicted", "measured", "low", "high", "error"]] = np.nan

    section = comparison_section(comparison, "none")
    assert "No recommendation" in section
    assert "<svg" in section


def test_text_is_escaped(tmp_path: Path) -> None:
    """Titles, introductions, notes, settings and environment cannot become markup."""
    evil = "<script>alert('\"')</script>"
    comparison = compared(setting={evil: evil, "seed": 0}, environment={"cpu": evil})
    comparison.frame["note"] = evil
    write_page(tmp_path / "page.html", evil, [comparison_section(comparison, evil)], intro=evil)

    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 5 + len(comparison.frame)


def test_a_page_stands_alone(tmp_path: Path) -> None:
    """No address outside itself, unique ids that all exist, the same bytes again, and a small file."""
    sections = [comparison_section(compared(), "same"), comparison_section(compared(), "same")]
    for name in ("one", "two"):
        write_page(tmp_path / "new" / name, "Page", sections)
    page = (tmp_path / "new" / "one").read_text(encoding="utf-8")

    assert not re.search(r"https?:|@import|\bsrc=|<link|<script", page)
    assert len(set(ids(page))) == len(ids(page)) > 2
    referred = re.findall(r'(?:href="|url\()#([^")]+)', page)
    assert set(referred) <= set(ids(page))
    assert (tmp_path / "new" / "two").read_text(encoding="utf-8") == page
    assert sections[0] == comparison_section(compared(), "same")
    assert len(page) < 1_500_000
    assert '<html lang="en">' in page
    assert 'name="viewport"' in page


@pytest.mark.parametrize("lengths", [np.full(20, 7), np.array([5, 0, 0, 5])], ids=["equal", "empty ones"])
def test_lengths_that_nothing_fits(lengths: np.ndarray) -> None:
    """Lengths of a single value are drawn without a fit, and the caption says why."""
    section = comparison_section(compared(lengths), "equal")

    assert "No distribution fitted: all" in section


def test_one_batch_size_and_long_tails_are_drawn() -> None:
    """Axes of a single size; one sequence a thousand times as long as the others."""
    assert "<svg" in comparison_section(compared(sizes=(4,)), "one size")
    axes = plot_lengths(np.append(LENGTHS, np.full(1, 30_000)))
    assert "up to 30,000" in axes.get_xlabel()
    assert axes.get_xlim()[1] < 100


def test_batches_are_drawn_as_they_are() -> None:
    """The area of all shades is the plan's tokens; a sequence keeps its shade over batches."""
    for strategy in (Padding(4), Chunking(4, 7, carry=True), Packing(60, rows=3)):
        plan = strategy.plan(LENGTHS[:30])
        axes = plot_batches(plan, range(len(plan)), steps=10_000)
        drawn = [patch for patch in axes.patches if not patch.get_hatch()]
        corners = np.concatenate([patch.get_path().vertices.reshape(-1, 5, 2) for patch in drawn])
        assert np.prod(corners[:, 2] - corners[:, 0], axis=1).sum() == plan.tokens
        hatched = [patch for patch in axes.patches if patch.get_hatch()]
        assert sum(patch.get_width() * patch.get_height() for patch in hatched) == plan.cells


def test_context_is_veiled_and_what_does_not_fit_is_cut() -> None:
    """As many veiled cells as the plan has context; no more lanes and steps than asked for."""
    plan = Chunking(4, 5, left_context=2, right_context=1).plan(LENGTHS[:10])
    axes = plot_batches(plan, range(len(plan)), steps=10_000)
    veils = [patch.get_path().vertices.reshape(-1, 5, 2) for patch in axes.patches if patch.get_alpha()]
    width = sum(float((v[:, 2, 0] - v[:, 0, 0]).sum()) for v in veils)
    assert width == plan.left_context.sum() + plan.right_context.sum()

    axes = plot_batches(Padding(50).plan(LENGTHS), lanes=6, steps=20)
    ends = [patch.get_extents().transformed(axes.transData.inverted()) for patch in axes.patches]
    assert max(end.xmax for end in ends) <= 20 + 1e-9
    assert max(end.ymax for end in ends) <= 6 + 1e-9


def test_figures_make_their_own_axes() -> None:
    """And draw what was measured, and nothing where nothing was."""
    comparison = compared()
    measured = int(comparison.frame["measured"].notna().sum())
    axes = plot_prediction(comparison.frame, comparison.calibration.points)
    strategies = [line for line in axes.lines if line.get_label() in {name.replace("_", " ") for name in NAMES}]
    assert sum(len(line.get_xdata()) for line in strategies) == measured
    assert plot_measured(comparison.frame, device=comparison.calibration.device).get_xscale() == "log"
    plot_prediction(comparison.frame.assign(measured=np.nan))


def test_check_writable_touches_nothing(tmp_path: Path) -> None:
    """It makes a missing folder, leaves no file, and keeps one that is there."""
    path = tmp_path / "a" / "b" / "page.html"
    check_writable(path)
    assert list(path.parent.iterdir()) == []
    path.write_text("kept")
    check_writable(path)
    assert path.read_text() == "kept"


@pytest.mark.parametrize("below", ["", "file/page.html", "file/deep/page.html", "x" * 300])
def test_check_writable_says_what_is_wrong(below: str, tmp_path: Path) -> None:
    """A folder, a path below a file, a name that is too long."""
    (tmp_path / "file").write_text("kept")
    with pytest.raises(OSError, match=r"cannot write .*choose another file"):
        check_writable(tmp_path / below)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
