"""The figures of the page of a comparison: inline SVG, each with a caption, and a text for those who cannot see it.

They are drawn small, so that their text, which stays text, can be read on a phone.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from html import escape
from io import StringIO
from typing import TYPE_CHECKING, Any

try:
    import matplotlib as mpl
    from matplotlib.figure import Figure
except ModuleNotFoundError:
    raise ModuleNotFoundError("the page needs matplotlib for its figures: pip install 'seqbatch[plot]'") from None

import numpy as np

from seqbatch.fitting import fit
from seqbatch.packing import Packing
from seqbatch.plots import plot_batches, plot_efficiency, plot_lengths, plot_measured, plot_prediction
from seqbatch.simulate import STRATEGIES, sized

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from seqbatch.compare import Comparison
    from seqbatch.plan import Plan
    from seqbatch.strategy import Strategy

__all__ = ["figure", "ground_figures", "talk_figures", "timelines"]

_LANES = 12
"""Lanes of the batches that are drawn: enough to see what a strategy does, few enough to see each piece."""


def talk_figures(comparison: "Comparison") -> str:
    """The two figures of Unno's 2015 talk: what is used, and what more lanes bring."""
    frame = comparison.frame
    device = comparison.calibration.device if comparison.calibration else None
    knee = ""
    if device is not None and 0 < device.knee < float("inf"):
        knee = (
            f" The knee, {device.knee:.0f} lanes, is where the cells of a step cost as much as the step itself: from "
        )
        knee += "there on only what holds tokens makes training faster."
    return _figures(
        figure(
            lambda ax: plot_efficiency(frame, lengths=comparison.lengths, ax=ax),
            "Real tokens per computed cell against batch size. " + _ends(frame, "padding_efficiency", "{:.2f}"),
            "Lanes are paid for whether they hold tokens or padding. The grey line is the exact expectation for "
            "batches padded at random.",
        ),
        figure(
            lambda ax: plot_measured(frame, device=device, ax=ax),
            "Real tokens per second against batch size. " + _ends(frame, "predicted", "{:.3g}"),
            f"Lines are predicted, points measured, with their range.{knee}",
        ),
    )


def _ends(frame: "pd.DataFrame", column: str, form: str) -> str:
    """What a figure shows, for those who cannot see it: each strategy's first and last value."""
    said = []
    for name, rows in frame.dropna(subset=["batch_size", column]).groupby("strategy", sort=False):
        rows = rows.sort_values("batch_size")
        points = [f"{form.format(row[column])} at {row['batch_size']:g}" for _, row in rows.iterrows()]
        said.append(f"{str(name).replace('_', ' ')}: {', '.join(points[:1] + points[1:][-1:])}")
    return "; ".join(said)


def timelines(comparison: "Comparison") -> str:
    """A few batches of each kind of strategy, as grids of pieces."""
    lengths = comparison.lengths
    # As many steps for all, so that their widths compare.
    steps = round(_LANES * float(lengths[lengths > 0].mean()))
    names = ("",) if lengths.ndim == 1 else (", sources", ", targets")
    seed = int(str(comparison.setting.get("seed", 0)))
    figures = []
    for name, strategy in _drawn(comparison):
        plan = strategy.plan(lengths, seed=seed)
        lanes = min(24, int(plan.lanes.max()))
        used = f"{name.replace('_', ' ')} uses {plan.padding_efficiency:.1%} of the cells of an epoch"
        figures += [
            figure(
                partial(_draw_batches, side, steps),
                f"Batches of {plan.strategy} as grids of pieces{which}: {used}.",
                f"{used[0].upper()}{used[1:]}; {len(plan):,} batches{which}.",
                height=0.55 + 0.075 * lanes,
            )
            for which, side in zip(names, plan.sides, strict=True)
        ]
    hint = (
        f'<p class="hint">Steps run rightwards, {steps:,} in each figure; lanes are rows. A piece of a sequence has a '
        "shade of its own; hatched cells are padding, computed for nothing. Below a batch: its steps × lanes. Drawn "
        f"with about {_LANES} lanes of mean length, in the order in which one rank trains.</p>\n"
    )
    return hint + _figures(*figures) if figures else '<p class="hint">None of the strategies is known by name.</p>'


def _draw_batches(plan: "Plan", steps: int, ax: "Axes") -> object:
    return plot_batches(plan, steps=steps, ax=ax)


