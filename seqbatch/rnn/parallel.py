"""Recurrent cells that are written as one step, as layers over sequences."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from seqbatch.rnn.checks import check_flags
from seqbatch.rnn.explain import Explanation, explain
from seqbatch.rnn.graph import StepGraph, check_example
from seqbatch.rnn.operations import has_hooks
from seqbatch.rnn.passes import Pass, schedule
from seqbatch.rnn.passes_run import Run, like_rows
from seqbatch.rnn.tracing import Cell

__all__ = ["Bidirectional", "Parallel", "parallelize"]

State = tuple[Tensor, ...]
Key = tuple[object, ...]


def parallelize(cell: Cell, *, example: Sequence[Tensor]) -> "Parallel":
    """Turn a step into a layer over sequences that does step by step only what must be.

    The step is traced and cut into the strongly connected components of its graph (Hwang and Sung, arXiv 1503.02852):
    only what feeds back into itself walks through time, all else runs once for all steps. A component that is affine
    and element-wise in its state becomes a scan. On CPU, in float32 and float64, what walks runs as a program of one
    compiled kernel, together with the element-wise operations around it, and matrix products that must stay are one
    call a step. :meth:`Parallel.explain` says what became of each operation.

    Random operations, such as ``nn.Dropout``, draw anew for each step and lane, wherever they run; the numbers are not
    those of a loop over the step, which draws in another order. Hooks on the cell's layers see the rows of all steps
    where those left the loop. There are no second derivatives. ``torch.compile`` leaves the layer as it is.

    Args:
        cell: ``cell(x_t, *state) -> (y_t, *new_state)``, an ``nn.Module`` or a function, in plain torch, on tensors
            whose first axis is the lanes. It must do the same operations whatever the numbers.
        example: Tensors such as the cell takes, (x_t, *state), with two lanes or more. Shapes, but for the number of
            lanes, and dtypes are those of later calls; the numbers try out which operations treat lanes alike.

    Returns:
        A layer with the cell's parameters and the cell's state dict: ``layer(input, hx=None, *, reset=None,
        mask=None)`` gives (output, states) of an input (T, B, ...); states are a tuple even if there is one. See
        :meth:`Parallel.forward`. States keep their graph: detach those that are carried to another batch.

    Raises:
        ValueError: The cell cannot be traced, works in place, returns something else than it should, or the output
            does not depend on the input; the text says where and what to do.

    >>> layer = parallelize(lambda x, c: (x + c, 0.5 * c + x), example=(torch.randn(3, 2), torch.randn(3, 2)))
    >>> output, (c,) = layer(torch.ones(3, 1, 2))
    >>> output[:, 0, 0].tolist(), c.tolist()
    ([1.0, 2.0, 2.5], [[1.75, 1.75]])
    """
    return Parallel(cell, example)


class Parallel(nn.Module):
    """A step as a layer over sequences: :func:`parallelize` makes it."""

    def __init__(self, cell: Cell, example: Sequence[Tensor]) -> None:
        super().__init__()
        check_example(example)
        self._cell = (cell,)  # in a tuple, so that its parameters are not registered twice
        self._example = tuple(part.detach().clone() for part in example)
        if isinstance(cell, nn.Module):  # the same names, and so the same state dict
            for name, child in cell._modules.items():  # tied ones too
                self.add_module(name, child)
            for name, parameter in cell._parameters.items():
                self.register_parameter(name, parameter)
            for name, buffer in cell._buffers.items():
                self.register_buffer(name, buffer, persistent=name not in cell._non_persistent_buffers_set)
            self.training = cell.training
        like = next(self.parameters(), None)
        self._dtype = self._example[0].dtype if like is None else like.dtype
        self._graphs: dict[Key, StepGraph] = {}
        self._passes: dict[tuple[Key, bool], tuple[Pass, ...]] = {}
        self.graph()

    def graph(self, input: Tensor | None = None) -> StepGraph:
        """The traced step; traced anew where it may have changed: in training and evaluation, and by dtype.

        Tracing is not for several threads at once (torch.fx): call this first where there are any.
        """
        return self._traced(self._now(input))

    def passes(self, compile: bool, input: Tensor | None = None) -> tuple[Pass, ...]:
        """What runs one after the other; see :func:`seqbatch.rnn.passes.schedule`."""
        return self._scheduled(self._now(input), compile)

    def _now(self, input: Tensor | None) -> "_Now":
        """What decides which trace holds: looked up in each call, so in one walk over the modules."""
        flags: list[object] = []
        like: Tensor | None = None
        dtypes: set[torch.dtype] = set()
        for module in self.modules():
            flags += (module.training, has_hooks(module))
            for tensor in module._parameters.values():
                like = tensor if like is None else like
            tensors = (*module._parameters.values(), *module._buffers.values())
            dtypes.update(t.dtype for t in tensors if t is not None and t.is_floating_point())
        like = input if like is None else like
        return _Now((*flags, self._like(self._example[0], like).dtype), like, dtypes)

    def _traced(self, now: "_Now") -> StepGraph:
        if now.key not in self._graphs:
            cell = self._cell[0]
            if isinstance(cell, nn.Module):  # what .to() and others have put in the layer's place
                cell._parameters.update({n: p for n, p in self._parameters.items() if n in cell._parameters})
                cell._buffers.update({n: b for n, b in self._buffers.items() if n in cell._buffers})
            example = [part.to(self._like(part, now.like)) for part in self._example]
            graph = StepGraph(cell, example, self.training)
            for name, constant in graph.constants.items():
                own = f"_step_constant{len(self._buffers)}"
                self.register_buffer(own, constant, persistent=False)
                for node in graph.module.graph.nodes:
                    if (node.op, node.target) == ("get_attr", name):
                        node.target = own
            self._graphs[now.key] = graph
        return self._graphs[now.key]

    def _scheduled(self, now: "_Now", compile: bool) -> tuple[Pass, ...]:
        key = (now.key, compile)
        if key not in self._passes:
            self._passes[key] = schedule(self._traced(now), compile)
        return self._passes[key]

    def _like(self, part: Tensor, like: Tensor | None) -> Tensor:
        """Where a part of the example would lie by now, and its dtype, after ``.to()`` and ``.double()``."""
        if like is None or part.dtype != self._dtype:
            return part if like is None else part.new_empty((), device=like.device)
        return like.detach()

    def explain(self) -> Explanation:
        """What became of each operation of the step: a table, graphviz text, a drawing.

        It says what runs on CPU in float32 and float64; elsewhere walks and loops run step by step.

        >>> def decay(x, c):
        ...     c = torch.sigmoid(x) * c + x
        ...     return torch.tanh(c), c
        >>> print(parallelize(decay, example=(torch.randn(2, 3), torch.randn(2, 3))).explain())
        decay runs in 1 pass: scan.
        Sequential operations per step, views not counted: 4 in a plain loop, 2 after.
        <BLANKLINE>
          operation  node     per lane  where it runs
        1 scan: lowered to a scan, since it is affine and element-wise in c
          sigmoid    sigmoid  3         came along into the walk
          mul        mul      3         walks through time
          add        add      3         walks through time
          tanh       tanh     3         came along into the walk
        """
        cell = self._cell[0]
        name = type(cell).__name__ if isinstance(cell, nn.Module) else getattr(cell, "__name__", "step")
        return explain(self.graph(), self.passes(compile=True), name)

    def forward(
        self,
        input: Tensor,
        hx: State | None = None,
        *,
        reset: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """Run the step over all rows.

        Args:
            input: (T, B, ...); padded rows are read as 0.
            hx: The states before the first step, (B, ...) each; None: 0.
            reset: (T, B) bool, true where a new piece starts: states are 0 before it.
            mask: (T, B) bool, true on real steps: elsewhere states are held and the output is 0.

        Returns:
            The output, (T, B, ...), and the states after the last step.

        Raises:
            RuntimeError: A shape does not fit.
            ValueError: A dtype does not.
        """
        now = self._now(input if isinstance(input, Tensor) else None)
        state = self._state(input, hx, now.like)
        check_flags(input.flatten(2) if input.dim() > 2 else input[..., None], reset, mask, None)
        input = _blank(input, mask)
        graph = self._traced(now)
        run = Run(self, graph, input, state, reset, mask)
        for one in self._scheduled(now, self._compiles(input, state, now.dtypes)):
            run.one(one)
        output = run.rows(graph.y)
        output = _blank(output.view(*input.shape[:2], *output.shape[1:]), mask)
        return output, tuple(run.last(k) for k in range(len(state)))

    forward._torchdynamo_disable = True  # type: ignore[attr-defined]  # torch.compiler.disable would import the compiler

    def _state(self, input: Tensor, hx: State | None, like: Tensor | None) -> State:
        x, *states = self._example
        if not isinstance(input, Tensor) or input.dim() != x.dim() + 1 or input.shape[2:] != x.shape[1:]:
            got = tuple(input.shape) if isinstance(input, Tensor) else type(input).__name__
            sizes = ", ".join(["T", "B", *map(str, x.shape[1:])])
            raise RuntimeError(f"input must have shape ({sizes}), as the example's x has {tuple(x.shape)}, got {got}")
        dtype, autocast = self._like(x, like).dtype, torch.is_autocast_enabled(input.device.type)
        if input.dtype != dtype and not autocast:
            raise ValueError(f"input must have dtype {dtype}, got {input.dtype}; convert it: input.to({dtype})")
        if not len(input):
            raise RuntimeError("expected at least one time step, got an input of 0 steps")
        if hx is None:
            return tuple(self._like(s, like).new_zeros(input.shape[1], *s.shape[1:]) for s in states)
        if not isinstance(hx, tuple | list) or not all(isinstance(part, Tensor) for part in hx):
            raise TypeError(f"hx must be a tuple of {len(states)} tensors, got {type(hx).__name__}")
        shapes, dtypes = [(input.shape[1], *s.shape[1:]) for s in states], [self._like(s, like).dtype for s in states]
        if len(hx) != len(shapes):
            raise RuntimeError(f"hx must be {len(shapes)} states of the shapes {shapes}, got {len(hx)}")
        for part, shape, dtype in zip(hx, shapes, dtypes, strict=True):
            if part.shape != shape:
                raise RuntimeError(f"a state in hx must have shape {shape}, got {tuple(part.shape)}")
            if part.dtype != dtype:
                raise ValueError(f"a state in hx must have dtype {dtype}, got {part.dtype}; convert it: hx.to({dtype})")
        return tuple(hx)

    def __getstate__(self) -> dict[str, Any]:
        """Without the graphs, which are traced again when they are needed."""
        return self.__dict__ | {"_graphs": {}, "_passes": {}}

    def _compiles(self, input: Tensor, state: State, dtypes: set[torch.dtype]) -> bool:
        """Whether element-wise programs can run: they know one dtype at a time, on CPU."""
        if input.device.type != "cpu" or input.dtype not in (torch.float32, torch.float64):
            return False
        return not torch.is_autocast_enabled("cpu") and {input.dtype} == dtypes.union(part.dtype for part in state)


class _Now(NamedTuple):
    """What a layer is at a call: which trace holds, a tensor of its dtype and device, the dtypes of its tensors."""

    key: Key
    like: Tensor | None
    dtypes: set[torch.dtype]


def _blank(rows: Tensor, mask: Tensor | None) -> Tensor:
    """Rows, 0 where they are padding."""
    return rows if mask is None else torch.where(like_rows(mask, rows), rows, rows.new_zeros(()))


class Bidirectional(nn.Module):
    """Two layers, of which one reads each sequence from its end; their outputs side by side.

    It takes whole sequences: the second layer cannot read the next batch, so that its output, and a state that is
    carried, are not those of a sequence that goes on there.

    Args:
        forward_layer: Takes (input, hx, reset=, mask=) and returns (output, states), as :class:`Parallel` does.
        backward_layer: Another one.

    >>> step = lambda x, c: (x + c, c + x)
    >>> one, other = (parallelize(step, example=(torch.randn(2, 1), torch.randn(2, 1))) for _ in range(2))
    >>> Bidirectional(one, other)(torch.ones(3, 1, 1))[0][:, 0].tolist()
    [[1.0, 3.0], [2.0, 2.0], [3.0, 1.0]]
    """

    def __init__(self, forward_layer: nn.Module, backward_layer: nn.Module) -> None:
        super().__init__()
        self.forward_layer, self.backward_layer = forward_layer, backward_layer

    def forward(
        self,
        input: Tensor,
        hx: tuple[State, State] | None = None,
        *,
        reset: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, tuple[State, State]]:
        """As :meth:`Parallel.forward`; states are a pair, one for each direction."""
        ahead, behind = hx if hx is not None else (None, None)
        output, first = self.forward_layer(input, ahead, reset=reset, mask=mask)
        ends = None  # read from behind, a piece starts where the next one began
        if reset is not None:
            ends = torch.cat([reset[1:], torch.zeros_like(reset[:1])]).flip(0)
        turned = None if mask is None else mask.flip(0)
        other, second = self.backward_layer(input.flip(0), behind, reset=ends, mask=turned)
        return torch.cat([output, other.flip(0)], -1), (first, second)
