"""Draw docs/batches.png: what five strategies make of the same sentences.

python docs/batches.py
"""

from pathlib import Path

from matplotlib.figure import Figure

from seqbatch import Bucketing, Chunking, Packing, Padding, Splicing, load_corpus
from seqbatch.plots import plot_batches

STRATEGIES = (Padding(12), Bucketing(max_tokens=184), Splicing(12, 35), Chunking(12, 20), Packing(159, rows=12))

figure = Figure(figsize=(9, 8.5), layout="constrained")
for ax, strategy in zip(figure.subplots(len(STRATEGIES)), STRATEGIES, strict=True):
    plot_batches(strategy.plan(load_corpus("ud_en_ewt")), ax=ax)
figure.savefig(Path(__file__).with_suffix(".png"), dpi=100)
