"""Draw how pairs' lengths lie, and the buckets that optimal edges make of them.

python -m experiments.pairs.figure
"""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from seqbatch import load_corpus
from seqbatch.ordering import IntArray
from seqbatch.pair_edges import assign_pairs, find_pair_edges

HERE = Path(__file__).parent
BUCKETS = 48
SHOWN = {  # corpus: what its sides are, and the lengths that are drawn
    "tanaka_en_ja": ("English words", "Japanese words", 17, 17),
    "tatoeba_en_zh": ("English words", "Chinese characters", 18, 26),
}


def draw(ax: Axes, lengths: IntArray, source: str, target: str, width: int, height: int) -> None:
    """Counts in shades, and a line wherever neighbouring lengths are of different buckets."""
    counts = np.zeros((height, width))
    inside = (lengths[:, 0] < width) & (lengths[:, 1] < height)
    np.add.at(counts, (lengths[inside, 1], lengths[inside, 0]), 1)
    ax.imshow(np.ma.masked_equal(counts, 0), origin="lower", cmap="Blues", norm=LogNorm(), aspect="auto")
    edges = find_pair_edges(lengths, BUCKETS)
    grid = np.stack(np.meshgrid(np.arange(width), np.arange(height)), axis=-1).reshape(-1, 2)
    bucket = assign_pairs(grid, edges, edges.sum(axis=1)).reshape(height, width)
    style = {"color": "#d9541a", "linewidth": 0.9}
    for t, s in zip(*np.nonzero(bucket[:, 1:] != bucket[:, :-1]), strict=True):
        ax.plot([s + 0.5, s + 0.5], [t - 0.5, t + 0.5], **style)
    for t, s in zip(*np.nonzero(bucket[1:] != bucket[:-1]), strict=True):
        ax.plot([s - 0.5, s + 0.5], [t + 0.5, t + 0.5], **style)
    used = lengths.sum() / edges[assign_pairs(lengths, edges, edges.sum(axis=1))].sum()
    ax.set_title(
        f"{len(lengths):,} pairs, {BUCKETS} buckets: {used:.1%} of all cells are tokens", loc="left", fontsize=10
    )
    ax.set_xlim(0.5, width - 0.5)
    ax.set_ylim(0.5, height - 0.5)
    ax.set_xlabel(f"source, {source}")
    ax.set_ylabel(f"target, {target}")


def main() -> None:
    """Write figure.png."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    for ax, (name, shown) in zip(figure.subplots(1, 2), SHOWN.items(), strict=True):
        draw(ax, load_corpus(name), *shown)
    figure.savefig(HERE / "figure.png", dpi=110)
    print(f"wrote {HERE / 'figure.png'}")


if __name__ == "__main__":
    main()
