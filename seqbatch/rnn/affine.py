"""Components that are affine in their own state: ``c' = a c + b`` with a and b from outside, for all steps at once."""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

__all__ = ["Affine", "affine_of", "why_not_affine"]

Value = Any
_ADD = {operator.add, torch.add, "add"}
_SUB = {operator.sub, torch.sub, torch.subtract, "sub"}
_MUL = {operator.mul, torch.mul, torch.multiply, "mul"}
_DIV = {operator.truediv, torch.div, torch.divide, "div"}
_NEG = {operator.neg, torch.neg, torch.negative, "neg"}
_LERP = {torch.lerp, "lerp"}


class Affine:
    """``a c + b``, a and b tensors for all steps or numbers."""

    def __init__(self, a: Value, b: Value) -> None:
        self.a, self.b = a, b

    def plus(self, other: Any, sign: int = 1) -> "Affine":
        """The sum with another affine value or one from outside."""
        if isinstance(other, Affine):
            return Affine(self.a + sign * other.a, self.b + sign * other.b)
        return Affine(self.a, self.b + sign * other)

    def times(self, factor: Any) -> "Affine":
        """The product with a value from outside."""
        return Affine(self.a * factor, self.b * factor)

    def at(self, c: Tensor) -> Tensor:
        """The value where the state before is c."""
        found: Tensor = self.a * c + self.b
        return found


def why_not_affine(nodes: tuple[fx.Node, ...], states: tuple[fx.Node, ...]) -> str:
    """Why a component is not affine and element-wise in its one state; empty if it is."""
    own = [node for node in nodes if node in states]
    if len(own) != 1:
        return f"the states {_listed([node.name for node in own])} feed into each other"
    inside, state = set(nodes), own[0].name
    for node in nodes:
        if node in states:
            continue
        fed = [source for source in node.args if isinstance(source, fx.Node) and source in inside]
        kind = _kind(node)
        if kind is None:
            return f"{_called(node)} is none of +, -, *, / and lerp"
        if node.kwargs:
            return f"{_called(node)} has keywords ({', '.join(node.kwargs)})"
        if kind == "mul" and len(fed) > 1:
            return f"{_called(node)} multiplies {fed[0].name} by {fed[1].name}, which both depend on {state}"
        if kind == "div" and node.args[1] in inside:
            return f"{_called(node)} divides by {node.args[1]}, which depends on {state}"
        if kind == "lerp" and (len(node.args) < 3 or node.args[2] in inside):
            return f"{_called(node)} has a weight that depends on {state}"
    return ""


def affine_of(nodes: tuple[fx.Node, ...], state: fx.Node, outside: Callable[[Any], Any]) -> dict[fx.Node, Affine]:
    """Each node of the component as a function of the state before the step."""
    found: dict[fx.Node, Affine] = {state: Affine(1.0, 0.0)}

    def value(argument: Any) -> Any:
        return found[argument] if argument in found else outside(argument)

    for node in nodes:
        if node is not state:
            found[node] = _apply(str(_kind(node)), [value(argument) for argument in node.args])
    return found


def _apply(kind: str, args: list[Any]) -> Affine:
    if kind == "neg":
        return args[0].times(-1.0)  # type: ignore[no-any-return]
    if kind == "lerp":
        start, end, weight = args
        one = start.times(1 - weight) if isinstance(start, Affine) else Affine(0.0, start * (1 - weight))
        return one.plus(end.times(weight) if isinstance(end, Affine) else end * weight)
    left, right = args
    if kind == "add":
        return left.plus(right) if isinstance(left, Affine) else right.plus(left)
    if kind == "sub":
        return left.plus(right, -1) if isinstance(left, Affine) else right.times(-1.0).plus(left)
    if kind == "mul":
        return left.times(right) if isinstance(left, Affine) else right.times(left)
    return left.times(1 / right)  # type: ignore[no-any-return]


def _kind(node: fx.Node) -> str | None:
    if node.op not in ("call_function", "call_method"):
        return None
    kinds = (("add", _ADD), ("sub", _SUB), ("mul", _MUL), ("div", _DIV), ("neg", _NEG), ("lerp", _LERP))
    return next((name for name, targets in kinds if node.target in targets), None)


def _called(node: fx.Node) -> str:
    """The node and, where that does not tell, its operation."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    alike = node.name == name.replace(".", "_") or node.name.rpartition("_")[0] == name
    return node.name if alike else f"{node.name} ({name})"


def _listed(names: list[str]) -> str:
    return ", ".join(names[:-1]) + " and " + names[-1]
