"""Trace a step of a recurrent cell, and run its operations one by one."""

import inspect
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from seqbatch.rnn.operations import has_hooks

__all__ = ["Cell", "attribute", "bound", "constants_of", "run_node", "trace", "untouched"]

Cell = nn.Module | Callable[..., Any]


class _Proxy(fx.Proxy):
    """Stands for a tensor while the step is traced; refuses what would be taken for something else."""

    def _refuse(self, other: Any) -> Any:
        raise ValueError(
            "the step changes a tensor in place (such as h += x or h[:, 0] = x): write h = h + x or torch.where"
        )

    __iadd__ = __isub__ = __imul__ = __itruediv__ = __ifloordiv__ = __imod__ = __ipow__ = __imatmul__ = _refuse
    __iand__ = __ior__ = __ixor__ = __ilshift__ = __irshift__ = _refuse

    def __setitem__(self, index: Any, value: Any) -> None:
        self._refuse(value)


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True  # so that a buffer is read at each call, and not once

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """What stands for a node's value."""
        return _Proxy(node, self)


def trace(cell: Cell, parts: int, training: bool) -> fx.GraphModule:
    """The step as a graph; what the tracer cannot follow is named with its line."""
    if isinstance(cell, type):
        raise ValueError(f"the cell is a class: make one, such as {cell.__name__}(...)")
    if isinstance(cell, nn.RNNCellBase):
        raise ValueError(f"nn.{type(cell).__name__} cannot be traced: take the step of that name in seqbatch.rnn.cells")
    if isinstance(cell, nn.Module) and has_hooks(cell):
        raise ValueError("the cell itself has hooks, which would not run at each step: put what they do into the step")
    forward = cell.forward if isinstance(cell, nn.Module) else cell
    takes = inspect.signature(forward)
    for name, parameter in takes.parameters.items():
        if parameter.kind is parameter.VAR_POSITIONAL:
            raise ValueError(f"the cell takes *{name}: give each state a name of its own")
    module = _traced(cell, training)
    inputs = [node for node in module.graph.nodes if node.op == "placeholder"]
    if len(inputs) != parts:
        raise ValueError(f"the cell takes {takes}, and example has {parts} tensors: give (x_t, *state)")
    constants = constants_of(module)
    for constant in constants.values():
        if constant.requires_grad:
            raise ValueError(
                f"the step uses a tensor of shape {tuple(constant.shape)} that requires a gradient and is no "
                "parameter of the cell: make it an nn.Parameter of an nn.Module, and compute with it inside the step"
            )
    if constants and any(not torch.equal(c, constants[n]) for n, c in constants_of(_traced(cell, training)).items()):
        raise ValueError(
            "the step draws random numbers that depend on no tensor of it, so that they would be drawn once for ever: "
            "use torch.randn_like(x) or nn.Dropout, or make them an input"
        )
    return module


def constants_of(module: nn.Module) -> dict[str, Tensor]:
    """Tensors that a traced step holds and that belong to no module, by name."""
    named = dict(module.named_buffers(recurse=False))
    return {name: value for name, value in named.items() if name.startswith("_tensor_constant")}


def _traced(cell: Cell, training: bool) -> fx.GraphModule:
    modules = list(cell.modules()) if isinstance(cell, nn.Module) else []
    before = {module: dict(vars(module)) for module in modules}
    try:
        if isinstance(cell, nn.Module):
            cell.training = training
        tracer = _Tracer()
        graph = tracer.trace(cell)
        found = fx.GraphModule(tracer.root, graph)
    except Exception as error:
        raise ValueError(_why_not_traced(error)) from error
    finally:
        changed = [name for module in modules for name in _restored(module, before[module])]
    if changed:
        raise ValueError(
            f"the step sets self.{changed[0]}: what a step keeps is an argument that it returns, "
            "cell(x_t, state) -> (y_t, new_state)"
        )
    for node in found.graph.nodes:
        if (
            node.op == "get_attr"
            and isinstance(cell, nn.Module)
            and isinstance(vars(cell).get(str(node.target)), Tensor)
        ):
            raise ValueError(
                f"self.{node.target} is a tensor, but no parameter and no buffer, and would not move with the layer: "
                f"self.register_buffer({str(node.target)!r}, ...)"
            )
    return found


def _restored(module: nn.Module, before: dict[str, Any]) -> list[str]:
    """Put attributes back to what they were; those that the step itself has set."""
    now, own = vars(module), []
    for name in now.keys() | before.keys():
        if name not in before or now.get(name) is not before[name]:
            if name != "training" and not name.startswith("_tensor_constant"):  # which the tracer leaves there
                own.append(name)
            now.pop(name, None)
    now.update(before)
    return own


def _why_not_traced(error: Exception) -> str:
    """The line of the step, what was wrong there, and what to do."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/torch/" not in f.filename]
    frames = [f for f in frames if f.filename != __file__]
    where = f" at {frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}" if frames else ""
    advice = "A step must do the same operations whatever the numbers: use torch.where in place of if, and tensor "
    advice += "operations in place of loops over values"
    if isinstance(error, NameError):
        advice = "A function holds no parameters: make the cell an nn.Module that owns this layer or parameter"
    elif isinstance(error, TypeError) and not isinstance(error, fx.proxy.TraceError):
        advice = "Sizes are no numbers while a step is traced: use torch.zeros_like(x) or x.new_zeros(x.size(0), 4)"
    return f"the step cannot be traced{where} ({type(error).__name__}: {error}). {advice}"


@contextmanager
def untouched(module: nn.Module) -> Iterator[None]:
    """Put buffers back to what they were: running statistics count no trial."""
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    try:
        yield
    finally:
        for name, buffer in module.named_buffers():
            if not torch.equal(buffer, before[name]):  # what is not written keeps its version
                buffer.copy_(before[name])


def run_node(module: nn.Module, node: fx.Node, value: Callable[[fx.Node], Any]) -> Any:
    """Run one operation of a step.

    Args:
        module: Where its parameters and submodules are.
        node: The operation.
        value: The values of the nodes that it reads.
    """
    return bound(module, node)(value)


def bound(module: nn.Module, node: fx.Node) -> Callable[[Callable[[fx.Node], Any]], Any]:
    """One operation of a step as a function of the values that it reads, for those who run it again and again."""
    target: Any = node.target
    if node.op == "get_attr":
        return lambda value: attribute(module, str(target))
    if node.op == "call_module":
        target = module.get_submodule(str(target))
    elif node.op == "call_method":
        target = partial(_call_method, str(node.target))
    if any(isinstance(a, tuple | list | dict | slice) for a in (*node.args, *node.kwargs.values())):
        return lambda value: target(
            *fx.node.map_arg(node.args, value),
            **fx.node.map_arg(node.kwargs, value),
        )
    args, kwargs = node.args, node.kwargs

    def flat(value: Callable[[fx.Node], Any]) -> Any:
        given = [value(a) if isinstance(a, fx.Node) else a for a in args]
        return target(*given, **{k: value(a) if isinstance(a, fx.Node) else a for k, a in kwargs.items()})

    return flat


def attribute(module: nn.Module, name: str) -> Any:
    """A parameter, buffer or tensor of a module or its submodules, by its dotted name."""
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part)
    return found


def _call_method(name: str, owner: Any, *args: Any, **kwargs: Any) -> Any:
    return getattr(owner, name)(*args, **kwargs)
