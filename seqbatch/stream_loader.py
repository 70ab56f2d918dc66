"""StreamLoader: a stream in worker processes and on several ranks, in step to the end, resumable at any batch."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from seqbatch.batch import SequenceBatch
from seqbatch.datasets import Column, Fetched
from seqbatch.ranks import check_ranks_agree
from seqbatch.strategy import check_choice, check_integer
from seqbatch.stream_base import State, Stream

__all__ = ["StreamLoader", "Unused"]

_OURS = ("batch_size", "shuffle", "sampler", "batch_sampler", "drop_last", "collate_fn", "in_order")
_ENDS = ("until_first", "until_last")


class Unused(NamedTuple):
    """What a rank read in an epoch and did not give, since another rank had come to its end."""

    batches: int
    tokens: int
    complete: bool
    """Whether that is all: True where this rank's stream had ended too, False where more may have been unread."""


class StreamLoader:
    """Runs a stream through a torch ``DataLoader``, as many steps on every rank, and knows its place.

    Each worker reads a shard of its own; item i of the source belongs to rank ``i % num_replicas``, and there to
    worker ``i // num_replicas % num_workers``. Workers give their batches in turn; those of a
    :class:`~seqbatch.SpliceStream` run a share of the lanes each, joined here to one batch.

    Ranks that have no common plan come to their ends at different steps, where a training loop would hang. So
    before each block of `sync_every` steps, every rank reads that many batches, and one all-reduce tells all of them
    how many steps there are, and the loss tokens of each for ``batch.loss_scale``. A single process exchanges nothing.
    An iteration that ran to its end moves to the next epoch; `set_epoch` goes to any other.

    Args:
        stream: A :class:`~seqbatch.BucketStream`, :class:`~seqbatch.PackStream` or :class:`~seqbatch.SpliceStream`.
        num_workers: Processes that read; the same number on all ranks.
        ends: ``"until_first"`` stops all ranks where the first has no more; what the others read beyond is not
            trained on, see `unused`. ``"until_last"`` goes on until all are through: a rank without a batch
            gives one of one step and no token, whose loss must count 0, so that nothing is lost.
        sync_every: Steps of a block. As many batches are held in memory.
        group: A process group of the stream's ranks; by default the stream's own. Where there is none although
            the stream was given several ranks, each goes its own way, and ``batch.loss_scale`` is of this rank alone.
        **options: Further options of ``DataLoader``: ``pin_memory``, ``prefetch_factor``, ...

    Attributes:
        unused: After an epoch, what this rank read and did not give: :class:`Unused`.

    Raises:
        TypeError, ValueError: settings of the wrong type or range; while iterating, what the stream raises. Where
            that happens on one rank, the others raise RuntimeError instead of waiting for it.

    >>> from seqbatch import PackStream
    >>> loader = StreamLoader(PackStream([[1, 2], [3], [4, 5, 6]], capacity=3, shuffle=False))
    >>> [batch.data.flatten().tolist() for batch in loader], loader.epoch
    ([[4, 5, 6], [1, 2, 3]], 1)
    """

    def __init__(
        self,
        stream: Stream,
        *,
        num_workers: int = 0,
        ends: str = "until_first",
        sync_every: int = 16,
        group: Any = None,
        **options: Any,
    ) -> None:
        if not isinstance(stream, Stream):
            raise TypeError(f"stream must be a BucketStream, PackStream or SpliceStream, got {type(stream).__name__}")
        check_choice("ends", ends, _ENDS)
        wrong = [name for name in options if name in _OURS]
        if wrong:
            raise ValueError(f"the stream decides {', '.join(wrong)}: leave it out, and say it in {stream!r}")
        if options.pop("persistent_workers", False):
            raise ValueError("persistent_workers would keep the first epoch's stream: leave it out")
        self.stream, self.ends = stream, ends
        self.num_workers = check_integer("num_workers", num_workers, at_least=0)
        self.sync_every = check_integer("sync_every", sync_every, at_least=1)
        if stream.carry and stream.lanes % self._shards:
            raise ValueError(
                f"num_workers={num_workers} does not divide the {stream.lanes} lanes, of which each worker runs a "
                f"share: choose one of {[n for n in range(1, stream.lanes + 1) if stream.lanes % n == 0]}"
            )
        self.group = stream.group if group is None else group
        if self.group is not None and dist.get_world_size(self.group) != stream.num_replicas:
            raise ValueError(
                f"the group has {dist.get_world_size(self.group)} ranks, but the stream num_replicas="
                f"{stream.num_replicas}: make the stream for the ranks of the group"
            )
        self._options = options
        self._states: Sequence[State] = []
        self.unused = Unused(0, 0, True)

    @property
    def _shards(self) -> int:
        return max(self.num_workers, 1)

    @property
    def epoch(self) -> int:
        """The present epoch: that of the next iteration."""
        return self.stream.epoch

    @property
    def dropped(self) -> dict[str, tuple[int, int]]:
        """What the stream left out on this rank in the epoch last run, up to the batch last read: by reason
        (``empty``, ``overlong``), (pieces, tokens)."""
        total: dict[str, tuple[int, int]] = {}
        for state in self._states:
            for reason, (pieces, tokens) in state["dropped"].items():
                before = total.get(reason, (0, 0))
                total[reason] = before[0] + pieces, before[1] + tokens
        return total

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of `epoch`; no move if it is the present one, which may have been resumed inside."""
        self.stream.set_epoch(epoch)

    def state_dict(self, after: SequenceBatch, *, lanes: Any = None) -> dict[str, Any]:
        """Return this rank's state to resume from, after the batch that was trained on last.

        Args:
            after: That batch.
            lanes: For a stream that carries state: the recurrent state of this rank after the batch.
        """
        return self.stream.state_dict(after, lanes=lanes)

    def load_state_dict(self, state: Mapping[str, Any], *, reset_lanes: bool = False) -> Any:
        """Go on after the batch that `state` was taken after, on the same rank, with as many ranks and workers.

        Args:
            state: From `state_dict`.
            reset_lanes: Start all lanes anew, where the recurrent state of a stream that carries it is gone.

        Returns:
            The recurrent state that came along, to be given to the next ``batch.carry_in``, or None.

        Raises:
            ValueError: another number of either, a state of another stream (the message says what differs), or
                no recurrent state where sequences are in their middle.
        """
        return self.stream.load_state_dict(state, num_workers=self._shards, reset_lanes=reset_lanes)

    def __iter__(self) -> Iterator[SequenceBatch]:
        epoch, self.unused = self.epoch, Unused(0, 0, True)
        alone = self.group is None or dist.get_world_size(self.group) == 1
        yield from self._read() if alone else self._in_step(self._read())
        if self.epoch == epoch:
            self.set_epoch(epoch + 1)

    def _read(self) -> Iterator[SequenceBatch]:
        """This rank's batches, as long as there are any."""
        states, turn = self.stream.start(self._shards)
        self._states = states
        feed = _Feed(self.stream, self._shards, states, turn)
        loader: DataLoader[_Message] = DataLoader(
            feed, batch_size=None, num_workers=self.num_workers, collate_fn=_as_it_is, **self._options
        )
        if not feed.joined:
            for message in loader:
                states[message.worker] = message.state
                if message.batch is not None:
                    turn = (message.worker + 1) % self._shards
                    yield _placed(message.batch, position=self.stream.position(states, turn))
            return
        going, waiting, parts = set(range(self._shards)), set(range(self._shards)), []
        for message in loader:
            states[message.worker] = message.state
            waiting.remove(message.worker)
            if message.batch is None:
                going.remove(message.worker)
            else:
                parts.append(message)
            if not waiting:
                waiting = set(going)
                if parts:
                    batch = self.stream.batch(_join(parts, self.stream.lanes), position=self.stream.position(states, 0))
                    yield batch.pin_memory() if self._options.get("pin_memory") else batch
                    parts = []

    def _in_step(self, batches: Iterator[SequenceBatch]) -> Iterator[SequenceBatch]:
        """The batches of this rank in blocks, as many as `ends` says."""
        world, size = self.stream.num_replicas, self.sync_every
        mine = self.stream.identity() | {"epoch": self.epoch, "num_workers": self._shards}
        check_ranks_agree(mine | {"ends": self.ends, "sync_every": size}, self.group)
        while True:
            block: list[SequenceBatch] = []
            error: Exception | None = None
            try:
                block.extend(islice(batches, size))
            except Exception as problem:
                error = problem
            ranks, loss_tokens, failed = self._exchange(block, error is not None)
            if error is not None:
                try:
                    raise error
                finally:
                    error = None  # its traceback holds this frame, and the frame the workers
            if failed:
                raise RuntimeError(f"{failed} of the {world} ranks failed while reading: their own errors say why")
            steps = int((ranks == world).sum() if self.ends == "until_first" else (ranks > 0).sum())
            while len(block) < steps:
                position = self.stream.position(self._states, 0)
                block.append(self.stream.batch(self.stream.filler(), position=position))
            for batch, tokens in zip(block[:steps], loss_tokens.tolist(), strict=False):
                yield _placed(batch, step_loss_tokens=tokens, num_replicas=world)
            if steps < size:
                over = block[steps:]
                self.unused = Unused(len(over), sum(b.placement.tokens for b in over), len(block) < size)
                return

    def _exchange(self, block: Sequence[SequenceBatch], failed: bool) -> tuple[Tensor, Tensor, int]:
        """Return, for each step of a block, (ranks that have a batch, their loss tokens), and how many ranks failed."""
        totals = torch.zeros(2, self.sync_every + 1, dtype=torch.int64)
        totals[0, : len(block)] = 1
        totals[1, : len(block)] = torch.tensor([batch.loss_tokens for batch in block], dtype=torch.int64)
        totals[0, -1] = failed
        if dist.get_backend(self.group) == "nccl":
            totals = totals.cuda()
        dist.all_reduce(totals, group=self.group)
        totals = totals.cpu()
        return totals[0, :-1], totals[1, :-1], int(totals[0, -1])


