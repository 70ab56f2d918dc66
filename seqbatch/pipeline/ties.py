"""Parameters that several parts share, such as embedding and softmax, when the parts lie on different devices."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = ["Ties", "find_ties"]

Names = tuple[str, ...]


def find_ties(parts: Mapping[str, nn.Module], tied: Sequence[Sequence[str]]) -> list[Names]:
    """Groups of names of parameters that are one: those that parts share already, and those that are named.

    The parts get a parameter of their own each, equal to the group's first.

    Raises:
        ValueError: There is no parameter of a name, a name comes twice, or shapes differ.
    """
    found: dict[Tensor, list[str]] = {}
    named: dict[str, nn.Parameter] = {}
    for name, part in parts.items():
        for inner, parameter in part.named_parameters():
            named[f"{name}.{inner}"] = parameter
            found.setdefault(parameter, []).append(f"{name}.{inner}")
    groups = [names for names in found.values() if len(names) > 1]
    for names in tied:
        _check_names(names, named)
        touched = [group for group in groups if set(group) & set(names)]
        merged = dict.fromkeys(name for group in (*touched, names) for name in group)
        groups = [group for group in groups if group not in touched] + [list(merged)]
    order = list(named)
    groups = [sorted(group, key=order.index) for group in groups]
    for first, *others in groups:
        for name in others:
            _own(parts, name, named[first])
    return [tuple(group) for group in sorted(groups, key=lambda group: order.index(group[0]))]


def _check_names(names: Sequence[str], named: Mapping[str, nn.Parameter]) -> None:
    if isinstance(names, str) or len(set(names)) != len(names) or len(names) < 2:
        raise ValueError(
            "each of `tied` must be two or more names of parameters, such as ('embed.weight', 'head.weight'), got "
            f"{names!r}"
        )
    for name in names:
        if name not in named:
            raise ValueError(f"tied parameter {name!r} does not exist; there are {', '.join(list(named)[:12])}")
        if named[name].shape != named[names[0]].shape:
            raise ValueError(
                f"tied parameters must have one shape: {names[0]} has {tuple(named[names[0]].shape)}, {name} "
                f"{tuple(named[name].shape)}"
            )


def _own(parts: Mapping[str, nn.Module], name: str, first: nn.Parameter) -> None:
    """Put a copy of `first` in a part's place of that name."""
    part = next(part for part in parts if name.startswith(f"{part}."))
    path, _, last = name[len(part) + 1 :].rpartition(".")
    copy = nn.Parameter(first.detach().clone(), requires_grad=first.requires_grad)
    parts[part].get_submodule(path)._parameters[last] = copy


class Ties:
    """Gives tied parameters one value, and adds up their gradients after each step, so that they keep it.

    Args:
        groups: As of `find_ties`.
        own: This rank's parameters by name.
        holders: For each group the ranks, of the default process group, that hold any of it.
        group: The ranks of the pipeline.
    """

    def __init__(
        self, groups: Sequence[Names], own: Mapping[str, nn.Parameter], holders: Sequence[Sequence[int]], group: Any
    ) -> None:
        self.groups: list[tuple[list[nn.Parameter], Sequence[int]]] = []
        self.copies: set[nn.Parameter] = set()
        self.group = group
        for names, ranks in zip(groups, holders, strict=True):
            mine = [own[name] for name in names if name in own]
            if mine and mine[0].requires_grad:
                self.groups.append((mine, ranks))
                self.copies.update(own[name] for name in names[1:] if name in own)
                self._spread(mine, ranks)

    @torch.no_grad()
    def _spread(self, mine: Sequence[nn.Parameter], ranks: Sequence[int]) -> None:
        """Begin with the first rank's values: ranks may have drawn their own."""
        first, *others = ranks
        if dist.get_rank() == first:
            for other in others:
                dist.send(mine[0].data, other, group=self.group)
            return
        value = torch.empty_like(mine[0])
        dist.recv(value, first, group=self.group)
        for parameter in mine:
            parameter.copy_(value)

    def before(self) -> list[Tensor | None]:
        """Take away the gradients that earlier steps have left, which are sums already."""
        kept = [mine[0].grad for mine, _ in self.groups]
        for mine, _ in self.groups:
            for parameter in mine:
                parameter.grad = None
        return kept

    def after(self, kept: Sequence[Tensor | None]) -> None:
        """Give each copy the sum of this step's gradients, on top of what `before` took."""
        for (mine, ranks), earlier in zip(self.groups, kept, strict=True):
            total = torch.zeros_like(mine[0])
            for parameter in mine:
                if parameter.grad is not None:
                    total += parameter.grad
            self._add_up(total, ranks)
            if earlier is not None:
                total += earlier
            for parameter in mine:
                parameter.grad = total.clone()

    def _add_up(self, total: Tensor, ranks: Sequence[int]) -> None:
        """Over the ranks that hold a copy, in one order; a group of theirs all ranks would have to make."""
        first, *others = ranks
        if dist.get_rank() != first:
            dist.send(total, first, group=self.group)
            dist.recv(total, first, group=self.group)
            return
        for other in others:
            part = torch.empty_like(total)
            dist.recv(part, other, group=self.group)
            total += part
        for other in others:
            dist.send(total, other, group=self.group)
