"""Which part of a recurrent cell must walk through time: its step as a graph, cut into strongly connected components.

The user writes one step, ``cell(x_t, *state) -> (y_t, *new_state)``. Traced, it is a graph of operations whose edges
have no delay, with one edge of delay 1 from each new state to the state. An operation must be computed step by
step only if it stands in a cycle of that graph (Hwang and Sung, arXiv 1503.02852): all others run once for all steps,
as rows (T * B, D), provided that they treat rows alike, which is tried out on numbers.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor, fx

from seqbatch.rnn.operations import name_of
from seqbatch.rnn.tracing import Cell, constants_of, run_node, trace, untouched

__all__ = ["Component", "StepGraph", "check_example"]

_AROUND = 3  # rows that stand around those that must not notice
_SCALES = (0.1, 1.0, 10.0)  # how large they are


@dataclass(frozen=True)
class Component:
    """Operations that run together.

    Attributes:
        nodes: In an order in which they can be computed.
        recurrent: They feed back into themselves over time: they run step by step.
        by_rows: Each treats rows alike; one that is neither recurrent nor by rows runs step by step too.
    """

    nodes: tuple[fx.Node, ...]
    recurrent: bool
    by_rows: bool


class StepGraph:
    """A step, traced, with the values that its operations have on an example.

    Args:
        cell: The step.
        example: Tensors that it takes.
        training: Whether the step shall find itself in training.

    Attributes:
        module: The traced step; shares its parameters with the cell.
        x: The node of the input.
        states: The nodes of the states, delay 1 after `new_states`.
        y: The node of the output.
        new_states: The nodes that become the states of the next step.
        values: What each node is on the example.
        random: Those that draw random numbers.
        reached: The nodes that depend on the input, a state or chance; all others are constants of the step.
        shaped: Those whose value has a row for each lane; others that are reached have one value a step.
        counts: Those whose value is the number of lanes, or a shape that begins with it.
        components: In an order in which they can run.

    Raises:
        ValueError: The step cannot be traced, or is none.
    """

    def __init__(self, cell: Cell, example: Sequence[Tensor], training: bool = False) -> None:
        check_example(example)
        self.module = trace(cell, len(example), training)
        graph = self.module.graph
        inputs = [node for node in graph.nodes if node.op == "placeholder"]
        self.x, self.states = inputs[0], tuple(inputs[1:])
        (output,) = (node for node in graph.nodes if node.op == "output")
        self.y, self.new_states = _results(output.args[0], self.states)
        self._check_in_place()
        self.random: set[fx.Node] = set()
        self.counts: set[fx.Node] = set()
        self.shaped: set[fx.Node] = {self.x, *self.states}
        with (
            torch.no_grad(),
            torch.random.fork_rng(devices=[example[0].device] if example[0].is_cuda else []),
            untouched(self.module),
        ):
            self.values = self._evaluate(example)
            self.reached = {self.x, *self.states, *self.operations}
            self._check_states(example)
            self.by_rows = self._try_rows()
        for node in (self.y, *self.new_states):
            if node not in self.shaped:
                raise ValueError(
                    f"output and states must have a row for each lane: {node.name} has shape "
                    f"{tuple(getattr(self.values[node], 'shape', ()))} whatever their number"
                )
        self.components = tuple(self._components())

    @property
    def operations(self) -> list[fx.Node]:
        """The nodes that compute something of the input or of a state, or draw random numbers, in order."""
        given = {self.x, *self.states}
        reached = set(given)
        found = []
        for node in self.module.graph.nodes:
            if node.op == "output" or node in given:
                continue
            if any(source in reached for source in node.all_input_nodes) or node in self.random:
                reached.add(node)
                found.append(node)
        return found

    def name_of(self, node: fx.Node) -> str:
        """The operation of a node, as torch names it."""
        return name_of(node, self.module)

    def in_order(self, nodes: Iterable[fx.Node]) -> list[fx.Node]:
        """Nodes in an order in which they can be computed within a step."""
        chosen = set(nodes)
        return [node for node in self.module.graph.nodes if node in chosen]

    def read_outside(self, nodes: Iterable[fx.Node]) -> list[fx.Node]:
        """Those of some nodes that others read, or that are the output or a state that only remembers."""
        inside = set(nodes)
        told = {new for s, new in zip(self.states, self.new_states, strict=True) if s not in inside} | {self.y}
        return [
            n for n in self.in_order(inside) if n in told or any(u not in inside and u.op != "output" for u in n.users)
        ]

    def _components(self) -> Iterator[Component]:
        """Strongly connected components of operations and states, in topological order of their condensation."""
        nodes = [*self.states, *self.operations]
        number = {node: i for i, node in enumerate(nodes)}
        edges = [(number[s], number[n]) for n in nodes for s in n.all_input_nodes if s in number]
        edges += [
            (number[new], number[state])
            for new, state in zip(self.new_states, self.states, strict=True)
            if new in number
        ]
        ones, size = np.ones(len(edges)), len(nodes)
        starts, ends = np.array(edges, np.int64).reshape(-1, 2).T
        count, label = connected_components(coo_matrix((ones, (starts, ends)), (size, size)), connection="strong")
        inside = {(int(label[a]), int(label[b])) for a, b in edges}
        for k in _topological(count, inside, label):
            members = tuple(nodes[i] for i in np.flatnonzero(label == k))
            recurrent = len(members) > 1 or any(a == b for a, b in edges if nodes[a] in members)
            yield Component(members, recurrent, all(node in self.by_rows for node in members))

    @property
    def constants(self) -> dict[str, Tensor]:
        """Tensors that the step holds and that belong to no module."""
        return constants_of(self.module)

    def _evaluate(self, example: Sequence[Tensor]) -> dict[fx.Node, Any]:
        given, found = iter(example), {}
        for node in self.module.graph.nodes:
            if node.op == "placeholder":
                found[node] = next(given)
            elif node.op != "output":
                before = _random_state(example[0])
                try:
                    found[node] = run_node(self.module, node, found.__getitem__)
                except Exception as error:
                    shapes = ", ".join(str(tuple(part.shape)) for part in example)
                    raise ValueError(
                        f"the step fails on tensors of shapes {shapes}, at {node.name} ({self.name_of(node)}): {error}"
                    ) from error
                if not torch.equal(before, _random_state(example[0])):
                    self.random.add(node)
        return found

    def _try_rows(self) -> set[fx.Node]:
        """The operations whose result for some rows is not changed by other rows around them."""
        generator, good = torch.Generator().manual_seed(0), {self.x, *self.states}
        for node in self.operations:
            if all(self._alike(node, scale, generator) for scale in _SCALES):
                good.add(node)
        return good

    def _alike(self, node: fx.Node, scale: float, generator: torch.Generator) -> bool:
        count = len(self.values[self.x])
        expected = self.values[node]

        def widen(value: Any) -> Any:
            if isinstance(value, tuple | list) and not isinstance(value, torch.Size):
                return type(value)([widen(part) for part in value])
            if not isinstance(value, Tensor):
                return value
            if not value.is_floating_point():
                return torch.cat([value[:1], value, value[-1:], value[:1]])
            like = [scale * torch.randn(n, *value.shape[1:], generator=generator).to(value) for n in (1, 2)]
            return torch.cat([like[0], value, like[1]])

        def around(source: fx.Node) -> Any:
            value = self.values[source]
            if source in self.counts:  # the number of lanes, which must not enter a result
                return count + _AROUND if isinstance(value, int) else torch.Size((count + _AROUND, *value[1:]))
            return widen(value) if source in self.shaped else value

        try:
            found = run_node(self.module, node, around)
        except Exception:  # whatever an operation objects to, it has not taken rows
            if _has_rows(expected, expected, count, 0):
                self.shaped.add(node)
            return False
        if _is_count(found, expected, count):
            self.counts.add(node)
            return True
        if not _has_rows(found, expected, count, _AROUND):
            return False
        self.shaped.add(node)
        known = self.shaped | self.counts
        if any(source in self.reached and source not in known for source in node.all_input_nodes):
            return False  # it reads what each step has one of
        return node in self.random or _same_rows(found, expected, count)

    def _check_in_place(self) -> None:
        for node in self.module.graph.nodes:
            name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
            writes = (
                name.endswith("_") and not name.endswith("__") and getattr(node.target, "__module__", "") != "_operator"
            )
            flag = node.kwargs.get("inplace", False)
            if node.op == "call_module":
                child = self.module.get_submodule(str(node.target))
                name, flag = type(child).__name__.lower(), getattr(child, "inplace", False)
            if writes or flag or name == "setitem" or "out" in node.kwargs:
                raise ValueError(
                    f"the step changes a tensor in place ({name}, at {node.format_node()}): write a new one instead"
                )

    def _check_states(self, example: Sequence[Tensor]) -> None:
        for k, (state, new, given) in enumerate(zip(self.states, self.new_states, example[1:], strict=True)):
            if new is state:
                raise ValueError(f"state {k} ({state.name}) is returned as it came: make it a constant of the cell")
            if new not in self.reached:
                raise ValueError(
                    f"state {k} ({state.name}) becomes {new.name}, a constant: make it a constant of the cell"
                )
            value = self.values.get(new)
            if not isinstance(value, Tensor) or value.shape != given.shape or value.dtype != given.dtype:
                got = f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(
                    f"state {k} ({state.name}) came as {tuple(given.shape)} {given.dtype} and left as {got}: "
                    "a state must keep its shape and dtype"
                )
        reached = {self.x}
        for _ in range(len(self.states) + 1):
            for node in self.module.graph.nodes:
                if any(source in reached for source in node.all_input_nodes):
                    reached.add(node)
            reached |= {s for s, new in zip(self.states, self.new_states, strict=True) if new in reached}
        if self.y not in reached:
            raise ValueError(f"the output ({self.y.name}) does not depend on the input, at no step")


def _random_state(like: Tensor) -> Tensor:
    return torch.cuda.get_rng_state(like.device) if like.is_cuda else torch.get_rng_state()


def check_example(example: Sequence[Tensor]) -> None:
    """Refuse what is no example of a step's arguments.

    >>> check_example([torch.zeros(1, 2), torch.zeros(1, 2)])
    Traceback (most recent call last):
        ...
    ValueError: example must have two lanes or more, as many in x_t as in each state, got shapes [(1, 2), (1, 2)]
    """
    if isinstance(example, Tensor) or not example or not all(isinstance(p, Tensor) and p.dim() for p in example):
        raise ValueError("example must be the tensors that cell takes, (x_t, *state), each with the lanes first")
    shapes = [tuple(part.shape) for part in example]
    if len({shape[0] for shape in shapes}) != 1 or shapes[0][0] < 2:
        raise ValueError(f"example must have two lanes or more, as many in x_t as in each state, got shapes {shapes}")


def _is_count(found: Any, expected: Any, count: int) -> bool:
    """Whether a value is the number of lanes, or a shape that begins with it."""
    if isinstance(expected, torch.Size) and isinstance(found, torch.Size):
        return (found, expected) == ((count + _AROUND, *expected[1:]), (count, *expected[1:]))
    return type(expected) is int and (found, expected) == (count + _AROUND, count)


def _has_rows(found: Any, expected: Any, count: int, more: int) -> bool:
    """Whether a value has a row for each lane, or is no tensor."""
    if isinstance(expected, tuple | list) and not isinstance(expected, torch.Size):
        return all(_has_rows(one, two, count, more) for one, two in zip(found, expected, strict=True))
    if not isinstance(expected, Tensor):
        return True
    return isinstance(found, Tensor) and bool(expected.dim()) and (len(expected), len(found)) == (count, count + more)


def _same_rows(found: Any, expected: Any, count: int) -> bool:
    """Whether rows 1 to count of what was found are what was expected."""
    if isinstance(expected, tuple | list) and not isinstance(expected, torch.Size):
        return all(_same_rows(one, two, count) for one, two in zip(found, expected, strict=True))
    if not isinstance(expected, Tensor):
        return bool(found == expected)
    near = 1e-5 if expected.dtype in (torch.float32, torch.float64) else 1e-2
    return torch.allclose(found[1 : count + 1].double(), expected.double(), rtol=near, atol=near, equal_nan=True)


def _topological(count: int, edges: set[tuple[int, int]], label: np.ndarray[Any, Any]) -> list[int]:
    """Components so that all that one needs come before it; of those that are ready, the one that stands first."""
    waits = {k: {a for a, b in edges if b == k and a != k} for k in range(count)}
    first = {k: int(np.flatnonzero(label == k)[0]) for k in range(count)}
    order: list[int] = []
    while waits:
        ready = min((k for k, needs in waits.items() if not needs), key=first.__getitem__)
        order.append(ready)
        del waits[ready]
        for needs in waits.values():
            needs.discard(ready)
    return order


def _results(result: Any, states: tuple[fx.Node, ...]) -> tuple[fx.Node, tuple[fx.Node, ...]]:
    parts = result if isinstance(result, tuple | list) else (result,)
    if len(parts) != 1 + len(states) or not all(isinstance(part, fx.Node) for part in parts):
        raise ValueError(
            f"the cell must return (y_t, *new_state), 1 + {len(states)} tensors, such as h, h; got {result}"
        )
    return parts[0], tuple(parts[1:])
