"""The order in which the parts of a step run, and how each does: a chain of passes over all steps."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import fx

from seqbatch.rnn.affine import why_not_affine
from seqbatch.rnn.compiled_pass import CannotCompile, CompiledPass
from seqbatch.rnn.graph import Component, StepGraph
from seqbatch.rnn.operations import columns_of, elementwise

__all__ = ["Pass", "schedule"]

Kind = Literal["rows", "shift", "scan", "walk", "loop", "steps"]


@dataclass(frozen=True)
class Pass:
    """Operations that run together.

    Attributes:
        kind: ``rows``: once, on the rows of all steps. ``shift``: a state that only remembers. ``scan``: affine and
            element-wise in its state. ``walk``: element-wise, not affine. ``loop``: a time loop over matrix products
            and element-wise programs. ``steps``: a time loop over torch's operations.
        nodes: The operations and states, in an order in which they can run.
        walking: Those of them that feed back, and so had to walk through time; the others came along.
        why: Why it is of no better kind.
        compiled: Its programs, where it runs as such.
    """

    kind: Kind
    nodes: tuple[fx.Node, ...]
    walking: tuple[fx.Node, ...] = ()
    why: str = ""
    compiled: CompiledPass | None = None


def schedule(graph: StepGraph, compile: bool) -> tuple[Pass, ...]:
    """Passes in an order in which they can run.

    Args:
        graph: The step.
        compile: Whether element-wise programs can run: on CPU, in float32 or float64.
    """
    passes: list[Pass] = []
    level = _levels(graph)
    for number in range(1 + max(level.values(), default=0)):
        here = [c for c in graph.components if level[c] == number]
        mixed = [c for c in here if _joins(graph, c)]
        passes += [_alone(graph, c, compile) for c in here if c not in mixed]
        passes += _together(graph, mixed) if compile else [_alone(graph, c, compile) for c in mixed]
    return tuple(_merged(passes))


def _levels(graph: StepGraph) -> dict[Component, int]:
    """Components of one level do not wait for each other, but for element-wise ones."""
    owner = {node: c for c in graph.components for node in c.nodes}
    new = dict(zip(graph.states, graph.new_states, strict=True))
    level: dict[Component, int] = {}
    for component in graph.components:
        sources = [
            n for node in component.nodes for n in (*node.all_input_nodes, *([new[node]] if node in new else []))
        ]
        before = [level[owner[n]] for n in sources if n in owner and owner[n] is not component]
        level[component] = max(before, default=0) + (not _joins(graph, component))
    return level


def _joins(graph: StepGraph, component: Component) -> bool:
    """Whether a component is made of element-wise operations and views of columns alone, and so can join others."""
    states = set(graph.states)
    operations = [node for node in component.nodes if node not in states]
    alike = all(
        elementwise(n, graph.module) is not None or columns_of(n, graph.values) is not None or _cuts(graph, n)
        for n in operations
    )
    return bool(operations) and alike and component.by_rows


def _cuts(graph: StepGraph, node: fx.Node) -> bool:
    return bool(node.users) and all(columns_of(user, graph.values) is not None for user in node.users)


def _alone(graph: StepGraph, component: Component, compile: bool) -> Pass:
    """The best that can be done for one component."""
    nodes, states = component.nodes, set(graph.states)
    if not component.recurrent:
        if not component.by_rows:
            return Pass("steps", nodes, nodes, "it mixes lanes, or its result depends on their number")
        return Pass("shift" if nodes[0] in states else "rows", nodes)
    why = _why_no_scan(graph, component)
    if compile:
        try:
            compiled = CompiledPass(graph, nodes, graph.read_outside(nodes))
        except CannotCompile as reason:
            return Pass("steps", nodes, nodes, str(reason))
        return Pass(_kind(compiled, why), nodes, nodes, why, compiled)
    return Pass("steps" if why else "scan", nodes, nodes, why)


def _why_no_scan(graph: StepGraph, component: Component) -> str:
    """Why a component is no scan; empty if it is one."""
    if not component.by_rows:
        return "it reads what is the same for all lanes, or their number"
    for node in component.nodes:
        if node in graph.states and not graph.values[node].is_floating_point():
            return f"{node.name} is {graph.values[node].dtype}"
    return why_not_affine(component.nodes, graph.states)


def _kind(compiled: CompiledPass, why: str) -> Kind:
    return "loop" if compiled.linears else "walk" if why else "scan"


def _together(graph: StepGraph, components: Sequence[Component]) -> list[Pass]:
    """Recurrent components with the element-wise operations around them, each such group in one pass.

    What is in no group feeds none, and groups do not feed each other: the rest can come after them.
    """
    found: list[Pass] = []
    left = list(components)
    for group in _groups(graph, components):
        nodes = tuple(graph.in_order(n for c in group for n in c.nodes))
        walking = [c for c in group if c.recurrent]
        reasons = [_why_no_scan(graph, c) for c in walking]
        try:
            compiled = CompiledPass(graph, nodes, graph.read_outside(nodes))
        except CannotCompile:
            continue
        why = next(filter(None, reasons), "")
        found.append(Pass(_kind(compiled, why), nodes, tuple(n for c in walking for n in c.nodes), why, compiled))
        left = [c for c in left if c not in group]
    return found + [_alone(graph, c, True) for c in left]


def _groups(graph: StepGraph, components: Sequence[Component]) -> list[list[Component]]:
    """Recurrent components, what is computed from them, and all that these are computed from, where connected."""
    owner = {node: c for c in components for node in c.nodes}
    sources = {c: {owner[n] for node in c.nodes for n in node.all_input_nodes if n in owner} - {c} for c in components}
    users = {c: {d for d in components if c in sources[d]} for c in components}
    below = _reached([c for c in components if c.recurrent], users)
    chosen = _reached(below, sources)
    either = {c: (sources[c] | users[c]) & chosen for c in chosen}
    groups, left = [], [c for c in components if c in chosen]
    while left:
        group = _reached(left[:1], either)
        groups.append([c for c in left if c in group])
        left = [c for c in left if c not in group]
    return groups


def _reached(starts: Iterable[Component], edges: Mapping[Component, set[Component]]) -> set[Component]:
    waiting, seen = list(starts), set[Component]()
    while waiting:
        component = waiting.pop()
        if component not in seen:
            seen.add(component)
            waiting += edges[component]
    return seen


def _merged(passes: Iterable[Pass]) -> list[Pass]:
    """Operations that run on all rows, one after the other, in one pass."""
    found: list[Pass] = []
    for one in passes:
        if found and found[-1].kind == one.kind == "rows":
            found[-1] = Pass("rows", found[-1].nodes + one.nodes)
        else:
            found.append(one)
    return found
