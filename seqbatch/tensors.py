"""Nests of tensors: what pads them, what they are on their way between processes, and functions over all of them."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["as_bytes", "as_tensors", "detach_state", "ignored", "map_tensors", "padding_of"]

_SMALL = 2**20


def padding_of(value: float | Mapping[Any, float], key: Any) -> float:
    """Return what pads a field: -100 for labels, where nothing else is said.

    >>> padding_of(0, "labels"), padding_of({"x": 7}, "x")
    (-100, 7)
    """
    if isinstance(value, Mapping):
        return value.get(key, -100 if key == "labels" else 0)
    return -100 if key == "labels" and value == 0 else value


def ignored(values: Tensor) -> int:
    """Return what a target that does not count holds: the default ``ignore_index`` of ``cross_entropy``."""
    return 0 if values.is_floating_point() or values.dtype in (torch.bool, torch.uint8) else -100


def map_tensors(function: Callable[[Tensor], Any], values: Any) -> Any:
    """Apply `function` to every tensor in nested dicts, tuples and lists; leave everything else as it is.

    >>> map_tensors(lambda t: t + 1, {"a": torch.tensor(1), "b": [torch.tensor(2), "x"]})
    {'a': tensor(2), 'b': [tensor(3), 'x']}
    """
    if isinstance(values, Tensor):
        return function(values)
    if isinstance(values, Mapping):
        return {name: map_tensors(function, value) for name, value in values.items()}
    if isinstance(values, tuple) and hasattr(values, "_fields"):
        return type(values)(*(map_tensors(function, value) for value in values))
    if isinstance(values, list | tuple):
        return type(values)(map_tensors(function, value) for value in values)
    return values


class _Bytes(NamedTuple):
    """A tensor on its way to another process."""

    array: NDArray[Any]


def as_bytes(tensor: Tensor) -> Any:
    """Return a small tensor on the CPU as bytes, any other as it is."""
    small = tensor.device.type == "cpu" and tensor.layout == torch.strided and not tensor.requires_grad
    plain = tensor.dtype not in (torch.bfloat16, torch.complex32) and not tensor.is_nested
    return _Bytes(tensor.numpy()) if small and plain and tensor.nbytes <= _SMALL else tensor


def as_tensors(values: Any) -> Any:
    """Undo `as_bytes` in nested dicts, tuples and lists."""
    if isinstance(values, _Bytes):
        return torch.from_numpy(values.array)
    if isinstance(values, dict):
        return {name: as_tensors(value) for name, value in values.items()}
    if type(values) in (list, tuple):
        return type(values)(as_tensors(value) for value in values)
    return values


def detach_state(state: Any) -> Any:
    """Return `state` - None, a tensor, or any nest of tensors such as ``(h, c)`` - without its graph.

    >>> detach_state((torch.ones(1, requires_grad=True),))[0].requires_grad
    False
    """
    return map_tensors(Tensor.detach, state)
