"""Packing: whole sequences in bins of a fixed capacity, several to a bin.

For models that keep the sequences of a row apart (block-diagonal attention, ``cu_seqlens``, resets).
Best fit, longest first, meets the lower bound on the number of bins for most lengths and wastes
several percent where sequences are near a half or a third of the capacity. Which sequence of a length
goes where is drawn anew in each epoch: the bins' shapes stay, their contents do not.
"""

from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike

from seqbatch.lengths import as_lengths
from seqbatch.ordering import random_order, shuffle_within
from seqbatch.pieces import OVERLONG, fit_overlong, not_empty
from seqbatch.plan import Plan
from seqbatch.strategy import Strategy, check_choice

__all__ = ["Packing"]

_LARGEST_TABLE = 2**28


@dataclass(frozen=True, repr=False)
class Packing(Strategy):
    """Batches of `rows` bins of `capacity` tokens; every batch has the same shape.

    Args:
        capacity: Steps of every batch: tokens a bin holds.
        rows: Lanes of every batch: bins. The last batch has empty ones where they do not divide.
        algorithm: ``"best_fit"`` puts the longest sequences first, each into the fullest bin that
            still holds it; ``"next_fit"`` fills bin after bin in the order of the sequences, as a
            stream would.
        max_sequences: At most this many sequences in a bin.
        overlong: What becomes of a sequence longer than `capacity`: ``"error"``, ``"split"``,
            ``"truncate"`` or ``"drop"``. ``"alone"`` cannot be: all batches have `capacity` steps.
        shuffle: Draw which sequences meet, and the order of bins, at random, new in each epoch.

    Raises:
        TypeError, ValueError: a setting of the wrong type or range.

    >>> plan = Packing(8).plan([5, 3, 4, 2, 2])
    >>> len(plan), plan.padding_efficiency
    (2, 1.0)
    """

    capacity: int
    _: KW_ONLY
    rows: int = 1
    algorithm: str = "best_fit"
    max_sequences: int | None = None
    overlong: str = "error"
    shuffle: bool = True

    at_least: ClassVar[dict[str, int]] = {"capacity": 1, "rows": 1, "max_sequences": 1}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("algorithm", self.algorithm, ("best_fit", "next_fit"))
        check_choice("overlong", self.overlong, tuple(policy for policy in OVERLONG if policy != "alone"))

    def plan(self, lengths: ArrayLike, *, seed: int = 0, epoch: int = 0) -> Plan:
        from seqbatch import kernels

        pieces, empty = not_empty(as_lengths(lengths))
        pieces, overlong = fit_overlong(pieces, self.capacity, self.overlong, f"capacity={self.capacity}")
        # No bin holds more than there is, so a huge capacity takes no huge table.
        capacity = min(self.capacity, int(pieces.length.sum()))
        if self.algorithm == "best_fit" and capacity > _LARGEST_TABLE:
            raise ValueError(
                f"best_fit keeps a table as long as a bin, and capacity={self.capacity} is over {_LARGEST_TABLE}: "
                'count tokens in a larger unit, or use algorithm="next_fit"'
            )
        if self.algorithm == "best_fit":
            words = self._words(len(pieces.length), seed, epoch)
            order = shuffle_within(capacity - pieces.length, max(capacity, 1), words)
        else:
            order = self._order(len(pieces.length), seed, epoch)
        length = pieces.length[order]
        bins, at_most = np.empty_like(length), self.max_sequences or max(len(length), 1)
        pack = kernels.best_fit if self.algorithm == "best_fit" else kernels.next_fit
        count = pack(length, capacity, at_most, bins)
        if self.shuffle:
            bins = random_order(count, int(seed), int(epoch), "bins")[bins]
        held = np.bincount(bins, minlength=count)
        position, step = np.empty_like(length), np.empty_like(length)
        kernels.group_by(bins, length, np.cumsum(held), position, step)
        sequence, start = pieces.take(order[position])
        num_batches = -(-count // self.rows)
        per_batch = np.add.reduceat(held, np.arange(0, count, self.rows)) if count else held
        return Plan(
            sequence=sequence,
            start=start,
            length=length[position],
            step=step,
            lane=np.repeat(np.arange(count) % self.rows, held),
            batch_ptr=np.append(0, np.cumsum(per_batch)),
            steps=np.full(num_batches, self.capacity),
            lanes=np.full(num_batches, self.rows),
            dropped=np.concatenate([empty, overlong]),
            **self._provenance(seed, epoch),
        )
