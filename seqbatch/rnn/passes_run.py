"""Run passes one after the other: the values of a step's nodes for all steps at once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from seqbatch.rnn.affine import affine_of
from seqbatch.rnn.compiled_pass import CompiledPass
from seqbatch.rnn.compiled_run import Inputs, refuse_second_derivative, run_pass
from seqbatch.rnn.graph import StepGraph
from seqbatch.rnn.operations import linear_of
from seqbatch.rnn.passes import Pass
from seqbatch.rnn.tracing import attribute, bound, run_node

__all__ = ["Run", "like_rows"]


class Run:
    """One call of a layer.

    Args:
        module: Where the step's parameters and submodules are.
        graph: The step.
        input: (T, B, ...).
        state: (B, ...) each, before the first step.
        reset: (T, B) bool.
        mask: (T, B) bool.
    """

    def __init__(
        self,
        module: nn.Module,
        graph: StepGraph,
        input: Tensor,
        state: Sequence[Tensor],
        reset: Tensor | None,
        mask: Tensor | None,
    ) -> None:
        self.module, self.graph, self.initial = module, graph, state
        self.steps, self.lanes = input.shape[:2]
        self.reset, self.mask = reset, mask
        self.values: dict[fx.Node, Any] = {graph.x: input.flatten(0, 1)}
        self.final: dict[int, Tensor] = {}
        for node in graph.module.graph.nodes:  # constants, in order, so that none waits for a long chain of others
            if node not in graph.reached and node.op != "output":
                self.rows(node)

    def rows(self, node: fx.Node) -> Any:
        """The value of a node for all steps, (T * B, ...); that of a constant as it is."""
        if node not in self.values:
            self.values[node] = self._compute(node, self.rows)
        return self.values[node]

    def last(self, k: int) -> Tensor:
        """State k after the last step."""
        return self.final[k]

    def one(self, one: Pass) -> None:
        """Run a pass."""
        if one.compiled is not None:
            self._programs(one.compiled)
        else:
            {"rows": self._rows, "shift": self._shift, "scan": self._scan, "steps": self._steps}[one.kind](one)

    def _rows(self, one: Pass) -> None:
        for node in one.nodes:
            value = self.rows(node)
            if isinstance(value, Tensor) and len(value) != self.steps * self.lanes:
                raise RuntimeError(
                    f"{node.name} gives {len(value)} rows for {self.steps * self.lanes}: parallelize the cell again, "
                    "with an example of more lanes, so that it shows"
                )

    def _programs(self, compiled: CompiledPass) -> None:
        """All steps without the interpreter, or with little of it."""
        linears = [(compiled.widths[compiled.places[node]], linear) for node, linear, _ in compiled.linears]
        numbers = [self.graph.states.index(s) for s in compiled.states]
        inputs = Inputs(
            [self.rows(node) for node in compiled.outer],
            [self.rows(v.node).reshape(-1).expand(v.width) for v in compiled.vectors],
            [
                (self._weight(linear.weight), None if linear.bias is None else self._weight(linear.bias).expand(width))
                for width, linear in linears
            ],
            [self.initial[k] for k in numbers],
        )
        exports, finals = run_pass(compiled, inputs, (self.steps, self.lanes), self.reset, self.mask)
        self.values |= dict(zip(compiled.exports, exports, strict=True))
        self.final |= dict(zip(numbers, finals, strict=True))

    def _weight(self, weight: fx.Node | str) -> Tensor:
        found: Tensor = attribute(self.module, weight) if isinstance(weight, str) else self.rows(weight)
        return found

    def _shift(self, one: Pass) -> None:
        """A state that does not feed back: what the step before left, as resets and padding let it."""
        k = self.graph.states.index(one.nodes[0])
        new = self.rows(self.graph.new_states[k])
        whole = torch.cat([self.initial[k], new])  # row B + r is what step r gives
        lane = torch.arange(self.lanes, device=new.device)
        rows = torch.arange(1, self.steps + 1, device=new.device)[:, None] * self.lanes + lane
        real = rows if self.mask is None else torch.where(self.mask, rows, -1)
        latest = torch.cat([lane[None], real]).cummax(0).values  # row T: after the last step
        zero = torch.zeros_like(latest, dtype=torch.bool)
        if self.reset is not None:  # since the last reset there may have been no real step
            starts = torch.where(self.reset, rows - self.lanes, -1).cummax(0).values
            starts = torch.cat([starts, starts[-1:]]) if self.steps else zero.long() - 1
            zero = (starts >= 0) & (latest < starts + self.lanes)
        before = torch.where(like_rows(zero.flatten(), whole), whole.new_zeros(()), whole[latest.flatten()])
        self.values[one.nodes[0]] = before[: self.steps * self.lanes]
        self.final[k] = before[self.steps * self.lanes :]

    def _scan(self, one: Pass) -> None:
        """A component that is affine in its state."""
        from seqbatch.rnn.linear_scan import linear_scan

        (state,) = (node for node in one.nodes if node in self.graph.states)
        k = self.graph.states.index(state)

        def outside(operand: Any) -> Any:
            return self.rows(operand) if isinstance(operand, fx.Node) else operand

        found = affine_of(one.nodes, state, outside)
        new = found[self.graph.new_states[k]]
        shape = (self.steps, self.lanes, *self.initial[k].shape[1:])
        size = (self.steps * self.lanes, *shape[2:])
        like = self.initial[k]
        parts = (torch.as_tensor(part, dtype=like.dtype, device=like.device) for part in (new.a, new.b))
        a, b = (part.expand(size).reshape(*shape[:2], -1) for part in parts)
        before, last = linear_scan(a, b, like.flatten(1), reset=self.reset, mask=self.mask)
        rows = before.to(like.dtype).reshape(size)
        self.final[k] = last.to(like.dtype).view_as(like)
        for node, value in found.items():
            self.values[node] = rows if node is state else value.at(rows)

    def _steps(self, one: Pass) -> None:
        """Step by step, over the pass's own nodes, in torch."""
        inside = set(one.nodes)
        numbers = [k for k, state in enumerate(self.graph.states) if state in inside]
        state = {k: self.initial[k] for k in numbers}
        wanted = self.graph.in_order(n for n in one.nodes if n not in self.graph.states)
        constants = {n: self._constants(n) for n in wanted}
        pools = {n: _Pool(pair, self.steps, self.lanes) for n, pair in constants.items() if pair is not None}
        operations = [(n, bound(self.module, n), pools.get(n)) for n in wanted]
        kept = [*self.graph.read_outside(one.nodes), *(self.graph.states[k] for k in numbers)]
        found: dict[fx.Node, list[Any]] = {node: [] for node in dict.fromkeys(kept)}
        outside = {n for node in wanted for n in node.all_input_nodes if n not in inside}
        given = {n: self._by_step(n) for n in outside}
        for t in range(self.steps):
            here = {n: parts[t] for n, parts in given.items()}
            for k in numbers:
                here[self.graph.states[k]] = state[k] = self._cleared(state[k], t)
            value = here.__getitem__
            for node, operation, pool in operations:
                here[node] = operation(value) if pool is None else pool.linear(value(node.all_input_nodes[0]))
            for node, parts in found.items():
                parts.append(here[node])
            for k in numbers:
                state[k] = self._held(here[self.graph.new_states[k]], state[k], t)
        self.final |= state
        for node, parts in found.items():
            self.values[node] = _joined(parts) if node in self.graph.shaped else _PerStep(parts)

    def _constants(self, node: fx.Node) -> tuple[Tensor, Tensor | None] | None:
        """Weight and bias of a linear layer in the loop."""
        linear = linear_of(node, self.module)
        if linear is None or linear.transposed or self.graph.values[node].dim() != 2:
            return None
        if not torch.is_grad_enabled():
            return None
        if any(isinstance(n, fx.Node) and n in self.graph.reached for n in (linear.weight, linear.bias)):
            return None
        return self._weight(linear.weight), None if linear.bias is None else self._weight(linear.bias)

    def _by_step(self, node: fx.Node) -> Sequence[Any]:
        """What a step reads of a node's value, for each step."""
        whole = self.rows(node)
        if isinstance(whole, _PerStep):
            return whole.values
        if node in self.graph.counts:
            return [self.lanes if isinstance(whole, int) else torch.Size((self.lanes, *whole[1:]))] * self.steps
        return _cut(whole, self.steps) if node in self.graph.shaped else [whole] * self.steps

    def _cleared(self, state: Tensor, t: int) -> Tensor:
        return state if self.reset is None else torch.where(like_rows(self.reset[t], state), state.new_zeros(()), state)

    def _held(self, new: Tensor, state: Tensor, t: int) -> Tensor:
        return new if self.mask is None else torch.where(like_rows(self.mask[t], state), new, state)

    def _compute(self, node: fx.Node, value: Callable[[fx.Node], Any]) -> Any:
        return run_node(self.module, node, value)


