"""What a step may not do, and what a parallelized layer does not take: each is refused, with what to do instead."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from seqbatch.rnn.cells import GRU, LSTM
from seqbatch.rnn.parallel import parallelize

X, H = torch.randn(4, 3), torch.randn(4, 3)
SIZES = (RuntimeError, ValueError)  # nn.LSTM raises either for a size


def branches(x, h):
    if x.sum() > 0:
        h = h + x
    return h, h


def loops(x, h):
    for _ in range(int(x.sum())):
        h = h + x
    return h, h


def iterates(x, h):
    return sum(row for row in x), h


def grows(x, h):
    return h[..., :3] + x, torch.cat([h, x], -1)


def loses_rows(x, h):
    return h + x, (h + x).mean(0)


def widens(x, h):
    return x + h, (x + h).double()


def asks(x, h):
    return x + h, h > x


def adds(x, h):
    h.add_(x)
    return h, h


def assigns(x, h):
    h[:] = x
    return h, h


def assigns_by_sum(x, h):
    before = h
    h += x
    return before, h


def rectifies(x, h):
    return F.relu(h, inplace=True) + x, torch.tanh(h + x)


class Rectifies(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x, h):
        return self.relu(h) + x, torch.tanh(h + x)


def writes_out(x, h):
    torch.add(h, x, out=h)
    return h, h


def ignores_input(x, h):
    return 2 * h, torch.tanh(h + 1)


def keeps(x, h, c):
    return x + h + c, torch.tanh(h + x), c


def keeps_alone(x, h):
    return x + h, h


def one_result(x, h):
    return h + x


def three_results(x, h):
    return h + x, h + x, x


def a_number(x, h):
    return 0.0, h + x


def names(x, h):
    return {"y": x + h, "h": h + x}


def a_list_inside(x, h):
    return x + h, [h + x]


def adds_noise(x, h):
    return x + h + torch.randn(3), torch.tanh(h + x)


def takes_any(x, *state):
    (h,) = state
    return x + h, torch.tanh(x + h)


class KeepsToItself(nn.Module):
    def forward(self, x, h):
        self.h = torch.tanh(x + h)
        return self.h, self.h


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = torch.ones(3)

    def forward(self, x, h):
        return x + h, torch.tanh(x + self.w * h)


LAYER = nn.Linear(3, 3)


def holds_a_layer(x, h):
    return x + h, LAYER(x + h)


def makes_zeros(x, h):
    return x + h, h + torch.zeros(x.shape[0], 3)


HERE = r"test_rnn_parallel_refused\.py:\d+: .*"
STEPS = [
    (branches, HERE + r"if x\.sum\(\) > 0.*torch\.where"),
    (loops, HERE + r"range\(int\(x\.sum\(\)\)\)"),
    (iterates, HERE + "sum"),
    (grows, r"state 0 \(h\).*\(4, 3\).*\(4, 6\).*must keep its shape"),
    (loses_rows, r"state 0 \(h\).*\(4, 3\).*\(3,\).*must keep its shape"),
    (widens, r"state 0 \(h\).*float32.*float64.*must keep its .*dtype"),
    (asks, r"state 0 \(h\).*float32.*bool.*must keep its .*dtype"),
    (adds, r"in place.*add_"),
    (assigns, r"in place"),
    (assigns_by_sum, r"in place"),
    (rectifies, r"in place.*relu"),
    (Rectifies(), r"in place.*relu"),
    (writes_out, r"in place.*add"),
    (ignores_input, r"output .*does not depend on the input"),
    (keeps, r"state 1 \(c\) is returned as it came"),
    (keeps_alone, r"state 0 \(h\) is returned as it came"),
    (one_result, r"must return \(y_t, \*new_state\), 1 \+ 1 tensors"),
    (three_results, r"must return \(y_t, \*new_state\), 1 \+ 1 tensors"),
    (a_number, r"must return \(y_t, \*new_state\), 1 \+ 1 tensors"),
    (names, r"must return \(y_t, \*new_state\), 1 \+ 1 tensors"),
    (a_list_inside, r"must return \(y_t, \*new_state\), 1 \+ 1 tensors"),
    (adds_noise, r"random"),  # drawn while tracing, the same numbers would come at every step
    (KeepsToItself(), r"the step sets self\.h"),
    (Plain(), r"self\.w is a tensor.*register_buffer\('w'"),
    (KeepsToItself, r"is a class: make one, such as KeepsToItself"),
    (nn.GRUCell(3, 3), r"seqbatch\.rnn\.cells"),
    (holds_a_layer, HERE + r".*make the cell an nn\.Module"),
    (makes_zeros, HERE + r".*x\.new_zeros"),
    (takes_any, r"\*state"),  # torch.fx takes it for one tensor
]


@pytest.mark.parametrize(("step", "message"), STEPS, ids=lambda value: getattr(value, "__name__", None))
def test_a_step_is_refused(step: Callable[..., Any], message: str) -> None:
    """Before any call; what was given is as it was."""
    example = (X.clone(), *[H.clone()] * (2 if step is keeps else 1))
    with pytest.raises((ValueError, TypeError), match="(?s)" + message):
        parallelize(step, example=example)
    assert torch.equal(example[0], X) and torch.equal(example[1], H)
    assert not hasattr(step, "h")


EXAMPLES: list[tuple[str, Any, str]] = [
    ("nothing", (), r"example must be"),
    ("a tensor", X, r"example must be"),
    ("a number as state", (X, 0.0), r"example must be"),
    ("a state without rows", (X, torch.tensor(1.0)), r"example must be"),
    ("one row", (X[:1], H[:1]), r"example .*two (rows|lanes).*got"),
    ("unequal rows", (X, H[:3]), r"as many in x_t.*\(4, 3\).*\(3, 3\)"),
    ("no state", (X,), r"the cell takes .*h.*example has 1 tensor"),
    ("too many states", (X, H, H), r"the cell takes .*h.*example has 3 tensors"),
    ("whole numbers", (X, H.long()), r"state 0 \(h\).*int64.*float32"),
]


@pytest.mark.parametrize(("example", "message"), [e[1:] for e in EXAMPLES], ids=[e[0] for e in EXAMPLES])
def test_an_example_is_refused(example: Any, message: str) -> None:
    """One lane tells nothing: what mixes lanes and what does not look the same."""
    with pytest.raises((ValueError, TypeError), match="(?s)" + message):
        parallelize(lambda x, h: (x + h, torch.tanh(x + h)), example=example)


def test_an_example_of_another_width_is_refused() -> None:
    """With the sizes that do not fit."""
    with pytest.raises(SIZES, match=r"4x5.*3x12|3.*5"):
        parallelize(GRU(3, 4), example=(torch.randn(4, 5), torch.randn(4, 4)))


@pytest.fixture(scope="module")
def layer() -> Any:
    """An LSTM of 3 inputs and 4 units."""
    cell = LSTM(3, 4)
    return parallelize(cell, example=cell.example())


INPUT = torch.randn(5, 2, 3)
STATES = torch.randn(2, 4)
FLAGS = torch.zeros(5, 2, dtype=torch.bool)
CALLS: list[tuple[str, tuple[Any, ...], dict[str, Any], str]] = [
    ("wide input", (torch.randn(5, 2, 6),), {}, r"input must .*3.*got \(5, 2, 6\)"),
    ("flat input", (torch.randn(5, 3),), {}, r"input must .*\(T, B, 3\).*got \(5, 3\)"),
    (
        "another dtype",
        (torch.randn(5, 2, 3).double(),),
        {},
        r"input must have dtype torch\.float32, got torch\.float64",
    ),
    ("no steps", (torch.randn(0, 2, 3),), {}, r"at least one (time )?step.*got .*0"),
    ("one state", (INPUT, (STATES,)), {}, r"hx must .*2 .*got 1"),
    ("three states", (INPUT, (STATES,) * 3), {}, r"hx must .*2 .*got 3"),
    ("a tensor", (INPUT, STATES), {}, r"hx must .*tuple.*got Tensor"),
    ("states of other lanes", (INPUT, (STATES, torch.randn(3, 4))), {}, r"hx.*\(2, 4\).*got \(3, 4\)"),
    ("one lane's state", (INPUT, (STATES[:1], STATES[:1])), {}, r"hx.*\(2, 4\).*got \(1, 4\)"),
    ("states of other widths", (INPUT, (torch.randn(2, 5), STATES)), {}, r"hx.*\(2, 4\).*got \(2, 5\)"),
    ("states with layers", (INPUT, (STATES[None], STATES[None])), {}, r"hx.*\(2, 4\).*got \(1, 2, 4\)"),
    ("whole numbers", (INPUT, (STATES.long(), STATES)), {}, r"hx.*int64"),
    ("reset of another shape", (INPUT,), {"reset": FLAGS.T}, r"reset must have shape \(5, 2\).*got \(2, 5\)"),
    ("reset in numbers", (INPUT,), {"reset": FLAGS.float()}, r"reset must be bool, got torch\.float32"),
    ("mask of another shape", (INPUT,), {"mask": FLAGS[:4]}, r"mask must have shape \(5, 2\).*got \(4, 2\)"),
    ("mask in numbers", (INPUT,), {"mask": FLAGS.long()}, r"mask must be bool, got torch\.int64"),
    ("mask as a list", (INPUT,), {"mask": [[True] * 2] * 5}, r"mask must be a tensor, got list"),
]


@pytest.mark.parametrize(("args", "kwargs", "message"), [call[1:] for call in CALLS], ids=[call[0] for call in CALLS])
def test_a_call_is_refused(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], message: str) -> None:
    """With what came and what was allowed."""
    with pytest.raises((RuntimeError, ValueError, TypeError), match="(?s)" + message):
        layer(*args, **kwargs)
