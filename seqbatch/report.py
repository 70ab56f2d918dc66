"""The page of a comparison: one HTML file that needs no other, for screens, phones and paper.

What a reader asks first comes first: what to use, then every row, then the figures, and last what the
numbers rest on. All text is escaped; figures are inline SVG with their text as text.
"""

import math
import re
from collections.abc import Sequence
from html import escape
from os import PathLike
from typing import TYPE_CHECKING, Any

from seqbatch.files import check_writable, replacing
from seqbatch.report_figures import ground_figures, talk_figures, timelines

if TYPE_CHECKING:
    import pandas as pd

    from seqbatch.compare import Comparison

__all__ = ["comparison_section", "write_page"]

_LONG_TABLE = 24
"""Rows from which on a table scrolls in a box of its own on screens."""

_COLUMNS = {
    "strategy": "strategy",
    "batch_size": "batch size",
    "padding_efficiency": "efficiency",
    "predicted": "predicted, tokens/s",
    "measured": "measured, tokens/s (range)",
    "error": "error",
    "memory_mib": "memory, MiB",
    "loader_share": "loader’s share",
    "note": "note",
    "settings": "settings",
}

_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1rem; background: #fff; color: #1b1b1b;
  font: 16px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: .5rem 0; }
h2 { font-size: 1.35rem; margin: 2.5rem 0 .75rem; padding-top: .5rem; border-top: 2px solid #1b1b1b; }
h3 { font-size: 1.05rem; margin: 1.75rem 0 .5rem; }
h1, h2, h3, p, li, figcaption, dd { overflow-wrap: anywhere; }
a { color: #00507f; }
code, pre { font: .875em/1.45 ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
pre { margin: .5rem 0; padding: .6rem .8rem; border: 1px solid #bbb; white-space: pre-wrap; overflow-wrap: anywhere; }
.advice { padding: .2rem 1rem .6rem; border: 1px solid #1b1b1b; border-left-width: .4rem; }
.advice p { font-size: 1.1rem; margin: .6rem 0; }
.hint, figcaption { color: #444; font-size: .9rem; }
.scroll { overflow-x: auto; border: 1px solid #bbb; }
.long { max-height: min(36rem, 80vh); overflow-y: auto; }
table { width: 100%; border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; text-align: right; vertical-align: top; white-space: nowrap; }
thead th { position: sticky; top: 0; background: #fff; vertical-align: bottom; box-shadow: inset 0 -2px #1b1b1b; }
tbody tr { border-top: 1px solid #e2e2e2; }
tbody:not(:first-of-type) tr:first-child { border-top: 1px solid #1b1b1b; }
tbody th { font-weight: normal; }
.text { text-align: left; }
td.note { white-space: normal; min-width: 14rem; }
td small { color: #444; }
.best > * { font-weight: bold; background: #f3f0da; }
.best small, .best code, .best .note { font-weight: normal; }
.figures { display: grid; gap: 1.5rem 2rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); }
figure { margin: 0; min-width: 0; }
figure svg { display: block; width: 100%; max-width: 40rem; height: auto; }
figcaption { margin-top: .25rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; margin: 0; font-size: .9rem; }
dt { color: #444; }
dd { margin: 0; }
@media print {
  @page { margin: 14mm; }
  body { max-width: none; padding: 0; font-size: 10.5pt; }
  section + section { break-before: page; }
  h2, h3 { break-after: avoid; }
  .scroll { overflow: visible; max-height: none; border: 0; }
  table { font-size: 7.5pt; }
  th, td { white-space: normal; padding: .1rem .3rem; }
  thead th { position: static; box-shadow: none; border-bottom: 1.5pt solid #000; }
  td.note { min-width: 0; }
  td small { white-space: nowrap; }
  .hint, figcaption { font-size: 8.5pt; }
  td code { overflow-wrap: anywhere; }
  tr, figure, .advice, dl, pre { break-inside: avoid; }
  .best > * { background: none; }
  .figures { grid-template-columns: 1fr 1fr; gap: 1rem; }
  nav { display: none; }
}
"""


def write_page(path: "str | PathLike[str]", title: str, sections: Sequence[str], intro: str = "") -> None:
    """Write one HTML file that refers to nothing outside itself.

    Args:
        path: Where to; a file that is there is replaced, and its folder is made if need be.
        title: Plain text.
        sections: What `comparison_section` returned.
        intro: Plain text below the title; a blank line begins a new paragraph.

    Raises:
        OSError: `path` cannot be written.
    """
    check_writable(path)
    paragraphs = "".join(f"<p>{escape(part)}</p>\n" for part in intro.split("\n\n") if part.strip())
    # Sections number their figures' ids alike, so each gets a prefix here, where their number is known.
    parts = [
        f'<section id="section-{i}">\n{_with_prefix(section, f"s{i}-")}\n</section>\n'
        for i, section in enumerate(sections, start=1)
    ]
    headings = [re.search("<h2>(.*?)</h2>", section, re.DOTALL) for section in sections]
    links = [f'<li><a href="#section-{i}">{h[1]}</a></li>' for i, h in enumerate(headings, start=1) if h]
    nav = f'<nav aria-label="Sections"><ul>{"".join(links)}</ul></nav>\n' if len(links) > 1 else ""
    page = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{escape(title)}</h1>\n{paragraphs}{nav}{''.join(parts)}</main>\n</body>\n</html>\n"
    )
    with replacing(path) as file:
        file.write(page.encode())


def comparison_section(comparison: "Comparison", title: str) -> str:
    """Return a comparison as a piece of HTML: advice, table, figures, and what the numbers rest on.

    Args:
        comparison: A `seqbatch.compare.Comparison`.
        title: Plain text, such as the name of the lengths.
    """
    parts = [
        f"<h2>{escape(title)}</h2>",
        _advice(comparison.recommendation),
        "<h3>Strategies and batch sizes</h3>",
        _table(comparison.frame, comparison.recommendation),
        talk_figures(comparison),
        "<h3>Batches of each strategy</h3>",
        timelines(comparison),
        "<h3>Lengths and predictions</h3>",
        ground_figures(comparison),
        "<h3>Settings</h3>",
        _facts(comparison.setting),
        "<h3>Environment</h3>",
        _facts(comparison.environment),
    ]
    return "\n".join(part for part in parts if part)


def _advice(found: Any) -> str:
    if found is None:
        return '<div class="advice"><p>No recommendation: no strategy has a measured or predicted throughput.</p></div>'
    return (
        f'<div class="advice">\n<p>{escape(found.sentence)}</p>\n<pre><code>{escape(found.code.strip())}</code></pre>'
        "\n</div>"
    )


def _table(frame: "pd.DataFrame", advice: Any) -> str:
    """One body for each strategy; the fastest measured row and the recommended one are marked in words too."""
    frame = frame.reset_index(drop=True)
    best = frame["measured"].idxmax() if frame["measured"].notna().any() else None
    text = ("strategy", "note", "settings")
    head = "".join(
        f"<th scope=col{' class=text' * (name in text)}>{escape(label)}</th>" for name, label in _COLUMNS.items()
    )
    bodies = []
    for _, rows in frame.groupby("strategy", sort=False):
        lines = [_row(row, _marks(row, index == best, advice)) for index, row in rows.iterrows()]
        bodies.append(f"<tbody>\n{''.join(lines)}</tbody>\n")
    long = " long" if len(frame) > _LONG_TABLE else ""
    label = f"{len(frame)} rows: strategies and batch sizes"
    box = f'<div class="scroll{long}" tabindex="0" role="region" aria-label="{label}">\n<table>\n'
    return f"{box}<thead><tr>{head}</tr></thead>\n{''.join(bodies)}</table>\n</div>\n{_table_hint(frame)}"


def _table_hint(frame: "pd.DataFrame") -> str:
    measured = frame.loc[frame["measured"].notna(), "batches_measured"]
    many = f"{measured.min():.0f}" + (f" to {measured.max():.0f}" if measured.min() < measured.max() else "")
    how = f"Measured: median and range over {many} batches." if len(measured) else "Nothing was measured."
    return (
        f'<p class="hint">Tokens are real ones. Efficiency: real tokens / computed cells. {how} Error: predicted / '
        "measured - 1. Memory: growth at its peak. Loader’s share: of the time of a training step.</p>"
    )


def _marks(row: "pd.Series[Any]", fastest: bool, advice: Any) -> list[str]:
    """What is said of a row: that it is the one to use, or the fastest."""
    chosen = advice is not None and (row["strategy"], row["settings"]) == (advice.strategy, advice.settings)
    return ["recommended"] * chosen + ["fastest measured"] * fastest


def _row(row: "pd.Series[Any]", marks: list[str]) -> str:
    size, low, high = row["batch_size"], row["low"], row["high"]
    spread = f" <small>({_round(low)} to {_round(high)})</small>" if _known(low) and _known(high) else ""
    name = escape(str(row["strategy"]).replace("_", " "))
    said = "".join(f"<strong>{mark}</strong> " for mark in marks)
    cells = [
        f"<td>{f'{size:g}' if _known(size) else '-'}</td>",
        f"<td>{_percent(row['padding_efficiency'], 1)}</td>",
        f"<td>{_round(row['predicted'])}</td>",
        f"<td>{_round(row['measured'])}{spread if _known(row['measured']) else ''}</td>",
        f"<td>{_percent(row['error'], 1, sign='+')}</td>",
        f"<td>{_round(row['memory_mib'])}</td>",
        f"<td>{_percent(row['loader_share'], 1)}</td>",
        f'<td class="text note">{said}{escape(str(row["note"] or ""))}</td>',
        f'<td class="text"><code>{escape(str(row["settings"]))}</code></td>',
    ]
    return f'<tr{" class=best" * bool(marks)}><th scope="row" class="text">{name}</th>{"".join(cells)}</tr>\n'


def _known(value: Any) -> bool:
    return value is not None and value == value and math.isfinite(value)


def _round(value: Any) -> str:
    """Three digits, since no timing has more."""
    if not _known(value):
        return "-"
    return f"{float(f'{value:.3g}'):,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _percent(value: Any, digits: int, sign: str = "") -> str:
    return f"{100 * value:{sign}.{digits}f}\u00a0%" if _known(value) else "-"


def _facts(values: Any) -> str:
    pairs = "".join(
        f"<dt>{escape(str(name).replace('_', ' '))}</dt><dd>{_fact(str(name), value)}</dd>\n"
        for name, value in values.items()
    )
    return f"<dl>\n{pairs}</dl>"


def _fact(name: str, value: object) -> str:
    text = escape("-" if value is None else str(value))
    return f"<code>{text}</code>" if name == "command" else text


def _with_prefix(html: str, prefix: str) -> str:
    """Put `prefix` before all ids of figures and what refers to them."""
    return re.sub(r'( id="| href="#|="url\(#|: url\(#)', lambda match: match[0] + prefix, html)