class _Pool:
    """A linear layer that is applied step by step; its weights' gradients are one product over all steps.

    The steps see the weights without their gradient, and a slot instead, whose gradient is that of their result.
    """

    def __init__(self, constants: tuple[Tensor, Tensor | None], steps: int, lanes: int) -> None:
        weight, bias = constants
        self.weight, self.bias = weight.detach(), None if bias is None else bias.detach()
        self.inputs: list[tuple[Tensor, int]] = []
        shape = (steps, lanes, len(weight))
        self.slots = iter(_Slots.apply(weight, bias, self.inputs, shape).unbind())  # type: ignore[no-untyped-call]

    def linear(self, x: Tensor) -> Tensor:
        """One step."""
        self.inputs.append((x.detach(), x._version))
        return _Linear.apply(x, self.weight, self.bias, next(self.slots))  # type: ignore[no-any-return, no-untyped-call]


class _Slots(torch.autograd.Function):
    """One slot for each step, without memory; from their gradients, those of the weights."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, bias: Tensor | None, inputs: list[tuple[Tensor, int]], shape: Any) -> Tensor:
        ctx.inputs = inputs
        return weight.new_zeros(()).expand(shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        refuse_second_derivative()
        if any(x._version != version for x, version in ctx.inputs):
            raise RuntimeError("an input of a linear layer in the step was changed in place before backward: copy it")
        slopes = grad.flatten(0, 1)
        found = slopes.t() @ torch.cat([x for x, _ in ctx.inputs]) if ctx.needs_input_grad[0] else None
        return found, slopes.sum(0) if ctx.needs_input_grad[1] else None, None, None


class _Linear(torch.autograd.Function):
    """One step of a linear layer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, slot: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        refuse_second_derivative()
        (weight,) = ctx.saved_tensors
        return grad @ weight if ctx.needs_input_grad[0] else None, None, None, grad


@dataclass(frozen=True)
class _PerStep:
    """A value that has no row for each lane: those who read it run step by step too."""

    values: list[Any]


def _cut(value: Any, steps: int) -> Sequence[Any]:
    """Rows of all steps as those of each; one operation, so that gradients are put together once."""
    if isinstance(value, tuple | list):
        return [type(value)(list(parts)) for parts in zip(*(_cut(v, steps) for v in value), strict=True)]
    if not isinstance(value, Tensor):
        return [value] * steps
    return value.reshape(steps, len(value) // steps, *value.shape[1:]).unbind()


def _joined(parts: list[Any]) -> Any:
    """Rows of all steps of what each step gave."""
    if isinstance(parts[0], tuple | list):
        return type(parts[0])([_joined(list(column)) for column in zip(*parts, strict=True)])
    return torch.cat(parts) if isinstance(parts[0], Tensor) else parts[0]


def like_rows(flags: Tensor, rows: Tensor) -> Tensor:
    """Flags with as many axes as the rows that they are for."""
    return flags.view(*flags.shape, *[1] * (rows.dim() - flags.dim()))
