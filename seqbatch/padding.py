"""Zero padding: whole sequences side by side, each batch as long as its longest ("bunch training").

What most programs do, and the yardstick for the rest: a batch of B random sequences uses
``E[L] / E[max of B]`` of its cells (:func:`seqbatch.distributions.expected_efficiency`).
"""

from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike

from seqbatch.lengths import as_lengths
from seqbatch.ordering import constant, round_up
from seqbatch.pieces import dropped_rows, not_empty
from seqbatch.plan import Plan
from seqbatch.strategy import Strategy

__all__ = ["Padding"]


@dataclass(frozen=True, repr=False)
class Padding(Strategy):
    """Batches of `batch_size` sequences, padded to the longest of each batch; pairs to the longest of each side.

    Args:
        batch_size: Lanes of a batch, one sequence each.
        shuffle: Draw the sequences of a batch at random, new in each epoch; False keeps their order.
        drop_last: Leave out a last batch of fewer than `batch_size` sequences.
        pad_to_multiple_of: Steps are rounded up to a multiple of this.

    Raises:
        TypeError, ValueError: a setting of the wrong type or below 1.

    >>> plan = Padding(2).plan([5, 1, 4, 2, 3])
    >>> plan.tokens, plan.lanes
    (15, array([2, 2, 1]))
    >>> Padding(2, shuffle=False).plan([[5, 2], [1, 4], [3, 3]]).steps.tolist()
    [[5, 4], [3, 3]]
    """

    batch_size: int
    _: KW_ONLY
    shuffle: bool = True
    drop_last: bool = False
    pad_to_multiple_of: int = 1

    at_least: ClassVar[dict[str, int]] = {"batch_size": 1, "pad_to_multiple_of": 1}

    def plan(self, lengths: ArrayLike, *, seed: int = 0, epoch: int = 0) -> Plan:
        pieces, dropped = not_empty(as_lengths(lengths, pairs=True))
        order = self._order(len(pieces.length), seed, epoch)
        full = len(order) - len(order) % self.batch_size if self.drop_last else len(order)
        left_out = dropped_rows("drop_last", *pieces.take(order[full:]), pieces.length[order[full:]])
        sequence, start = pieces.take(order[:full])
        length = pieces.length[order[:full]]
        begins = np.arange(0, full, self.batch_size)
        longest = np.maximum.reduceat(length, begins) if full else length[:0]
        return Plan(
            sequence=sequence,
            start=start,
            length=length,
            step=constant(0, full),
            lane=np.arange(full) % self.batch_size,
            batch_ptr=np.append(begins, full),
            steps=round_up(longest, self.pad_to_multiple_of),
            lanes=np.diff(np.append(begins, full)),
            dropped=np.concatenate([dropped, left_out]),
            **self._provenance(seed, epoch),
        )
