"""Text of 27 symbols, and the sequences that it is cut into."""

import gzip
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

__all__ = ["ALPHABET", "Text", "crops", "windows"]

DATA = Path(__file__).parents[1] / "data"
ALPHABET = " abcdefghijklmnopqrstuvwxyz"
_UNKNOWN = 255
_NUMBERS = np.full(256, _UNKNOWN, np.uint8)
_NUMBERS[np.frombuffer(ALPHABET.encode(), np.uint8)] = np.arange(len(ALPHABET))


@dataclass(frozen=True)
class Text:
    """Three parts of a text as numbers of symbols, (N,) uint8 each."""

    train: Tensor
    valid: Tensor
    test: Tensor

    @classmethod
    def wikipedia(cls) -> "Text":
        """The sample in experiments/data; the last twentieth of its training file is the validation part."""
        text = symbols(DATA / "wiki27_train.txt.gz")
        valid = len(text) // 20
        return cls(text[:-valid], text[-valid:], symbols(DATA / "wiki27_test.txt.gz"))

    @classmethod
    def of_file(cls, path: Path) -> "Text":
        """One file, divided 90/5/5 in its order, as text8 is."""
        text = symbols(path)
        held_out = len(text) // 20
        return cls(text[: -2 * held_out], text[-2 * held_out : -held_out], text[-held_out:])

    def to(self, device: str) -> "Text":
        """The same on another device."""
        return Text(self.train.to(device), self.valid.to(device), self.test.to(device))


def symbols(path: Path) -> Tensor:
    """Read a file of lower-case letters and blanks, compressed if its name ends in .gz.

    Raises:
        ValueError: Another character stands in it.
    """
    raw = np.frombuffer(gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes(), np.uint8)
    numbers = _NUMBERS[raw]
    wrong = np.flatnonzero(numbers == _UNKNOWN)
    if len(wrong):
        raise ValueError(
            f"{path} has {bytes(raw[wrong[:1]])!r} at {wrong[0]}: only a to z and blanks, as text8 has them"
        )
    return torch.from_numpy(numbers)


def windows(text: Tensor, steps: int) -> Tensor:
    """Cut a text into sequences of `steps` predictions, (steps + 1, N) int64: the last symbol is the next one's first.

    >>> windows(torch.arange(8), 3).T.tolist()
    [[0, 1, 2, 3], [3, 4, 5, 6]]
    """
    starts = torch.arange(0, len(text) - steps, steps, device=text.device)
    return text[starts + torch.arange(steps + 1, device=text.device)[:, None]].long()


def crops(text: Tensor, steps: int, batch: int, seed: int) -> Iterator[Tensor]:
    """Epoch after epoch of batches (steps + 1, batch): the windows from a random offset, in random order.

    What does not fill a batch is left to the next epoch's chance.
    """
    generator = torch.Generator().manual_seed(seed)
    steps_on = torch.arange(steps + 1, device=text.device)[:, None]
    while True:
        offset = int(torch.randint(steps, (), generator=generator))
        starts = torch.arange(offset, len(text) - steps, steps)
        if len(starts) < batch:
            raise ValueError(
                f"a text of {len(text)} symbols has {len(starts)} sequences of {steps} steps, need {batch}"
            )
        starts = starts[torch.randperm(len(starts), generator=generator)].to(text.device)
        for chosen in starts[: len(starts) // batch * batch].split(batch):
            yield text[chosen + steps_on].long()
