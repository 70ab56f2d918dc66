"""Run a :class:`CompiledPass` over all steps, forward and backward."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from seqbatch.rnn.compiled_pass import CompiledPass
from seqbatch.rnn.programs import WIDTH, Instructions
from seqbatch.rnn.threads import GROUPS, Span, run_blocks

__all__ = ["Inputs", "refuse_second_derivative", "run_pass"]

_SMALL = 1 << 20  # instructions times elements below which threads cost more than they save
Weights = Sequence[tuple[Tensor, Tensor | None]]


class Inputs(NamedTuple):
    """What a pass runs on.

    Attributes:
        outer: (T * B, columns) for each of the pass's outer nodes.
        vectors: (columns,) for each of its vectors.
        weights: A matrix, (out, in), and a bias (out,) or None, for each of its products.
        initial: (B, columns), what the states are before the first step.
    """

    outer: Sequence[Tensor]
    vectors: Sequence[Tensor]
    weights: Weights
    initial: Sequence[Tensor]


def run_pass(
    compiled: CompiledPass, inputs: Inputs, grid: tuple[int, int], reset: Tensor | None, mask: Tensor | None
) -> tuple[list[Tensor], list[Tensor]]:
    """The rows of the exports and the states after the last step.

    Args:
        compiled: What to run.
        inputs: What to run it on.
        grid: T and B.
        reset: (T, B) bool.
        mask: (T, B) bool.
    """
    _check(compiled, inputs, grid)
    initial = inputs.initial
    if reset is not None:
        initial = [torch.where(reset[0][:, None], 0.0, state) for state in initial]
    flat = [part for pair in inputs.weights for part in pair]
    rows = [part if part.stride(-1) == 1 or not part.numel() else part.contiguous() for part in inputs.outer]
    found = _Run.apply(compiled, grid, reset, mask, *rows, *inputs.vectors, *flat, *initial)  # type: ignore[no-untyped-call]
    exports = len(compiled.exports)
    return list(found[:exports]), list(found[exports:])


def refuse_second_derivative() -> None:
    """For backwards that autograd cannot follow; it would drop their part without a word."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "a parallelized step has no second derivative (create_graph=True): call the cell itself in a loop for that"
        )


def _check(compiled: CompiledPass, inputs: Inputs, grid: tuple[int, int]) -> None:
    """Refuse what does not have the sizes of the example: the kernel goes by address."""
    outer, vectors, weights, initial = inputs
    sizes: list[tuple[str, Tensor, tuple[int, ...]]] = [
        (n.name, t, (grid[0] * grid[1], w)) for n, t, w in zip(compiled.outer, outer, compiled.widths, strict=False)
    ]
    sizes += [(v.node.name, t, (v.width,)) for v, t in zip(compiled.vectors, vectors, strict=True)]
    states = compiled.widths[compiled.first_state : compiled.first_product]
    sizes += [(n.name, t, (grid[1], w)) for n, t, w in zip(compiled.states, initial, states, strict=True)]
    for k, ((node, linear, _), (weight, bias)) in enumerate(zip(compiled.linears, weights, strict=True)):
        size = (compiled.widths[compiled.first_product + k], compiled.widths[compiled.sources[k]])
        sizes.append((f"the weight of {node.name}", weight, size[::-1] if linear.transposed else size))
        if bias is not None:
            sizes.append((f"the bias of {node.name}", bias, size[:1]))
    for name, tensor, shape in sizes:
        if tensor.shape != shape or tensor.dtype != initial[0].dtype:
            raise RuntimeError(
                f"{name} must be {shape} {initial[0].dtype} here, as with the example, got {tuple(tensor.shape)} "
                f"{tensor.dtype}: parallelize the cell again, with an example of more lanes if it cuts rows"
            )


