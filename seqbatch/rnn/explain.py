"""What became of each operation of a step: as data, as a table, as graphviz text, and as a drawing."""

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, fx

from seqbatch.rnn.graph import StepGraph
from seqbatch.rnn.operations import linear_of
from seqbatch.rnn.passes import Kind, Pass

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Explanation", "Operation", "Part", "explain"]

Where = Literal[
    "once: it is constant",
    "once, for all steps",
    "walks through time",
    "came along into the walk",
    "step by step",
]
_WIDTH = 100
_FILL = "#f0a868"


@dataclass(frozen=True)
class Operation:
    """A traced operation.

    Attributes:
        node: Its name in the graph.
        name: The operation, as torch names it.
        shape: What it gives for each lane; of a constant, the whole; empty if that is no tensor.
        part: Number of the pass, from 1; 0 for constants of the step, which are computed before all passes.
        where: Where it runs. What came along could have run once, and costs nothing where it is.
        reads: Names of the operations, states or input that it is computed from.
        view: It computes nothing: it gives numbers that lie in memory already, or a shape.
    """

    node: str
    name: str
    shape: str
    part: int
    where: Where
    reads: tuple[str, ...]
    view: bool

    @property
    def in_loop(self) -> bool:
        """Whether it runs for each step, because it must."""
        return self.where in ("walks through time", "step by step")


@dataclass(frozen=True)
class Part:
    """A pass: operations that run together.

    Attributes:
        kind: As :class:`seqbatch.rnn.passes.Pass` has it.
        states: Names of the states in it.
        why: How it runs, and why not better.
        products: Names of the matrix products that remain in its loop.
    """

    kind: Kind
    states: tuple[str, ...]
    why: str
    products: tuple[str, ...]


@dataclass(frozen=True)
class Explanation:
    """What became of a step; ``str()`` of it is a table.

    Attributes:
        cell: The cell's name.
        x: Name of the input.
        y: Name of the operation, state or input that is the output.
        states: Each state's name and that of what it becomes.
        operations: In the order in which they run.
        parts: The passes, in the order in which they run, on CPU in float32 and float64.
        all_products: Names of all matrix products of the step.
    """

    cell: str
    x: str
    y: str
    states: dict[str, str]
    operations: tuple[Operation, ...]
    parts: tuple[Part, ...]
    all_products: tuple[str, ...]

    @property
    def before(self) -> int:
        """Operations that a loop over the step computes for each step, one after the other; views do not count."""
        return sum(not one.view for one in self.operations)

    @property
    def after(self) -> int:
        """Those that still must; views do not count."""
        return sum(one.in_loop and not one.view for one in self.operations)

    @property
    def products(self) -> tuple[str, ...]:
        """Names of the matrix products that remain in a loop."""
        return tuple(name for part in self.parts for name in part.products)

    def __str__(self) -> str:
        return "\n".join([*self._summary(), "", *self._table()])

    def to_dot(self) -> str:
        """Graphviz text: passes are clusters, operations in the loop are filled, dashed edges lead to the next step."""
        lines = [f"digraph {_quoted(self.cell)} {{", "  node [shape=box];", f"  {_quoted(self.x)} [shape=ellipse];"]
        for number in range(len(self.parts) + 1):
            lines += [f"  {line}" for line in self._cluster(number)]
        lines += [f"  {_quoted(source)} -> {_quoted(one.node)};" for one in self.operations for source in one.reads]
        lines += [
            f"  {_quoted(new)} -> {_quoted(state)} [style=dashed, constraint=false];"
            for state, new in self.states.items()
        ]
        return "\n".join([*lines, '  output [label="y", shape=ellipse];', f"  {_quoted(self.y)} -> output;", "}", ""])

    def plot(self, path: str | Path | None = None, *, ax: "Axes | None" = None) -> "Axes":
        """Draw what computes, from the input at the top to the output; views and constants are left out.

        Args:
            path: A file to write the drawing to, .png, .svg or .pdf; None writes none.
            ax: Where to draw; None makes a figure of fitting size.

        Raises:
            ModuleNotFoundError: Without matplotlib.
        """
        from seqbatch.rnn.explain_plot import draw

        return draw(self, path, ax)

    def _summary(self) -> Iterator[str]:
        count = len(self.parts)
        kinds = ", ".join(part.kind for part in self.parts)
        yield _short(f"{self.cell} runs in {count} {'pass' if count == 1 else 'passes'}: {kinds}.", _WIDTH)
        yield f"Sequential operations per step, views not counted: {self.before} in a plain loop, {self.after} after."
        if self.all_products:
            left = f"{len(self.products) or 'none'} after"
            yield f"Matrix products among them: {len(self.all_products)} in a plain loop, {left}."

    def _table(self) -> Iterator[str]:
        head = ("operation", "node", "per lane", "where it runs")
        groups = _alike(self.operations)
        cells = [_cells(group) for group in groups]
        widths = [max(len(row[k]) for row in [head, *cells]) for k in range(3)]
        while sum(widths) > _WIDTH - 40:  # the rest is for the longest `where`, and gaps
            widths[widths.index(max(widths))] -= 1
        yield _aligned(head, widths)
        for number in range(len(self.parts) + 1):
            rows = [row for row, group in zip(cells, groups, strict=True) if group[0].part == number]
            if number:
                part = self.parts[number - 1]
                yield from textwrap.wrap(f"{number} {part.kind}: {part.why}", _WIDTH, subsequent_indent="  ")
            elif rows:
                yield "constants of the step"
            yield from (_aligned(row, widths) for row in rows)

    def _cluster(self, number: int) -> Iterator[str]:
        inside = [one for one in self.operations if one.part == number]
        if not number:
            yield from (_box(one) for one in inside)
            return
        part = self.parts[number - 1]
        yield f"subgraph cluster_{number} {{"
        yield f"  label={_quoted(f'{number} {part.kind}')};"
        yield from (f"  {_quoted(state)} [shape=ellipse];" for state in part.states)
        yield from (f"  {_box(one)}" for one in inside)
        yield "}"


