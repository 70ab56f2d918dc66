"""The encoder, and the forms in which a batch of utterances can reach it; run.py measures them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence
from torch.utils.data import Dataset

from seqbatch import Bucketing, Packing, Padding, SequenceBatch, make_loader
from seqbatch.placement import PieceIndices, Placement
from seqbatch.rnn import LSTM, SRU
from seqbatch.strategy import Strategy

__all__ = ["ROWS", "Batches", "Encoder", "Row", "Utterances", "deviations", "loss_of", "strategy"]

CELLS: dict[str, type[nn.Module]] = {"nn.LSTM": nn.LSTM, "LSTM": LSTM, "SRU": SRU}
BANK = 65_536  # frames of noise that all utterances are cut from: 84 MB of 320 features


@dataclass(frozen=True)
class Row:
    """One way to train: which utterances meet, how they reach the layers, and the layers."""

    plan: str
    form: str
    cell: str

    @property
    def name(self) -> str:
        """As tables and figures show it."""
        return f"{self.plan}, {self.form}: {self.cell}"

    @property
    def pads(self) -> bool:
        """Whether the layers run over padding: `cu_seqlens` of LSTM is padded inside."""
        return self.form != "PackedSequence" and (self.form, self.cell) != ("flat", "SRU")


ROWS = (
    Row("random", "no mask", "nn.LSTM"),
    Row("random", "PackedSequence", "nn.LSTM"),
    Row("sorted in pools", "PackedSequence", "nn.LSTM"),
    Row("random", "mask", "LSTM"),
    Row("random", "flat", "LSTM"),
    Row("8 optimal buckets", "mask", "LSTM"),
    Row("token budget", "mask", "LSTM"),
    Row("packed bins", "resets", "LSTM"),
    Row("random", "mask", "SRU"),
    Row("random", "flat", "SRU"),
    Row("8 optimal buckets", "mask", "SRU"),
    Row("token budget", "mask", "SRU"),
    Row("packed bins", "resets", "SRU"),
)


class Utterances(Dataset[dict[str, Tensor]]):
    """Random features and labels of given lengths, each utterance a slice of one array of noise.

    Args:
        lengths: (N,) frames of each.
        features: Values a frame.
        classes: Labels are below this.
        dtype: Of the features.
    """

    def __init__(
        self, lengths: NDArray[np.int64], features: int, classes: int, dtype: torch.dtype = torch.float32
    ) -> None:
        draw, frames = torch.Generator().manual_seed(0), BANK + int(lengths.max())
        self.lengths = lengths
        self.features = torch.randn(frames, features, generator=draw, dtype=dtype)
        self.labels = torch.randint(classes, (frames,), generator=draw)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        begin = index * 7919 % BANK
        frames = slice(begin, begin + int(self.lengths[index]))
        return {"features": self.features[frames], "labels": self.labels[frames]}


def strategy(name: str, lengths: NDArray[np.int64], utterances: int) -> Strategy:
    """A plan's settings, such that its mean batch holds the frames of `utterances` utterances of mean length."""
    frames = utterances * float(lengths.mean())
    if name == "random":
        return Padding(utterances)
    if name == "sorted in pools":
        return Bucketing(batch_size=utterances)
    if name == "packed bins":
        rows = max(int(frames // lengths.max()), 1)
        return Packing(max(int(np.ceil(frames / rows)), int(lengths.max())), rows=rows)
    settings: dict[str, Any] = {"num_buckets": 8} if name == "8 optimal buckets" else {}
    max_tokens = max(frames, float(lengths.max()))
    for _ in range(6):  # the budget counts padding, so it is larger than the frames wanted
        plan = Bucketing(max_tokens=round(max_tokens), **settings).plan(lengths)
        max_tokens = max(max_tokens * frames * len(plan) / plan.tokens, float(lengths.max()))
    return Bucketing(max_tokens=round(max_tokens), **settings)


@dataclass
class Stock:
    """What most programs make of a list of utterances: zero padding by ``pad_sequence``, and the lengths."""

    data: dict[str, Tensor]
    lengths: Tensor

    @staticmethod
    def of(items: Sequence[dict[str, Tensor]]) -> "Stock":
        features, labels = ([item[key] for item in items] for key in ("features", "labels"))
        data = {"features": pad_sequence(features), "labels": pad_sequence(labels, padding_value=-100)}
        return Stock(data, torch.tensor([len(row) for row in labels]))

    def to(self, device: str) -> "Stock":
        return Stock({key: value.to(device) for key, value in self.data.items()}, self.lengths)

    def unbatch(self, values: Tensor) -> list[Tensor]:
        return [values[:length, lane] for lane, length in enumerate(self.lengths.tolist())]


class Batches:
    """An epoch's batches of one row by number: nn.LSTM gets them as most programs make them, the rest from a loader."""

    def __init__(self, row: Row, data: Utterances, utterances: int) -> None:
        how = strategy(row.plan, data.lengths, utterances)
        self.data, self.stock = data, row.cell == "nn.LSTM"
        self.loader = make_loader(data, how, layout="flat" if row.form == "flat" else "time_major")
        self.indices: list[PieceIndices] = list(self.loader.batch_sampler)

    @property
    def placements(self) -> list[Placement]:
        """Where the frames of each batch lie."""
        return [indices.placement for indices in self.indices]

    def __getitem__(self, number: int) -> Stock | SequenceBatch:
        indices = self.indices[number]
        if self.stock:
            return Stock.of([self.data[index] for index in indices])
        batch: SequenceBatch = self.loader.collate_fn(self.loader.dataset.__getitems__(indices))  # type: ignore[attr-defined]
        return batch


class Encoder(nn.Module):
    """Bidirectional layers and a linear head on every frame.

    Args:
        cell: ``"nn.LSTM"``, ``"LSTM"`` or ``"SRU"``; the first two have the same parameters for the same seed.
        features: Values a frame.
        hidden: Units of a direction.
        classes: Outputs of the head.
        layers: How many.
        dtype: Of the parameters.
    """

    def __init__(
        self, cell: str, features: int, hidden: int, classes: int, layers: int = 2, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.rnn = CELLS[cell](features, hidden, num_layers=layers, bidirectional=True, dtype=dtype)
        self.head = nn.Linear(2 * hidden, classes, dtype=dtype)

    def encode(self, batch: Stock | SequenceBatch, form: str) -> Tensor:
        """Return the layers' output, (T, B, 2 * hidden), or (S, 2 * hidden) of a flat batch."""
        x = batch.data["features"]
        if form == "PackedSequence":
            packed = pack_padded_sequence(x, batch.lengths, enforce_sorted=False)
            return pad_packed_sequence(self.rnn(packed)[0], total_length=len(x))[0]
        flags = {"mask": ("mask",), "resets": ("reset", "mask"), "flat": ("cu_seqlens",), "no mask": ()}[form]
        output: Tensor = self.rnn(x, **{flag: getattr(batch, flag) for flag in flags})[0]
        return output


def loss_of(encoder: Encoder, batch: Stock | SequenceBatch, form: str) -> Tensor:
    """Mean cross entropy over the real frames: the labels of all others are -100, which is ignored."""
    scores = encoder.head(encoder.encode(batch, form))
    return nn.functional.cross_entropy(scores.flatten(0, -2), batch.data["labels"].flatten())


@torch.no_grad()
def deviations(
    encoder: Encoder, batch: Stock | SequenceBatch, form: str, sequences: Sequence[int], data: Utterances
) -> Iterator[Tensor]:
    """Yield |output in the batch - output alone| of each utterance, (length, 2 * hidden).

    Args:
        encoder: Of the dtype of the data.
        batch: From the same data.
        form: How the batch reaches the layers.
        sequences: The utterances of the batch, in its order.
        data: Where they come from.
    """
    together = batch.unbatch(encoder.encode(batch, form))
    for index, output in zip(sequences, together, strict=True):
        alone = encoder.rnn(data[index]["features"].to(output.device)[:, None])[0][:, 0]
        yield (output - alone).abs()
