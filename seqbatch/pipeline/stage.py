"""One stage: the layers of one place, which take unit after unit and hand their state from each to the next."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from seqbatch.pipeline.parts import Mode, run_layer, state_tensors, takes_cpu_flags, untouched
from seqbatch.pipeline.units import Piece
from seqbatch.tensors import detach_state

__all__ = ["Stage", "Step"]

States = list[Any]
"""The state of each layer of a stage."""


class Step(NamedTuple):
    """What a stage needs to know before the first unit of a batch comes.

    Attributes:
        pieces: One for each unit.
        states: Before the batch, for each layer: one for the first unit, or in micro-batches one for each. None: 0.
        scale: What the sum of the losses is multiplied by.
        draws: What random numbers depend on, beside layer and unit: (seed, replica, step).
    """

    pieces: Sequence[Piece]
    states: Sequence[States | None]
    scale: float
    draws: tuple[int, int, int]


class Stage(nn.Module):
    """The consecutive parts of one place. Engines call it once for each unit, in ascending order.

    In full BPTT the state after a unit starts the next one as a leaf of the next one's graph, and the gradient that
    gathers there comes back when this unit's turn in the backward pass comes, which must be after the next one's.

    Args:
        parts: By name, in order: the embedding, layers, the head.
        numbers: Of each part, counted over all stages: what random numbers depend on.
        loss: Where this is the last stage: (N, ...) outputs, (N, ...) targets -> (N,) losses.
        mode: Whether units are time chunks with or without a gradient between them, or micro-batches.
        device: Where it runs.
    """

    def __init__(
        self,
        parts: Mapping[str, nn.Module],
        numbers: Mapping[str, int],
        loss: Callable[[Tensor, Tensor], Tensor] | None,
        mode: Mode,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.names, self.numbers = list(parts), [numbers[name] for name in parts]
        self.parts = nn.ModuleList(parts.values())
        self.loss: Any = loss
        self.mode, self.device = mode, device
        self.loss_sum: Tensor | None = None
        self._reset(None)

    def _reset(self, step: Step | None) -> None:
        self._step: Any = step  # there is one wherever units come
        self._unit = 0
        self._walked = 0 if step is None else len(step.pieces)  # the unit that went backward last
        self._states: States = []
        self._final: list[States] = []
        self._leaves: dict[int, list[Tensor]] = {}

    @property
    def layers(self) -> list[str]:
        """Names of the parts that have a state."""
        return [name for name in self.names if name.startswith("layers.")]

    @contextmanager
    def during(self, step: Step) -> Iterator[list[States]]:
        """Run a batch: yields the list that holds the states after it, when it is done."""
        self._reset(step)
        self.loss_sum = None
        after: list[States] = []
        generator = _generator(self.device) if self.training else None
        drawn = None if generator is None else generator.get_state()
        try:
            yield after
            after += self._final
        finally:
            if generator is not None and drawn is not None:
                generator.set_state(drawn)
            self._reset(None)  # frees what the units have left, also after an error

    def forward(self, x: Tensor) -> Tensor:
        """Run the next unit: (T, B, ...) -> (T, B, ...), or (1,) the scaled sum of its losses from the last stage."""
        step, unit = self._step, self._unit
        self._unit += 1
        piece = step.pieces[unit]
        before = self._before(unit)
        after: States = []
        for name, number, part in zip(self.names, self.numbers, self.parts, strict=True):
            if self.training:
                _generator(self.device).manual_seed(_seed(*step.draws, number, unit))
            if name == "head":
                x = part(_rows(x, piece))
            elif name == "embed":
                x = part(x)
            else:
                state = None if before is None else before[len(after)]
                flags = piece.on_cpu if takes_cpu_flags(part) else (piece.reset, piece.mask)
                x, state = run_layer(part, x, state, *flags)
                after.append(state)
        if self.loss is not None:
            total = self._losses(x if "head" in self.names else _rows(x, piece), piece)
            x = (total * step.scale).float()  # of a dtype that engines are told; its gradient is 1, whatever the dtype
        return self._handed(unit, x.contiguous(), after)  # messages are sent as they lie in memory

    def _before(self, unit: int) -> States | None:
        """The states that a unit starts from."""
        first: States | None = self._step.states[unit]
        return first if self.mode == "microbatch" or unit == 0 else self._states

    def _handed(self, unit: int, x: Tensor, after: States) -> Tensor:
        """Keep the states for the next unit; tie their gradient to the output's where there is full BPTT."""
        last = unit + 1 == len(self._step.pieces)
        kept = detach_state(after)
        if self.mode == "microbatch":
            self._final = [*self._final, kept] if unit else [kept]
        elif last:
            self._final = [kept]
        else:
            self._states = kept
        if not torch.is_grad_enabled():
            return x
        if self.mode != "full":
            return _learning(x)
        handed = [] if last else [t for t in state_tensors(after) if t.requires_grad]
        if not last:
            leaves = [
                k.requires_grad_()
                for k, t in zip(state_tensors(kept), state_tensors(after), strict=True)
                if t.requires_grad
            ]
            self._leaves[unit + 1] = leaves
        found: Tensor = _Hand.apply(self, unit, x, *handed)  # type: ignore[no-untyped-call]
        return _learning(found)

    def returned(self, unit: int) -> list[Tensor | None]:
        """The gradients that the unit after `unit` has left for its state; called in descending order.

        Raises:
            RuntimeError: In another order, in which the gradients are not there yet.
        """
        if self._walked != unit + 1:
            raise RuntimeError(
                f"the backward pass of time chunk {unit} came after that of {self._walked}, not {unit + 1}: full BPTT "
                "hands gradients from each chunk to the one before it, and this version of torch schedules them in "
                "another order"
            )
        self._walked = unit
        return [leaf.grad for leaf in self._leaves.pop(unit + 1, [])]

    @torch.no_grad()
    def try_loss(self, x: Tensor, targets: Tensor) -> None:
        """Run head and loss on a few rows of (T, B, ...), so that what they raise is raised before anything is sent."""
        x = x.flatten(0, 1)[: len(targets)]
        with untouched(self.parts, x.device):
            for name, part in zip(self.names, self.parts, strict=True):
                x = part(x) if name == "head" else x
            self._each(x, targets)

    def _each(self, x: Tensor, targets: Tensor) -> Tensor:
        losses, rows = self.loss(x, targets), len(targets)
        if not isinstance(losses, Tensor) or losses.shape != (rows,):
            got = f"shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
            raise ValueError(
                f"loss must return one loss for each of the {rows} rows, shape ({rows},), got {got}: use "
                "reduction='none'"
            )
        return losses

    def _losses(self, x: Tensor, piece: Piece) -> Tensor:
        losses = self._each(x, piece.targets)
        total = losses.sum(dtype=torch.promote_types(losses.dtype, torch.float32)).view(1)
        self.loss_sum = total.detach() if self.loss_sum is None else self.loss_sum + total.detach()
        return total


class _Hand(torch.autograd.Function):
    """The identity of a stage's output, whose backward brings in the gradients of the states that it handed on."""

    @staticmethod
    def forward(ctx: Any, stage: Stage, unit: int, x: Tensor, *states: Tensor) -> Tensor:
        ctx.stage, ctx.unit = stage, unit
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        stage, ctx.stage = ctx.stage, None
        return None, None, gradient, *stage.returned(ctx.unit)


def _rows(x: Tensor, piece: Piece) -> Tensor:
    """(N, ...): the outputs that carry loss; the others need no head and no softmax."""
    x = x.flatten(0, 1)
    return x if piece.rows is None else x.index_select(0, piece.rows)


def _learning(x: Tensor) -> Tensor:
    """The output as one that takes a gradient, as engines expect, also where all before it is frozen."""
    return x if x.requires_grad else x.detach().requires_grad_()


def _generator(device: torch.device) -> torch.Generator:
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index or 0]
    return torch.default_generator


def _seed(*numbers: int) -> int:
    """A seed for what these numbers name, the same for every way to split the layers."""
    high, low = np.random.SeedSequence(numbers).generate_state(2)
    return int(high) << 32 | int(low)
