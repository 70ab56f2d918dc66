"""Cells that nobody would write, against their loops."""

from hypothesis import given, note, settings
from hypothesis import strategies as st
from random_cells import MOST, STATE, Recipe, grown, recipes
from steps import assert_same, flags

from seqbatch.rnn.parallel import parallelize


@settings(max_examples=500)
@given(
    recipe=recipes(),
    steps=st.integers(1, 5),
    lanes=st.integers(1, 3),
    example=st.integers(2, 4),
    kind=st.sampled_from(["plain", "reset", "mask", "reset and mask"]),
)
def test_random_cells_equal_their_loops(recipe: Recipe, steps: int, lanes: int, example: int, kind: str) -> None:
    """Outputs, last states and all gradients, in float64, as programs and as torch's operations."""
    cell = grown(recipe)
    note(repr(cell))
    rows, *states = cell.example(steps * lanes)
    x, state = rows.view(steps, lanes, -1), tuple(part[:lanes] for part in states)
    layer = parallelize(cell, example=cell.example(example))
    given_flags = flags(steps, lanes, kind, seed=recipe.seed)
    assert_same(layer, cell, x, state, given_flags)
    layer._compiles = lambda *_: False  # as on CUDA, where torch's operations run, and scans
    assert_same(layer, cell, x, state, given_flags)


@settings(max_examples=100)
@given(recipe=recipes())
def test_random_cells_stay_in_bounds(recipe: Recipe) -> None:
    """What the cells above are built on: states do not grow, so that 1e-10 means something."""
    cell = grown(recipe)
    _x, *states = values = cell.example(3)
    output, *new = cell(*values)
    assert output.abs().max() <= MOST and all(part.abs().max() <= STATE for part in new)
    assert [part.shape for part in new] == [part.shape for part in states]
