"""Which rank this is, whether all ranks mean the same epoch, and what they must add up."""

import os
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from seqbatch.strategy import check_integer
from seqbatch.tensors import map_tensors

__all__ = [
    "check_ranks_agree",
    "check_still_alone",
    "find_ranks",
    "gather_lanes",
    "global_loss_tokens",
    "scatter_lanes",
]


def find_ranks(rank: int | None, num_replicas: int | None, mesh: Any = None) -> tuple[int, int, Any]:
    """Return (rank, num_replicas, process group or None).

    Args:
        rank: Given together with `num_replicas`, or not at all.
        num_replicas: As `rank`.
        mesh: A ``DeviceMesh`` of one dimension, or with a dimension named ``"dp"``; one named ``"pp"`` alone is one
            replica.

    Without any: the default process group where it is initialised, else a single process.

    Raises:
        ValueError: one of the two without the other, both them and a mesh, or a mesh of several dimensions none of
            which is named ``"dp"``.
    """
    if (rank is None) != (num_replicas is None):
        raise ValueError(f"rank and num_replicas go together, got rank={rank} and num_replicas={num_replicas}")
    if mesh is not None:
        if rank is not None:
            raise ValueError("give rank and num_replicas, or a mesh, not both")
        if mesh.ndim > 1:
            if "dp" not in (mesh.mesh_dim_names or ()):
                raise ValueError(
                    f"the mesh has the dimensions {mesh.mesh_dim_names}, and none is named 'dp': pass the "
                    "data-parallel one, mesh['name'], since the ranks of the others must see the same batches"
                )
            mesh = mesh["dp"]
        elif mesh.mesh_dim_names == ("pp",):
            return 0, 1, None  # the stages of one pipeline, which take the same batches
        return mesh.get_local_rank(), mesh.size(), mesh.get_group()
    if rank is not None and num_replicas is not None:
        check_integer("num_replicas", num_replicas, at_least=1)
        if check_integer("rank", rank, at_least=0) >= num_replicas:
            raise ValueError(f"rank must be in 0..{num_replicas - 1} for num_replicas={num_replicas}, got {rank}")
        return rank, num_replicas, dist.group.WORLD if _world_size() == num_replicas > 1 else None
    if _world_size():
        return dist.get_rank(), dist.get_world_size(), dist.group.WORLD
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        warnings.warn(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but torch.distributed is not initialised, so this process "
            "takes all data: make the loader after init_process_group, or pass rank and num_replicas",
            stacklevel=4,
        )
    return 0, 1, None


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 0


def check_still_alone() -> None:
    """Raise where there are several ranks now, for what was made when there was one and no rank was given.

    Raises:
        ValueError: the default process group came later, so that every rank would take all data.
    """
    if _world_size() > 1:
        raise ValueError(
            f"this was made for one process, before torch.distributed was initialised, and now there are "
            f"{_world_size()}, which would all take all data: make the loader after init_process_group (under "
            "Lightning in train_dataloader), or pass rank and num_replicas (rank=0, num_replicas=1 for all data)"
        )


def check_ranks_agree(mine: Mapping[str, Any], group: Any) -> None:
    """Raise on every rank unless all were given the same; one exchange of a few bytes.

    Raises:
        ValueError: ranks differ; the message says which and in what. Without this they would hang, or train on
            different data.
    """
    if group is None:
        return
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, dict(mine), group=group)
    for rank, other in enumerate(everyone):
        if other != everyone[0]:
            different = [
                f"{key}={other.get(key)!r} ({everyone[0].get(key)!r})"
                for key in mine
                if other.get(key) != everyone[0].get(key)
            ]
            raise ValueError(
                f"ranks do not agree: rank {rank} (rank 0) has {', '.join(different)}: give every rank the "
                "same lengths, settings, seed, epoch and state"
            )


def global_loss_tokens(masks: Iterable[Tensor], group: Any = None) -> int:
    """Return how many positions count in an optimizer step, over all ranks: one all-reduce a step.

    For losses that mask tokens the plan cannot know, such as the prompt's in fine-tuning. Scale the sum of the
    losses by ``num_replicas / global_loss_tokens(...)`` instead of ``batch.loss_scale``.

    Args:
        masks: The bool masks of this rank's micro-steps (or labels compared with -100).
        group: A process group; the default one where it is initialised.

    >>> global_loss_tokens([torch.tensor([True, False]), torch.tensor([True])])
    2
    """
    count = sum((mask.sum(dtype=torch.int64) for mask in masks), torch.zeros((), dtype=torch.int64))
    if _world_size():
        count = count.cuda() if dist.get_backend(group) == "nccl" else count
        dist.all_reduce(count, group=group)
    return int(count)


def gather_lanes(state: Any, group: Any = None) -> Any:
    """Return the recurrent state of all lanes, in global order, from every rank's own lanes.

    Args:
        state: Any nest of tensors (..., B/W, H), such as ``(h, c)``.
        group: A process group; the default one where it is initialised. One process returns `state` itself.

    Returns:
        The same nest of tensors (..., B, H), detached, on the CPU, equal on all ranks.
    """

    def gather(tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        if not _world_size():
            return tensor.cpu()
        parts = [
            torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size(group))
        ]
        dist.all_gather(parts, tensor.contiguous(), group=group)
        return torch.cat(parts, dim=-2).cpu()

    return map_tensors(gather, state)


def scatter_lanes(state: Any, rank: int, num_replicas: int) -> Any:
    """Return one rank's lanes of what `gather_lanes` returned: any number of ranks that divides the lanes.

    >>> scatter_lanes(torch.arange(4.0)[None, :, None], 1, 2).flatten()
    tensor([2., 3.])
    """

    def scatter(tensor: Tensor) -> Tensor:
        lanes = tensor.shape[-2]
        if lanes % num_replicas:
            raise ValueError(f"the state has {lanes} lanes, which num_replicas={num_replicas} does not divide")
        return tensor.narrow(-2, rank * (lanes // num_replicas), lanes // num_replicas).clone()

    return map_tensors(scatter, state)
