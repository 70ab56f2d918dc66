"""Draw an explanation: operations in layers, passes as bands, what feeds back as dashed arcs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from seqbatch.rnn.explain import Explanation

__all__ = ["draw", "figure_for"]

Point = tuple[float, float]
_ONCE, _CAME, _WALKS, _GIVEN = "white", "#dbe8f4", "#f0a868", "0.93"
_BAND, _STATE = "#f5f5f3", "#b3541e"
_INCH, _ROW = 0.85, 0.5  # of one column, of one layer
_SWEEPS = 24
_BENDS = 0.15  # room that a passing edge takes, in columns


@dataclass
class _Layout:
    """Where each node lies: layers from the top, columns; edges as the nodes that they pass, bends included.

    Bands are the first and the last layer of each pass; a state feeds back on its side, -1 left or 1 right.

    A node is a name, a bend is a (source, target, layer). Names are those of the explanation, and "y" in a tuple.
    """

    layer: dict[Any, int] = field(default_factory=dict)
    column: dict[Any, float] = field(default_factory=dict)
    paths: list[list[Any]] = field(default_factory=list)
    bands: list[tuple[int, int]] = field(default_factory=list)
    sides: dict[str, int] = field(default_factory=dict)

    def at(self, node: Any) -> Point:
        """Where the middle of a node lies."""
        return self.column[node], float(self.layer[node])


_Y = ("y",)


def draw(found: "Explanation", path: str | Path | None, ax: "Axes | None") -> "Axes":
    """Draw an explanation; see :meth:`seqbatch.rnn.explain.Explanation.plot`."""
    from seqbatch.command_line import check_matplotlib

    check_matplotlib("plot()")
    ax = ax if ax is not None else figure_for([found])[1][0]
    layout = _laid_out(found)
    columns = [layout.column[node] for node in layout.layer]
    left, right, last = min(columns) - 0.75, max(columns) + 0.75, max(layout.layer.values())
    _draw_bands(ax, found, layout, (left, right))
    _draw_edges(ax, found, layout, (left, right))
    _draw_nodes(ax, found, layout)
    ax.set(xlim=(left - 0.4, right + 0.4), ylim=(last + 0.6, -0.6), xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    ax.set_title(f"{found.cell}: {found.after} of {found.before} operations walk through time", loc="left", fontsize=10)
    _legend(ax, found)
    if path is not None:
        ax.figure.savefig(path, dpi=150)  # type: ignore[union-attr]  # a subfigure cannot
    return ax


def figure_for(found: Sequence["Explanation"]) -> tuple[Any, list["Axes"]]:
    """A figure with axes for some explanations side by side, of a size that they fit in."""
    from matplotlib.figure import Figure

    layouts = [_laid_out(one) for one in found]
    widths = [max(one.column.values()) - min(one.column.values()) + 2.3 for one in layouts]
    rows = max(max(one.layer.values()) for one in layouts) + 1
    figure = Figure(figsize=(_INCH * sum(widths) + 0.2, _ROW * rows + 0.9), layout="constrained")
    return figure, list(figure.subplots(1, len(found), squeeze=False, width_ratios=widths)[0])


def _laid_out(found: "Explanation") -> _Layout:
    """Layers by longest path, each pass below the ones before it, then columns that keep edges short."""
    nodes, edges, part = _shown(found)
    layout = _Layout()
    layout.layer = _layers(found, nodes, edges, part)
    for number in range(1, len(found.parts) + 1):
        here = [layout.layer[node] for node in nodes if part.get(node) == number]
        if here:
            layout.bands.append((min(here), max(here)))
        else:
            layout.bands.append((0, -1))
    for source, target in edges:
        bends = [(source, target, k) for k in range(layout.layer[source] + 1, layout.layer[target])]
        layout.layer |= {bend: bend[2] for bend in bends}
        layout.paths.append([source, *bends, target])
    layout.sides = {state: 1 if k % 2 or len(found.states) == 1 else -1 for k, state in enumerate(found.states)}
    new = {_end(found, name): layout.sides[state] for state, name in found.states.items()}
    layout.column = _columns(layout, new | layout.sides)
    return layout


def _shown(found: "Explanation") -> tuple[list[Any], list[tuple[Any, Any]], dict[Any, int]]:
    """Nodes without views and constants, the edges between them, and the pass of each."""
    by_name = {one.node: one for one in found.operations}

    def sources(name: str) -> list[str]:
        one = by_name.get(name)
        if one is None:
            return [name]
        if not one.part:
            return []
        return [end for read in one.reads for end in sources(read)] if one.view else [name]

    shown = [one for one in found.operations if one.part and not one.view]
    edges: list[tuple[Any, Any]] = [
        (s, one.node) for one in shown for s in dict.fromkeys(s for read in one.reads for s in sources(read))
    ]
    edges += [(s, _Y) for s in sources(found.y)]
    part: dict[Any, int] = {one.node: one.part for one in shown}
    part |= {state: number for number, one in enumerate(found.parts, 1) for state in one.states}
    return [found.x, *found.states, *(one.node for one in shown), _Y], edges, part


def _layers(
    found: "Explanation", nodes: Sequence[Any], edges: Sequence[tuple[Any, Any]], part: Mapping[Any, int]
) -> dict[Any, int]:
    """As early as a node can come, then as late as it can without making the drawing longer."""
    layer: dict[Any, int] = {found.x: 0}
    first = 1
    for number in range(1, len(found.parts) + 1):
        here = [node for node in nodes if part.get(node) == number]
        for node in here:  # in the order in which they run
            layer[node] = max([first, *(layer[s] + 1 for s, t in edges if t == node and s in layer)])
        last = max((layer[node] for node in here), default=first - 1)
        for node in reversed(here):
            users = [layer[t] - 1 for s, t in edges if s == node and part.get(t) == number]
            if node not in found.states and users:
                layer[node] = min(users)
            elif node in found.states and users:
                layer[node] = max(first, min(users))
        first = last + 1
    layer[_Y] = first
    return layer


def _columns(layout: _Layout, ends: Mapping[Any, int]) -> dict[Any, float]:
    """Nodes of a layer in the order of the mean of their neighbours, and as near to it as they have room."""
    rows: dict[int, list[Any]] = {}
    for node, k in layout.layer.items():
        rows.setdefault(k, []).append(node)
    near: dict[Any, list[Any]] = {node: [] for node in layout.layer}
    for path in layout.paths:
        for one, other in pairwise(path):
            near[one].append(other)
            near[other].append(one)
    column = {node: i - (len(row) - 1) / 2 for row in rows.values() for i, node in enumerate(row)}
    wanted: dict[Any, float] = {}
    for sweep in range(_SWEEPS):
        for k in sorted(rows, reverse=bool(sweep % 2)):
            side = k + 1 if sweep % 2 else k - 1
            for node in rows[k]:
                seen = near[node]
                if sweep < _SWEEPS // 2:  # first the order, from one side; then places, from both
                    seen = [other for other in seen if layout.layer[other] == side] or seen
                wanted[node] = _mean([(column[other], _pull(node, other)) for other in seen], column[node])
            if sweep < _SWEEPS // 2:
                rows[k].sort(key=lambda node: wanted[node] + 100 * ends.get(node, 0))
            column |= _placed(rows[k], wanted)
    return column


def _pull(node: Any, other: Any) -> float:
    """How much an edge wants to be upright: most where it passes layers."""
    return (1.0, 3.0, 9.0)[sum(isinstance(end, tuple) and end != _Y for end in (node, other))]


def _mean(values: Sequence[tuple[float, float]], otherwise: float) -> float:
    weight = sum(w for _, w in values)
    return sum(v * w for v, w in values) / weight if weight else otherwise


def _placed(row: Sequence[Any], wanted: Mapping[Any, float]) -> dict[Any, float]:
    """Places in order and apart, by least squares: neighbours that would collide move as one block."""
    blocks: list[tuple[list[Any], float]] = []  # nodes, and the sum of where they want the block's zero
    offset: dict[Any, float] = {}
    place = 0.0
    for before, node in zip([None, *row], row, strict=False):
        place += 0.0 if before is None else (_room(before) + _room(node)) / 2
        offset[node] = place
        block, total = [node], wanted[node] - place
        while blocks and blocks[-1][1] / len(blocks[-1][0]) > total / len(block):
            earlier, more = blocks.pop()
            block, total = earlier + block, more + total
        blocks.append((block, total))
    return {node: offset[node] + total / len(block) for block, total in blocks for node in block}


def _room(node: Any) -> float:
    return _BENDS * 2 if isinstance(node, tuple) and node != _Y else 1.0


def _draw_bands(ax: "Axes", found: "Explanation", layout: _Layout, sides: Point) -> None:
    from matplotlib.patches import FancyBboxPatch

    left, right = sides
    for number, (part, (first, last)) in enumerate(zip(found.parts, layout.bands, strict=True), 1):
        if last < first:
            continue
        box = FancyBboxPatch((left, first - 0.44), right - left, last - first + 0.88, zorder=0,
                             boxstyle="round,pad=0,rounding_size=0.12", facecolor=_BAND, edgecolor="0.8",
                             linewidth=0.8)  # fmt: skip
        ax.add_patch(box)
        ax.annotate(f"{number} {part.kind}", (left + 0.06, first - 0.4), va="top", fontsize=8, color="0.35",
                    fontweight="bold")  # fmt: skip


def _draw_edges(ax: "Axes", found: "Explanation", layout: _Layout, sides: Point) -> None:
    from matplotlib.patches import FancyArrowPatch
    from matplotlib.path import Path as Line

    for path in layout.paths:
        points = [layout.at(node) for node in path]
        start, end = _half(found, path[0])[1], _half(found, path[-1])[1]
        points[0], points[-1] = (points[0][0], points[0][1] + start), (points[-1][0], points[-1][1] - end - 0.02)
        line = Line(*_curve(points))
        ax.add_patch(FancyArrowPatch(path=line, arrowstyle="-|>", mutation_scale=7, color="0.35", linewidth=0.9,
                                     zorder=1, shrinkA=0, shrinkB=0))  # fmt: skip
    for k, (state, name) in enumerate(found.states.items()):
        new, sign = _end(found, name), layout.sides[state]
        (u, v), (x, y) = layout.at(new), layout.at(state)
        out = (sides[1] if sign > 0 else sides[0]) + sign * (0.3 + 0.12 * (k // 2))
        points = [(u + sign * _half(found, new)[0], v), (out, v), (out, y), (x + sign * _half(found, state)[0], y)]
        line = Line(points, [Line.MOVETO, Line.CURVE4, Line.CURVE4, Line.CURVE4])
        ax.add_patch(FancyArrowPatch(path=line, arrowstyle="-|>", mutation_scale=9, color=_STATE, linewidth=1.3,
                                     linestyle=(0, (4, 2)), zorder=2, shrinkA=0, shrinkB=0))  # fmt: skip


def _end(found: "Explanation", name: str) -> str:
    """The operation that a new state is, behind views."""
    by_name = {one.node: one for one in found.operations}
    while name in by_name and by_name[name].view and by_name[name].reads:
        name = by_name[name].reads[0]
    return name


def _curve(points: Sequence[Point]) -> tuple[list[Point], list[Any]]:
    """Through all points, upright at each."""
    from matplotlib.path import Path as Line

    found, codes = [points[0]], [Line.MOVETO]
    for (a, b), (c, d) in pairwise(points):
        half = (d - b) / 2
        found += [(a, b + half), (c, d - half), (c, d)]
        codes += [Line.CURVE4] * 3
    return found, codes


def _draw_nodes(ax: "Axes", found: "Explanation", layout: _Layout) -> None:
    names = {one.node: one for one in found.operations}
    for node in layout.layer:
        if isinstance(node, tuple) and node != _Y:
            continue
        one = names.get(node)
        text, style = _label(found, node), "round,pad=0.3,rounding_size=0.25"
        if one is None:  # the input, a state or the output
            face, style = _GIVEN, "circle,pad=0.25"
        else:
            face = _WALKS if one.in_loop else _CAME if "came" in one.where else _ONCE
        box = {"boxstyle": style, "facecolor": face, "edgecolor": "0.3", "linewidth": 0.8}
        ax.annotate(text, layout.at(node), ha="center", va="center", fontsize=7.5, bbox=box, zorder=3,
                    linespacing=0.9)  # fmt: skip


def _label(found: "Explanation", node: Any) -> str:
    """What is written on a node; matrix products are told by their names too."""
    if isinstance(node, tuple):
        return str(node[0])
    one = next((one for one in found.operations if one.node == node), None)
    if one is None:
        return str(node)
    return f"{one.name}\n{node}" if node in found.all_products and node != one.name else one.name


def _half(found: "Explanation", node: Any) -> Point:
    """About half the width and half the height of a node as drawn."""
    text = _label(found, node)
    if "\n" not in text and text in (found.x, "y", *found.states):
        return 0.06 + 0.03 * len(text), 0.15
    return 0.09 + 0.03 * max(map(len, text.split("\n"))), 0.26 if "\n" in text else 0.17


def _walks(found: "Explanation") -> str:
    present = {one.where for one in found.operations if one.in_loop}
    return " or ".join(sorted(present, reverse=True))


def _legend(ax: "Axes", found: "Explanation") -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    present = {_walks(found) if one.in_loop else one.where for one in found.operations if not one.view}
    kinds = [(_WALKS, _walks(found)), (_CAME, "came along into the walk"), (_ONCE, "once, for all steps")]
    marks: list[Any] = [
        Patch(facecolor=colour, edgecolor="0.3", label=label) for colour, label in kinds if label in present
    ]
    if found.states:
        marks.append(Line2D([], [], color=_STATE, linestyle=(0, (4, 2)), label="to the next step"))
    ax.legend(handles=marks, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=2, frameon=False, fontsize=8)
