"""The batch sampler: one rank's way through a plan, resumable at any step and with any number of ranks."""

from collections.abc import Iterator, Mapping
from hashlib import sha256
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike
from torch.utils.data import Sampler

from seqbatch.lengths import as_lengths
from seqbatch.placement import PieceIndices
from seqbatch.plan import Plan
from seqbatch.ranks import check_ranks_agree, check_still_alone, find_ranks
from seqbatch.sharding import check_history
from seqbatch.steps import PairBatches, RankBatches, Steps
from seqbatch.strategy import Strategy, check_choice, check_cost, check_integer

__all__ = ["PlanBatchSampler"]

STATE_VERSION = 1


class PlanBatchSampler(Sampler[PieceIndices]):
    """Yields the batches of one rank, epoch by epoch, as lists of indices that carry their pieces.

    For ``DataLoader(PieceDataset(dataset), batch_sampler=..., collate_fn=collate)``, which is what
    :func:`~seqbatch.make_loader` makes; a plain dataset takes the indices alone (and pads to the longest).

    Args:
        strategy: How to batch.
        lengths: (N,) tokens of each sequence, or (N, 2) of source and target of each pair.
        seed: With the epoch decides every random choice.
        epoch: The first epoch; see `set_epoch`.
        rank: This process's number; ``"all"`` yields the batches of all `num_replicas` ranks in turn, step by
            step, for wrappers that deal batch i to rank i mod W themselves (Accelerate).
        num_replicas: Ranks (W). Without it and `rank`: the default process group where it is initialised.
        mesh: A ``DeviceMesh`` instead: its only dimension, or the one named ``"dp"``.
        next_token: Whether targets are the next tokens, so that a sequence's last token carries no loss; of pairs,
            those of the second side, which alone carries loss.
        accumulation: Micro-steps of an optimizer step, for ``batch.loss_scale`` and ``batch.update``.
        cost: (a, b) of ``a * l + b * l**2``: batches of a step cost about the same.
        tail: ``"split"`` or ``"drop"`` what fills no whole step; see :meth:`seqbatch.Plan.shard`.
        worst_first: Begin with the most expensive step, so that running out of memory shows at once.

    With several ranks the first iteration of an epoch is collective: all ranks compare what they were given. A batch of
    a plain dataset holds whole sequences, so there the strategy must not cut them.

    Raises:
        TypeError, ValueError: settings of the wrong type or range.

    >>> import seqbatch
    >>> sampler = PlanBatchSampler(seqbatch.Padding(2, shuffle=False), [3, 1, 2])
    >>> len(sampler), [list(batch) for batch in sampler]
    (2, [[0, 1], [2]])
    """

    batch_size = None  # none fixed: Accelerate would drop batches that differ from a number
    drop_last = False

    def __init__(
        self,
        strategy: Strategy,
        lengths: ArrayLike,
        *,
        seed: int = 0,
        epoch: int = 0,
        rank: int | Literal["all"] | None = None,
        num_replicas: int | None = None,
        mesh: Any = None,
        next_token: bool = False,
        accumulation: int = 1,
        cost: tuple[float, float] = (1.0, 0.0),
        tail: str = "split",
        worst_first: bool = False,
    ) -> None:
        if not isinstance(strategy, Strategy):
            raise TypeError(f"strategy must be one of seqbatch's, such as Bucketing(max_tokens=4096), got {strategy!r}")
        self.strategy = strategy
        self.lengths = as_lengths(lengths, pairs=True)
        self.seed = check_integer("seed", seed, at_least=0)
        self.epoch = check_integer("epoch", epoch, at_least=0)
        if rank == "all":
            if num_replicas is None:
                raise ValueError('rank="all" needs num_replicas: how many ranks the batches will be dealt to')
            _, self.num_replicas, self._group = find_ranks(0, num_replicas, mesh)
            self.ranks = tuple(range(self.num_replicas))
        else:
            own, self.num_replicas, self._group = find_ranks(rank, num_replicas, mesh)
            self.ranks = (own,)
        check_choice("tail", tail, ("split", "drop"))
        self.next_token = bool(next_token)
        self.accumulation = check_integer("accumulation", accumulation, at_least=1)
        self.cost, self.tail, self.worst_first = check_cost(cost), tail, bool(worst_first)
        self._alone = rank is None and mesh is None and self.num_replicas == 1
        self._history: list[tuple[int, int]] = []
        self._reset_lanes = False
        self._finished: Any = None  # the history object of the last iteration that came to its end
        self._agreed: Any = None  # that which all ranks were found to agree in
        self._plan: Plan | None = None
        self._steps: Steps | None = None
        self._position: Mapping[str, Any] | None = None
        digest = sha256(f"{len(self.lengths)} ".encode() + np.ascontiguousarray(self.lengths, "<i8").tobytes())
        self._lengths_digest = digest.hexdigest()[:32]

    @property
    def sampler(self) -> "PlanBatchSampler":
        """Itself: Lightning and Accelerate look here for `set_epoch`."""
        return self

    @property
    def plan(self) -> Plan:
        """The plan of the present epoch, of all ranks."""
        if self._plan is None:
            self._plan = self.strategy.plan(self.lengths, seed=self.seed, epoch=self.epoch)
        return self._plan

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of `epoch`; to the present one is no move, so that a resumed loop may call this too."""
        if check_integer("epoch", epoch, at_least=0) != self.epoch:
            self._go_to(epoch, [])

    def _go_to(self, epoch: int, history: list[tuple[int, int]], reset_lanes: bool = False) -> None:
        if epoch != self.epoch:
            self._plan = None
        self.epoch, self._history, self._reset_lanes = epoch, history, reset_lanes
        self._steps, self._position = None, None

    def __len__(self) -> int:
        """Batches still to come in this epoch, counted from its start or from the loaded state."""
        return len(self._present_steps().totals) * len(self.ranks)

    @property
    def steps_done(self) -> int:
        """Steps of the present epoch that ran before the loaded state, on however many ranks."""
        return sum(steps for _, steps in self._history)

    def __iter__(self) -> Iterator[PieceIndices]:
        if self._alone:
            check_still_alone()
        if self._finished is self._history:
            self._go_to(self.epoch, [])  # what was loaded has been run: the epoch begins anew
        steps, start, history = self._present_steps(), self.state_after(0), self._history
        if self._agreed is not history:
            check_ranks_agree(start | {"next_token": self.next_token, "accumulation": self.accumulation}, self._group)
            self._agreed = history
        self._position = start
        *before, (_, done) = [*history, (self.num_replicas, 0)]
        if history and history[-1][0] == self.num_replicas:
            *before, (_, done) = history
        pairs = [list(pair) for pair in before]
        ranks = [
            PairBatches(self.plan, self.lengths, batches, self.next_token)
            if self.plan.pairs
            else RankBatches(self.plan, self.lengths, batches, steps.before, self.next_token)
            for batches in steps.batches
        ]
        for step in range(len(steps.totals)):
            position = start | {"history": [*pairs, [self.num_replicas, done + step + 1]]}
            common = {
                "step_loss_tokens": int(steps.totals[step]),
                "num_replicas": self.num_replicas,
                "update": bool(steps.update[step]),
                "position": position,
            }
            for rank in ranks:
                indices = rank.place(step, common)
                self._position = position
                yield indices
        self._finished = history

    def rewind(self) -> None:
        """Let the next iteration begin where the loaded state says, even if one came to its end since."""
        self._finished = None

    def _present_steps(self) -> Steps:
        if self._steps is None:
            self._steps = Steps.of(
                self.plan,
                self.lengths,
                self.ranks,
                self.num_replicas,
                next_token=self.next_token,
                accumulation=self.accumulation,
                reset_lanes=self._reset_lanes,
                history=self._history,
                cost=self.cost,
                tail=self.tail,
                worst_first=self.worst_first,
            )
        return self._steps

    def state_dict(self, after: Any = None) -> dict[str, Any]:
        """Return the state to resume from: numbers and short texts, under 1 KB as JSON.

        Args:
            after: The last batch that was trained on: whatever runs ahead, workers or wrappers, its own `position`
                is exact. Without it: after the last batch this sampler has yielded in the present iteration.
        """
        if after is not None:
            if getattr(after, "position", None) is None:
                raise ValueError(
                    f"after must be a batch of this loader, which knows its position, got {type(after).__name__}"
                )
            return dict(after.position)
        if self._position is not None:
            return dict(self._position)
        return self.state_after(0)

    def state_after(self, steps: int) -> dict[str, Any]:
        """Return the state after `steps` steps, counted from the epoch's start or from the loaded state."""
        return self._identity() | {
            "epoch": self.epoch,
            "history": _pairs([*self._history, (self.num_replicas, steps)]),
            "plan": self.plan.digest[:32],
        }

    def _identity(self) -> dict[str, Any]:
        return {
            "version": STATE_VERSION,
            "sequences": len(self.lengths),
            "lengths": self._lengths_digest,
            "strategy": repr(self.strategy),
            "seed": self.seed,
            "cost": list(self.cost),
            "tail": self.tail,
            "worst_first": self.worst_first,
        }

    def load_state_dict(self, state: Mapping[str, Any], *, reset_lanes: bool = False) -> None:
        """Go on after the batch that `state` was taken after, on however many ranks there are now.

        Args:
            state: From `state_dict` or ``batch.position``, of any number of ranks and workers.
            reset_lanes: Where a carried plan is resumed inside an epoch, the state of the recurrent layers must come
                along (``state["lanes"]``, see :meth:`seqbatch.loader.PlanLoader.state_dict`); True starts all
                lanes anew instead, and says so in ``batch.reset``.

        Raises:
            ValueError: a state of other data, settings, seed or version (the message says what differs), or of a
                carried plan without the lanes.
        """
        if not isinstance(state, Mapping) or "history" not in state or "epoch" not in state:
            raise ValueError(f"this is no state of a seqbatch sampler: {str(state)[:80]}")
        mine = self._identity()
        different = [f"{key} is {state.get(key)!r}, here {mine[key]!r}" for key in mine if state.get(key) != mine[key]]
        if different:
            raise ValueError(
                f"the state belongs to another run: {'; '.join(different)}. Make the loader as it was, or start anew"
            )
        epoch = check_integer("epoch", state["epoch"], at_least=0)
        history = check_history(state["history"])
        before = self.epoch, self._history, self._reset_lanes
        self._go_to(epoch, history)
        try:
            if state.get("plan") != self.plan.digest[:32]:
                raise ValueError(
                    f"the state's plan of epoch {epoch} has digest {state.get('plan')}, here it is "
                    f"{self.plan.digest[:32]}: the same lengths and settings give another plan, so the planning code "
                    "differs; resume with the version that wrote it"
                )
            left = len(self)  # finds a history that this plan cannot have had
            inside = self.plan.carry and bool(history) and left > 0
            if inside and not reset_lanes and state.get("lanes") is None:
                raise ValueError(
                    "a carried plan goes on in the middle of sequences, so the recurrent state must come along: save "
                    "loader.state_dict(after=batch, lanes=state), or start all lanes anew with reset_lanes=True"
                )
        except ValueError:
            self._go_to(*before)
            raise
        self._reset_lanes = bool(inside and reset_lanes)
        self._steps = None


def _pairs(history: list[tuple[int, int]]) -> list[list[int]]:
    return [list(pair) for pair in check_history(history)]