@dataclass(frozen=True)
class _Message:
    """What a worker sends: a batch - its pieces where they will be joined, None at the end - and its state after."""

    worker: int
    batch: Any
    state: State

    def pin_memory(self) -> "_Message":
        return replace(self, batch=self.batch.pin_memory()) if isinstance(self.batch, SequenceBatch) else self


class _Feed(IterableDataset[_Message]):
    """The stream as a worker runs it.

    A ``DataLoader`` begins with its worker 0, so worker j plays worker ``turn + j``: then the turn is kept.
    """

    def __init__(self, stream: Stream, workers: int, states: Sequence[State], turn: int) -> None:
        super().__init__()
        self.stream, self.workers, self.states, self.turn = stream, workers, list(states), turn
        self.joined = stream.carry and workers > 1

    def __iter__(self) -> Iterator[_Message]:
        info = get_worker_info()
        worker = (self.turn + (0 if info is None else info.id)) % self.workers
        for step in self.stream.steps(worker, self.workers, self.states[worker]):
            batch = step.fetched if step.fetched is None or self.joined else self.stream.batch(step.fetched)
            yield _Message(worker, batch, step.state)


def _as_it_is(message: Any) -> Any:
    return message


def _placed(batch: SequenceBatch, **changes: Any) -> SequenceBatch:
    return replace(batch, placement=replace(batch.placement, **changes))


