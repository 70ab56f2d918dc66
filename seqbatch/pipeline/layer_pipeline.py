"""Train recurrent layers that lie on several devices as if they lay on one."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from seqbatch.batch import SequenceBatch
from seqbatch.pipeline.agreement import Council, brief
from seqbatch.pipeline.calls import Call, Carried, Settings, check_loss, check_settings
from seqbatch.pipeline.checkpoint import Checkpoint
from seqbatch.pipeline.costs import CHUNKS, PartCost, Tuned
from seqbatch.pipeline.engine import Engine
from seqbatch.pipeline.parts import Mode, digest_of, looks_back, named_parts, part_of
from seqbatch.pipeline.placing import find_place, split_layers
from seqbatch.pipeline.replicas import average_gradients, spread_parameters
from seqbatch.pipeline.runner import Runner
from seqbatch.pipeline.stage import Stage
from seqbatch.pipeline.ties import Ties, find_ties
from seqbatch.pipeline.timeline import Timeline
from seqbatch.pipeline.timing import part_costs, timed_timeline, tuned

__all__ = ["LayerPipeline", "Result"]


class Result(NamedTuple):
    """What a batch gives, on every rank.

    Attributes:
        loss: () float64, the mean loss of the tokens of this call, over all replicas, on the rank's device.
        tokens: How many carried loss.
    """

    loss: Tensor
    tokens: int


class LayerPipeline(nn.Module):
    """Recurrent layers on several devices, trained exactly as on one.

    All ranks construct it with the same modules, and each keeps those of its stages: ``parameters()``, ``train()``,
    ``state_dict()`` are theirs, by names that hold for the whole network (``layers.2.weight_ih_l0``), whatever the
    split. Make the optimizer from ``pipe.parameters()`` on every rank.

    Args:
        layers: In order. ``seqbatch.rnn`` layers, ``nn.LSTM``, ``nn.GRU``, ``nn.RNN``, or modules of the signature
            ``layer(x, state, reset=, mask=)`` -> (output, state), time-major: x (T, B, features); a state of tensors,
            None for the first; `reset` and `mask`, (T, B) bool or None, as :class:`seqbatch.SequenceBatch` says.
        embed: What comes before them, on the first stage: cell by cell, (T, B, ...) -> (T, B, features).
        head: What comes after them, on the last stage, row by row: (N, features) -> (N, ...). It gets the cells that
            carry loss, and no others.
        loss: ``loss(output, targets)`` of such rows -> (N,), a loss each: ``partial(cross_entropy, reduction="none")``.
        mesh: With a dimension ``"pp"``, the stages, and perhaps ``"dp"``, replicas that take different batches and
            average gradients. None: all ranks are one pipeline; a process without others is one rank.
        split: Layers of each stage; the last may take 0 and hold the head alone. ``"auto"`` balances multiplications.
        mode: ``"full"``: units are time chunks, the state and its gradient go from each to the next: exact full
            BPTT. ``"truncated"``: time chunks, no gradient between them. ``"microbatch"``: units are lanes; for layers
            that need whole sequences, and where a step is not bound by latency.
        chunk_size: Steps of a time chunk, at most; None: all. Full BPTT shares steps evenly among as many chunks as
            needed.
        num_microbatches: Units of ``mode="microbatch"``.
        virtual: Stages on each rank, which takes stages ``rank``, ``rank + ranks``, ...: a smaller bubble, more
            messages.
        tied: Names of parameters that are one, such as ``[("embed.weight", "head.weight")]``; parameters that parts
            share already are found. Each place keeps a copy, and takes the sum of all gradients.
        seed: Of dropout: masks depend on it, the step, the layer and the unit, not on the split.
        cache: Shapes of batches for which schedules, with a buffer for each message, are kept.

    Raises:
        TypeError: A part is no module.
        ValueError: More stages than layers, bidirectional layers or ``batch_first`` where time is cut, settings out of
            range; on all ranks, as all check the same.

    Source: Huang+19 (GPipe), whose micro-batches are time chunks here, as in Li+21 (TeraPipe); the wavefront over
    layers and time is Appleyard+16's within one device. ``seqbatch simulate-pipeline`` draws it.

    >>> import torch, seqbatch
    >>> from functools import partial
    >>> layers = [seqbatch.rnn.LSTM(8, 8) for _ in range(2)]
    >>> pipe = LayerPipeline(
    ...     layers, embed=nn.Embedding(10, 8), head=nn.Linear(8, 10), chunk_size=4, virtual=2,
    ...     loss=partial(nn.functional.cross_entropy, reduction="none"),
    ... )
    >>> collate = seqbatch.PadCollate(next_token=True)
    >>> result = pipe.step(collate([torch.arange(9), torch.arange(5)]))
    >>> result.tokens, result.loss.dtype, layers[0].weight_hh_l0.grad.shape
    (12, torch.float64, torch.Size([32, 8]))
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        *,
        embed: nn.Module | None = None,
        head: nn.Module | None = None,
        loss: Callable[[Tensor, Tensor], Tensor],
        mesh: DeviceMesh | None = None,
        split: Literal["auto"] | Sequence[int] = "auto",
        mode: Mode = "full",
        chunk_size: int | None = None,
        num_microbatches: int | None = None,
        virtual: int = 1,
        tied: Sequence[Sequence[str]] = (),
        seed: int = 0,
        cache: int = 4,
    ) -> None:
        super().__init__()
        modules = [part for part in (embed, *layers, head) if isinstance(part, nn.Module)]
        place = find_place(mesh, any(p.device.type == "cuda" for module in modules for p in module.parameters()))
        council, stages = Council(place.everyone), len(place.ranks) * virtual
        facts: dict[str, Any] = {"replica": 0}  # all ranks are given the same, those of other replicas too
        error: Exception | None = None
        parts: dict[str, nn.Module] = {}
        names: list[list[str]] = []
        try:
            check_settings(mode, chunk_size, num_microbatches, virtual, seed, cache)
            check_loss(loss)
            parts = named_parts(layers, embed, head, mode)
            names = split_layers(parts, stages, split)
            facts |= {"mode": mode, "units": [chunk_size, num_microbatches, virtual, cache, seed]}
            self.split = [sum(name.startswith("layers.") for name in stage) for stage in names]
            facts |= {"split": brief(self.split), "parts": digest_of(parts), "tied": brief(tied)}
        except Exception as found:  # whatever it is, all ranks must stop
            error = found
        council.same(facts, {}, error)
        if isinstance(loss, nn.Module):
            loss = loss.to(place.device)
        ties = find_ties(parts, tied)
        numbers = list(range(place.rank, stages, len(place.ranks)))
        self._register(parts, [name for number in numbers for name in names[number]], place.device)
        order = {name: number for number, name in enumerate(parts)}
        own = [
            Stage(
                {n: parts[n] for n in names[number]}, order, loss if number == stages - 1 else None, mode, place.device
            )
            for number in numbers
        ]
        home = {name: place.ranks[number % len(place.ranks)] for number, stage in enumerate(names) for name in stage}
        holders = [sorted({home[part_of(name)] for name in names}) for names in ties]
        self._ties = Ties(ties, dict(self.named_parameters()), holders, place.group)
        if place.replica_group is not None:
            spread_parameters(self, place.replica_group)
        engine = Engine(own, numbers, stages, place.group, mode, place.device, cache)
        settings = Settings(mode, chunk_size, num_microbatches, place.replicas, any(map(looks_back, parts.values())))
        self._runner = Runner(own, engine, place, settings, seed, council)
        self._carried, self._carried_in_evaluation = Carried(), Carried()
        self._steps = 0

    @property
    def mesh(self) -> DeviceMesh:
        """The ranks; ``make_loader(..., mesh=pipe.mesh)`` gives all stages of a replica the same batches."""
        return self._runner.place.mesh

    def _register(self, parts: dict[str, nn.Module], own: Sequence[str], device: torch.device) -> None:
        """Hold this rank's parts under their names, on its device."""
        for name in own:
            parts[name].to(device)
        if "embed" in own:
            self.embed = parts["embed"]
        self.layers = nn.ModuleDict({n.removeprefix("layers."): parts[n] for n in own if n.startswith("layers.")})
        if "head" in own:
            self.head = parts["head"]

    def step(
        self,
        batch: SequenceBatch,
        targets: Tensor | None = None,
        *,
        carry: bool | None = None,
        loss_tokens: int | None = None,
    ) -> Result:
        """Run a batch forward and backward; gradients are added to ``.grad``, and the optimizer's step is yours.

        Gradients are those of the sum of the losses over ``batch.step_loss_tokens``, the tokens that carry loss in
        this optimizer step over all replicas and micro-steps.

        Args:
            batch: The same on all ranks of a replica. Best on the CPU: what stages need is sent to their devices.
            targets: (T, B, ...), in place of ``batch.targets``.
            carry: Whether to start from the states that the last step left; None: as the batch's plan says.
            loss_tokens: What the sum is divided by, where it is not as the plan counts: a loss mask of one's own.

        Raises:
            TypeError, ValueError: A batch or a layer that does not fit, or ranks that were given different batches; on
                all ranks, before anything is sent.
            RuntimeError: A rank is gone, or failed while it computed; this pipeline cannot be used any more.
        """
        self._follow_modes()
        with torch.enable_grad():
            call, tokens = self._runner.prepare(batch, targets, carry, loss_tokens, self._carried, self._steps)
            before = self._ties.before()
            self._runner.run(call, self._carried, self._steps)
            if self._runner.place.replica_group is not None:
                average_gradients(self.parameters(), self._runner.place.replica_group)
            self._ties.after(before)
        self._steps += 1
        return Result(self._runner.loss(tokens), tokens)

    @torch.no_grad()
    def evaluate(self, batch: SequenceBatch, targets: Tensor | None = None, *, carry: bool | None = None) -> Result:
        """The loss of a batch without gradients and dropout.

        Args:
            batch: As for `step`.
            targets: As for `step`.
            carry: Whether to start from the states that the last call of `evaluate` left - those of training stay as
                they are; None: as the batch's plan says.
        """
        was = {module: module.training for module in self.modules()}
        self.eval()
        self._follow_modes()
        try:
            call, tokens = self._runner.prepare(batch, targets, carry, 1, self._carried_in_evaluation, self._steps)
            self._runner.run(call, self._carried_in_evaluation, self._steps)
            return Result(self._runner.loss(tokens), tokens)
        finally:
            for module, training in was.items():
                module.training = training

    def _follow_modes(self) -> None:
        """Stages draw random numbers of their own where this module trains."""
        for stage in self._runner.stages:
            stage.training = self.training

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """As ``torch.nn.utils.clip_grad_norm_``, over the parameters of all stages; returns the total norm.

        Tied parameters count once. () float64. All ranks must call it.
        """
        parameters = [parameter for parameter in self.parameters() if parameter.grad is not None]
        counted = [p.grad for p in parameters if p.grad is not None and p not in self._ties.copies]
        place = self._runner.place
        total = torch.nn.utils.get_total_norm(counted, norm_type).to(place.device, torch.float64)
        if len(place.ranks) > 1:
            if norm_type == float("inf"):
                dist.all_reduce(total, dist.ReduceOp.MAX, group=place.group)
            else:
                total = total**norm_type
                dist.all_reduce(total, group=place.group)
                total = total ** (1 / norm_type)
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, total)
        return total

    def reset_state(self, lanes: Tensor | None = None) -> None:
        """Forget the carried states, of training and of evaluation, or clear some lanes before the next step.

        Args:
            lanes: (B,) bool, true where training's state is to be cleared, such as ``done`` flags; None: all.
        """
        if lanes is not None and (lanes.dtype != torch.bool or lanes.dim() != 1):
            raise ValueError(f"lanes must be (B,) bool, true where to clear, got {lanes.dtype} {tuple(lanes.shape)}")
        if lanes is None:
            self._carried, self._carried_in_evaluation = Carried(), Carried()
        else:
            self._carried.cleared = (
                lanes.cpu() if self._carried.cleared is None else self._carried.cleared | lanes.cpu()
            )

    def simulate(self, batch: SequenceBatch, targets: Tensor | None = None, *, repeats: int = 3) -> Timeline:
        """When each unit of a step would run, by what units and messages take on the devices at hand.

        Measures on all ranks at once; all must call it. Parameters, gradients, states and random numbers stay.

        Returns:
            Its ``makespan`` predicts the seconds of ``step``, and ``seqbatch.pipeline.gantt.draw`` draws it.
        """
        return timed_timeline(self._runner, self._measured(batch, targets), repeats)

    def costs(self, batch: SequenceBatch, targets: Tensor | None = None, *, repeats: int = 3) -> dict[str, PartCost]:
        """What each part of the network takes on its device, which :func:`seqbatch.pipeline.predict` needs.

        All ranks must call it.
        """
        return part_costs(self._runner, self._measured(batch, targets), repeats)

    def tune(
        self,
        batch: SequenceBatch,
        targets: Tensor | None = None,
        *,
        stages: int | None = None,
        chunks: Sequence[int] = CHUNKS,
        repeats: int = 3,
    ) -> Tuned:
        """The number of units and the split that are fastest for batches like this one, by costs measured here.

        All ranks must call it. The split is for a pipeline to be made anew; units are ``chunk_size=ceil(T / chunks)``
        or ``num_microbatches``.

        Args:
            batch: As for `step`.
            targets: As for `step`.
            stages: Devices of the pipeline to be made, one stage each; None: as many as there are ranks now.
            chunks: Numbers of units to choose from.
            repeats: Measurements of each piece.
        """
        stages = len(self._runner.place.ranks) if stages is None else stages
        return tuned(self._runner, self._measured(batch, targets), stages, repeats, chunks)

    def _measured(self, batch: SequenceBatch, targets: Tensor | None) -> Call:
        self._follow_modes()
        with torch.enable_grad():
            return self._runner.prepare(batch, targets, False, 1, Carried(), self._steps)[0]

    def save(self, path: str | Path, optimizer: Optimizer | None = None, **extra: Any) -> None:
        """Write parameters, buffers, the optimizer's state, carried states and the number of steps into a folder.

        All ranks must call it, with a path that all see. It is written beside its place and renamed when complete, so
        that a folder of that name is always whole. Format: ``torch.distributed.checkpoint``, by names of the whole
        network. Under ``torchrun --max-restarts`` set ``TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1``: restarted ranks may
        otherwise look for those that are gone.

        Args:
            path: A folder; replaced where it exists.
            optimizer: Of ``pipe.parameters()``.
            extra: What else to keep, such as ``loader=loader.state_dict(after=batch, lanes=())``; the first rank's is
                written.
        """
        self._checkpoint(path).save(optimizer, self._carried, self._steps, extra)

    def load(self, path: str | Path, optimizer: Optimizer | None = None, *, carry: bool = True) -> dict[str, Any]:
        """Read what `save` wrote, on any number of stages; returns what it was given beside.

        Args:
            path: The folder.
            optimizer: Made as the one that was saved.
            carry: Whether to go on from the carried states; they need as many replicas as wrote them.

        Raises:
            FileNotFoundError: It does not exist, is not complete, or lost a file; on all ranks.
            ValueError: It is of another network, or its carried states are of another number of replicas.
        """
        self._carried, self._steps, extra = self._checkpoint(path).load(optimizer, carry)
        self._carried_in_evaluation = Carried()
        return extra

    def _checkpoint(self, path: str | Path) -> Checkpoint:
        return Checkpoint(Path(path), self, self._runner.council, self._runner.place)
