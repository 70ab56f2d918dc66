"""One batch as it is given to a pipeline: checked, and put into words that ranks compare."""

import hashlib
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from seqbatch.batch import SequenceBatch
from seqbatch.pipeline.parts import Mode, check_mode
from seqbatch.pipeline.units import unit_shape
from seqbatch.strategy import check_integer

__all__ = ["Call", "Carried", "Settings", "check_loss", "check_settings", "read_call"]


class Settings(NamedTuple):
    """How a pipeline cuts batches, and what divides its losses."""

    mode: Mode
    chunk_size: int | None
    num_microbatches: int | None
    replicas: int
    looks_back: bool


def check_settings(
    mode: Mode, chunk_size: int | None, num_microbatches: int | None, virtual: int, seed: int, cache: int
) -> None:
    """Refuse settings of a pipeline that do not go together."""
    check_mode(mode)
    if (mode == "microbatch") != (num_microbatches is not None) or (mode == "microbatch" and chunk_size is not None):
        raise ValueError(
            "mode='microbatch' takes num_microbatches and no chunk_size, the others chunk_size alone, got "
            f"mode={mode!r}, chunk_size={chunk_size}, num_microbatches={num_microbatches}"
        )
    for name, value in {"chunk_size": chunk_size, "num_microbatches": num_microbatches}.items():
        if value is not None:
            check_integer(name, value, at_least=1)
    check_integer("virtual", virtual, at_least=1)
    check_integer("seed", seed, at_least=0)
    check_integer("cache", cache, at_least=1)


def check_loss(loss: Any) -> None:
    """Refuse what is no function, and modules whose parameters nobody would train."""
    if not callable(loss):
        raise TypeError(f"loss must be a function of (output, targets), got {type(loss).__name__}")
    if isinstance(loss, nn.Module) and any(True for _ in loss.parameters()):
        raise ValueError("loss has parameters, which no optimizer of the pipeline would train: put them into head")


@dataclass
class Carried:
    """What a batch leaves for the next one.

    Attributes:
        states: For each layer of this rank, one state, or one for each micro-batch.
        units: Micro-batches (1 for time chunks) and lanes of the batch that left them; None: nothing is carried.
        cleared: (B,) bool, lanes to be cleared before the next batch.
    """

    states: dict[str, list[Any]] = field(default_factory=dict)
    units: tuple[int, int] | None = None
    cleared: Tensor | None = None


@dataclass(frozen=True)
class Call:
    """A batch that fits.

    Attributes:
        batch: Time-major, with reset and mask.
        targets: (T, B, ...).
        fresh: Whether all states are 0 before it.
        scale: What the sum of its losses is multiplied by.
        shape: (count, steps, lanes) of its units.
        units: As of `Carried`.
        facts: What all ranks of a replica must have alike.
    """

    batch: SequenceBatch
    targets: Tensor
    fresh: bool
    scale: float
    shape: tuple[int, int, int]
    units: tuple[int, int]
    facts: dict[str, Any]


def read_call(
    batch: SequenceBatch,
    targets: Tensor | None,
    carry: bool | None,
    loss_tokens: int | None,
    carried: Carried,
    settings: Settings,
    digest: bool,
) -> Call:
    """Check a batch; see :meth:`LayerPipeline.step` for what it must be.

    Raises:
        TypeError: It is no SequenceBatch, or its data are no tensor.
        ValueError: It has no targets, or sizes or counts do not fit.
    """
    if not isinstance(batch, SequenceBatch):
        raise TypeError(
            "batch must be a SequenceBatch, as loaders and collate functions of seqbatch give, got "
            f"{type(batch).__name__}"
        )
    if batch.layout != "time_major":
        if targets is not None or int(batch.loss_mask.sum()) != batch.placement.loss_tokens:
            raise ValueError(f"targets and loss masks of one's own go with layout='time_major', got {batch.layout!r}")
        batch = batch.to_layout("time_major")
    if not isinstance(batch.data, Tensor):
        raise TypeError(
            f"the data of a pipelined batch must be one tensor, got {type(batch.data).__name__}: only tensors are cut "
            "and sent"
        )
    targets = _check_targets(batch.targets if targets is None else targets)
    grid = batch.placement.steps, batch.placement.lanes
    batch = _with_flags(batch, carried.cleared)
    counted = _check_counts(batch, targets, grid, loss_tokens, settings.replicas)
    shape = unit_shape(settings.mode, grid, settings.chunk_size, settings.num_microbatches)
    carry = batch.placement.carry if carry is None else carry
    fresh = not carry or carried.units is None or bool(cast(Tensor, batch.reset)[0].all())
    units = shape[0] if settings.mode == "microbatch" else 1, grid[1]
    if not fresh and carried.units != units:
        raise ValueError(
            f"the carried states are of {carried.units[1] if carried.units else 0} lanes, the batch has {grid[1]}: "
            "call reset_state() where the lanes change, or pass carry=False"
        )
    if not fresh and settings.looks_back:
        raise ValueError("bidirectional layers cannot go on from carried states: pass carry=False")
    scale = settings.replicas / max(counted, 1)
    facts = {
        "grid": list(grid),
        "features": list(batch.data.shape[2:]),
        "dtype": str(batch.data.dtype),
        "targets": [str(targets.dtype), *targets.shape[2:]],
        "scale": scale,
        "units": list(shape),
        "carry": not fresh,
        "tokens": int(batch.loss_mask.sum()),
        "content": _digest(batch, targets) if digest else "",
    }
    return Call(batch, targets, fresh, scale, shape, units, facts)


