"""Stages on torch's engine: schedules of ``torch.distributed.pipelining`` for units of one shape."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleLoopedBFS

from seqbatch.pipeline.parts import Mode, Spec

__all__ = ["Engine", "Shape", "check_order"]


class Shape(NamedTuple):
    """What a schedule is made for; torch fixes the size of every message when it makes one."""

    units: int
    steps: int
    lanes: int
    training: bool
    specs: tuple[Spec, ...]


class Engine:
    """The schedules of one rank: made where a shape is new, and the last few kept.

    Args:
        modules: The stages of this rank, in order.
        numbers: Their numbers among all stages.
        stages: How many there are on all ranks.
        group: The ranks of the pipeline.
        mode: As of the pipeline.
        device: Where they run.
        cache: How many shapes to keep, with a buffer for each message.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        numbers: Sequence[int],
        stages: int,
        group: Any,
        mode: Mode,
        device: torch.device,
        cache: int,
    ) -> None:
        self.modules, self.numbers, self.stages = list(modules), list(numbers), stages
        self.group, self.mode, self.device, self.cache = group, mode, device, cache
        self._schedules: OrderedDict[Shape, Any] = OrderedDict()

    @property
    def first(self) -> bool:
        """Whether this rank has the first stage."""
        return self.numbers[0] == 0

    @property
    def last(self) -> bool:
        """Whether this rank has the last stage."""
        return self.numbers[-1] == self.stages - 1

    def alternates(self, count: int) -> bool:
        """Whether forward and backward passes alternate, which keeps fewer units in memory; full BPTT cannot."""
        return self.mode != "full" and len(self.modules) == 1 and count >= self.stages

    def run(self, shape: Shape, data: Tensor) -> None:
        """Run all units forward, and in training backward; the stages know the rest of the batch."""
        inputs = (data,) if self.first else ()
        if not shape.training and dist.get_world_size(self.group) == 1:
            # torch's schedules cannot leave out the backward pass within one rank
            for x in torch.split(data, shape.steps):
                for module in self.modules:
                    x = module(x)
            return
        schedule = self._schedule(shape)
        target = {"target": torch.zeros(shape.units)} if self.last and shape.training else {}
        schedule.step(*inputs, **target, return_outputs=False)

    def forget(self) -> None:
        """Drop all schedules, and what a step that failed has left in them."""
        self._schedules.clear()

    def _schedule(self, shape: Shape) -> Any:
        if shape in self._schedules:
            self._schedules.move_to_end(shape)
            return self._schedules[shape]
        if len(self._schedules) >= self.cache:
            self._schedules.popitem(last=False)  # before the new one's buffers are made
        schedule = self._made(shape)
        self._schedules[shape] = schedule
        return schedule

    def _made(self, shape: Shape) -> Any:
        stages = [
            _Stage(
                module,
                number,
                self.stages,
                self.device,
                input_args=_wire(shape, number),
                output_args=_wire(shape, number + 1),
                group=self.group,
            )
            for number, module in zip(self.numbers, self.modules, strict=True)
        ]
        loss = _as_it_is if shape.training else None
        if shape.training and self.alternates(shape.units):
            return Schedule1F1B(stages[0], shape.units, loss, scale_grads=False)
        schedule = ScheduleLoopedBFS(stages, shape.units, loss, scale_grads=False)  # type: ignore[arg-type]
        if self.mode == "full":
            check_order(schedule)
        return schedule


class _Stage(PipelineStage):
    def _get_init_p2p_neighbors_ops(self) -> list[Any]:
        """Nothing to connect where all stages are on one rank, which torch 2.11 overlooks."""
        return [] if self.group_size == 1 else super()._get_init_p2p_neighbors_ops()


def check_order(schedule: Any) -> None:
    """Refuse a schedule whose backward passes do not come in descending order.

    Raises:
        RuntimeError: Full BPTT needs it, and torch only happens to do it so.
    """
    for rank, actions in schedule.pipeline_order.items():
        backward: dict[int, list[int]] = {}
        for action in actions:
            if action is not None and "BACKWARD" in action.computation_type.name:
                backward.setdefault(action.stage_index, []).append(action.microbatch_index)
        for stage, order in backward.items():
            if order != sorted(order, reverse=True):
                raise RuntimeError(
                    f"{type(schedule).__name__} of torch {torch.__version__} runs the backward passes of stage {stage} "
                    f"on rank {rank} in the order {order[:8]}, and full BPTT over time chunks needs the descending "
                    "one: use mode='truncated' or 'microbatch', or torch 2.11 to 2.13"
                )


def _as_it_is(output: Tensor, target: Tensor) -> Tensor:
    """The last stage gives its loss already, so that no engine holds its scores."""
    return output


def _wire(shape: Shape, border: int) -> Tensor:
    """What comes into stage `border`, without storage; from the last stage: its loss."""
    if border == len(shape.specs):
        return torch.empty(1, device="meta", requires_grad=shape.training)
    tensor = shape.specs[border].empty(shape.steps, shape.lanes)
    return tensor.requires_grad_(shape.training and border > 0 and tensor.is_floating_point())
