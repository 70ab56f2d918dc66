"""Packing: whole sequences in bins of a fixed capacity, several to a bin.

For models that keep the sequences of a row apart (block-diagonal attention, ``cu_seqlens``, resets).
Best fit, longest first, meets the lower bound on the number of bins for most lengths and wastes
several percent where sequences are near a half or a third of the capacity; there a linear programme
finds patterns that waste less. Which sequence of a length goes where is drawn anew in each epoch: the
bins' shapes stay, their contents do not.
"""

from dataclasses import KW_ONLY, dataclass, field
from numbers import Real
from os import PathLike
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from seqbatch.lengths import as_lengths
from seqbatch.ordering import random_order, shuffle_within
from seqbatch.pieces import OVERLONG, Pieces, fit_overlong, not_empty
from seqbatch.plan import Plan
from seqbatch.strategy import Strategy, check_choice

if TYPE_CHECKING:
    from seqbatch.cutting import Solution

__all__ = ["Packing"]

_LARGEST_TABLE = 2**28
_TIME_LIMIT = 30.0


@dataclass(frozen=True, repr=False)
class Packing(Strategy):
    """Batches of `rows` bins of `capacity` tokens; every batch has the same shape.

    Args:
        capacity: Steps of every batch: tokens a bin holds.
        rows: Lanes of every batch: bins. The last batch has empty ones where they do not divide.
        algorithm: ``"best_fit"`` puts the longest sequences first, each into the fullest bin that
            still holds it; ``"next_fit"`` fills bin after bin in the order of the sequences, as a
            stream would; ``"optimal"`` solves a linear programme over patterns of lengths (Gilmore and
            Gomory 1961, 1963, "A linear programming approach to the cutting-stock problem") once for
            all epochs, and never needs more bins than best fit; see :meth:`solve`.
        max_sequences: At most this many sequences in a bin.
        overlong: What becomes of a sequence longer than `capacity`: ``"error"``, ``"split"``,
            ``"truncate"`` or ``"drop"``. ``"alone"`` cannot be: all batches have `capacity` steps.
        shuffle: Draw which sequences meet, and the order of bins, at random, new in each epoch.
        time_limit: Seconds after which ``"optimal"`` uses the best it has found, at worst best fit's
            bins, and warns. Plans may then differ from run to run.
        solution: A file that keeps what ``"optimal"`` found: read where it is of the same lengths and settings,
            else written. With it every process and machine packs alike; without it the solver's last digits
            may differ between platforms and releases, and ranks or a resume whose plans differ are refused.

    Raises:
        TypeError, ValueError: a setting of the wrong type or range, or that excludes another.

    >>> plan = Packing(8).plan([5, 3, 4, 2, 2])
    >>> len(plan), plan.padding_efficiency
    (2, 1.0)
    >>> lengths = [5, 5, 4, 4, 3, 3]
    >>> len(Packing(12).plan(lengths)), len(Packing(12, algorithm="optimal").plan(lengths))
    (3, 2)
    """

    capacity: int
    _: KW_ONLY
    rows: int = 1
    algorithm: str = "best_fit"
    max_sequences: int | None = None
    overlong: str = "error"
    shuffle: bool = True
    time_limit: float = _TIME_LIMIT
    solution: "str | PathLike[str] | None" = field(default=None, repr=False, compare=False)

    at_least: ClassVar[dict[str, int]] = {"capacity": 1, "rows": 1, "max_sequences": 1}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("algorithm", self.algorithm, ("best_fit", "next_fit", "optimal"))
        check_choice("overlong", self.overlong, tuple(policy for policy in OVERLONG if policy != "alone"))
        object.__setattr__(self, "time_limit", _check_seconds(self.time_limit))
        if self.time_limit != _TIME_LIMIT and self.algorithm != "optimal":
            raise ValueError(f'time_limit={self.time_limit} goes with algorithm="optimal": leave it out')
        if self.solution is not None and not isinstance(self.solution, str | PathLike):
            raise TypeError(f"solution must be the path of a file, got {self.solution!r}")
        if self.solution is not None and self.algorithm != "optimal":
            raise ValueError(f'solution={self.solution!r} goes with algorithm="optimal": leave it out')

    def solve(self, lengths: ArrayLike) -> "Solution":
        """Find the patterns that plans of ``algorithm="optimal"`` use, or return them if they are known.

        A process solves the same lengths, capacity, `max_sequences` and `time_limit` once, whatever the
        epochs and `rows`. Where best fit meets the bound there is nothing to solve.

        Args:
            lengths: (N,) tokens of each sequence, as for :meth:`plan`.

        Returns:
            The :class:`~seqbatch.cutting.Solution`: ``bins``, ``best_fit_bins``, ``bound`` (Farley 1990),
            ``status``, ``seconds``, ``unit``, ``patterns``. Printed, it is one line.

        Raises:
            ValueError: another algorithm, or lengths that :meth:`plan` refuses.

        Warns:
            UserWarning: time was up, or the solver failed.

        >>> found = Packing(12, algorithm="optimal").solve([5, 5, 4, 4, 3, 3])
        >>> found.bins, found.best_fit_bins, found.bound, found.status, found.patterns
        (2, 3, 2, 'optimal', [((5, 4, 3), 2)])
        """
        if self.algorithm != "optimal":
            raise ValueError(f'there is nothing to solve with algorithm={self.algorithm!r}: use algorithm="optimal"')
        pieces, _, capacity = self._pieces(lengths)
        return self._solution(pieces, capacity)

    def _pieces(self, lengths: ArrayLike) -> tuple[Pieces, NDArray[np.void], int]:
        """Return what is to be packed, what is not, and how much a bin holds."""
        pieces, empty = not_empty(as_lengths(lengths))
        pieces, overlong = fit_overlong(pieces, self.capacity, self.overlong, f"capacity={self.capacity}")
        # No bin holds more than there is, so a huge capacity takes no huge table.
        capacity = min(self.capacity, int(pieces.length.sum()))
        if self.algorithm != "next_fit" and capacity > _LARGEST_TABLE:
            raise ValueError(
                f"{self.algorithm} keeps a table as long as a bin, and capacity={self.capacity} is over "
                f'{_LARGEST_TABLE}: count tokens in a larger unit, or use algorithm="next_fit"'
            )
        return pieces, np.concatenate([empty, overlong]), capacity

    def _solution(self, pieces: Pieces, capacity: int) -> "Solution":
        from seqbatch import cutting

        return cutting.solve(pieces.length, capacity, self.max_sequences, self.time_limit, self.solution)

    def plan(self, lengths: ArrayLike, *, seed: int = 0, epoch: int = 0) -> Plan:
        from seqbatch import kernels

        pieces, dropped, capacity = self._pieces(lengths)
        if self.algorithm == "next_fit":
            order = self._order(len(pieces.length), seed, epoch)
        else:
            words = self._words(len(pieces.length), seed, epoch)
            order = shuffle_within(capacity - pieces.length, max(capacity, 1), words)
        length = pieces.length[order]
        if self.algorithm == "optimal":
            found = self._solution(pieces, capacity)
            count, bins = found.bins, found.placed.astype(np.int64)
        else:
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
            dropped=dropped,
            **self._provenance(seed, epoch),
        )


def _check_seconds(value: object) -> float:
    """Return `value` as a float above 0, or say what it should have been."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"time_limit must be a number of seconds, got {value!r}")
    seconds = float(value)
    if not seconds > 0:
        raise ValueError(f"time_limit must be above 0 seconds, got {value!r}")
    return seconds
