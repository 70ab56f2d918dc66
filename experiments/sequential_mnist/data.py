"""MNIST as sequences of pixels, in order or permuted."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

__all__ = ["MNIST", "ORDERS", "Part", "load", "order_of"]

MNIST = Path(__file__).parents[1] / "data" / "mnist_10k_2k.npz"
ORDERS = ("in order", "permuted")
PERMUTATION_SEED = 0


@dataclass(frozen=True)
class Part:
    """Images as sequences of pixels from 0 to 1, x (T, N) float32, and their classes, y (N,) int64."""

    x: Tensor
    y: Tensor

    def batches(self, size: int, generator: torch.Generator | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield all images once as (T, B, 1) and (B,), in the data's order or a generator's."""
        count = len(self.y)
        where = torch.arange(count) if generator is None else torch.randperm(count, generator=generator)
        for index in where.to(self.y.device).split(size):
            yield self.x[:, index, None], self.y[index]


def order_of(steps: int, order: str) -> np.ndarray:
    """The order in which pixels are read: each pixel once, the same order in every run."""
    if order not in ORDERS:
        raise ValueError(f"order must be one of {', '.join(map(repr, ORDERS))}, got {order!r}")
    if order == "in order":
        return np.arange(steps)
    return np.argsort(np.random.Generator(np.random.Philox(PERMUTATION_SEED)).random(steps), kind="stable")


def load(
    path: Path, side: int, order: str, sizes: tuple[int, int, int], device: torch.device | str = "cpu"
) -> tuple[Part, Part, Part]:
    """Return the training, validation and test part.

    The validation part comes after the training part in the training file, as in the released code.

    Args:
        path: An .npz file with x_train, y_train, x_test, y_test, images uint8 (N, 28, 28), as Keras has MNIST.
        side: Pixels become means of squares, so that an image is `side` by `side`: 28, 14 or 7.
        order: ``"in order"``, row by row, or ``"permuted"``.
        sizes: Images of the three parts.
        device: Where they shall lie.

    Raises:
        ValueError: The file has fewer images; or `side` or `order` is another.
    """
    if side not in (28, 14, 7):
        raise ValueError(f"side must be 28, 14 or 7, got {side!r}")
    train, valid, test = sizes
    with np.load(path) as file:
        images = {"train": (file["x_train"], file["y_train"]), "test": (file["x_test"], file["y_test"])}
    for name, need in (("train", train + valid), ("test", test)):
        if len(images[name][1]) < need:
            raise ValueError(
                f"{path} has {len(images[name][1])} images in x_{name}, {need} are needed: "
                "give the full MNIST, an .npz like Keras's mnist.npz, with --data"
            )

    def part(name: str, begin: int, end: int) -> Part:
        x, y = (array[begin:end] for array in images[name])
        width = 28 // side
        means = x.reshape(-1, side, width, side, width).mean((2, 4), dtype=np.float32) / np.float32(255)
        rows = means.reshape(len(x), -1).T[order_of(side * side, order)]
        return Part(
            torch.from_numpy(np.ascontiguousarray(rows)).to(device), torch.from_numpy(y.astype(np.int64)).to(device)
        )

    return part("train", 0, train), part("train", train, train + valid), part("test", 0, test)