def _drawn(comparison: "Comparison") -> Iterator[tuple[str, "Strategy"]]:
    """One strategy of each kind, at a size at which pieces can be seen: the recommended one, or the first named."""
    lengths, frame = comparison.lengths, comparison.frame
    chosen = comparison.recommendation.strategy if comparison.recommendation else None
    names = [name for name in frame["strategy"].unique() if name in STRATEGIES]
    kinds: dict[type, tuple[str, Strategy]] = {}
    for name, _, strategy in sized(lengths, names, [_LANES], int(str(comparison.setting.get("chunk_size", 35)))):
        if isinstance(strategy, Packing):
            strategy = replace(strategy, rows=_LANES)  # one row of many tokens would show little
        if type(strategy) not in kinds or name == chosen:
            kinds[type(strategy)] = (name, strategy)
    yield from kinds.values()


def ground_figures(comparison: "Comparison") -> str:
    """What the numbers rest on: the lengths, and predictions against measurements."""
    names = ("",) if comparison.lengths.ndim == 1 else ("Sources. ", "Targets. ")
    lengths = [
        figure(
            partial(_draw_lengths, array),
            f"{which}Histogram of {len(array):,} lengths, mean {array.mean():.4g}, longest {array.max():,}.",
            which + _fit_caption(array),
            columns=1,
        )
        for which, array in zip(names, [side[side > 0] for side in np.atleast_2d(comparison.lengths.T)], strict=True)
    ]
    if comparison.calibration is None:
        return _figures(*lengths)
    frame, points, device = comparison.frame, comparison.calibration.points, comparison.calibration.device
    held_out = ~points["fitted"].astype(bool)
    off = (points["predicted"] / points["seconds"] - 1).abs()
    errors = frame["error"].dropna().abs()
    said = f"{(errors <= 0.15).sum()} of {len(errors)} measured rows lie within 15 %. " if len(errors) else ""
    if held_out.any():
        median, most = off[held_out].median(), off[held_out].max()
        said += f"Grids held out of the fit are off by {median:.1%} (median), {most:.1%} at most. "
    large = ""
    if device.large_cell_ns:
        large = f", {device.large_cell_ns:.4g} ns more for each beyond {device.large_batch:,.0f} of a batch"
    prediction = figure(
        lambda ax: plot_prediction(frame, points, ax=ax),
        f"Predicted against measured tokens per second. {said}",
        f"{said}The model: {device.batch_us:.4g} µs a batch, {device.step_us:.4g} µs a step and "
        f"{device.cell_ns:.4g} ns a cell{large}, fitted to {(~held_out).sum()} full grids.",
    )
    return _figures(*lengths, prediction)


def _draw_lengths(lengths: Any, ax: "Axes") -> object:
    return plot_lengths(lengths, ax=ax)


def _fit_caption(lengths: Any) -> str:
    try:
        best = fit(lengths)[0]
    except ValueError as error:
        return f"No distribution fitted: {error}."
    return (
        f"The closest family is {best.distribution}; KS, the Kolmogorov-Smirnov distance, is the largest gap between "
        "two distribution functions."
    )


def _figures(*figures: str) -> str:
    return '<div class="figures">\n' + "".join(figures) + "</div>"


def figure(draw: "Callable[[Axes], object]", label: str, caption: str, *, height: float = 3.0, columns: int = 2) -> str:
    """Draw into an inline SVG with a legend below, small enough for its text to be read on a phone."""
    # The salt keeps the ids of figures apart, and the same in every run.
    style: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": label,
        "font.size": 8.5,
        "axes.titlesize": 9.5,
        "hatch.linewidth": 0.5,
    }
    with mpl.rc_context(style):
        drawing = Figure(figsize=(4.7, height), layout="constrained")
        axes = drawing.subplots()
        draw(axes)
        handles, labels = axes.get_legend_handles_labels()
        if handles:
            lines = -(-len(handles) // columns)
            drawing.set_figheight(height + 0.1 + 0.17 * lines)
            drawing.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize="small")
        drawn = StringIO()
        drawing.savefig(drawn, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = _bare(drawn.getvalue(), label)
    return f"<figure>\n{svg}\n<figcaption>{escape(caption)}</figcaption>\n</figure>\n"


def _bare(svg: str, label: str) -> str:
    """Strip what a stand-alone file needs and a page does not, and give it a text for those who cannot see it."""
    svg = svg[svg.index("<svg") :].replace("xlink:href", "href")
    svg = re.sub("<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', svg))
    svg = re.sub(r' id="([^"]*)"', lambda match: match[0] if match[1] in used else "", svg)
    box = re.search(r'viewBox="[^"]*"', svg)
    opening = f'<svg role="img" aria-label="{escape(label)}" {box[0] if box else ""}>'
    svg = re.sub(r"<svg[^>]*>", lambda _: opening, svg, count=1)
    return re.sub(r"\s*\n\s*", "\n", svg).strip()