def explain(graph: StepGraph, passes: Sequence[Pass], cell: str) -> Explanation:
    """What became of the operations of a step.

    Args:
        graph: The step.
        passes: What :func:`seqbatch.rnn.passes.schedule` made of it.
        cell: The name of the cell.
    """
    states = set(graph.states)
    rows = [
        _operation(graph, node, 0, "once: it is constant")
        for node in graph.module.graph.nodes
        if node not in graph.reached and node.op not in ("output", "get_attr", "placeholder")
    ]
    for number, one in enumerate(passes, 1):
        rows += [_operation(graph, node, number, _where(one, node)) for node in one.nodes if node not in states]
    products = [node for node in graph.operations if linear_of(node, graph.module) is not None]
    return Explanation(
        cell,
        graph.x.name,
        graph.y.name,
        {s.name: new.name for s, new in zip(graph.states, graph.new_states, strict=True)},
        tuple(rows),
        tuple(_part(graph, one, products) for one in passes),
        tuple(node.name for node in products),
    )


def _operation(graph: StepGraph, node: fx.Node, part: int, where: Where) -> Operation:
    value = graph.values[node]
    shape = _shape(value, 1 if part else 0)
    reads = tuple(source.name for source in node.all_input_nodes if source.op != "get_attr")
    return Operation(node.name, graph.name_of(node), shape, part, where, reads, _is_view(graph, node))


def _where(one: Pass, node: fx.Node) -> Where:
    if one.kind == "rows":
        return "once, for all steps"
    if one.kind == "steps":
        return "step by step"
    return "walks through time" if node in one.walking else "came along into the walk"


def _part(graph: StepGraph, one: Pass, products: Sequence[fx.Node]) -> Part:
    states = tuple(node.name for node in one.nodes if node in graph.states)
    inside = tuple(node.name for node in one.nodes if node in products and one.kind != "rows")
    names = " and ".join(states)
    several = len(inside) > 1
    loops = f"the matrix product{'s' * several} {' and '.join(inside)}"
    how = {
        "rows": "once, for the rows of all steps together",
        "shift": f"{names} only remembers the step before: no loop",
        "scan": f"lowered to a scan, since it is affine and element-wise in {names}",
        "walk": f"one element-wise loop; no scan, since {one.why}",
        "loop": f"a loop over {loops} and what is element-wise; no scan, since {_mix(inside)} columns",
        "steps": f"a loop over torch's operations, since {one.why}",
    }
    return Part(one.kind, states, how[one.kind], inside)


def _mix(products: Sequence[str]) -> str:
    return "they mix" if len(products) > 1 else f"{''.join(products)} mixes"


def _is_view(graph: StepGraph, node: fx.Node) -> bool:
    """Whether what an operation gives lies in the memory of what it reads."""
    given = {_place(value) for source in node.all_input_nodes for value in _tensors(graph.values[source])}
    return all(_place(value) in given for value in _tensors(graph.values[node]))


def _tensors(value: Any) -> list[Tensor]:
    parts = value if isinstance(value, tuple | list) else [value]
    return [part for part in parts if isinstance(part, Tensor)]


def _place(value: Tensor) -> int:
    return value.untyped_storage().data_ptr()


def _shape(value: Any, skip: int) -> str:
    """Sizes after the lanes: ``32``, ``4×8``, or ``8 + 8`` for two of 8."""
    found = ["×".join(map(str, part.shape[skip:])) for part in _tensors(value)]
    if len(found) > 2 and len(set(found)) == 1:
        return f"{len(found)} of {found[0]}"
    return " + ".join(found)


def _alike(operations: Sequence[Operation]) -> list[list[Operation]]:
    """Operations one by one, but views of one kind together."""
    found: list[list[Operation]] = []
    for one in operations:
        last = found[-1][-1] if found else None
        if one.view and last is not None and _kind(last) == _kind(one):
            found[-1].append(one)
        else:
            found.append([one])
    return found


def _kind(one: Operation) -> tuple[object, ...]:
    return one.name, one.shape, one.part, one.view, one.reads


def _cells(group: Sequence[Operation]) -> tuple[str, str, str, str]:
    first = group[0]
    nodes = [one.node for one in group]
    node = ", ".join(nodes) if len(nodes) < 3 else f"{nodes[0]} to {nodes[-1]}"
    return first.name, node, first.shape, first.where + (" (view)" if first.view else "")


def _box(one: Operation) -> str:
    label = one.name if one.name.lower() == one.node.lower() else f"{one.name}: {one.node}"
    filled = f', style=filled, fillcolor="{_FILL}"' if one.in_loop else ""
    return f"{_quoted(one.node)} [label={_quoted(label)}{filled}];"


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."


def _aligned(row: Sequence[str], widths: Sequence[int]) -> str:
    cut = [_short(text, width).ljust(width) for text, width in zip(row[:-1], widths, strict=True)]
    return "  ".join(["  " + cut[0], *cut[1:], row[-1]]).rstrip()
