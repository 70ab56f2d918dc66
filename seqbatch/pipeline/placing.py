"""Which ranks and devices a pipeline has, and which layers lie on which."""

import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from seqbatch.pipeline.balance import balanced_split

__all__ = ["Place", "find_place", "split_layers"]


class Place(NamedTuple):
    """Where this process stands.

    Attributes:
        device: What it computes on.
        rank: Among the ranks of its pipeline.
        ranks: Those of its pipeline, as numbers in the default process group.
        group: Theirs.
        replica: Of the pipelines that train on different batches.
        replicas: How many there are.
        replica_group: The ranks that hold the same layers, or None where there is one replica.
        everyone: All ranks of the mesh.
        mesh: It itself.
    """

    device: torch.device
    rank: int
    ranks: list[int]
    group: Any
    replica: int
    replicas: int
    replica_group: Any
    everyone: list[int]
    mesh: DeviceMesh


def find_place(mesh: DeviceMesh | None, on_cuda: bool) -> Place:
    """Read a mesh with a dimension "pp" and perhaps "dp"; without one, all ranks are one pipeline.

    Processes that torchrun started are connected if they are not yet, by NCCL where there is CUDA, else by gloo. A
    process without others computes where its parameters are: `on_cuda`.

    Raises:
        ValueError: The mesh has other dimensions.
    """
    if mesh is None:
        if not dist.is_initialized():
            _connect()
        kind = "cuda" if on_cuda or dist.get_backend() == "nccl" else "cpu"
        mesh = init_device_mesh(kind, (dist.get_world_size(),), mesh_dim_names=("pp",))
    names = mesh.mesh_dim_names or ()
    if "pp" not in names or set(names) - {"pp", "dp"}:
        raise ValueError(
            f"the mesh must have a dimension 'pp' and may have 'dp', got {names}: init_device_mesh('cuda', (replicas, "
            "stages), mesh_dim_names=('dp', 'pp'))"
        )
    stages, replicas = mesh["pp"], mesh["dp"] if "dp" in names else None
    device = torch.device(mesh.device_type)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    return Place(
        device,
        stages.get_local_rank(),
        dist.get_process_group_ranks(stages.get_group()),
        stages.get_group(),
        0 if replicas is None else replicas.get_local_rank(),
        1 if replicas is None else replicas.size(),
        None if replicas is None or replicas.size() == 1 else replicas.get_group(),
        mesh.mesh.flatten().tolist(),
        mesh,
    )


def _connect() -> None:
    if "RANK" not in os.environ:
        store = dist.HashStore()  # type: ignore[attr-defined]
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    elif torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl")
    else:
        dist.init_process_group("gloo")


def split_layers(
    parts: Mapping[str, nn.Module], stages: int, split: Literal["auto"] | Sequence[int]
) -> list[list[str]]:
    """The names of the parts of each stage.

    Args:
        parts: All of them, in order.
        stages: How many.
        split: How many layers each stage takes; the last may take none where there is a head. ``"auto"`` balances the
            matrices' elements, the head's included: the multiplications of a token.

    Raises:
        ValueError: More stages than layers, or a split that does not fit.
    """
    layers = [name for name in parts if name.startswith("layers.")]
    if isinstance(split, str):
        if split != "auto":
            raise ValueError(f"split must be 'auto' or the number of layers of each stage, got {split!r}")
        costs = [_elements(parts[name]) for name in layers]
        counts = balanced_split(costs, stages, tail=_elements(parts["head"]) if "head" in parts else 0.0)
    else:
        counts = tuple(split)
        least = [1] * (stages - 1) + [0 if "head" in parts and stages > 1 else 1]
        fits = len(counts) == stages and all(isinstance(count, int) for count in counts)
        if (
            not fits
            or sum(counts) != len(layers)
            or any(c < at_least for c, at_least in zip(counts, least, strict=True))
        ):
            raise ValueError(
                f"split must give the layers of each of the {stages} stages, {len(layers)} in all, at least 1 each "
                f"(the last may have only the head), got {list(counts)}"
            )
    found: list[list[str]] = []
    for count in counts:
        taken = sum(len(stage) for stage in found)
        found.append(layers[taken : taken + count])
    found[0] = [name for name in parts if name == "embed"] + found[0]
    found[-1] = found[-1] + [name for name in parts if name == "head"]
    return found


def _elements(part: nn.Module) -> float:
    return float(sum(parameter.numel() for parameter in part.parameters() if parameter.dim() > 1))
