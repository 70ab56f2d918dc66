"""Runs batches: agrees with the other ranks, cuts, sends all units through the stages, and adds up the loss."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from seqbatch.batch import SequenceBatch
from seqbatch.pipeline.agreement import Council
from seqbatch.pipeline.calls import Call, Carried, Settings, read_call
from seqbatch.pipeline.engine import Engine, Shape
from seqbatch.pipeline.parts import Spec, probe
from seqbatch.pipeline.placing import Place
from seqbatch.pipeline.stage import Stage, States, Step
from seqbatch.pipeline.units import cut

__all__ = ["Runner"]


class Runner:
    """What a rank does with a batch.

    Args:
        stages: Of this rank.
        engine: That runs them.
        place: Where this rank stands.
        settings: How batches are cut.
        seed: Of dropout.
        council: All ranks.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        engine: Engine,
        place: Place,
        settings: Settings,
        seed: int,
        council: Council,
    ) -> None:
        self.stages, self.engine, self.place, self.settings, self.seed = list(stages), engine, place, settings, seed
        self.council = council
        self._specs: dict[Any, tuple[Spec, ...]] = {}
        self._broken: str | None = None
        self._all_dtypes = ""

    def _dtypes(self) -> list[str]:
        """What this rank's layers compute in, which ``.double()`` and the like change."""
        return sorted({str(parameter.dtype) for stage in self.stages for parameter in stage.parameters()})

    def prepare(
        self,
        batch: SequenceBatch,
        targets: Tensor | None,
        carry: bool | None,
        loss_tokens: int | None,
        carried: Carried,
        step: int,
    ) -> tuple[Call, int]:
        """Check a batch on all ranks at once; how many tokens carry loss in all replicas' batches."""
        if self._broken is not None:
            raise RuntimeError(
                f"this pipeline stopped in mid-step ({self._broken}): start again from the last checkpoint"
            )
        error: Exception | None = None
        facts, call = {}, cast(Call, None)
        try:
            call = read_call(
                batch, targets, carry, loss_tokens, carried, self.settings, digest=self.council.group is not None
            )
            facts = call.facts | {
                "step": step,
                "learning": torch.is_grad_enabled(),
                "training": any(stage.training for stage in self.stages),
                "autocast": str(_autocast(self.place.device)),
            }
        except Exception as found:  # whatever it is, all ranks must stop
            error = found
        everyone = self.council.same({"replica": self.place.replica, **facts}, {"dtypes": self._dtypes()}, error)
        self._all_dtypes = str([other["dtypes"] for other in everyone])
        self.specs(call.batch, call.targets)  # so that layers are refused here
        return call, sum({other["replica"]: other["tokens"] for other in everyone}.values())

    def specs(self, batch: SequenceBatch, targets: Tensor) -> tuple[Spec, ...]:
        """What comes into each stage: found by two steps through the stages in turn, once for each kind of data.

        Raises:
            TypeError, ValueError: A layer cannot run in a pipeline; on all ranks.
        """
        data = batch.data
        kinds = Spec.of(data), Spec.of(targets), _autocast(self.place.device), torch.is_grad_enabled()
        key = *kinds, self._all_dtypes  # the same on all ranks
        if key in self._specs:
            return self._specs[key]
        specs = [Spec.of(data)]
        for number in range(self.engine.stages):
            error, found = None, {}
            if number in self.engine.numbers:
                stage = self.stages[self.engine.numbers.index(number)]
                try:
                    x = specs[-1].random(2, min(data.shape[1], 4), self.place.device)
                    if number == 0:
                        x = data[[0, -1], :4].to(self.place.device)
                    else:
                        x.requires_grad_(torch.is_grad_enabled())
                    output = probe(
                        {n: p for n, p in zip(stage.names, stage.parts, strict=True) if n != "head"},
                        x,
                        self.settings.mode,
                    )
                    if stage.loss is not None:
                        stage.try_loss(output, targets[batch.loss_mask][: len(output)].to(self.place.device))
                    y = Spec.of(output)
                    found = {"features": list(y.features), "dtype": str(y.dtype).removeprefix("torch.")}
                except Exception as failure:  # whatever a layer raises, all ranks must stop
                    error = failure
            everyone = self.council.share({"replica": self.place.replica, **found}, error)
            own = next(other for other in everyone if other["replica"] == self.place.replica and "dtype" in other)
            specs.append(Spec(tuple(own["features"]), getattr(torch, own["dtype"])))
        self._specs[key] = tuple(specs[:-1])
        return self._specs[key]

    def run(self, call: Call, carried: Carried, step: int) -> None:
        """Send all units through the stages, and back where gradients are on; `carried` is what they leave."""
        learning = torch.is_grad_enabled()
        shape = Shape(*call.shape, learning, self.specs(call.batch, call.targets))
        units = cut(call.batch, call.targets, self.settings.mode, call.shape, call.fresh, self.place.device)
        draws = self.seed, self.place.replica, step
        with ExitStack() as stack:
            afters: list[tuple[Stage, list[States]]] = []
            for stage in self.stages:
                before = _before(stage, None if call.fresh else carried, units.count)
                afters.append((stage, stack.enter_context(stage.during(Step(units.pieces, before, call.scale, draws)))))
            try:
                self.engine.run(shape, units.data)
            except Exception as failure:
                self.engine.forget()
                if self.council.group is None:
                    raise
                cause = failure.__cause__ or failure  # torch wraps what a layer raises
                self._broken = f"{type(cause).__name__}: {cause}".strip()[:300]
                raise RuntimeError(
                    f"rank {dist.get_rank()} stopped in mid-step, as it or a neighbour failed: {self._broken}; start "
                    "again from the last checkpoint"
                ) from failure
        carried.states = {name: [s[i] for s in after] for stage, after in afters for i, name in enumerate(stage.layers)}
        carried.units = call.units
        carried.cleared = None

    def loss(self, tokens: int) -> Tensor:
        """() float64, the mean over all replicas, on every rank."""
        found = torch.zeros((), dtype=torch.float64, device=self.place.device)
        if self.engine.last and self.stages[-1].loss_sum is not None:
            found += self.stages[-1].loss_sum.squeeze()
        if len(self.place.ranks) > 1:
            dist.all_reduce(found, group=self.place.group)
        if self.place.replica_group is not None:
            dist.all_reduce(found, group=self.place.replica_group)
        return found / max(tokens, 1)


def _before(stage: Stage, carried: Carried | None, count: int) -> list[States | None]:
    """The states that each unit starts from, where there are any."""
    if carried is None or not carried.states:
        return [None] * count
    slots = [list(states) for states in zip(*(carried.states[name] for name in stage.layers), strict=True)]
    return [*slots, *[None] * (count - len(slots))]


def _autocast(device: torch.device) -> torch.dtype | None:
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
