"""Does the cost model predict what is measured, and is the recommendation the best? See README.md beside this file.

python -m experiments.prediction.run [--part prediction|lanes] [--device cpu|cuda] [--seconds 75] [--quick]
"""

from pathlib import Path

import click
import numpy as np
import pandas as pd

from experiments.texts import paragraphs
from seqbatch import load_corpus
from seqbatch.compare import Comparison, compare
from seqbatch.measure import environment
from seqbatch.ordering import IntArray
from seqbatch.workload import CELLS

HERE = Path(__file__).parent
LANES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
KEYS = ("corpus", "cell", "hidden", "device", "dtype")
SPEECH_FRAMES = 4  # 10 ms frames that speech encoders stack into one step


def corpora() -> dict[str, IntArray]:
    """Short, middling and long sequences."""
    return {
        "EWT sentences, words": load_corpus("ud_en_ewt"),
        "LibriSpeech utterances, 40 ms": -(-load_corpus("librispeech_devtest_clean") // SPEECH_FRAMES),
        "WikiText-2 paragraphs, characters": np.array([len(text) for text in paragraphs("valid")]),
    }


def tidy(found: Comparison, part: str, corpus: str) -> pd.DataFrame:
    """The rows of a comparison with what they were measured on."""
    setting = {name: found.setting[name] for name in ("cell", "hidden", "device", "dtype")}
    advice = found.recommendation
    chosen = [advice is not None and row == (advice.strategy, advice.batch_size) for row in _names(found.frame)]
    frame = found.frame.assign(recommended=chosen)
    return frame.assign(part=part, corpus=corpus, **setting, **environment(str(found.setting["device"])))


def _names(frame: pd.DataFrame) -> list[tuple[str, int]]:
    return list(zip(frame["strategy"], frame["batch_size"].astype(int), strict=True))


def points(found: Comparison, corpus: str) -> pd.DataFrame:
    """The grids that the model was fitted to and tested on."""
    setting = {name: found.setting[name] for name in ("cell", "hidden", "device", "dtype")}
    if found.calibration is None:
        return pd.DataFrame()
    device = found.calibration.device
    numbers = {"batch_us": device.batch_us, "step_us": device.step_us, "cell_ns": device.cell_ns,
               "large_batch": device.large_batch, "large_cell_ns": device.large_cell_ns}  # fmt: skip
    return found.calibration.points.assign(corpus=corpus, **setting, **numbers)


@click.command()
@click.option("--part", type=click.Choice(["prediction", "lanes"]), help="Only this one; both otherwise.")
@click.option("--cell", "cells", type=click.Choice(CELLS), multiple=True, default=CELLS, help="Only this one.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--dtype", default="float32", show_default=True)
@click.option("--seconds", type=float, default=75, show_default=True, help="Of each comparison.")
@click.option("--quick", is_flag=True, help="Only the sentences and SRU, in 20 seconds each; nothing is written.")
def main(part: str | None, cells: tuple[str, ...], device: str, dtype: str, seconds: float, quick: bool) -> None:
    """Compare on real lengths, and write a row per strategy and batch size as each comparison ends."""
    seconds = 20 if quick else seconds
    if part != "lanes":
        for corpus, lengths in list(corpora().items())[: 1 if quick else None]:
            for cell in cells[: 1 if quick else None]:
                found = compare(
                    lengths,
                    cell=cell,
                    device=device,
                    dtype=dtype,
                    batch_sizes=(4, 16, 64),
                    seconds=seconds,
                    progress=True,
                )
                keep(found, "prediction", corpus, device, quick)
    if part != "prediction":
        corpus, lengths = next(iter(corpora().items()))
        for cell in [cell for cell in cells if cell != "nn.LSTM"][: 1 if quick else None]:
            found = compare(
                lengths, cell=cell, hidden=128, device=device, dtype=dtype, batch_sizes=LANES, seconds=1.5 * seconds,
                strategies=("padding", "token_budget", "splicing"), chunk_size=32, progress=True,
            )  # fmt: skip
            keep(found, "lanes", corpus, device, quick)


def keep(found: Comparison, part: str, corpus: str, device: str, quick: bool) -> None:
    """Print what a comparison found and add its rows to the files."""
    frame = tidy(found, part, corpus)
    error = frame["error"].abs()
    print(f"\n{corpus}, {found.setting['cell']}: error median {error.median():.1%}, worst {error.max():.1%}")
    print(
        frame[["strategy", "batch_size", "predicted", "measured", "error", "recommended"]].to_string(
            float_format="%.3g"
        )
    )
    if found.interrupted:
        raise SystemExit(130)  # what was finished before is written, this one not
    if not quick:
        for rows, name in ((frame, "results"), (points(found, corpus), "grids")):
            path = HERE / f"{name}-{device.split(':')[0]}.csv"
            before = pd.read_csv(path) if path.exists() else pd.DataFrame(columns=rows.columns)
            same = (before[list(KEYS)] == rows[list(KEYS)].iloc[0]).all(axis=1)  # of an earlier run
            pd.concat([before[~same], rows]).to_csv(path, index=False, float_format="%.6g")


if __name__ == "__main__":
    main()
