"""What `make demo` shows: two corpora compared, a language model trained both ways, and one page of it all.

python -m experiments.demo [--out report] [--seconds 75] [--training 60]
"""

from functools import partial
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
from tqdm import tqdm

from experiments.lm_strategies.model import wikitext
from experiments.lm_strategies.train import Point, train
from seqbatch import load_corpus
from seqbatch.advice import Recommendation
from seqbatch.compare import compare
from seqbatch.files import check_writable
from seqbatch.ordering import IntArray
from seqbatch.padding import Padding
from seqbatch.report import comparison_section, write_page
from seqbatch.report_figures import figure
from seqbatch.simulate import sized
from seqbatch.strategy import Strategy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HIDDEN, CELL, CHUNK_SIZE = 256, "sru", 64
INTRO = (
    "Sequences differ in length, so a batch that is padded to its longest computes much that nobody needs. This page "
    "shows, for two corpora and this machine, what each way to batch uses and how fast it trains, and then trains a "
    "small language model with what is recommended and with zero padding, for the same time."
)


@click.command()
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default="report", show_default=True)
@click.option("--seconds", type=float, default=75, show_default=True, help="Of each comparison.")
@click.option("--training", type=float, default=60, show_default=True, help="Seconds of both trainings together.")
def main(out: Path, seconds: float, training: float) -> None:
    """Compare, train, and write `out`/index.html; Ctrl-C in a comparison goes on with the rows that were measured."""
    page = out / "index.html"
    check_writable(page)
    corpus = wikitext()
    sections, chosen = [], None
    for title, lengths in {
        "English sentences in words": load_corpus("ud_en_ewt"),
        "Wikipedia paragraphs in characters": corpus.training.lengths,
    }.items():
        print(f"\n{title}: comparing for about {seconds:.0f} seconds", flush=True)
        found = compare(
            lengths, cell=CELL, hidden=HIDDEN, chunk_size=CHUNK_SIZE, batch_sizes=(8, 32, 128), seconds=seconds,
            progress=True,
        )  # fmt: skip
        sections.append(comparison_section(found, title))
        chosen = found.recommendation
        print(chosen.sentence if chosen else "no row could be measured", flush=True)
        write_page(page, "seqbatch on this machine", sections, INTRO)
    if chosen is not None:
        best = as_strategy(chosen, corpus.training.lengths)
        # Zero padding with about as many real tokens an update, so that both make about as many updates a token.
        plan = best.plan(corpus.training.lengths)
        padded = Padding(max(1, round(plan.tokens / len(plan) / float(np.mean(corpus.training.lengths)))))
        curves = {repr(way): run(way, training / 2) for way in (padded, best)}
        sections.append(training_section(curves))
        write_page(page, "seqbatch on this machine", sections, INTRO)
    print(f"\nThe page is {page}")


def as_strategy(advice: Recommendation, lengths: IntArray) -> Strategy:
    """The strategy that was recommended."""
    return next(strategy for _, _, strategy in sized(lengths, [advice.strategy], [advice.batch_size or 1], CHUNK_SIZE))


def run(strategy: Strategy, seconds: float) -> list[Point]:
    """Train the language model for some seconds, with a bar."""
    with tqdm(total=10, desc=f"training with {strategy!r}", unit="point", disable=None, leave=False) as bar:
        curve = train(strategy, CELL, seconds=seconds, hidden=HIDDEN, on_point=lambda _: bar.update())
    last = curve[-1]
    print(f"{strategy!r}: {last['tokens']:,.0f} characters in {last['seconds']:.0f} s, {last['loss']:.3f} nats each")
    return curve


def training_section(curves: dict[str, list[Point]]) -> str:
    """The curves of both trainings and their last points."""
    rows = [
        {
            "strategy": name,
            "real tokens/s": f"{curve[-1]['tokens'] / curve[-1]['seconds']:,.0f}",
            "real tokens": f"{curve[-1]['tokens']:,.0f}",
            "updates": f"{curve[-1]['updates']:,.0f}",
            "loss, nats per character": f"{curve[-1]['loss']:.3f}",
        }
        for name, curve in curves.items()
    ]
    losses = "; ".join(f"{row['strategy']}: {row['loss, nats per character']}" for row in rows)
    drawn = figure(
        partial(draw, curves),
        f"Held-out loss against seconds of training. At the end {losses}.",
        "Held-out loss of the same model, trained for the same time. One run of each: loss differs by a few hundredths "
        "between seeds.",
    )
    head = "".join(f"<th scope=col{' class=text' * (name == 'strategy')}>{name}</th>" for name in rows[0])
    body = "".join(
        f"<tr><th scope=row class=text><code>{escape(name)}</code></th>{''.join(f'<td>{v}</td>' for v in values)}</tr>"
        for name, *values in (row.values() for row in rows)
    )
    return (
        "<h2>The same time, the same model</h2>\n"
        f"<p>A character-level language model (SRU, {HIDDEN} units) on WikiText-2's paragraphs, updates of about as "
        "many real tokens each, Adam with the same learning rate.</p>\n"
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>\n{drawn}'
    )


def draw(curves: dict[str, list[Point]], ax: "Axes") -> Any:
    """Loss against seconds, a line a strategy."""
    for (name, curve), marker, line in zip(curves.items(), "os", ("-", "--"), strict=False):
        points = [point for point in curve if point["tokens"]]
        ax.plot([p["seconds"] for p in points], [p["loss"] for p in points], marker=marker, linestyle=line,
                color="#1b1b1b" if marker == "o" else "#c44e00", markerfacecolor="white", label=name)  # fmt: skip
    ax.set(xlabel="seconds of training", ylabel="held-out loss, nats per character")
    ax.grid(axis="y", color="0.9")
    ax.spines[["top", "right"]].set_visible(False)
    return ax


if __name__ == "__main__":
    main()