def _check_targets(targets: Any) -> Tensor:
    """They themselves, if they are there."""
    if targets is None:
        raise ValueError("the batch has no targets: make the loader with next_token=True, or pass targets, (T, B, ...)")
    if not isinstance(targets, Tensor):
        raise TypeError(f"targets must be a tensor, (T, B, ...), got {type(targets).__name__}")
    return targets


def _with_flags(batch: SequenceBatch, cleared: Tensor | None) -> SequenceBatch:
    """The batch with flags on the CPU, lanes that are to be cleared included."""
    shape = batch.loss_mask.shape
    reset = torch.zeros(shape, dtype=torch.bool) if batch.reset is None else batch.reset.cpu()
    mask = torch.ones(shape, dtype=torch.bool) if batch.mask is None else batch.mask.cpu()
    if cleared is not None:
        if len(cleared) != shape[1]:
            raise ValueError(
                f"reset_state(lanes) was given {len(cleared)} lanes, the batch has {shape[1]}: reset_state() clears all"
            )
        reset = torch.cat([reset[:1] | cleared, reset[1:]])
    return replace(batch, reset=reset, mask=mask, loss_mask=batch.loss_mask.cpu())


def _check_counts(
    batch: SequenceBatch, targets: Tensor, grid: tuple[int, int], loss_tokens: int | None, replicas: int
) -> int:
    """What the sum of the losses is divided by."""
    for name, part in {
        "data": batch.data,
        "reset": batch.reset,
        "mask": batch.mask,
        "loss_mask": batch.loss_mask,
        "targets": targets,
    }.items():
        if part.shape[:2] != grid:
            raise ValueError(
                f"{name} must have the batch's {grid[0]} steps and {grid[1]} lanes, got shape {tuple(part.shape)}"
            )
    if not grid[0] or not grid[1]:
        raise ValueError(f"a batch must have steps and lanes, got {grid[0]} by {grid[1]}")
    if loss_tokens is not None:
        return check_integer("loss_tokens", loss_tokens, at_least=1)
    placement, true = batch.placement, int(batch.loss_mask.sum())
    if true != placement.loss_tokens:
        raise ValueError(
            f"loss_mask has {true} tokens, the plan counts {placement.loss_tokens}: pass loss_tokens=, the tokens of "
            "the step over all replicas (seqbatch.global_loss_tokens counts them)"
        )
    if placement.num_replicas != replicas:
        raise ValueError(
            f"the batch is shared among {placement.num_replicas} replicas, the pipeline has {replicas}: "
            "make_loader(..., mesh=mesh), or pass loss_tokens=, the tokens of the step over all replicas"
        )
    return placement.step_loss_tokens


def _digest(batch: SequenceBatch, targets: Tensor) -> str:
    """Of which tokens lie where, of all flags, and of what lies on the CPU: differs where ranks read other data."""
    found = hashlib.blake2b(digest_size=8)
    place = batch.placement
    for column in (place.sequence, place.start, place.length, place.step, place.lane):
        found.update(column.tobytes())
    for flag in (batch.reset, batch.mask, batch.loss_mask):
        found.update(cast(Tensor, flag).numpy().tobytes())
    for part in (batch.data, targets):
        if part.device.type == "cpu":  # looking at others would wait for their device
            found.update(part.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
