"""What became of each operation of a step: the facts, the table, the graphviz text and the drawing."""

import re
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from seqbatch.rnn import cells
from seqbatch.rnn.affine import why_not_affine
from seqbatch.rnn.explain import Explanation
from seqbatch.rnn.parallel import parallelize

SHIPPED = [name for name in cells.__all__ if name != "Cell"]


def explained(name: str) -> Explanation:
    cell = getattr(cells, name)(6, 4)
    return parallelize(cell, example=cell.example()).explain()


def where(found: Explanation) -> dict[str, str]:
    return {one.node: one.where for one in found.operations}


def test_sru_is_one_product_ahead_and_a_scan_of_two_operations() -> None:
    """The paper's optimisation by hand: W x for all steps at once, c' = f c + b in a scan."""
    found = explained("SRUv1")
    places = where(found)

    assert (found.before, found.after) == (14, 2)
    assert places["linear"] == "once, for all steps"
    assert [node for node, place in places.items() if place == "walks through time"] == ["mul", "add_2"]
    assert (places["sigmoid"], places["getitem_4"]) == ("came along into the walk", "once: it is constant")
    assert (found.all_products, found.products) == (("linear",), ())
    assert [part.kind for part in found.parts] == ["rows", "scan"]
    assert found.parts[1].why == "lowered to a scan, since it is affine and element-wise in c"


def test_of_lstm_the_product_with_the_input_leaves_and_that_with_h_stays() -> None:
    """And with it all that is element-wise, since all of it is in the cycle."""
    found = explained("LSTM")
    places = where(found)

    assert (found.before, found.after) == (12, 11)
    assert (places.pop("ih"), set(places.values())) == ("once, for all steps", {"walks through time"})
    assert (found.all_products, found.products) == (("ih", "hh"), ("hh",))
    assert [part.kind for part in found.parts] == ["rows", "loop"]
    assert found.parts[1].states == ("h", "c")
    assert "the matrix product hh" in found.parts[1].why and "no scan, since hh mixes columns" in found.parts[1].why


def test_batch_statistics_over_lanes_stay_in_the_loop_with_the_reason() -> None:
    """Those of the input too: they cannot run on the rows of all steps together."""
    found = explained("BNLSTM")
    places = where(found)

    assert (places["ih"], places["batch_norm"], places["mul_2"]) == (
        "once, for all steps",
        "step by step",
        "step by step",
    )
    assert [part.kind for part in found.parts] == ["rows", "steps", "steps"]
    assert "mixes lanes" in found.parts[1].why
    assert "batch_norm" in found.parts[2].why
    assert found.products == ("hh",)


def test_two_layers_are_two_loops_with_a_product_between() -> None:
    """Nothing leads back down."""
    found = explained("TwoLayer")

    assert [(part.kind, part.states) for part in found.parts] == [
        ("rows", ()),
        ("loop", ("h", "c")),
        ("rows", ()),
        ("loop", ("g",)),
    ]
    assert {one.node: one.part for one in found.operations}["upper_ih"] == 3
    assert found.products == ("lower_hh", "upper_hh")


def test_a_state_that_only_remembers_is_no_loop() -> None:
    """A window over the input: nothing is left per step."""
    found = parallelize(lambda x, last: (x - last, x), example=(torch.randn(3, 2), torch.randn(3, 2))).explain()

    assert (found.before, found.after) == (1, 0)
    assert [(part.kind, part.states) for part in found.parts] == [("shift", ("last",)), ("rows", ())]
    assert "only remembers" in str(found) and "<lambda> runs in 2 passes" in str(found)


def squares(x, c):
    c = c * c + x
    return c, c


def divides(x, c):
    c = x / (c + 3.0)
    return c, c


def weighs(x, c):
    c = torch.lerp(x, c, c)
    return c, c


def scales(x, c):
    c = torch.add(x, c, alpha=0.5)
    return c, c


def squashes(x, c):
    c = torch.relu(x + c)
    return c, c


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        (squares, "mul multiplies c by c, which both depend on c"),
        (divides, "truediv divides by add, which depends on c"),
        (weighs, "lerp has a weight that depends on c"),
        (scales, "add has keywords (alpha)"),
        (squashes, "relu is none of +, -, *, / and lerp"),
        (lambda x, c, d: (c, d + x, c + x), "the states c and d feed into each other"),
    ],
)
def test_what_is_no_scan_says_why(step, reason: str) -> None:
    """In words that name the operation."""
    example = [torch.randn(3, 2) for _ in range(3 if "states" in reason else 2)]
    layer = parallelize(step, example=example)
    (cycle,) = (part for part in layer.graph().components if part.recurrent)

    assert why_not_affine(cycle.nodes, layer.graph().states) == reason
    assert all(part.kind != "scan" for part in layer.explain().parts)


