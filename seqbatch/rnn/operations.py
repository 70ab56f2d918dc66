"""What the operations of a traced step are: element-wise, a view of columns, a linear map, or something else."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, fx, nn

__all__ = ["Linear", "columns_of", "elementwise", "has_hooks", "linear_of", "name_of"]

Emit = Callable[..., int]


# By name: how many operands, and what is computed of their values.
_EXPRESSIONS: dict[str, tuple[int, Callable[..., int]]] = {
    **{name: (2, partial(lambda name, emit, a, b: emit(name, a, b), name)) for name in ("add", "sub", "mul", "div")},
    **{
        name: (1, partial(lambda name, emit, a: emit(name, a), name))
        for name in ("neg", "sigmoid", "tanh", "relu", "exp", "log", "sqrt", "abs", "softplus")
    },
    "identity": (1, lambda emit, a: a),
    "rsub": (2, lambda emit, a, b: emit("sub", b, a)),
    "square": (1, lambda emit, a: emit("mul", a, a)),
    "pow": (2, lambda emit, a, b: emit("mul", a, a)),  # the exponent is 2
    "reciprocal": (1, lambda emit, a: emit("div", emit("number", 1.0), a)),
    "silu": (1, lambda emit, a: emit("mul", a, emit("sigmoid", a))),
    "logsigmoid": (1, lambda emit, a: emit("neg", emit("softplus", emit("neg", a)))),
    "addcmul": (3, lambda emit, a, b, c: emit("add", a, emit("mul", b, c))),
    "lerp": (3, lambda emit, a, b, w: emit("add", a, emit("mul", w, emit("sub", b, a)))),
}
_SAME = {
    "truediv": "div",
    "divide": "div",
    "true_divide": "div",
    "subtract": "sub",
    "multiply": "mul",
    "negative": "neg",
    "absolute": "abs",
    "special_expit": "sigmoid",
    "contiguous": "identity",
    "clone": "identity",
    "log_sigmoid": "logsigmoid",
}
_MODULES: dict[type[nn.Module], str] = {
    nn.Sigmoid: "sigmoid",
    nn.Tanh: "tanh",
    nn.ReLU: "relu",
    nn.Softplus: "softplus",
    nn.SiLU: "silu",
    nn.LogSigmoid: "logsigmoid",
    nn.Identity: "identity",
}


def name_of(node: fx.Node, module: nn.Module) -> str:
    """The operation's name, as torch has it."""
    if node.op == "call_module":
        return type(module.get_submodule(str(node.target))).__name__
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def _is_torch_s(node: fx.Node) -> bool:
    """Whether a name means what torch means by it: a function of the user's own may be called ``relu`` too."""
    module = getattr(node.target, "__module__", "") or ""
    return node.op == "call_method" or module.partition(".")[0] in ("torch", "_operator", "builtins")


def has_hooks(module: nn.Module) -> bool:
    """Whether calling a module does more than its forward, such as computing its weight."""
    hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return any(hooks)


def elementwise(node: fx.Node, module: nn.Module) -> Callable[..., int] | None:
    """How a program computes an element-wise operation, given ``emit`` and its operands; None if it is another."""
    name = name_of(node, module)
    if node.op == "call_module":
        child = module.get_submodule(str(node.target))
        name = _MODULES.get(type(child), "")
        if has_hooks(child) or (isinstance(child, nn.Softplus) and (child.beta, child.threshold) != (1, 20)):
            return None
    elif node.op not in ("call_function", "call_method") or not _is_torch_s(node):
        return None
    count, expression = _EXPRESSIONS.get(_SAME.get(name, name), (0, None))
    takes = all(isinstance(operand, fx.Node | int | float) for operand in node.args) and len(node.args) == count
    plain = all((key, value) == ("inplace", False) for key, value in node.kwargs.items())
    if not takes or not plain or (name == "pow" and node.args[1] != 2):
        return None
    return expression