class _Run(torch.autograd.Function):
    """All steps of a pass."""

    @staticmethod
    def forward(
        ctx: Any, compiled: CompiledPass, grid: tuple[int, int], reset: Any, mask: Any, *tensors: Any
    ) -> tuple[Tensor, ...]:
        rows, vectors, weights, initial = _parted(compiled, tensors)
        steps, lanes = grid
        like = initial[0] if initial else rows[0]
        states = [like.new_empty(steps + 1, *s.shape) for s in initial]
        for state, first in zip(states, initial, strict=True):
            state[0] = first
        widths = compiled.widths[len(rows) + len(vectors) + len(states) :]
        inner = [like.new_empty(steps, lanes, width) for width in widths]
        buffers = [*rows, *[v.contiguous() for v in vectors], *states, *inner]
        machine = _Machine(like.dtype, buffers, len(vectors), len(rows), grid, reset, mask)
        if not compiled.linears:
            machine.run(compiled.programs[0], compiled.width, (0, steps))
        else:
            _forward_steps(compiled, machine, _Products(compiled, weights, buffers))
        ctx.compiled, ctx.grid = compiled, grid
        ctx.save_for_backward(reset, mask, *tensors, *states, *inner)
        ctx.set_materialize_grads(False)
        exports = [buffers[compiled.places[n]][:steps].flatten(0, 1) for n in compiled.exports]
        return (*exports, *[state[steps].clone() for state in states])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        refuse_second_derivative()
        compiled, grid = ctx.compiled, ctx.grid
        reset, mask, *saved = ctx.saved_tensors
        count = compiled.first_state + 2 * len(compiled.linears) + len(compiled.states)
        rows, vectors, weights, _ = _parted(compiled, saved[:count])
        needs = ctx.needs_input_grad[4:]
        wanted = frozenset(k for k in range(compiled.first_state) if needs[k])
        derived = compiled.gradients(wanted)
        buffers = [*rows, *[v.contiguous() for v in vectors], *saved[count:]]
        slopes = _slopes(compiled, buffers, wanted, derived.written, grads)
        every = [*buffers, *slopes]
        machine = _Machine(buffers[-1].dtype, every, len(vectors), len(rows), grid, reset, mask, len(buffers))
        if not compiled.linears:
            machine.run(derived.programs[0], compiled.width, (grid[0], 0))
            from_weights: list[Tensor | None] = []
        else:
            products = _Products(compiled, weights, buffers)
            _backward_steps(compiled, derived.programs, machine, products, slopes)
            from_weights = products.gradients(slopes, needs[compiled.first_state :])
        found: list[Any] = [slopes[k] if k in wanted else None for k in range(len(rows))]
        found += [slopes[k].sum(0) if k in wanted else None for k in range(len(rows), compiled.first_state)]
        initial = [slopes[k][0].clone() for k in range(compiled.first_state, compiled.first_product)]
        return (None, None, None, None, *found, *from_weights, *initial)


def _parted(compiled: CompiledPass, tensors: Sequence[Any]) -> Inputs:
    a, b = len(compiled.outer), compiled.first_state
    c = b + 2 * len(compiled.linears)
    pairs = list(zip(tensors[b:c:2], tensors[b + 1 : c : 2], strict=True))
    return Inputs(tensors[:a], tensors[a:b], pairs, tensors[c:])


def _slopes(
    compiled: CompiledPass,
    buffers: Sequence[Tensor],
    wanted: frozenset[int],
    written: frozenset[int],
    grads: Sequence[Tensor | None],
) -> list[Tensor]:
    """Where gradients of buffers are added up or written; those given are in them."""
    given = {compiled.places[n]: g for n, g in zip(compiled.exports, grads, strict=False) if g is not None}
    slopes = []
    for k, buffer in enumerate(buffers):
        if len(compiled.outer) <= k < compiled.first_state:
            slopes.append(buffer.new_zeros(GROUPS, len(buffer)))
        elif k in written:
            slopes.append(torch.empty_like(buffer, memory_format=torch.contiguous_format))
        elif k < compiled.first_state and k not in wanted:
            slopes.append(buffer.new_empty(0))
        elif k in given and k >= compiled.first_root and k not in compiled.sources:
            slopes.append(given[k].contiguous().view(buffer.shape))  # nothing is added to it
        else:
            slopes.append(torch.zeros_like(buffer, memory_format=torch.contiguous_format))
            if k in given:
                steps = slice(0, -1 if k < compiled.first_product else None)  # of a state, not what follows the last
                slopes[k][steps] += given[k].view_as(slopes[k][steps])
    for k, grad in enumerate(grads[len(compiled.exports) :]):
        if grad is not None:
            slopes[compiled.first_state + k][-1] += grad
    return slopes


