"""A batch cut into units: time chunks, or micro-batches of lanes."""

from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from seqbatch.batch import SequenceBatch
from seqbatch.pipeline.parts import Mode

__all__ = ["Piece", "Units", "cut"]


class Piece(NamedTuple):
    """What the stages know of one unit, beside the data that go from one to the next.

    Attributes:
        reset: (T, B) bool, or None where nothing starts.
        mask: (T, B) bool, or None where all cells are real.
        on_cpu: Both on the CPU, for layers that take them there.
        rows: (N,) int64, the cells that carry loss, counted step by step; None: all.
        targets: (N, ...), theirs.
    """

    reset: Tensor | None
    mask: Tensor | None
    rows: Tensor | None
    targets: Tensor
    on_cpu: tuple[Tensor | None, Tensor | None]


@dataclass(frozen=True)
class Units:
    """A batch as `count` units of `steps` by `lanes`.

    Attributes:
        data: (count * steps, lanes, ...), one unit after the other, so that splitting the first axis gives them.
        pieces: What belongs to each.
    """

    data: Tensor
    pieces: tuple[Piece, ...]
    count: int
    steps: int
    lanes: int


def unit_shape(
    mode: Mode, grid: tuple[int, int], chunk_size: int | None, num_microbatches: int | None
) -> tuple[int, int, int]:
    """(count, steps, lanes) of the units of a batch of `grid` = (T, B).

    Full BPTT has the same gradients wherever it is cut, so that the units share the steps evenly; truncated BPTT is
    cut where the user says.
    """
    steps, lanes = grid
    if mode == "microbatch":
        count = num_microbatches or 1
        if count > lanes:
            raise ValueError(
                f"a batch of {lanes} lanes cannot be cut into num_microbatches={count}: give larger batches or fewer"
            )
        return count, steps, -(-lanes // count)
    chunk = min(chunk_size or steps, steps)
    count = -(-steps // chunk)
    return count, chunk if mode == "truncated" else -(-steps // count), lanes


def cut(
    batch: SequenceBatch, targets: Tensor, mode: Mode, shape: tuple[int, int, int], fresh: bool, device: torch.device
) -> Units:
    """Cut a time-major batch into units of `shape` and bring them to `device`.

    Args:
        batch: Its data are one tensor.
        targets: (T, B, ...).
        mode: ``"microbatch"`` cuts lanes, the others steps.
        shape: Of `unit_shape`. What a batch lacks to fill it is padding: masked, without loss.
        fresh: Whether the state before the batch is 0, so that resets at its first step change nothing.
        device: Where the stage runs.
    """
    count, steps, lanes = shape
    data, loss_mask = batch.data, batch.loss_mask
    reset, mask = cast(Tensor, batch.reset), cast(Tensor, batch.mask)  # read_call has made them
    missing = (steps, lanes * count) if mode == "microbatch" else (steps * count, lanes)
    missing = missing[0] - data.shape[0], missing[1] - data.shape[1]
    flags = [_filled(flag.cpu(), missing) for flag in (reset, mask, loss_mask)]
    if fresh:
        flags[0][0] = False
    data, targets = _filled(data, missing), _filled(targets, missing)
    if mode == "microbatch":
        data = torch.cat(torch.split(data, lanes, 1)) if count > 1 else data
        parts = [torch.split(part, lanes, 1) for part in (*flags, targets)]
    else:
        parts = [torch.split(part, steps) for part in (*flags, targets)]
    pieces = tuple(_piece(*four, device=device) for four in zip(*parts, strict=True))
    return Units(data.to(device, non_blocking=True), pieces, count, steps, lanes)


def _filled(part: Tensor, missing: tuple[int, int]) -> Tensor:
    """A copy with so many more steps and lanes of zeros."""
    if not any(missing):
        return part.clone() if part.dtype == torch.bool else part
    return F.pad(part, (0, 0) * (part.dim() - 2) + (0, missing[1], 0, missing[0]))


def _piece(reset: Tensor, mask: Tensor, loss_mask: Tensor, targets: Tensor, *, device: torch.device) -> Piece:
    rows = None if loss_mask.all() else loss_mask.flatten().nonzero().squeeze(1)
    targets = targets.flatten(0, 1)
    targets = targets if rows is None else targets[rows.to(targets.device)]
    flags = reset if reset.any() else None, None if mask.all() else mask
    there = [None if part is None else part.to(device, non_blocking=True) for part in (*flags, rows)]
    return Piece(there[0], there[1], there[2], targets.to(device, non_blocking=True), flags)