def test_a_walk_says_why_it_is_no_scan() -> None:
    """In the table too."""
    found = parallelize(squashes, example=(torch.randn(3, 2), torch.randn(3, 2))).explain()

    assert "1 walk: one element-wise loop; no scan, since relu is none of +, -, *, / and lerp" in str(found).split("\n")


@pytest.mark.parametrize("name", SHIPPED)
def test_the_table_names_what_walks_and_is_no_wider_than_a_hundred_columns(name: str) -> None:
    """Each operation that computes has a row of its own, in the section of its pass."""
    found = explained(name)
    lines = str(found).splitlines()

    assert max(map(len, lines)) <= 100
    assert 3 <= lines.index("") + 1 <= 4
    assert f"{found.before} in a plain loop, {found.after} after" in lines[1]
    for one in found.operations:
        rows = [line.split() for line in lines if line.startswith("  ") and f" {one.node} " in line]
        assert one.view or [row[0] for row in rows if row[1] == one.node] == [one.name]
    for number, part in enumerate(found.parts, 1):
        assert sum(line.startswith(f"{number} {part.kind}: ") for line in lines) == 1


def cuts(x, c):
    left, right = x.chunk(2, -1), c.chunk(2, -1)
    a, b, d, e = left[0], left[1], right[0], right[1]
    one, two = torch.sigmoid(a), torch.sigmoid(a)
    c = torch.cat([one * d + b, two * e], -1)
    return c, c


def test_views_of_one_source_share_a_row_and_what_computes_has_its_own() -> None:
    """Eight cuts of a product would hide what matters."""
    table = str(parallelize(cuts, example=(torch.randn(3, 4), torch.randn(3, 4))).explain())

    for nodes in ("getitem, getitem_1", "getitem_2, getitem_3", "sigmoid", "sigmoid_1"):
        assert any(re.match(rf"  \w+ +{nodes} +2 ", line) for line in table.splitlines()), nodes


class LongNames(nn.Module):
    """Operations whose names fill a line."""

    def __init__(self) -> None:
        super().__init__()
        self.a_name_that_goes_on_and_on_and_on_until_the_table_is_as_wide_as_it_may_be = nn.Linear(2, 2)

    def forward(self, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        c = 0.5 * c + self.a_name_that_goes_on_and_on_and_on_until_the_table_is_as_wide_as_it_may_be(x)
        return c, c


def test_long_names_are_cut() -> None:
    """So that columns stay in line."""
    lines = str(parallelize(LongNames(), example=(torch.randn(3, 2), torch.randn(3, 2))).explain()).splitlines()

    assert max(map(len, lines)) <= 100
    assert any("..." in line for line in lines)


@pytest.mark.parametrize("name", SHIPPED)
def test_graphviz_text_has_every_operation_once(name: str) -> None:
    """Braces balance, edges lead between nodes that there are, delays are dashed, walkers are filled."""
    found = explained(name)
    dot = found.to_dot()

    assert dot.count("{") == dot.count("}") == 1 + len(found.parts)
    nodes = re.findall(r'^\s*"?(\w+)"? \[(?:label|shape)', dot.replace("node [shape=box];", ""), re.MULTILINE)
    assert sorted(nodes) == sorted([found.x, *found.states, *(one.node for one in found.operations), "output"])
    edges = re.findall(r'"(\w+)" -> "?(\w+)"?( \[style=dashed)?', dot)
    assert {end for edge in edges for end in edge[:2]} <= set(nodes)
    assert {(new, state) for new, state, dashed in edges if dashed} == {(n, s) for s, n in found.states.items()}
    filled = re.findall(r'"(\w+)" \[.*style=filled', dot)
    assert filled == [one.node for one in found.operations if one.in_loop]


@pytest.mark.parametrize("name", SHIPPED)
def test_a_drawing_has_what_computes_and_nothing_on_top_of_another(name: str, tmp_path: Path) -> None:
    """One box for each operation that is no view, the input, each state and the output."""
    pytest.importorskip("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    found = explained(name)
    ax = found.plot(tmp_path / "graph.png")

    assert (tmp_path / "graph.png").read_bytes()[:4] == b"\x89PNG"
    boxes = [text for text in ax.texts if text.get_bbox_patch() is not None]
    computing = [one for one in found.operations if not one.view and one.part]
    assert len(boxes) == len(computing) + 2 + len(found.states)
    renderer = FigureCanvasAgg(ax.figure).get_renderer()
    extents = [box.get_bbox_patch().get_window_extent(renderer) for box in boxes]
    assert not any(a.overlaps(b) for i, a in enumerate(extents) for b in extents[:i])


def test_without_matplotlib_a_drawing_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the house's words."""
    monkeypatch.setattr("seqbatch.command_line.find_spec", lambda name: None)
    assert "matplotlib" not in vars(sys.modules["seqbatch.rnn.explain"])

    with pytest.raises(ModuleNotFoundError, match=r"needs matplotlib: pip install 'seqbatch\[plot\]'"):
        explained("SRUv1").plot()
