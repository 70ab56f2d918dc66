"""Replicas of a pipeline, which train on different batches: one set of parameters, averaged gradients."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = ["average_gradients", "spread_parameters"]

_BUCKET = 25 * 2**20  # bytes, as DistributedDataParallel's


@torch.no_grad()
def spread_parameters(module: nn.Module, group: Any) -> None:
    """Begin with the first replica's parameters and buffers."""
    for tensor in (*module.parameters(), *module.buffers()):
        dist.broadcast(tensor.data, dist.get_global_rank(group, 0), group=group)


def average_gradients(parameters: Iterable[nn.Parameter], group: Any) -> None:
    """Average over replicas what has a gradient on any of them; what has none anywhere keeps none.

    Not by ``DistributedDataParallel``: torch's engine has it average in the last unit's backward pass, and leaves out
    what that unit does not use - such as a learned first state, which only the first time chunk has.
    """
    learning = [parameter for parameter in parameters if parameter.requires_grad]
    if not learning:
        return
    used = torch.tensor([parameter.grad is not None for parameter in learning], dtype=torch.uint8)
    used = used.to(learning[0].device)
    dist.all_reduce(used, dist.ReduceOp.MAX, group=group)
    gradients = []
    for parameter, flag in zip(learning, used.tolist(), strict=True):
        if flag:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            gradients.append(parameter.grad)
    replicas = dist.get_world_size(group)
    for bucket in _buckets(gradients):
        flat = torch.cat([gradient.flatten() for gradient in bucket])
        dist.all_reduce(flat, group=group)
        flat /= replicas
        for gradient, part in zip(bucket, torch.split(flat, [g.numel() for g in bucket]), strict=True):
            gradient.copy_(part.view_as(gradient))


def _buckets(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Of one dtype each, and of some megabytes, so that there are few messages."""
    bucket: list[Tensor] = []
    size = 0
    for gradient in sorted(gradients, key=lambda g: str(g.dtype)):  # a stable order, the same on all replicas
        if bucket and (gradient.dtype != bucket[0].dtype or size > _BUCKET):
            yield bucket
            bucket, size = [], 0
        bucket.append(gradient)
        size += gradient.numel() * gradient.element_size()
    if bucket:
        yield bucket
