"""Random recurrent cells, for hypothesis: a list of genes that grows into a step, and shrinks with the list.

All values stay bounded: x in [-1, 1] and states in [-2, 2] give each instruction a bound, and what grows past it is
scaled down. Kinks are away from 0, where states start. Dead instructions are welcome.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

STATE, MOST = 2.0, 6.0  # bounds of states, and of what instructions may hand on
SCALARS = (0.5, -0.7, 1.0, 2, 0.3, -1)

# Name: what it computes of its operands and one number or parameter, and the bound of the result, given theirs.
UNARY: dict[str, tuple[Callable[..., Any], Callable[[float], float]]] = {
    "neg": (lambda a: -a, lambda a: a),
    "tanh": (torch.tanh, lambda a: 1.0),
    "sigmoid": (lambda a: a.sigmoid(), lambda a: 1.0),
    "relu": (lambda a: torch.relu(a + 0.37), lambda a: a + 0.37),
    "exp": (lambda a: torch.exp(a.tanh()), lambda a: 2.8),
    "square": (lambda a: a**2, lambda a: a * a),
    "clamp": (lambda a: torch.clamp(a, min=-0.83, max=0.91), lambda a: 0.91),
    "detach": (lambda a: a.detach(), lambda a: a),
    "softmax": (lambda a: a.softmax(-1), lambda a: 1.0),
    "norm": (lambda a: F.layer_norm(a, (a.shape[-1],), eps=0.1), lambda a: 2.0),
    "sum": (lambda a: a - 0.2 * a.sum(-1, keepdim=True), lambda a: 2 * a),
    "center": (lambda a: a - a.mean(0), lambda a: 2 * a),
    "lanes": (lambda a: a - a.sum(0, keepdim=True) / a.size(0), lambda a: 2 * a),
    "roll": (lambda a: a.roll(1, 0), lambda a: a),
    "first": (lambda a: 0.5 * a[:1] + a, lambda a: 1.5 * a),
    "over": (lambda a: a.softmax(0), lambda a: 1.0),
    "count": (lambda a: a / a.shape[0], lambda a: a),
}
SCALAR: dict[str, tuple[Callable[..., Any], Callable[[float], float]]] = {
    "scale": (lambda a, s: s * a, lambda a: 2 * a),
    "shift": (lambda a, s: a + s, lambda a: a + 2),
    "from": (lambda a, s: s - a, lambda a: a + 2),
    "over scalar": (lambda a, s: a / s, lambda a: 4 * a),
}
PARAMETER: dict[str, tuple[Callable[..., Any], Callable[[float], float]]] = {
    "gain": (lambda a, p: a * p, lambda a: a),
    "offset": (lambda a, p: p + a, lambda a: a + 1),
    "decay": (lambda a, p: torch.exp(-F.softplus(p)) * a, lambda a: a),
}
BINARY: dict[str, tuple[Callable[..., Any], Callable[[float, float], float]]] = {
    "add": (lambda a, b: a + b, lambda a, b: a + b),
    "mul": (lambda a, b: a * b, lambda a, b: a * b),
    "sub": (lambda a, b: a - b, lambda a, b: a + b),
    "gate": (lambda a, b: torch.sigmoid(b) * a, lambda a, b: a),
    "div": (lambda a, b: a / (1.5 + b.sigmoid()), lambda a, b: a),
    "add alpha": (lambda a, b: torch.add(a, b, alpha=0.5), lambda a, b: a + b),
    "sub alpha": (lambda a, b: a.sub(b, alpha=0.5), lambda a, b: a + b),
    "mix": (lambda a, b: torch.lerp(a, b, 0.3), max),
    "where": (lambda a, b: torch.where(a > 0.11, a, b), max),
    "product": (lambda a, b: torch.mul(input=a, other=b), lambda a, b: a * b),
}
TERNARY: dict[str, tuple[Callable[..., Any], Callable[[float, float, float], float]]] = {
    "lerp": (lambda a, b, c: torch.lerp(a, b, torch.sigmoid(c)), lambda a, b, c: max(a, b)),
    "addcmul": (lambda a, b, c: torch.addcmul(a, b, c, value=0.5), lambda a, b, c: a + b * c),
    "gru": (lambda a, b, c: (1 - c.sigmoid()) * a + c.sigmoid() * b, lambda a, b, c: max(a, b)),
}
SHAPES = ("chunk", "split", "slice", "cat", "heads")
MATRICES = ("linear", "linear again", "F.linear", "matmul", "no bias")
RARE = ("center", "lanes", "roll", "first", "over", "count", "detach")
COMMON = [*BINARY, *[name for name in UNARY if name not in RARE], *SCALAR, *PARAMETER, *TERNARY, *SHAPES]
OPERATIONS = [*COMMON, *MATRICES, "linear", "linear", *COMMON, *MATRICES, *RARE]

Gene = tuple[str, int, int, int]


@dataclass(frozen=True)
class Recipe:
    """What a random cell is made of: widths, genes, and where the output and the new states are taken."""

    width: int
    states: tuple[int, ...]
    genes: tuple[Gene, ...]
    output: int
    updates: tuple[tuple[int, str], ...]
    seed: int


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    """Up to 12 operations on up to 3 states, of widths up to 4."""
    width = st.integers(1, 4)
    states = draw(st.lists(width, min_size=1, max_size=3))
    back = st.integers(0, 11)
    genes = draw(st.lists(st.tuples(st.sampled_from(OPERATIONS), back, back, back), max_size=12))
    update = st.tuples(back, st.sampled_from(["scale", "tanh"]))
    updates = draw(st.lists(update, min_size=len(states), max_size=len(states)))
    return Recipe(draw(width), tuple(states), tuple(genes), draw(back), tuple(updates), draw(st.integers(0, 3)))


class RandomCell(nn.Module):
    """A step that goes through a list of instructions: (name, operands, number)."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe, self.program = recipe, []
        self.random = torch.Generator().manual_seed(recipe.seed)
        self.linears, self.parameters_ = nn.ModuleList(), nn.ParameterList()
        self.widths = [recipe.width, *recipe.states]
        self.bounds = [1.0] + [STATE] * len(recipe.states)
        self.fed = [{k} for k in range(len(self.widths))]  # which of x and the states it is made of
        for gene in recipe.genes:
            self._grow(*gene)
        self.updates = [self._update(k + 1, *update) for k, update in enumerate(recipe.updates)]
        self.output = self._at(recipe.output)
        if 0 not in self._sources(self.output):
            self.output = self._emit("add", (self.output, self._fit(0, self.widths[self.output])))
        del self.random  # a generator cannot be copied

    def __repr__(self) -> str:
        """The program, for the report of a failure."""
        names = ["x", *"abc"[: len(self.recipe.states)]]
        lines = [f"v{k + len(names)} = {name} {args} {more}" for k, (name, args, more) in enumerate(self.program)]
        return "\n".join([f"0.. are {names}, {self.recipe}", *lines, f"return {[self.output, *self.updates]}"])

    def example(self, lanes: int) -> tuple[Tensor, ...]:
        """Inputs in [-1, 1] and states in [-2, 2]."""
        draw = torch.Generator().manual_seed(self.recipe.seed + lanes)
        bounds = [1.0] + [STATE] * len(self.recipe.states)
        widths = (self.recipe.width, *self.recipe.states)
        rows = [torch.rand(lanes, n, generator=draw, dtype=torch.float64) for n in widths]
        return tuple(bound * (2 * row - 1) for bound, row in zip(bounds, rows, strict=True))

    def step(self, *values: Any) -> tuple[Any, ...]:
        """Run the program."""
        found = list(values)
        for name, args, more in self.program:
            found.append(self._run(name, [found[k] for k in args], more))
        return tuple(found[k] for k in (self.output, *self.updates))

    def _run(self, name: str, args: list[Any], more: Any) -> Any:
        for table in (UNARY, BINARY, TERNARY):
            if name in table:
                return table[name][0](*args)
        if name in SCALAR:
            return SCALAR[name][0](*args, more)
        if name in PARAMETER:
            return PARAMETER[name][0](*args, self.parameters_[more])
        (a, *others) = args
        match name:
            case "linear":
                return self.linears[more](a)
            case "F.linear":
                return F.linear(a, self.parameters_[more])
            case "matmul":
                return a @ self.parameters_[more].T
            case "chunk":
                return a.chunk(2, -1)
            case "split":
                return a.split(more, dim=-1)
            case "item":
                return a[more]
            case "slice":
                return a[..., more[0] : more[1]]
            case "cat":
                return torch.cat([a, *others], -1)
            case "heads":
                return (a.view(a.size(0), 2, -1) * 0.5).flatten(1)
        raise AssertionError(name)

    def _emit(self, name: str, args: tuple[int, ...], more: Any = None, width: int = 0, bound: float = 0.0) -> int:
        bounds = [self.bounds[k] for k in args]
        for table in (UNARY, SCALAR, PARAMETER, BINARY, TERNARY):
            if name in table:
                bound = table[name][1](*bounds)
        self.program.append((name, args, more))
        self.widths.append(width or self.widths[args[0]])
        self.bounds.append(bound or max(bounds))
        self.fed.append(set().union(*(self.fed[k] for k in args)))
        last = len(self.widths) - 1
        if self.bounds[last] <= MOST or self.widths[last] < 0:  # a pair: its parts are scaled
            return last
        factor = 0.9 * MOST / self.bounds[last]
        self.program.append(("scale", (last,), factor))
        self.widths.append(self.widths[last])
        self.bounds.append(MOST)
        self.fed.append(self.fed[last])
        return last + 1

    def _at(self, back: int) -> int:
        """The node so many places back, leaving out pairs of parts."""
        whole = [k for k, width in enumerate(self.widths) if width > 0]
        return whole[-1 - back % len(whole)]

    def _fit(self, k: int, width: int) -> int:
        """The node with another width: a part of it, or several of it."""
        if self.widths[k] < width:
            copies = -(-width // self.widths[k])
            k = self._emit("cat", (k,) * copies, width=copies * self.widths[k])
        if self.widths[k] > width:
            k = self._emit("slice", (k,), (0, width), width)
        return k

    def _parameter(self, *shape: int) -> int:
        value = 2 * torch.rand(*shape, generator=self.random, dtype=torch.float64) - 1
        self.parameters_.append(nn.Parameter(value / shape[-1] if len(shape) > 1 else value))
        return len(self.parameters_) - 1

    def _grow(self, name: str, i: int, j: int, k: int) -> None:
        a, b = self._at(i), self._at(j)
        width = self.widths[a]
        if name in UNARY:
            self._emit(name, (a,))
        elif name in SCALAR:
            self._emit(name, (a,), SCALARS[k % len(SCALARS)])
        elif name in PARAMETER:
            self._emit(name, (a,), self._parameter(width))
        elif name in BINARY:
            self._emit(name, (a, self._fit(b, width)))
        elif name in TERNARY:
            self._emit(name, (a, self._fit(b, width), self._fit(self._at(k), width)))
        elif name in MATRICES:
            self._matrix(name, a, 1 + k % 4)
        else:
            self._shape(name, a, b)

    def _matrix(self, name: str, a: int, width: int) -> None:
        if name in ("F.linear", "matmul"):
            self._emit(name, (a,), self._parameter(width, self.widths[a]), width)
            return
        fitting = [n for n, linear in enumerate(self.linears) if linear.in_features == self.widths[a]]
        if name == "linear again" and fitting:
            number = fitting[width % len(fitting)]
        else:
            linear = nn.Linear(self.widths[a], width, bias=name != "no bias", dtype=torch.float64)
            for part in linear.parameters():
                value = 2 * torch.rand(part.shape, generator=self.random, dtype=torch.float64) - 1
                part.data = value / (linear.in_features if part.dim() > 1 else 3)
            self.linears.append(linear)
            number = len(self.linears) - 1
        self._emit("linear", (a,), number, self.linears[number].out_features, self.bounds[a] + 0.34)

    def _shape(self, name: str, a: int, b: int) -> None:
        width = self.widths[a]
        if name == "cat":
            if width + self.widths[b] <= 6:
                self._emit("cat", (a, b), width=width + self.widths[b])
        elif width == 1 or (name in ("chunk", "heads") and width % 2):
            return
        elif name == "heads":
            self._emit("heads", (a,))
        elif name == "slice":
            self._emit("slice", (a,), (1, width), width - 1)
        else:
            sizes = [width // 2] * 2 if name == "chunk" else [1, width - 1]
            both = self._emit(name, (a,), None if name == "chunk" else sizes, -1)
            for part, size in enumerate(sizes):
                self._emit("item", (both,), part, size)

    def _update(self, state: int, back: int, how: str) -> int:
        """The node that becomes the state: it may be x or another state as it came, but not the same."""
        new = self._fit(self._at(back), self.widths[state])
        if new == state:
            new = self._emit("add", (self._emit("scale", (new,), 0.5), self._fit(0, self.widths[state])))
        if self.bounds[new] <= STATE:
            return new
        return self._emit("tanh", (new,)) if how == "tanh" else self._emit("scale", (new,), STATE / self.bounds[new])

    def _sources(self, k: int) -> set[int]:
        """What of x and the states it depends on, at this step or later."""
        found = set(self.fed[k])
        for _ in self.updates:
            found = found.union(*(self.fed[self.updates[state - 1]] for state in found if state))
        return found


class OneState(RandomCell):
    """fx takes names for the states."""

    def forward(self, x: Tensor, a: Tensor) -> Any:
        return self.step(x, a)


class TwoStates(RandomCell):
    """With two states."""

    def forward(self, x: Tensor, a: Tensor, b: Tensor) -> Any:
        return self.step(x, a, b)


class ThreeStates(RandomCell):
    """With three states."""

    def forward(self, x: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Any:
        return self.step(x, a, b, c)


def grown(recipe: Recipe) -> RandomCell:
    """The cell of a recipe."""
    return (OneState, TwoStates, ThreeStates)[len(recipe.states) - 1](recipe)
