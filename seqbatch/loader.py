"""make_loader: a dataset and a strategy in, a torch DataLoader of :class:`SequenceBatch` out."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from dataclasses import fields as dataclass_fields
from functools import partial
from typing import Any, Literal

from numpy.typing import ArrayLike
from torch import Tensor
from torch.utils.data import DataLoader

from seqbatch.collating import collate
from seqbatch.datasets import PieceDataset
from seqbatch.measuring import dataset_lengths
from seqbatch.placement import LAYOUTS, targets_of
from seqbatch.plan import Plan
from seqbatch.ranks import scatter_lanes
from seqbatch.sampler import PlanBatchSampler
from seqbatch.strategy import Strategy, check_choice
from seqbatch.tensors import map_tensors

__all__ = ["PlanLoader", "make_loader"]

_OURS = ("batch_size", "shuffle", "sampler", "batch_sampler", "drop_last", "collate_fn", "in_order")


@dataclass
class _Iteration:
    """How far one iteration of a loader has come."""

    history: Any  # where it began: the sampler's own object, a new one for every move
    handed_out: int = 0


class PlanLoader(DataLoader[Any]):
    """The ``DataLoader`` that :func:`make_loader` makes: epochs that move on by themselves, and exact resume.

    An iteration that handed out its last batch moves to the next epoch; one that is broken off does not, and the
    next one begins the same epoch anew (or where it was resumed). `set_epoch` goes to any other.
    """

    batch_sampler: PlanBatchSampler
    _last: _Iteration = _Iteration(None)  # the iteration that handed out the last batch

    @property
    def plan(self) -> Plan:
        """The plan of the present epoch, of all ranks."""
        return self.batch_sampler.plan

    @property
    def epoch(self) -> int:
        """The present epoch: that of the next iteration."""
        return self.batch_sampler.epoch

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of `epoch`; no move if it is the present one, which may have been resumed inside."""
        self.batch_sampler.set_epoch(epoch)

    def __len__(self) -> int:
        """Batches of the whole present epoch, also of those that ran before a resume: what trainers count to."""
        return self.batch_sampler.steps_done * len(self.batch_sampler.ranks) + len(self.batch_sampler)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        sampler = self.batch_sampler
        sampler.rewind()
        count, mine = len(sampler), _Iteration(sampler._history)
        batches = self._here() if self.num_workers == 0 and not self.pin_memory else super().__iter__()
        try:
            for batch in batches:
                mine.handed_out += 1
                self._last = mine
                yield batch
        finally:  # also where the caller leaves the loop at the last batch
            if mine.handed_out == count and mine.history is sampler._history:
                self.set_epoch(self.epoch + 1)

    def _here(self) -> Iterator[Any]:
        """Batches made in this process, without what ``DataLoader`` does for workers: a third of the time."""
        collate_fn: Any = self.collate_fn
        for indices in self.batch_sampler:
            yield collate_fn(self.dataset.__getitems__(indices))  # type: ignore[attr-defined]

    def state_dict(self, after: Any = None, *, lanes: Any = None) -> dict[str, Any]:
        """Return the state to resume from, after the batch that was trained on last.

        Args:
            after: That batch. It knows its own place, so whatever reads ahead does no harm. Without it: after the
                last batch that this loader itself has handed out, whatever its workers have read.
            lanes: For a plan that carries state: the recurrent state after the batch, of all lanes
                (:func:`seqbatch.gather_lanes` where there are several ranks); ``()`` where it is kept elsewhere, as
                by :meth:`seqbatch.pipeline.LayerPipeline.save`.

        Returns:
            Under 1 KB, and the lanes. Equal on all ranks.
        """
        sampler = self.batch_sampler
        if after is not None:
            state = sampler.state_dict(after=after)
        else:
            here = self._last.history is sampler._history
            state = sampler.state_after(self._last.handed_out // len(sampler.ranks) if here else 0)
        if after is not None and not getattr(after, "placement", after).update:
            warnings.warn(
                "this batch does not end an optimizer step: the gradients accumulated so far are not in the state, and "
                "a resume would leave them out; save after a batch with batch.update",
                stacklevel=2,
            )
        return state if lanes is None else state | {"lanes": map_tensors(lambda lane: lane.detach().clone(), lanes)}

    def load_state_dict(self, state: Mapping[str, Any], *, reset_lanes: bool = False) -> Any:
        """Go on after the batch that `state` was taken after, with any number of workers and ranks.

        Args:
            state: From `state_dict`.
            reset_lanes: Start all lanes of a carried plan anew, where the state has no lanes.

        Returns:
            The recurrent state of this rank's lanes (of all with ``rank="all"``), to be given to the next
            ``batch.carry_in``, or None.

        Raises:
            ValueError: see :meth:`seqbatch.PlanBatchSampler.load_state_dict`.
        """
        sampler = self.batch_sampler
        sampler.load_state_dict(state, reset_lanes=reset_lanes)
        lanes = None if reset_lanes else state.get("lanes")
        if lanes is None or not len(sampler):
            return None
        map_tensors(self._check_lanes, lanes)
        if len(sampler.ranks) > 1:
            return lanes
        return scatter_lanes(lanes, sampler.ranks[0], sampler.num_replicas)

    def _check_lanes(self, lanes: Tensor) -> None:
        wanted = int(self.plan.lanes[0])
        if lanes.ndim < 2 or lanes.shape[-2] != wanted:
            raise ValueError(
                f"the state's lanes have shape {tuple(lanes.shape)}, but the plan has {wanted} lanes, (..., {wanted}, "
                "H): save those of all ranks, lanes=seqbatch.gather_lanes(state)"
            )


def make_loader(
    dataset: Any,
    strategy: Strategy,
    *,
    lengths: ArrayLike | str | None = None,
    seed: int = 0,
    epoch: int = 0,
    train: bool = True,
    rank: int | Literal["all"] | None = None,
    num_replicas: int | None = None,
    mesh: Any = None,
    layout: str = "time_major",
    next_token: bool | str | int = False,
    fields: Sequence[str | int] | None = None,
    per_sequence: Sequence[str | int] = (),
    padding_value: float | Mapping[Any, float] = 0,
    as_dict: bool = False,
    accumulation: int = 1,
    cost: tuple[float, float] = (1.0, 0.0),
    tail: str = "split",
    worst_first: bool = False,
    lengths_cache: Any = None,
    num_workers: int = 0,
    **options: Any,
) -> PlanLoader:
    """Return a ``DataLoader`` that runs the strategy's plan over `dataset`, one plan an epoch.

    Args:
        dataset: Map-style; :class:`~seqbatch.TokenArray` is the fast path. Items are token tensors, arrays or lists
            (T_i, ...), or dicts or tuples of such fields.
        strategy: How to batch.
        lengths: (N,) tokens of each sequence; a text names a column of a Hugging Face dataset that holds them.
            By default the dataset's own ``lengths``, else they are measured, see `lengths_cache`. (N, 2) of source
            and target makes batches of pairs, :class:`~seqbatch.PairBatch`, of items with two fields.
        seed: With the epoch decides every random choice.
        epoch: The first epoch.
        train: False for evaluation: dataset order, nothing dropped, nothing repeated; see :func:`~seqbatch.stitch`.
        rank: See :class:`~seqbatch.PlanBatchSampler`, as for `num_replicas`, `mesh`, `accumulation`, `cost`, `tail`
            and `worst_first`.
        num_replicas: Ranks.
        mesh: A ``DeviceMesh``.
        layout: ``"time_major"`` (T, B, ...), ``"batch_first"`` (B, T, ...) or ``"flat"`` (S, ...) with
            ``batch.cu_seqlens``.
        next_token: Make ``batch.targets``, the next token of the same sequence; a text or number names the field. Of
            pairs those of the target side.
        fields: The per-token fields of the items to use; by default all that are not in `per_sequence`. Of pairs the
            two sides, in the order of the columns of `lengths`.
        per_sequence: Fields with one value a sequence, such as a label: in ``batch.per_sequence``.
        padding_value: What cells without a token hold, or a dict by field (``labels`` get -100).
        as_dict: Yield the keyword arguments of Hugging Face models; see :func:`~seqbatch.collating.as_model_inputs`.
        accumulation: Micro-steps of an optimizer step.
        cost: What balances the ranks.
        tail: What becomes of batches that fill no whole step.
        worst_first: Begin with the most expensive step.
        lengths_cache: A file to keep measured lengths in; see :func:`~seqbatch.measuring.dataset_lengths`.
        num_workers: As for ``DataLoader``. A ``TokenArray`` is fastest with 0.
        **options: Further options of ``DataLoader``: ``pin_memory``, ``persistent_workers``, ...

    Raises:
        TypeError, ValueError: settings of the wrong type or range, lengths that are not those of the dataset.

    >>> import seqbatch
    >>> data = seqbatch.TokenArray.of_sequences([[1, 2, 3], [4, 5], [6]])
    >>> loader = make_loader(data, seqbatch.Padding(2, shuffle=False), next_token=True)
    >>> [batch.targets.tolist() for batch in loader]
    [[[2, 5], [3, -100], [-100, -100]], [[-100]]]
    """
    wrong = [name for name in options if name in _OURS]
    if wrong:
        raise ValueError(f"the strategy decides {', '.join(wrong)}: leave it out, and say it in {strategy!r}")
    check_choice("layout", layout, LAYOUTS)
    if worst_first and not train:
        raise ValueError("train=False keeps the dataset's order: leave worst_first out")
    if lengths is None or isinstance(lengths, str):
        lengths = dataset_lengths(
            dataset,
            lengths,
            fields=fields,
            per_sequence=per_sequence,
            num_workers=num_workers,
            cache=lengths_cache,
        )
    wanted, target = targets_of(next_token)
    sampler = PlanBatchSampler(
        strategy if train else _in_order(strategy),
        lengths,
        seed=seed,
        epoch=epoch,
        rank=rank,
        num_replicas=num_replicas,
        mesh=mesh,
        next_token=wanted,
        accumulation=accumulation,
        cost=cost,
        tail=tail,
        worst_first=worst_first,
    )
    if len(sampler.lengths) != len(dataset):
        raise ValueError(f"there are {len(sampler.lengths)} lengths for a dataset of {len(dataset)} sequences")
    if not train:
        _check_whole(sampler)
    return PlanLoader(
        PieceDataset(dataset, fields=fields, per_sequence=per_sequence, target=target),
        batch_sampler=sampler,
        collate_fn=partial(collate, layout=layout, padding_value=padding_value, as_dict=as_dict),
        num_workers=num_workers,
        **options,
    )


def _in_order(strategy: Strategy) -> Strategy:
    """The same strategy without chance, and without leaving anything out."""
    if not isinstance(strategy, Strategy):
        return strategy
    settings = {"shuffle": False, "drop_last": False}
    return replace(strategy, **{f.name: settings[f.name] for f in dataclass_fields(strategy) if f.name in settings})


def _check_whole(sampler: PlanBatchSampler) -> None:
    left_out = sampler.plan.dropped[sampler.plan.dropped["reason"] != "empty"]
    cuts = "" if sampler.plan.pairs else '"split" or '
    advice = f'choose overlong={cuts}"alone", and tail="split"'
    empty = sampler.plan.dropped[sampler.plan.dropped["reason"] == "empty"]
    half = empty[empty["length"].any(axis=1)] if sampler.plan.pairs else empty[:0]
    if len(half):
        raise ValueError(
            f"train=False leaves nothing out, but {len(half)} pairs have an empty side, the first of them pair "
            f"{half['sequence'][0]}: fill both sides, or leave such pairs out of the dataset"
        )
    if len(left_out):
        raise ValueError(
            f"train=False leaves nothing out, but {sampler.strategy!r} drops {len(left_out)} pieces, the first of "
            f"sequence {left_out['sequence'][0]}: {advice}"
        )
    if sampler.tail == "drop":
        raise ValueError(f'train=False leaves nothing out, but tail="drop" does: {advice}')
