"""What all streams share: a shard of a source, a bounded buffer, and a state that is carried in every batch."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from seqbatch.batch import SequenceBatch
from seqbatch.collating import collate
from seqbatch.datasets import Fetched, PieceDataset
from seqbatch.placement import LAYOUTS, PieceIndices, Placement, targets_of
from seqbatch.ranks import find_ranks
from seqbatch.strategy import Strategy, check_choice, check_integer
from seqbatch.stream_source import Source
from seqbatch.tensors import map_tensors

__all__ = ["State", "Step", "Stream"]

STATE_VERSION = 1
_ENOUGH_TOKENS = 2**20
_ENOUGH_BATCHES = 16

State = dict[str, Any]
"""Where one shard is: numbers, lists of numbers and short texts only."""


@dataclass(frozen=True)
class Step:
    """What a shard gives next: the pieces of a batch, or None at its end; and its state after them."""

    fetched: Fetched | None
    state: State


class Stream(IterableDataset[SequenceBatch]):
    """What all streams share: their shard of the source, their buffer, their state.

    Args:
        source: Items without known lengths, each a token tensor, array or list (T_i, ...), or a dict or tuple of such
            fields. A callable is called as ``source(epoch)`` and returns a fresh iterable; an iterable is read anew
            in each epoch; of a map-style dataset only the shard's own items are read. To be resumed, it must give
            the same items again.
        strategy: What plans the buffer.
        buffer_tokens: Tokens to read before planning; at least those of one batch.
        seed: With the epoch decides every random choice.
        epoch: The first epoch; see `set_epoch`.
        rank: This process's number; item i of the source belongs to rank ``i % num_replicas``.
        num_replicas: Ranks. Without it and `rank`: the default process group where it is initialised.
        mesh: A ``DeviceMesh`` instead: its only dimension, or the one named ``"dp"``.
        layout: ``"time_major"``, ``"batch_first"`` or ``"flat"``.
        next_token: Make ``batch.targets``; a text or number names the field they are of.
        fields: The per-token fields to use; by default all that are not in `per_sequence`.
        per_sequence: Fields with one value a sequence.
        padding_value: What cells without a token hold, or a dict by field.

    Raises:
        TypeError, ValueError: settings of the wrong type or range.
    """

    carry: ClassVar[bool] = False

    def __init__(
        self,
        source: Any,
        strategy: Strategy,
        *,
        buffer_tokens: int | None = None,
        seed: int = 0,
        epoch: int = 0,
        rank: int | None = None,
        num_replicas: int | None = None,
        mesh: Any = None,
        layout: str = "time_major",
        next_token: bool | str | int = False,
        fields: Sequence[str | int] | None = None,
        per_sequence: Sequence[str | int] = (),
        padding_value: float | Mapping[Any, float] = 0,
    ) -> None:
        super().__init__()
        check_choice("layout", layout, LAYOUTS)
        self.next_token, target = targets_of(next_token)
        self._serve = PieceDataset({}, fields=fields, per_sequence=per_sequence, target=target)
        self._source = Source(source, fields, per_sequence)
        self.strategy = strategy
        batch = self._batch_tokens()
        enough = max(_ENOUGH_TOKENS, _ENOUGH_BATCHES * batch)
        self.buffer_tokens = check_integer(
            "buffer_tokens", enough if buffer_tokens is None else buffer_tokens, at_least=1
        )
        if self.buffer_tokens < batch:
            raise ValueError(
                f"buffer_tokens={self.buffer_tokens} holds less than one batch of {strategy!r}, {batch} tokens, so "
                f"none would be full: make it several batches, at least {_ENOUGH_BATCHES * batch} for little waste"
            )
        self.seed = check_integer("seed", seed, at_least=0)
        self.epoch = check_integer("epoch", epoch, at_least=0)
        self.rank, self.num_replicas, self.group = find_ranks(rank, num_replicas, mesh)
        self.layout, self.padding_value = layout, padding_value
        self._loaded: State | None = None

    def _batch_tokens(self) -> int:
        """Tokens of one batch, as far as the settings say."""
        return 1

    @property
    def lanes(self) -> int:
        """Lanes of a batch in which nothing is: 1 where batches differ in their lanes."""
        return 1

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.strategy!r}, buffer_tokens={self.buffer_tokens})"

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"group": None}  # a process group cannot go to a worker, which needs none

    # The epoch and the state.

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of `epoch`; to the present one is no move, so that a resumed loop may call this too."""
        if check_integer("epoch", epoch, at_least=0) != self.epoch:
            self.epoch, self._loaded = epoch, None

    def identity(self) -> dict[str, Any]:
        """Return what must agree between ranks, and between a state and the stream that it is loaded into."""
        return {
            "version": STATE_VERSION,
            "stream": repr(self),
            "seed": self.seed,
            "num_replicas": self.num_replicas,
        }

    def position(self, states: Sequence[State], turn: int) -> dict[str, Any]:
        """Return the state of the whole rank.

        Args:
            states: That of each worker's shard.
            turn: The worker that gives the next batch.
        """
        whole = {"rank": self.rank, "epoch": self.epoch, "num_workers": len(states)}
        return self.identity() | whole | {"turn": turn, "workers": list(states)}

    def start(self, workers: int) -> tuple[list[State], int]:
        """Return the state of each shard to begin with, and the worker whose turn it is.

        Raises:
            ValueError: a state of another number of workers was loaded.
        """
        if self._loaded is None:
            return [self._begin(self.rank + worker * self.num_replicas) for worker in range(workers)], 0
        _check_workers(self._loaded, workers)
        return list(self._loaded["workers"]), self._loaded["turn"]

    def state_dict(self, after: SequenceBatch, *, lanes: Any = None) -> dict[str, Any]:
        """Return the state to resume from, after the batch that was trained on last: numbers and short texts.

        Args:
            after: A batch of this stream. It knows its own place, so whatever reads ahead does no harm.
            lanes: For a stream that carries state: the recurrent state of this rank after that batch.

        Raises:
            ValueError: something that knows no place, such as a batch of a bare ``DataLoader`` with several workers.
        """
        if getattr(after, "position", None) is None:
            raise ValueError(
                f"after must be a batch that knows its position, got {type(after).__name__} without one: several "
                "workers know theirs through StreamLoader"
            )
        state = dict(after.position)  # type: ignore[arg-type]
        return state if lanes is None else state | {"lanes": map_tensors(lambda lane: lane.detach().clone(), lanes)}

    def load_state_dict(self, state: Mapping[str, Any], *, num_workers: int = 1, reset_lanes: bool = False) -> Any:
        """Go on after the batch that `state` was taken after; every rank loads its own.

        Args:
            state: From `state_dict` or ``batch.position``.
            num_workers: Processes that will read.
            reset_lanes: Start all lanes anew, and say so in ``batch.reset``: for a stream that carries state, where the
                recurrent state after that batch is gone.

        Returns:
            The recurrent state that came along, to be given to the next ``batch.carry_in``, or None.

        Raises:
            ValueError: a state of another rank, number of ranks or workers, seed, version, or of other settings; or of
                sequences in their middle without the recurrent state.
        """
        if not isinstance(state, Mapping) or not {"workers", "turn", "epoch", "num_workers"} <= set(state):
            raise ValueError(f"this is no state of a seqbatch stream: {str(state)[:80]}")
        mine = self.identity() | {"rank": self.rank}
        different = [f"{key} is {state.get(key)!r}, here {mine[key]!r}" for key in mine if state.get(key) != mine[key]]
        if different:
            raise ValueError(
                f"the state belongs to another stream: {'; '.join(different)}. Make the stream as it was, give each "
                "rank its own state, or start anew"
            )
        _check_workers(state, num_workers)
        lanes = None if reset_lanes else state.get("lanes")
        if lanes is None and not reset_lanes and any(worker.get("open") for worker in state["workers"]):
            raise ValueError(
                "a spliced stream goes on in the middle of sequences, so the recurrent state must come along: save "
                "state_dict(after=batch, lanes=state), or start all lanes anew with reset_lanes=True"
            )
        self.epoch, self._loaded = check_integer("epoch", state["epoch"], at_least=0), dict(state)
        if reset_lanes:
            self._loaded["workers"] = [{**worker, "reset": True} for worker in state["workers"]]
        return lanes

    # Running.

    def __iter__(self) -> Iterator[SequenceBatch]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        if self.carry and workers > 1:
            raise ValueError(
                f"state flows from batch to batch, but {workers} workers would give theirs in turn: use StreamLoader, "
                "which joins the workers' lanes, or num_workers=1"
            )
        states, _ = self.start(workers)
        for step in self.steps(worker, workers, states[worker]):
            if step.fetched is not None:
                position = self.position([step.state], 0) if workers == 1 else None
                yield self.batch(step.fetched, position=position)

    def steps(self, worker: int, workers: int, state: State) -> Iterator[Step]:
        """Return what one worker's shard gives after `state`, and at its end once nothing."""
        if state["ended"]:
            yield Step(None, state)
            return
        yield from self._steps(self.rank + worker * self.num_replicas, self.num_replicas * workers, state)

    def batch(self, fetched: Fetched, **changes: Any) -> SequenceBatch:
        """Lay fetched pieces on their grid; `changes` are of their placement."""
        fetched = fetched._replace(placement=replace(fetched.placement, **changes))
        return collate(fetched, layout=self.layout, padding_value=self.padding_value)  # type: ignore[return-value]

    def filler(self) -> Fetched:
        """Return a batch of one step without a token, shaped as the source's first item."""
        none = np.empty(0, np.int64)
        placement = Placement(
            *(none,) * 5,
            steps=1,
            lanes=self.lanes,
            left_context=none,
            right_context=none,
            whole=none,
            continues=np.empty(0, np.bool_),
            carry=self.carry,
            next_token=self.next_token,
        )
        return self._fetch({0: self._source.first(self.epoch)}, placement)

    def _fetch(self, held: dict[int, Any], placement: Placement) -> Fetched:
        self._serve.dataset = held
        fetched: Fetched = self._serve.__getitems__(PieceIndices(placement.sequence.tolist(), placement))
        self._serve.dataset = {}  # or a pool would live on while the next one is read
        return fetched

    @abstractmethod
    def _begin(self, first: int) -> State:
        """The state of a shard before its first item, which has this number."""

    @abstractmethod
    def _steps(self, first: int, shards: int, state: State) -> Iterator[Step]:
        """What the shard of items first, first + shards, ... gives after `state`, and at its end once nothing."""


def _check_workers(state: Mapping[str, Any], workers: int) -> None:
    if state["num_workers"] != workers:
        raise ValueError(
            f"the state is of num_workers={state['num_workers']}, here it is {workers} (0 counts as 1): each worker "
            "reads a share of its own, so resume with as many, or start the epoch anew"
        )
