"""The naive twin of a parallelized cell: its step in a loop, with what reset and mask mean written out."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

EXACT = {"rtol": 1e-10, "atol": 1e-10}
Flags = dict[str, Tensor]


def loop(
    cell: Callable[..., Any],
    input: Tensor,
    state: Sequence[Tensor],
    reset: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The cell step by step over (T, B, ...): the output, and the states after the last step."""
    outputs, state = [], tuple(state)
    for t, x in enumerate(input):
        if mask is not None:
            x = torch.where(like(mask[t], x), x, x.new_zeros(()))
        if reset is not None:
            state = tuple(torch.where(like(reset[t], s), s.new_zeros(()), s) for s in state)
        y, *new = cell(x, *state)
        if mask is not None:
            new = [torch.where(like(mask[t], s), s, old) for s, old in zip(new, state, strict=True)]
            y = torch.where(like(mask[t], y), y, y.new_zeros(()))
        state = tuple(new)
        outputs.append(y)
    return torch.stack(outputs), state


def like(flags: Tensor, rows: Tensor) -> Tensor:
    """One flag for each row, in the rows' number of dimensions."""
    return flags.view(-1, *[1] * (rows.dim() - 1))


def zeros(example: Sequence[Tensor], lanes: int) -> tuple[Tensor, ...]:
    """The states before the first step, where none are given."""
    return tuple(part.new_zeros(lanes, *part.shape[1:]) for part in example[1:])


def flags(steps: int, lanes: int, kinds: str, seed: int = 0) -> Flags:
    """Random resets and paddings: `kinds` is "plain", "reset", "mask" or "reset and mask"."""
    draw = torch.Generator().manual_seed(seed)
    found = {"reset": torch.rand(steps, lanes, generator=draw) < 0.3}
    found["mask"] = torch.rand(steps, lanes, generator=draw) < 0.7
    return {name: flag for name, flag in found.items() if name in kinds}


def assert_same(
    layer: Callable[..., Any],
    cell: Callable[..., Any],
    input: Tensor,
    state: Sequence[Tensor],
    given: Flags,
    *,
    pass_state: bool = True,
    near: dict[str, float] | None = None,
) -> None:
    """Outputs, states and all gradients of the layer are those of the loop, for weights that tell all numbers apart.

    `state` goes to the layer only where `pass_state` is true; else it must be 0, which is what the layer starts from.
    """
    near = near or EXACT
    leaves = {"input": input.detach().clone().requires_grad_()}
    hx = tuple(part.detach().clone().requires_grad_(pass_state) for part in state)
    leaves |= {f"hx[{k}]": part for k, part in enumerate(hx) if pass_state}
    if isinstance(cell, nn.Module):
        leaves |= dict(cell.named_parameters())
    found, found_grads = _run(lambda x: layer(x, hx if pass_state else None, **given), leaves)
    expected, expected_grads = _run(lambda x: loop(cell, x, hx, **given), leaves)
    torch.testing.assert_close(found[0], expected[0], **near, msg=lambda m: f"output: {m}")
    torch.testing.assert_close(found[1], expected[1], **near, msg=lambda m: f"state: {m}")
    for name, grad in expected_grads.items():
        torch.testing.assert_close(found_grads[name], grad, **near, msg=lambda m, name=name: f"gradient of {name}: {m}")


def _run(function: Callable[..., Any], leaves: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
    output, states = function(leaves["input"])
    parts = [part for part in (output, *states) if part.requires_grad]
    generator = torch.Generator().manual_seed(5)
    weights = [torch.randn(part.shape, generator=generator).to(part) for part in parts]
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    grads = torch.autograd.grad(parts, list(wanted.values()), weights, allow_unused=True)
    pairs = zip(wanted.items(), grads, strict=True)
    return (output, tuple(states)), {
        name: torch.zeros_like(leaf) if grad is None else grad for (name, leaf), grad in pairs
    }