class _Machine:
    """The kernel with its buffers."""

    def __init__(
        self,
        dtype: torch.dtype,
        buffers: Sequence[Tensor],
        vectors: int,
        rows: int,
        grid: tuple[int, int],
        reset: Tensor | None,
        mask: Tensor | None,
        count: int = 0,
    ) -> None:
        self.dtype, self.grid = dtype, (*grid, max(-(-grid[1] // GROUPS), 1))
        self.buffers = buffers  # alive as long as their addresses are used
        self.table = np.array([(b.data_ptr(), _row_stride(b) * b.itemsize, 0) for b in buffers])
        for k in range(rows, rows + vectors):
            self.table[k, 1:] = 0
            if count:
                sums = buffers[count + k]
                self.table[count + k, 1:] = 0, sums.stride(0) * sums.itemsize
        none = np.empty(0, np.bool_)
        self.reset = none if reset is None else reset.contiguous().numpy().reshape(-1)
        self.mask = none if mask is None else mask.contiguous().numpy().reshape(-1)
        self.constants: dict[int, Any] = {}

    def run(self, program: Instructions, width: int, times: tuple[int, int]) -> None:
        """Run a program over some steps, backwards where the first is the later one."""
        from seqbatch.rnn.program_kernels import run

        if not len(program.each):
            return
        if id(program) not in self.constants:
            numbers = torch.tensor(program.numbers).to(self.dtype).numpy()
            self.constants[id(program)] = numbers, np.empty((program.registers, WIDTH), numbers.dtype)
        (numbers, space), lanes = self.constants[id(program)], self.grid[1]
        rest = (program.slots, numbers, self.table, self.reset, self.mask, self.grid, times)
        work = abs(times[1] - times[0]) * lanes * width * len(program.each)
        if work < _SMALL or torch.get_num_threads() == 1:
            run(program.once, program.each, space, *rest, (0, lanes), (0, width))
            return

        def block(span: Span, columns: Span, group: int, reverse: bool) -> None:
            run(program.once, program.each, np.empty_like(space), *rest, span, columns)

        run_blocks(block, lanes, width, 1, work)


def _row_stride(buffer: Tensor) -> int:
    """Elements from a row to the next; where an axis has one element, its stride says nothing."""
    return buffer.shape[-1] if buffer.is_contiguous() else buffer.stride(-2)


class _Products:
    """The matrix products of a pass, step by step, and their weights' gradients for all steps at once."""

    def __init__(self, compiled: CompiledPass, weights: Weights, buffers: Sequence[Tensor]) -> None:
        self.compiled = compiled
        self.matrices = [
            w if linear.transposed else w.t() for (w, _), (_, linear, _) in zip(weights, compiled.linears, strict=True)
        ]
        self.biases = [bias for _, bias in weights]
        self.from_, self.to = compiled.sources, [compiled.places[n] for n, _, _ in compiled.linears]
        self.inputs = [buffers[k].unbind() for k in self.from_]
        self.outputs = [buffers[k].unbind() for k in self.to]
        self.rows = [buffers[a][: len(buffers[b])].flatten(0, 1) for a, b in zip(self.from_, self.to, strict=True)]

    def forward(self, k: int, t: int) -> None:
        bias = self.biases[k]
        if bias is None:
            torch.mm(self.inputs[k][t], self.matrices[k], out=self.outputs[k][t])
        else:
            torch.addmm(bias, self.inputs[k][t], self.matrices[k], out=self.outputs[k][t])

    def gradients(self, slopes: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
        """Of each weight and bias, one product over all steps."""
        found: list[Tensor | None] = []
        for k, (_, linear, _) in enumerate(self.compiled.linears):
            slope = slopes[self.to[k]].flatten(0, 1)
            rows = self.rows[k]
            weight = None
            if needs[2 * k]:
                weight = rows.t() @ slope if linear.transposed else slope.t() @ rows
            found += [weight, slope.sum(0) if self.biases[k] is not None and needs[2 * k + 1] else None]
        return found


def _forward_steps(compiled: CompiledPass, machine: _Machine, products: _Products) -> None:
    by_depth = _by_depth(compiled)
    for t in range(machine.grid[0]):
        for depth, program in enumerate(compiled.programs):
            for k in by_depth[depth]:
                products.forward(k, t)
            machine.run(program, compiled.width, (t, t + 1))


def _backward_steps(
    compiled: CompiledPass,
    programs: Sequence[Instructions],
    machine: _Machine,
    products: _Products,
    slopes: Sequence[Tensor],
) -> None:
    by_depth = _by_depth(compiled)
    above = [slopes[k].unbind() for k in products.to]
    below = [slopes[k].unbind() for k in products.from_]
    back = [matrix.t() for matrix in products.matrices]
    for t in range(machine.grid[0] - 1, -1, -1):
        for depth in range(len(programs) - 1, -1, -1):
            machine.run(programs[depth], compiled.width, (t + 1, t))
            for k in by_depth[depth]:
                torch.addmm(below[k][t], above[k][t], back[k], out=below[k][t])


def _by_depth(compiled: CompiledPass) -> list[list[int]]:
    return [[k for k, (_, _, d) in enumerate(compiled.linears) if d == depth] for depth in range(len(compiled.stages))]
