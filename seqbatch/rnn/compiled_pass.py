"""A part of a step as element-wise programs and matrix products with constant weights: what can leave the interpreter.

Each value that must exist in memory is a *buffer* of rows: what comes from outside, states, products, and *roots*, the
values that products or others read. Stage d computes roots from buffers of products with at most d products before
them; all other values live in registers, and are computed again where they are needed again.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx

from seqbatch.rnn.operations import Linear, columns_of, elementwise, linear_of
from seqbatch.rnn.programs import Instructions, Values

if TYPE_CHECKING:
    from seqbatch.rnn.graph import StepGraph

__all__ = ["CannotCompile", "CompiledPass", "Gradients", "Vector"]

Leaf = tuple[int, int]  # buffer, column


class CannotCompile(Exception):
    """Why a part of a step is no program."""


@dataclass(frozen=True)
class Vector:
    """A constant of the step, as one row of some width."""

    node: fx.Node
    width: int


@dataclass(frozen=True)
class Stage:
    """Values of one stage and what is to be written of them: (what, buffer, value, column)."""

    values: Values
    effects: tuple[tuple[str, int, int, int], ...]


@dataclass(frozen=True)
class Gradients:
    """The programs of backward, by stage, and the buffers whose gradient they write instead of adding to it."""

    programs: tuple[Instructions, ...]
    written: frozenset[int]


class CompiledPass:
    """Nodes of a step that run as programs.

    Attributes:
        outer: Nodes from outside, buffers 0 to len(outer) - 1.
        vectors: Constants, the buffers after them.
        states: Nodes of states, the buffers after those.
        linears: (node, Linear, depth); the buffers after those, in an order in which they can be computed.
        roots: Nodes, the last buffers.
        exports: Nodes of states, linears and roots whose rows are wanted.
        places: The buffers of states, products and roots.
        sources: The buffers that products read, one for each.
        width: Columns of the programs.
        programs: The forward programs by stage.

    Raises:
        CannotCompile: With the reason.
    """

    def __init__(self, graph: "StepGraph", nodes: Sequence[fx.Node], exports: Iterable[fx.Node]) -> None:
        self._graph, self._inside = graph, set(nodes)
        self.states = [s for s in graph.states if s in self._inside]
        new = dict(zip(graph.states, graph.new_states, strict=True))
        found = {n: self._linear(n) for n in nodes}
        depth = self._depths(nodes, found)
        self.linears = [(n, linear, depth[n]) for n, linear in found.items() if linear is not None]
        self.linears.sort(key=lambda entry: entry[2])
        products = {n for n, _, _ in self.linears}
        self.exports = self._exported(exports, products)
        sources = [linear.source for _, linear, _ in self.linears]
        wanted = dict.fromkeys(n for n in [*self.exports, *sources] if n not in self.states and n not in products)
        sources_of_states = [new[s] for s in self.states]
        self.roots = list(wanted)
        for node in self.roots:
            if node not in self._inside:
                raise CannotCompile(f"{node.name} comes from outside")
        self.width = self._common_width([*self.roots, *sources_of_states])
        self.outer, self.vectors = self._leaves([*self.roots, *sources_of_states], products)
        fixed: list[fx.Node | Vector] = [*self.outer, *self.vectors, *self.states]
        keys = [*fixed, *(n for n, _, _ in self.linears), *(("root", n) for n in self.roots)]
        self.buffers = {key: k for k, key in enumerate(keys)}
        self.widths = [self._width_of(key) for key in keys]
        self.first_state = len(self.outer) + len(self.vectors)
        self.first_product = self.first_state + len(self.states)
        self.first_root = self.first_product + len(self.linears)
        self.places = {n: k for n, k in self.buffers.items() if k >= self.first_state and isinstance(n, fx.Node)}
        self.places |= {n: self.buffers["root", n] for n in self.roots}
        self.sources = [self.places[linear.source] for _, linear, _ in self.linears]
        self.stages = [self._stage(d, depth, new) for d in range(1 + max((d for *_, d in self.linears), default=0))]
        self.programs = tuple(stage.values.instructions(stage.effects) for stage in self.stages)
        self._gradients: dict[frozenset[int], Gradients] = {}

    def gradients(self, wanted: frozenset[int]) -> Gradients:
        """The programs of backward for the gradients of some of the outer nodes and vectors, given by buffer."""
        if wanted not in self._gradients:
            self._gradients[wanted] = self._derive(wanted)
        return self._gradients[wanted]

    def _linear(self, node: fx.Node) -> Linear | None:
        if node in self._graph.states:
            return None
        linear = linear_of(node, self._graph.module)
        if linear is None or linear.source not in self._inside:
            return None
        value = self._graph.values[linear.source]
        constant = not any(isinstance(n, fx.Node) and n in self._graph.reached for n in (linear.weight, linear.bias))
        return linear if constant and isinstance(value, Tensor) and value.dim() == 2 else None

    def _depths(self, nodes: Sequence[fx.Node], linears: dict[fx.Node, Linear | None]) -> dict[fx.Node, int]:
        """How many products come before a node within the step, itself included."""
        depth: dict[fx.Node, int] = dict.fromkeys(self.states, 0)
        for node in self._graph.in_order(nodes):
            if node not in self.states:
                before = (depth[n] for n in node.all_input_nodes if n in depth)
                depth[node] = max(before, default=0) + (linears[node] is not None)
        return depth

    def _exported(self, exports: Iterable[fx.Node], products: set[fx.Node]) -> list[fx.Node]:
        """What must be written so that the exports can be read: a view is read from its source."""
        found: dict[fx.Node, None] = {}
        waiting = list(exports)
        while waiting:
            node = waiting.pop(0)
            if node in products or node in self.states or elementwise(node, self._graph.module):
                found[node] = None
            else:
                waiting += [n for n in node.all_input_nodes if n in self._inside]
        return list(found)

    def _common_width(self, roots: list[fx.Node]) -> int:
        widths = []
        for node in roots:
            value = self._graph.values[node]
            if not isinstance(value, Tensor) or value.dim() != 2:
                raise CannotCompile(f"{node.name} has shape {tuple(getattr(value, 'shape', ()))}, not (lanes, columns)")
            widths.append(value.shape[1])
        width = min(widths)
        if not width or any(w % width for w in widths):
            raise CannotCompile(f"its values have {sorted(set(widths))} columns, which do not fit together")
        return width

    def _width_of(self, key: Any) -> int:
        if isinstance(key, Vector):
            return key.width
        return int(self._graph.values[key[1] if isinstance(key, tuple) else key].shape[1])

    def _leaves(self, roots: list[fx.Node], products: set[fx.Node]) -> tuple[list[fx.Node], list[Vector]]:
        """The rows and the constants from outside that roots are computed from; refuses what is no program."""
        seen: set[tuple[fx.Node, int, int]] = set()
        outer: dict[fx.Node, None] = {}
        vectors: dict[Vector, None] = {}
        waiting = [(n, c, self.width) for n in roots for c in range(0, self._width_of(n), self.width)]
        while waiting:
            item = waiting.pop()
            if item in seen:
                continue
            seen.add(item)
            node, column, _ = item
            if node in self.states or node in products:
                continue
            if node not in self._inside:
                source, _ = self._outside(node, column)
                outer[self._rows(source)] = None
                continue
            waiting += self._operands(node, column, vectors)
        order = {n: k for k, n in enumerate(self._graph.module.graph.nodes)}
        self._columns = sorted(((n, c) for n, c, _ in seen if n in self._inside), key=lambda entry: order[entry[0]])
        return sorted(outer, key=order.__getitem__), sorted(vectors, key=lambda v: (order[v.node], v.width))

    def _outside(self, node: fx.Node, column: int) -> tuple[fx.Node, int]:
        """Where columns from outside lie: views are followed to what they view."""
        view = columns_of(node, self._graph.values)
        found = None if view is None else view(column, self.width)
        return (node, column) if found is None else self._outside(*found)

    def _rows(self, node: fx.Node) -> fx.Node:
        value, like = self._graph.values[node], self._graph.values[self._graph.x]
        rows = node in self._graph.shaped and isinstance(value, Tensor) and value.dim() == 2
        if not rows or value.dtype != like.dtype:
            raise CannotCompile(f"{node.name} is not a row of {like.dtype} for each lane")
        return node

    def _operands(self, node: fx.Node, column: int, vectors: dict[Vector, None]) -> list[tuple[fx.Node, int, int]]:
        """The (node, column, width) that some columns of an element-wise operation or a view are computed from."""
        values, width = self._graph.values, self.width
        view = columns_of(node, values)
        if view is not None:
            found = view(column, width)
            if found is None:
                raise CannotCompile(f"columns {column} to {column + width} of {node.name} come from several values")
            return [(*found, width)]
        if elementwise(node, self._graph.module) is None:
            raise CannotCompile(f"{node.name} ({self._graph.name_of(node)}) has no compiled form")
        whole, found_operands = values[node], []
        for operand in node.args:
            if not isinstance(operand, fx.Node):
                continue
            value = values[operand]
            if operand not in self._graph.reached:
                vectors[self._vector(operand, value, whole)] = None
            elif isinstance(value, Tensor) and value.shape == whole.shape:
                found_operands.append((operand, column, width))
            else:
                raise CannotCompile(f"{node.name} widens {operand.name}")
        return found_operands

    def _vector(self, node: fx.Node, value: Any, whole: Tensor) -> Vector:
        fits = isinstance(value, Tensor) and value.is_floating_point() and value.dtype == whole.dtype
        width = whole.shape[1]
        if not fits or value.shape not in ((width,), (1, width), (1,), (1, 1), ()):
            raise CannotCompile(f"{node.name} is no row of {width} constants of {whole.dtype}")
        return Vector(node, width)

    def _stage(self, number: int, depth: dict[fx.Node, int], new: dict[fx.Node, fx.Node]) -> Stage:
        values, effects = Values(), []
        known: dict[tuple[fx.Node, int], int] = {}
        for node, column in self._columns:
            if depth[node] <= number:
                known[node, column] = self._value(values, node, column, known)
        for node in self.roots:
            if depth[node] == number:
                for column in range(0, self._width_of(node), self.width):
                    effects.append(("store", self.buffers["root", node], known[node, column], column))
        for state in self.states:
            if depth.get(new[state], 0) == number:
                for column in range(0, self._width_of(state), self.width):
                    value = self._operand(values, new[state], state, column, known)
                    effects.append(("next", self.buffers[state], value, column))
        return Stage(values, tuple(effects))

    def _value(self, values: Values, node: fx.Node, column: int, known: dict[tuple[fx.Node, int], int]) -> int:
        """The place of some columns of a node in the list of values, once its operands are in it."""
        if node in self.buffers:
            return values.emit("load", self.buffers[node], column)
        view = columns_of(node, self._graph.values)
        if view is not None:
            source, begin = view(column, self.width)  # type: ignore[misc]  # checked before
            return self._operand(values, source, node, begin, known)
        operands = [self._operand(values, operand, node, column, known) for operand in node.args]
        found: int = elementwise(node, self._graph.module)(values.emit, *operands)  # type: ignore[misc]
        return found

    def _operand(
        self, values: Values, operand: Any, node: fx.Node, column: int, known: dict[tuple[fx.Node, int], int]
    ) -> int:
        if not isinstance(operand, fx.Node):
            return values.emit("number", float(operand))
        if operand not in self._graph.reached:
            return values.emit("once", self.buffers[Vector(operand, self._graph.values[node].shape[1])], column)
        if operand in self._inside:
            return known[operand, column]
        source, begin = self._outside(operand, column)
        return values.emit("load", self.buffers[source], begin)

    def _derive(self, wanted: frozenset[int]) -> Gradients:
        """Stages backwards; the gradient of buffer k is buffer k + len(buffers)."""
        inner = range(self.first_state, len(self.buffers))
        writes: dict[int, list[int]] = defaultdict(list)
        found: list[tuple[Values, list[tuple[int, int, int]]]] = []
        count = len(self.buffers)
        for stage in self.stages:
            values = stage.values.copy()
            seeds: dict[int, int] = {}
            for what, buffer, value, column in stage.effects:
                seed = values.emit("back" if what == "next" else "load", buffer + count, column)
                seeds[value] = values.emit("add", seeds[value], seed) if value in seeds else seed
            leaves = {
                place: (entry[1], entry[2])
                for place, entry in enumerate(stage.values.list)
                if entry[0] in ("load", "once") and (entry[1] in wanted or entry[1] in inner)
            }
            gradients = [(*leaves[leaf], g) for leaf, g in sorted(values.derivative(seeds, leaves).items())]
            for buffer, column, _ in gradients:
                writes[buffer].append(column)
            found.append((values, gradients))
        written = frozenset(
            k
            for k, columns in writes.items()
            if sorted(columns) == list(range(0, self.widths[k], self.width)) and self._may_write(k)
        )
        programs = tuple(
            values.instructions(
                ("store" if buffer in written else "accumulate", buffer + count, value, column)
                for buffer, column, value in gradients
            )
            for values, gradients in found
        )
        return Gradients(programs, written)

    def _may_write(self, buffer: int) -> bool:
        """Only gradients that come from programs alone: of rows from outside, and of products that none else reads."""
        if buffer < len(self.outer):
            return True
        first = self.first_product
        inner = first <= buffer < self.first_root and buffer not in self.sources
        return inner and self.linears[buffer - first][0] not in self.exports
