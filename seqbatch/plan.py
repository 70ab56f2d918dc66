"""The one type of seqbatch: pieces of sequences on grids of steps by lanes, for one epoch.

Whatever the strategy, a batch is a grid of ``steps`` by ``lanes``, and a piece runs down one lane::

    lane    0    1    2          a piece is   sequence, start, length   which tokens it holds
    step 0  a0   b0   c3                      step, lane                where its first token lies
         1  a1   b1   c4         padding      every piece starts at step 0 of a lane of its own
         2  a2   d0   .          splicing     the next piece starts where the last one ended
         3  a3   d1   .          chunking     a sequence is cut into several pieces

A plan is columns of numbers, no Python object per sequence, so ten million lengths plan in seconds,
and what the simulator counts is what a loader runs.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import sha256
from os import PathLike
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from seqbatch import planfile
from seqbatch.ordering import IntArray
from seqbatch.pieces import DROPPED, DROPPED_PAIRS, dropped_rows, dropped_side
from seqbatch.sharding import History, Schedule, check_history, lane_ranges, schedule
from seqbatch.strategy import MOST, check_choice, check_cost, check_integer

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["BatchPlan", "Plan"]

_PIECES = ("sequence", "start", "length", "step", "lane")
_CONTEXT = ("left_context", "right_context")
_BATCHES = ("batch_ptr", "steps", "lanes")


class BatchPlan(NamedTuple):
    """One batch of a plan: views of its pieces' columns, and the grid they lie on."""

    sequence: IntArray
    start: IntArray
    length: IntArray
    step: IntArray
    lane: IntArray
    left_context: IntArray | None
    right_context: IntArray | None
    steps: int
    """Of a plan of pairs, a list of two."""
    lanes: int


