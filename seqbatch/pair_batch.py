"""PairBatch: a batch of pairs, such as sentences and their translations, as two batches of the same lanes."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from seqbatch.batch import SequenceBatch
from seqbatch.placement import Placement

__all__ = ["PairBatch"]


@dataclass(eq=False, repr=False)
class PairBatch:
    """What a loader yields for pairs: both sides as :class:`~seqbatch.SequenceBatch`, one pair a lane on each.

    Each side has its own steps, ``data``, ``mask``, ``reset`` and what else such a batch has: ``batch["source"]`` by
    the dataset's field, ``batch.source``, or unpacked, ``source, target = batch``. Loss is the target's:
    ``batch.target.targets``, ``loss_mask``, and the counts, which are the batch's too. An encoder-decoder's attention
    takes ``batch.source.mask``, so that no output depends on how long the sources of other lanes are. A decoder that
    starts from the encoder's state takes no ``reset``, which would clear it.

    Attributes:
        source: The first side; its data (Ts, B, ...).
        target: The second side, of the same lanes in the same order; its data (Tt, B, ...).
        keys: The fields of the dataset that they are: names, or (0, 1) where items are tuples.

    >>> import seqbatch
    >>> from torch.utils.data import StackDataset
    >>> source, target = (seqbatch.TokenArray.of_sequences(rows) for rows in ([[1, 2], [3]], [[4], [5, 6, 7]]))
    >>> data = StackDataset(source=source, target=target)
    >>> strategy, lengths = seqbatch.Padding(2, shuffle=False), [[2, 1], [1, 3]]
    >>> (batch,) = seqbatch.make_loader(data, strategy, lengths=lengths, next_token=True)
    >>> batch["source"].data.tolist(), batch.target.data.tolist(), batch.target.targets.t().tolist()
    ([[1, 3], [2, 0]], [[4, 5], [0, 6], [0, 7]], [[-100, -100, -100], [6, 7, -100]])
    """

    source: SequenceBatch
    target: SequenceBatch
    keys: tuple[Any, Any] = ("source", "target")

    def __iter__(self) -> Iterator[SequenceBatch]:
        yield from (self.source, self.target)

    def __getitem__(self, key: Any) -> SequenceBatch:
        """Return a side by its field."""
        if key not in self.keys:
            raise KeyError(f"a batch of the pairs {list(self.keys)} has no {key!r}")
        return (self.source, self.target)[self.keys.index(key)]

    def __repr__(self) -> str:
        return f"<PairBatch of {self.keys[0]!r} {self.source!r} and {self.keys[1]!r} {self.target!r}>"

    @property
    def data(self) -> dict[Any, Any]:
        """The data of each side, by field."""
        return {key: side.data for key, side in zip(self.keys, self, strict=True)}

    @property
    def mask(self) -> dict[Any, Any]:
        """The mask of each side, by field."""
        return {key: side.mask for key, side in zip(self.keys, self, strict=True)}

    @property
    def per_sequence(self) -> Mapping[Any, Any]:
        """As :attr:`SequenceBatch.per_sequence`: one row a pair."""
        return self.target.per_sequence

    @property
    def placement(self) -> Placement:
        """That of the targets, which has the pairs' indices."""
        return self.target.placement

    @property
    def position(self) -> Mapping[str, Any] | None:
        """As :attr:`SequenceBatch.position`."""
        return self.target.position

    @property
    def loss_tokens(self) -> int:
        """Target tokens that carry loss."""
        return self.target.loss_tokens

    @property
    def step_loss_tokens(self) -> int:
        """As :attr:`SequenceBatch.step_loss_tokens`, of targets."""
        return self.target.step_loss_tokens

    @property
    def loss_scale(self) -> float:
        """As :attr:`SequenceBatch.loss_scale`, of targets."""
        return self.target.loss_scale

    @property
    def update(self) -> bool:
        """As :attr:`SequenceBatch.update`."""
        return self.target.update

    @property
    def device(self) -> torch.device:
        """Where the batch's tensors are."""
        return self.target.device

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "PairBatch":
        """Return the batch on `device`."""
        return self._map(lambda side: side.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "PairBatch":
        """Return the batch in page-locked memory; ``DataLoader(pin_memory=True)`` calls this."""
        return self._map(SequenceBatch.pin_memory)

    def _map(self, function: Callable[[SequenceBatch], SequenceBatch]) -> "PairBatch":
        return PairBatch(function(self.source), function(self.target), self.keys)