def _join(parts: Sequence[_Message], lanes: int) -> Fetched:
    """Lay the windows of several workers side by side; lanes of workers that have ended are empty."""
    parts = sorted(parts, key=lambda part: part.worker)
    placed = [part.batch.placement for part in parts]
    share = placed[0].lanes
    names = ("sequence", "start", "length", "step", "left_context", "right_context", "whole", "continues")
    columns = {name: np.concatenate([getattr(p, name) for p in placed]) for name in names}
    placement = replace(
        placed[0],
        **columns,
        lane=np.concatenate([p.lane + share * part.worker for p, part in zip(placed, parts, strict=True)]),
        steps=max(p.steps for p in placed),
        lanes=lanes,
        loss_tokens=sum(p.loss_tokens for p in placed),
        step_loss_tokens=sum(p.loss_tokens for p in placed),
    )
    fetched = [part.batch for part in parts]
    tokens = {key: _join_columns([f.columns[key] for f in fetched]) for key in fetched[0].columns}
    labels = {name: _concatenate([f.per_sequence[name] for f in fetched]) for name in fetched[0].per_sequence}
    return Fetched(placement, tokens, fetched[0].target, labels)


def _join_columns(columns: Sequence[Column]) -> Column:
    sizes = np.array([len(column.tokens) for column in columns])
    begins = (np.cumsum(sizes) - sizes).tolist()
    source = np.concatenate([column.source + begin for column, begin in zip(columns, begins, strict=True)])
    return Column(_concatenate([column.tokens for column in columns]), source)


def _concatenate(values: Sequence[Any]) -> Any:
    """Lay rows of several workers end to end: tensors, arrays, lists, or dicts and tuples of them."""
    first = values[0]
    if isinstance(first, Tensor):
        return torch.cat(list(values))
    if isinstance(first, np.ndarray):
        return np.concatenate(values)
    if isinstance(first, Mapping):
        return {name: _concatenate([value[name] for value in values]) for name in first}
    if isinstance(first, tuple):
        return tuple(_concatenate(parts) for parts in zip(*values, strict=True))
    return [row for value in values for row in value]
