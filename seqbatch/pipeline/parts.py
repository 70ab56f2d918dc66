"""What a pipeline is cut from - embedding, layers, head - and how one of them runs on a piece of a batch."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from seqbatch.pipeline.stock import run_stock

__all__ = [
    "Mode",
    "Spec",
    "check_mode",
    "looks_back",
    "named_parts",
    "probe",
    "run_layer",
    "state_tensors",
    "takes_cpu_flags",
    "untouched",
]

Mode = Literal["full", "truncated", "microbatch"]
_MODES = ("full", "truncated", "microbatch")
_STOCK = (nn.LSTM, nn.GRU, nn.RNN)


def check_mode(mode: str) -> None:
    """Refuse a mode that there is not."""
    if mode not in _MODES:
        raise ValueError(f"mode must be one of {', '.join(map(repr, _MODES))}, got {mode!r}")


def named_parts(
    layers: Sequence[nn.Module], embed: nn.Module | None, head: nn.Module | None, mode: Mode
) -> dict[str, nn.Module]:
    """The parts in the order in which data go through them, by the names that parameters have in checkpoints.

    Raises:
        TypeError: A part is no module.
        ValueError: There is no layer, a layer comes twice, or cannot run on pieces of time in this mode.
    """
    layers = list(layers)
    if not layers:
        raise ValueError("a pipeline needs at least one layer, got none")
    parts = {f"layers.{index}": layer for index, layer in enumerate(layers)}
    for name, part in ({"embed": embed} | parts | {"head": head}).items():
        if not isinstance(part, nn.Module) and not (part is None and name in ("embed", "head")):
            raise TypeError(f"{name} must be a torch.nn.Module, got {type(part).__name__}")
    for index, layer in enumerate(layers):
        if any(layer is other for other in layers[:index]):
            raise ValueError(f"layers.{index} is a layer that came before: make one module for each place")
        _check_layer(f"layers.{index}", layer, mode)
    first = {} if embed is None else {"embed": embed}
    return first | parts | ({} if head is None else {"head": head})


def looks_back(part: nn.Module) -> bool:
    """Whether it reads sequences from their end too."""
    return any(getattr(m, "bidirectional", False) or type(m).__name__ == "Bidirectional" for m in part.modules())


def _check_layer(name: str, layer: nn.Module, mode: Mode) -> None:
    if getattr(layer, "batch_first", False):
        raise ValueError(
            f"{name} has batch_first=True: a pipeline hands on time-major (T, B, features) data; set it to False"
        )
    if looks_back(layer) and mode != "microbatch":
        raise ValueError(
            f"{name} is bidirectional, which needs whole sequences, and mode={mode!r} cuts them in time: use "
            "mode='microbatch'"
        )


def takes_cpu_flags(layer: nn.Module) -> bool:
    """Whether a layer wants `reset` and `mask` on the CPU, whatever it computes on."""
    return type(layer) in _STOCK


def run_layer(layer: nn.Module, x: Tensor, state: Any, reset: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Any]:
    """One layer on a piece: (T, B, ...) and the state before it -> output and the state after it."""
    if type(layer) in _STOCK:
        return run_stock(layer, x, state, reset, mask)  # type: ignore[arg-type]
    return layer(x, state, reset=reset, mask=mask)  # type: ignore[no-any-return]


def state_tensors(state: Any) -> list[Tensor]:
    """The tensors of a state, which is None, a tensor, or tuples and lists of states."""
    if isinstance(state, Tensor):
        return [state]
    return [tensor for part in state for tensor in state_tensors(part)] if isinstance(state, tuple | list) else []


class Spec(NamedTuple):
    """What goes from one stage to the next: (steps, lanes, *features) of a dtype."""

    features: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, x: Tensor) -> "Spec":
        """The spec of (T, B, ...) data."""
        return cls(tuple(x.shape[2:]), x.dtype)

    def empty(self, steps: int, lanes: int) -> Tensor:
        """A tensor without storage, of so many steps and lanes."""
        return torch.empty(steps, lanes, *self.features, dtype=self.dtype, device="meta")

    def random(self, steps: int, lanes: int, device: torch.device) -> Tensor:
        """The same numbers each time: for floats normal, else 0."""
        shape = (steps, lanes, *self.features)
        if not self.dtype.is_floating_point:
            return torch.zeros(shape, dtype=self.dtype, device=device)
        return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, self.dtype)


def probe(parts: Mapping[str, nn.Module], x: Tensor, mode: Mode) -> Tensor:
    """Run two steps through the parts of a stage, as in training, and check what a pipeline asks of a layer.

    Parameters, buffers, modes and random numbers stay as they are.

    Args:
        parts: Embedding and layers, not the head.
        x: (2, B, ...).
        mode: Other than ``"microbatch"``, a layer must give the same for two steps at once and one after the other.

    Returns:
        (2, B, ...), what the next stage gets.

    Raises:
        TypeError: An output is no tensor, or a layer does not return (output, state).
        ValueError: An output's shape or strides do not fit, or a layer looks ahead.
    """
    with untouched(parts.values(), x.device):
        for name, part in parts.items():
            if name == "embed":
                y = part(x)
            else:
                y, state = _pair(name, run_layer(part, x, None, None, None))
                _check_state(name, state)
            _check_output(name, x, y)
            if (
                name != "embed"
                and mode != "microbatch"
                and type(part).__module__.split(".")[0] not in ("torch", "seqbatch")
            ):
                _check_causal(name, part, x)
            x = y
    return x


@contextmanager
def untouched(parts: Iterable[nn.Module], device: torch.device) -> Iterator[None]:
    """Put buffers, modes and random numbers back."""
    parts = list(parts)
    modules = [module for part in parts for module in part.modules()]
    buffers = [(buffer, buffer.clone()) for part in parts for buffer in part.buffers()]
    modes = [module.training for module in modules]
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)
            for module, training in zip(modules, modes, strict=True):
                module.training = training


def _pair(name: str, found: Any) -> tuple[Any, Any]:
    if not isinstance(found, tuple) or len(found) != 2:
        got = f"{len(found)} values" if isinstance(found, tuple) else type(found).__name__
        raise TypeError(f"{name} must return (output, state), as layer(x, state, reset=..., mask=...), got {got}")
    return found


def _check_state(name: str, state: Any) -> None:
    if state is None or isinstance(state, Tensor):
        return
    if not isinstance(state, tuple | list):
        raise TypeError(f"the state of {name} must be a tensor or tuples of tensors, got {type(state).__name__}")
    for part in state:
        _check_state(name, part)


def _check_output(name: str, x: Tensor, y: Any) -> None:
    if not isinstance(y, Tensor):
        raise TypeError(
            f"the output of {name} must be one tensor, got {type(y).__name__}: only tensors go from stage to stage"
        )
    if not y.is_floating_point():
        raise TypeError(f"the output of {name} must be floating, to take a gradient, got {y.dtype}")
    if y.shape[:2] != x.shape[:2]:
        raise ValueError(
            f"the output of {name} must have the steps and lanes of its input, {tuple(x.shape[:2])}, got shape "
            f"{tuple(y.shape)}"
        )
    if not y.is_contiguous():
        raise ValueError(
            f"the output of {name} has strides {y.stride()} for shape {tuple(y.shape)}; a device sends memory as it "
            "lies: return output.contiguous()"
        )


def _check_causal(name: str, layer: nn.Module, x: Tensor) -> None:
    layer.eval()  # dropout draws other masks for one step than for two
    y, _ = run_layer(layer, x, None, None, None)
    first, state = run_layer(layer, x[:1], None, None, None)
    second, _ = run_layer(layer, x[1:], state, None, None)
    tolerance = max(torch.finfo(y.dtype).eps ** 0.5, 1e-3) if y.is_floating_point() else 0.0
    if not torch.allclose(torch.cat([first, second]), y, rtol=tolerance, atol=tolerance, equal_nan=True):
        raise ValueError(
            f"{name} gives another output for two steps at once than for one after the other with its state: it looks "
            "ahead or keeps something beside its state, and cannot be cut in time: use mode='microbatch'"
        )


def part_of(name: str) -> str:
    """The part that a parameter's name is of.

    >>> part_of("layers.2.cell.weight"), part_of("head.weight")
    ('layers.2', 'head')
    """
    first, *rest = name.split(".")
    return f"layers.{rest[0]}" if first == "layers" else first


def digest_of(parts: Mapping[str, nn.Module]) -> str:
    """Of the names of all parts, and of the names and shapes of their parameters, which ranks compare."""
    shapes = [
        (name, [(inner, tuple(p.shape), p.requires_grad) for inner, p in part.named_parameters()])
        for name, part in parts.items()
    ]
    return sha256(repr(shapes).encode()).hexdigest()[:16]