@dataclass(frozen=True, eq=False, kw_only=True)
class Plan:
    """One epoch: M batches, P pieces. Strategies make plans; all columns are read-only int64.

    Args:
        sequence: (P,) which sequence a piece is of; a pair counts as one.
        start: (P,) its first token in that sequence, context included.
        length: (P,) its tokens, context included, at least 1; (P, 2) of both sides of pairs.
        step: (P,) the step of its batch at which its first token lies.
        lane: (P,) its lane.
        batch_ptr: (M + 1,) pieces ``batch_ptr[i] : batch_ptr[i + 1]`` form batch i.
        steps: (M,) rows of each grid (T); (M, 2) of the two grids of a batch of pairs.
        lanes: (M,) columns of each grid (B), empty ones too.
        carry: Whether the state of a lane flows from a batch to the next.
        left_context: (P,) tokens at the front of a piece that are computed but carry no loss.
        right_context: (P,) the same at its end.
        dropped: Rows (sequence, start, length, reason) of what was left out.
        strategy: The settings that made the plan, as their repr.
        seed: As given to the strategy.
        epoch: As given to the strategy.
        shuffle: Whether `shard` may order the batches at random.

    Raises:
        ValueError: columns that do not fit together.

    >>> import seqbatch
    >>> plan = seqbatch.Padding(2, shuffle=False).plan([3, 1, 2])
    >>> len(plan), plan.tokens, plan.cells, plan.padding_efficiency
    (2, 6, 8, 0.75)
    >>> plan[0].sequence, plan[0].lane, plan[0].steps
    (array([0, 1]), array([0, 1]), 3)
    """

    sequence: IntArray
    start: IntArray
    length: IntArray
    step: IntArray
    lane: IntArray
    batch_ptr: IntArray
    steps: IntArray
    lanes: IntArray
    carry: bool = False
    left_context: IntArray | None = None
    right_context: IntArray | None = None
    dropped: NDArray[np.void] = field(default_factory=lambda: np.empty(0, dtype=DROPPED))
    strategy: str = ""
    seed: int = 0
    epoch: int = 0
    shuffle: bool = True

    def __post_init__(self) -> None:
        pieces, batches = len(self.sequence), len(self.steps)
        tail = np.shape(self.length)[1:]
        shapes = dict.fromkeys(("length", "steps"), tail if tail == (2,) else ())
        for names, size in ((_PIECES + _CONTEXT, pieces), (("steps", "lanes"), batches), (("batch_ptr",), batches + 1)):
            for name in names:
                column = getattr(self, name)
                if column is None and name in _CONTEXT:
                    continue
                column = np.asarray(column)
                if column.dtype.kind not in "iu" and column.size:
                    raise ValueError(f"column {name} must hold integers, got {column.dtype}")
                column = column.astype(np.int64, copy=False).view()
                if column.shape != (size, *shapes.get(name, ())):
                    raise ValueError(
                        f"column {name} has shape {column.shape}, expected {(size, *shapes.get(name, ()))}"
                    )
                column.flags.writeable = False
                object.__setattr__(self, name, column)
        ptr = self.batch_ptr
        if ptr[0] != 0 or ptr[-1] != pieces or (np.diff(ptr) < 0).any():
            raise ValueError(f"batch_ptr must rise from 0 to the {pieces} pieces, got {ptr}")
        if self.pairs:
            self._check_pairs()
        each = self.steps.astype(np.float64)
        if ((each.sum(axis=1) if self.pairs else each) * self.lanes).sum() > MOST:
            raise ValueError("the plan has more than 2**62 cells: smaller batches, lengths or multiples would do")
        check_integer("seed", self.seed, at_least=0)
        check_integer("epoch", self.epoch, at_least=0)
        if not (isinstance(self.shuffle, bool) and isinstance(self.carry, bool) and isinstance(self.strategy, str)):
            raise ValueError("shuffle and carry must be True or False, and strategy a text")

    def _check_pairs(self) -> None:
        """Raise for what a plan of pairs cannot have, and give what it dropped both lengths."""
        if self.carry or self.left_context is not None or self.right_context is not None or self.step.any():
            raise ValueError("a plan of pairs has one whole pair a lane: no carry, no context, and every step 0")
        if not len(self.dropped):
            object.__setattr__(self, "dropped", np.empty(0, dtype=DROPPED_PAIRS))

    def __len__(self) -> int:
        """The number of batches."""
        return len(self.steps)

    def __getitem__(self, index: int) -> BatchPlan:
        """Return batch `index` (negative ones count from the end)."""
        if not hasattr(index, "__index__"):
            raise TypeError(f"a plan is indexed by the number of a batch, got {index!r}")
        if not -len(self) <= index < len(self):
            raise IndexError(f"batch {index} of a plan of {len(self)} batches")
        number = index % len(self)
        part = slice(self.batch_ptr[number], self.batch_ptr[number + 1])
        columns = (getattr(self, name) for name in _PIECES + _CONTEXT)
        pieces = (None if column is None else column[part] for column in columns)
        return BatchPlan(*pieces, steps=self.steps[number].tolist(), lanes=int(self.lanes[number]))  # type: ignore[misc, arg-type]

    def __iter__(self) -> Iterator[BatchPlan]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        return (
            f"<Plan of {len(self)} batches, {len(self.sequence)} pieces, {self.tokens} tokens in {self.cells} cells"
            f" ({self.padding_efficiency:.1%}), by {self.strategy or 'hand'}, seed {self.seed}, epoch {self.epoch}>"
        )

    @property
    def pairs(self) -> bool:
        """Whether its pieces are pairs, with two lengths each."""
        return self.length.ndim == 2

    @cached_property
    def sides(self) -> "tuple[Plan, ...]":
        """The two plans of one length each that a plan of pairs is made of; of any other plan, itself alone.

        They have the same batches, lanes and pieces, and what is dropped.

        >>> import seqbatch
        >>> plan = seqbatch.Padding(2, shuffle=False).plan([[3, 4], [1, 2]])
        >>> [side.steps.tolist() for side in plan.sides], plan.cells
        ([[3], [4]], 14)
        """
        if not self.pairs:
            return (self,)
        return tuple(
            replace(
                self,
                length=self.length[:, side],
                steps=self.steps[:, side],
                dropped=dropped_side(self.dropped, side),
            )
            for side in range(2)
        )

    @cached_property
    def _lane_cells(self) -> IntArray:
        """(M,) cells of each lane of a batch."""
        return self.steps.sum(axis=1) if self.pairs else self.steps

    @cached_property
    def tokens(self) -> int:
        """Real tokens, each once: those of all pieces without their context, of pairs on both sides."""
        context = sum(int(c.sum()) for c in (self.left_context, self.right_context) if c is not None)
        return int(self.length.sum()) - context

    @cached_property
    def cells(self) -> int:
        """Steps times lanes of every batch, empty lanes too: what is computed. Of pairs, on both sides."""
        return int((self._lane_cells * self.lanes).sum())

    @property
    def padding_efficiency(self) -> float:
        """Real tokens / cells, total over total; NaN for a plan without batches."""
        return self.tokens / self.cells if self.cells else float("nan")

    @cached_property
    def digest(self) -> str:
        """SHA-256 of what is placed where and what is dropped: equal if and only if the epochs are.

        What ranks compare before they start, and a resumed run before it goes on.
        """
        sha = sha256(f"plan {planfile.VERSION}, carry {self.carry}, dropped {len(self.dropped)}".encode())
        for name in _BATCHES + _PIECES + _CONTEXT:
            column = getattr(self, name)
            sha.update(f"{name} {None if column is None else 'x'.join(map(str, column.shape))}".encode())
            if column is not None:
                small = np.ascontiguousarray(planfile.narrow(column))
                sha.update(f"{small.dtype.kind}{small.dtype.itemsize} {len(small)}".encode())
                sha.update(small.astype(small.dtype.newbyteorder("<"), copy=False).tobytes())
        sha.update(np.ascontiguousarray(self.dropped).tobytes())
        return sha.hexdigest()

    def costs(self, cost: tuple[float, float] = (1.0, 0.0)) -> NDArray[np.float64]:
        """Return what each batch costs under ``a * l + b * l**2``, the field's model of attention.

        The linear part counts cells. The quadratic part counts, for each lane, the square of its
        steps; in a plan whose lanes hold several pieces (splicing, packing) attention stays inside
        them, so it is the sum of their squared lengths. The two sides of pairs add up.

        Args:
            cost: (a, b), neither negative, not both 0.

        Returns:
            (M,) float64.

        >>> import seqbatch
        >>> seqbatch.Padding(2, shuffle=False).plan([3, 1, 2]).costs((1.0, 0.5))
        array([15.,  4.])
        """
        if self.pairs:
            return self.sides[0].costs(cost) + self.sides[1].costs(cost)
        a, b = check_cost(cost)
        linear = (self.steps * self.lanes).astype(np.float64)
        if b == 0:
            return a * linear
        if (self.step > 0).any():
            return a * linear + b * self._sum_per_batch(self.length.astype(np.float64) ** 2)
        return a * linear + b * (linear * self.steps)

    def to_frame(self) -> "pd.DataFrame":
        """Return a pandas frame, one row per batch: steps, lanes, cells, tokens, pieces.

        Of pairs, ``steps`` is the sum of ``source_steps`` and ``target_steps``.

        >>> import seqbatch
        >>> seqbatch.Padding(2, shuffle=False).plan([3, 1, 2]).to_frame().to_dict("list")
        {'steps': [3, 2], 'lanes': [2, 1], 'cells': [6, 2], 'tokens': [4, 2], 'pieces': [2, 1]}
        """
        import pandas as pd

        tokens = self.length.sum(axis=1) if self.pairs else self.length
        for context in (self.left_context, self.right_context):
            tokens = tokens if context is None else tokens - context
        both = {"source_steps": self.steps[:, 0], "target_steps": self.steps[:, 1]} if self.pairs else {}
        columns = {
            "steps": self._lane_cells,
            **both,
            "lanes": self.lanes,
            "cells": self._lane_cells * self.lanes,
            "tokens": self._sum_per_batch(tokens),
            "pieces": np.diff(self.batch_ptr),
        }
        return pd.DataFrame(columns, index=pd.RangeIndex(len(self), name="batch"))

    def schedule(
        self,
        num_replicas: int,
        *,
        history: History = (),
        cost: tuple[float, float] = (1.0, 0.0),
        tail: str = "split",
        worst_first: bool = False,
    ) -> Schedule:
        """Return which batch each of `num_replicas` ranks runs at each step; see `shard`."""
        return schedule(
            self.costs(cost),
            num_replicas,
            history=history,
            tail=tail,
            shuffle=self.shuffle,
            key=(self.seed, self.epoch),
            worst_first=worst_first,
        )

    def shard(
        self,
        rank: int,
        num_replicas: int,
        *,
        history: History = (),
        cost: tuple[float, float] = (1.0, 0.0),
        tail: str = "split",
        worst_first: bool = False,
    ) -> "Plan":
        """Return the steps of one rank, as a plan: batch i is what the rank runs at its step i.

        All ranks get the same number of steps, the batches of a step cost about the same, and
        together the ranks run the plan once. Which sequences form a batch does not depend on the
        number of ranks. A carried plan keeps its order; rank r owns lanes ``[r*B/W, (r+1)*B/W)``.

        Args:
            rank: ``0 <= rank < num_replicas``.
            num_replicas: W. For a carried plan it must divide the lanes.
            history: ``[[num_replicas, steps], ...]`` of the epoch so far; the steps returned are
                those still to come. With the last entry's number of ranks it is the same order gone
                on with; with another one, the rest is dealt anew. Every batch comes exactly once.
            cost: (a, b) of `costs`. Keep it, like `tail`, for the whole epoch.
            tail: The left-over ``M mod W`` batches are one last step: ``"split"`` cuts them by lanes
                (a rank without a lane gets one empty lane), ``"drop"`` lists them in ``dropped``. Parts of
                a batch have fewer lanes: choose ``"drop"`` where shapes must stay the same.
            worst_first: Begin the epoch with the step of the most expensive batch, so that running out
                of memory shows at once. A carried plan keeps its order; its batches cost about the same.

        Raises:
            ValueError: a rank out of range, a history of another plan, or lanes that W does not
                divide (the message names the numbers that do).

        >>> import seqbatch
        >>> plan = seqbatch.Padding(2).plan([5, 5, 3, 3, 1, 1, 4, 4, 2])
        >>> [len(plan.shard(rank, 2)) for rank in range(2)], sum(plan.shard(rank, 2).tokens for rank in range(2))
        ([3, 3], 28)
        """
        options = {"history": history, "cost": cost, "tail": tail, "worst_first": worst_first}
        batches, first, end = self.assign(rank, num_replicas, **options)  # type: ignore[arg-type]
        dropped = self.dropped
        if tail == "drop" and not self.carry:
            left_over = self.schedule(num_replicas, **options).left_over  # type: ignore[arg-type]
            rest = self._restrict(left_over, np.zeros(len(left_over), np.int64), self.lanes[left_over])
            dropped = np.concatenate([dropped, dropped_rows("tail", *rest._new_tokens())])
        return self._restrict(batches, first, end, dropped=dropped)

    def assign(
        self,
        rank: int,
        num_replicas: int,
        *,
        history: History = (),
        cost: tuple[float, float] = (1.0, 0.0),
        tail: str = "split",
        worst_first: bool = False,
    ) -> tuple[IntArray, IntArray, IntArray]:
        """Return (batch, first lane, end lane) of each step of a rank: what `shard` makes a plan of.

        Arguments and errors are those of `shard`; a range without lanes stands for one empty lane.

        >>> import seqbatch
        >>> plan = seqbatch.Padding(2, shuffle=False).plan([5, 5, 3, 3, 1, 1])
        >>> [column.tolist() for column in plan.assign(1, 2)]  # batch 1, then the second lane of batch 2
        [[1, 2], [0, 1], [2, 2]]
        """
        check_integer("num_replicas", num_replicas, at_least=1)
        check_integer("rank", rank, at_least=0)
        check_choice("tail", tail, ("split", "drop"))
        if rank >= num_replicas:
            raise ValueError(f"rank must be in 0..{num_replicas - 1} for num_replicas={num_replicas}, got {rank}")
        if self.carry:
            return self._assign_lanes(rank, num_replicas, history)
        groups, left_over = self.schedule(num_replicas, history=history, cost=cost, tail=tail, worst_first=worst_first)
        batches, first, end = groups[:, rank], np.zeros(len(groups), np.int64), self.lanes[groups[:, rank]]
        if len(left_over) and tail == "split":
            own = [column[rank] for column in lane_ranges(left_over, self.lanes[left_over], num_replicas)]
            batches, first, end = (np.append(*pair) for pair in zip((batches, first, end), own, strict=True))
        return batches, first, end

    def _assign_lanes(self, rank: int, num_replicas: int, history: History) -> tuple[IntArray, IntArray, IntArray]:
        num_lanes = int(self.lanes[0]) if len(self) else num_replicas
        phases = check_history(history)
        for replicas in (num_replicas, *(phase[0] for phase in phases)):
            if num_lanes % replicas:
                divisors = ", ".join(str(d) for d in range(1, num_lanes + 1) if num_lanes % d == 0)
                raise ValueError(
                    f"num_replicas={replicas} does not divide the {num_lanes} lanes of this carried plan, whose "
                    f"state stays with its lane: use one of {divisors} ranks, or another number of lanes"
                )
        done = sum(phase[1] for phase in phases)
        if done > len(self):
            raise ValueError(f"history took {done} steps, but the plan has {len(self)}: it belongs to another plan")
        batches = np.arange(done, len(self))
        share = num_lanes // num_replicas
        first = np.full(len(batches), rank * share)
        return batches, first, first + share

    def _restrict(self, batches: IntArray, first: IntArray, end: IntArray, **changes: Any) -> "Plan":
        """Return lanes ``first[i] : end[i]`` of each of `batches`, in that order; never fewer than one lane."""
        counts = np.diff(self.batch_ptr)[batches]
        offset = np.cumsum(counts) - counts
        pieces = np.arange(counts.sum()) + np.repeat(self.batch_ptr[batches] - offset, counts)
        lane = self.lane[pieces] - np.repeat(first, counts)
        keep = (lane >= 0) & (lane < np.repeat(end - first, counts))
        counts = np.bincount(np.repeat(np.arange(len(batches)), counts)[keep], minlength=len(batches))
        pieces = pieces[keep]
        columns = {name: getattr(self, name) for name in _PIECES + _CONTEXT}
        columns = {name: None if column is None else column[pieces] for name, column in columns.items()}
        columns["lane"] = lane[keep]
        provenance = {
            name: getattr(self, name) for name in ("carry", "dropped", "strategy", "seed", "epoch", "shuffle")
        }
        return Plan(
            **columns,
            batch_ptr=np.concatenate([[0], np.cumsum(counts)]),
            steps=self.steps[batches],
            lanes=np.maximum(end - first, 1),
            **(provenance | changes),
        )

    def _new_tokens(self) -> tuple[IntArray, IntArray, IntArray]:
        """Sequence, start and length of the pieces without their context."""
        left = 0 if self.left_context is None else self.left_context
        right = 0 if self.right_context is None else self.right_context
        return self.sequence, self.start + left, self.length - left - right

    def _sum_per_batch(self, column: NDArray[Any]) -> NDArray[Any]:
        total = np.concatenate([[0], np.cumsum(column)])
        return np.diff(total[self.batch_ptr])

    def save(self, path: "str | PathLike[str]") -> None:
        """Write the plan to `path` as an ``.npz`` without pickles, which `load` reads back."""
        arrays = {name: getattr(self, name) for name in _BATCHES + _PIECES + _CONTEXT}
        names = ("carry", "strategy", "seed", "epoch", "shuffle", "digest")
        planfile.write(
            path,
            {name: column for name, column in arrays.items() if column is not None} | {"dropped": self.dropped},
            {name: getattr(self, name) for name in names},
        )

    @classmethod
    def load(cls, path: "str | PathLike[str]") -> "Plan":
        """Read a plan that `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not a plan, is truncated or changed, or was written by another format version.
        """
        arrays, settings = planfile.read(path)
        digest = settings.pop("digest", None)
        try:
            plan = cls(**arrays, **settings)
            plan._check_grid()
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a whole plan: {error}; make it again with Plan.save") from error
        if plan.digest != digest:
            raise ValueError(f"{path} was changed after it was saved: its digest does not match; make it again")
        return plan

    def _check_grid(self) -> None:
        expected = DROPPED_PAIRS if self.pairs else DROPPED
        if self.dropped.dtype != expected:
            raise ValueError(f"dropped has the columns {self.dropped.dtype}, expected {expected}")
        if self.pairs:
            for side in self.sides:
                side._check_grid()
            return
        batch = np.repeat(np.arange(len(self)), np.diff(self.batch_ptr))
        inside = (self.step >= 0) & (self.lane >= 0) & (self.lane < self.lanes[batch]) & (self.start >= 0)
        inside &= (self.length > 0) & (self.step + self.length <= self.steps[batch]) & (self.sequence >= 0)
        if not inside.all():
            raise ValueError(f"piece {int(np.argmin(inside))} lies outside the grid of its batch")