def columns_of(node: fx.Node, values: dict[fx.Node, Any]) -> Callable[[int, int], tuple[fx.Node, int] | None] | None:
    """Where columns of a view lie: a function of (first column, how many) to (source, first column there).

    None if the node is no view of columns. The function gives None where the columns come from several sources.
    """
    if node.op not in ("call_function", "call_method") or not _is_torch_s(node) or not node.args:
        return None
    name = name_of(node, nn.Module())
    if name == "cat" and _last_axis(node, values, 1, "dim"):
        parts = list(node.args[0])  # type: ignore[arg-type]
        return lambda column, width: _in_parts(parts, values, column, width)
    if name != "getitem" and name != "narrow":
        return None
    source = node.args[0]
    begin = _begin(node, source, values, name) if isinstance(source, fx.Node) else None
    if begin is None:
        return None
    if isinstance(values[source], tuple | list):  # type: ignore[index]
        source = source.args[0]  # type: ignore[union-attr]
    return lambda column, width: (source, begin + column)  # type: ignore[return-value]


def _begin(node: fx.Node, source: fx.Node, values: dict[fx.Node, Any], name: str) -> int | None:
    value, whole = values[source], values[node]
    if not isinstance(whole, Tensor) or whole.dim() != 2:
        return None
    if len(node.args) < 2:
        return None
    if isinstance(value, tuple | list):
        part = node.args[1]
        cuts = _is_torch_s(source) and name_of(source, nn.Module()) in ("chunk", "split", "tensor_split")
        cuts = cuts and isinstance(part, int)
        if not cuts or not _last_axis(source, values, 2, "dim"):
            return None
        return sum(piece.shape[-1] for piece in value[: part % len(value)])  # type: ignore[operator, index]
    if not isinstance(value, Tensor) or value.dim() != 2:
        return None
    if name == "narrow":
        if len(node.args) != 4:
            return None
        axis, begin = node.args[1], node.args[2]
        return begin if axis in (1, -1) and isinstance(begin, int) and begin >= 0 else None
    index = node.args[1]
    if not isinstance(index, tuple) or len(index) != 2 or not isinstance(index[1], slice):
        return None
    ends = (index[1].start, index[1].stop, index[1].step)
    if index[0] not in (slice(None), Ellipsis) or not all(e is None or isinstance(e, int) for e in ends):
        return None
    found = range(value.shape[-1])[index[1]]
    return found.start if found.step == 1 else None


def _last_axis(node: fx.Node, values: dict[fx.Node, Any], place: int, key: str) -> bool:
    if not node.args:
        return False
    axis = node.args[place] if len(node.args) > place else node.kwargs.get(key, 0)
    source = node.args[0]
    first = source[0] if isinstance(source, tuple | list) else source
    value = values.get(first) if isinstance(first, fx.Node) else None
    return isinstance(value, Tensor) and value.dim() == 2 and axis in (1, -1)


def _in_parts(parts: list[Any], values: dict[fx.Node, Any], column: int, width: int) -> tuple[fx.Node, int] | None:
    for part in parts:
        here = values[part].shape[-1]
        if column < here:
            return (part, column) if column + width <= here else None
        column -= here
    return None


@dataclass(frozen=True)
class Linear:
    """A product with a constant matrix: ``source @ weight.T + bias``, or ``source @ weight`` if transposed.

    A weight or bias is a node, or the name of a parameter.
    """

    source: fx.Node
    weight: fx.Node | str
    bias: fx.Node | str | None = None
    transposed: bool = False


def linear_of(node: fx.Node, module: nn.Module) -> Linear | None:
    """The linear map that a node is, if it is one; whether its weight is constant is for the caller to know."""
    if node.op == "call_module":
        child = module.get_submodule(str(node.target))
        if type(child) is not nn.Linear or has_hooks(child) or not isinstance(node.args[0], fx.Node):
            return None
        return Linear(node.args[0], f"{node.target}.weight", None if child.bias is None else f"{node.target}.bias")
    name = name_of(node, module)
    if node.op not in ("call_function", "call_method") or not _is_torch_s(node) or node.kwargs.keys() - {"bias"}:
        return None
    if name == "linear" and all(isinstance(a, fx.Node) for a in node.args[:2]):
        bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
        return Linear(node.args[0], node.args[1], bias)  # type: ignore[arg-type]
    if name in ("matmul", "mm") and len(node.args) == 2 and all(isinstance(a, fx.Node) for a in node.args):
        return Linear(node.args[0], node.args[1], None, transposed=True)  # type: ignore[arg-type]
    return None
