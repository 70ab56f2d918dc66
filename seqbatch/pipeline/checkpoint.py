"""Checkpoints of a pipeline: written by all ranks into one folder, read by any number of stages."""

import os
import pickle
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.optim import Optimizer

from seqbatch.pipeline.agreement import Council
from seqbatch.pipeline.calls import Carried
from seqbatch.pipeline.parts import state_tensors
from seqbatch.pipeline.placing import Place
from seqbatch.tensors import map_tensors

__all__ = ["Checkpoint"]

_METADATA = ".metadata"


@dataclass(frozen=True)
class Checkpoint:
    """A folder, and the part of it that is a rank's.

    Entries are ``model.NAME``, ``optimizer.state.NAME.KEY``, ``optimizer.group.NAME.KEY``,
    ``carried.REPLICA.LAYER...``,
    and ``pipeline.*``; names are those of the whole network, so that they say nothing of the split.
    """

    path: Path
    module: nn.Module
    council: Council
    place: Place

    def save(self, optimizer: Optimizer | None, carried: Carried, steps: int, extra: Mapping[str, Any]) -> None:
        """Write it; see :meth:`LayerPipeline.save`."""
        state: dict[str, Any] = {f"model.{name}": value for name, value in self.module.state_dict().items()}
        state["pipeline.steps"] = steps
        error: Exception | None = None
        try:
            if optimizer is not None:
                state |= _flat_optimizer(self.module, optimizer)
            state |= _flat_carried(carried, self.place.replica)
            if self._first:
                state["pipeline.extra"] = pickle.dumps(dict(extra))  # as it is: torch would take dicts apart
                self.path.parent.mkdir(parents=True, exist_ok=True)
                if self.path.exists() and not self.path.is_dir():
                    raise ValueError(f"{self.path} is a file, and a checkpoint is a folder: give another path")
        except Exception as failure:  # whatever it is, all ranks must stop
            error = failure
        self.council.share({}, error)
        partial = self.path.with_name(self.path.name + ".partial")
        with _quiet():
            save(state, checkpoint_id=partial, process_group=self.council.group, no_dist=self.council.group is None)
        try:
            if self._first:
                _replace(self.path, partial)
        except OSError as failure:
            error = failure
        self.council.share({}, error)  # whoever comes out of this may rely on the folder

    def load(self, optimizer: Optimizer | None, carry: bool) -> tuple[Carried, int, dict[str, Any]]:
        """Read it; see :meth:`LayerPipeline.load`."""
        error: Exception | None = None
        state: dict[str, Any] = {}
        try:
            metadata = _checked(self.path)
            state = self._wanted(metadata, optimizer, carry)
        except Exception as failure:  # whatever it is, all ranks must stop
            error = failure
        self.council.share({}, error)
        with _quiet():
            load(state, checkpoint_id=self.path, process_group=self.council.group, no_dist=self.council.group is None)
        own = {key.removeprefix("model."): value for key, value in state.items() if key.startswith("model.")}
        self.module.load_state_dict(own)
        if optimizer is not None:
            _set_optimizer(self.module, optimizer, state)
        found = _read_carried(state, self.place.replica) if carry else Carried()
        return found, state["pipeline.steps"], pickle.loads(state["pipeline.extra"])

    @property
    def _first(self) -> bool:
        return len(self.place.everyone) == 1 or dist.get_rank() == self.place.everyone[0]

    def _wanted(self, metadata: Mapping[str, Any], optimizer: Optimizer | None, carry: bool) -> dict[str, Any]:
        """What this rank reads, as tensors to be filled and None for other things."""
        state: dict[str, Any] = {f"model.{name}": value for name, value in self.module.state_dict().items()}
        lacks = [key for key in state if key not in metadata]
        if lacks:
            raise ValueError(
                f"checkpoint {self.path} is of another network: it has no {lacks[0].removeprefix('model.')!r}"
            )
        for key, value in state.items():
            size = getattr(metadata[key], "size", None)
            if isinstance(value, Tensor) and size != value.shape:
                raise ValueError(
                    f"checkpoint {self.path} is of another network: {key} has shape {tuple(size or ())}, not "
                    f"{tuple(value.shape)}"
                )
        if optimizer is not None:
            if not any(key.startswith("optimizer.") for key in metadata):
                raise ValueError(f"checkpoint {self.path} has no optimizer's state: save(path, optimizer) writes it")
            _flat_optimizer(self.module, optimizer)  # refuses parameters of others
            settings = [group.get(name) for group in optimizer.param_groups for name in ("fused", "capturable")]
            parameters = dict(self.module.named_parameters())
            for key, entry in metadata.items():
                kind, _, name = key.rpartition(".")[0].removeprefix("optimizer.").partition(".")
                if key.startswith("optimizer.") and kind in ("state", "group") and name in parameters:
                    state[key] = _empty(entry, parameters[name].device, counts_too=any(settings))
        wrote = {key.split(".")[1] for key in metadata if key.startswith("carried.")} if carry else set()
        if wrote and len(wrote) != self.place.replicas:
            raise ValueError(
                f"the states that checkpoint {self.path} carries are of {len(wrote)} replicas, each with lanes of its "
                f"own, and there are {self.place.replicas} now: load(path, carry=False) starts all lanes from 0"
            )
        layers = (
            {"units", "cleared", *(n for n, _ in self.module.get_submodule("layers").named_children())}
            if carry
            else set()
        )
        for key, entry in metadata.items():
            if key.startswith(f"carried.{self.place.replica}.") and key.split(".")[2] in layers:
                state[key] = _empty(entry, self.place.device)
        return state | {"pipeline.steps": None, "pipeline.extra": None}


def _replace(path: Path, new: Path) -> None:
    before = path.with_name(path.name + ".before")
    shutil.rmtree(before, ignore_errors=True)
    if path.exists():
        os.replace(path, before)
    os.replace(new, path)
    shutil.rmtree(before, ignore_errors=True)


def _checked(path: Path) -> dict[str, Any]:
    """What a complete checkpoint holds: sizes and dtypes by name."""
    if not (path / _METADATA).is_file():
        there = "has no .metadata, which is written last" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"checkpoint {path} {there}: take one that was finished")
    try:
        metadata = FileSystemReader(path).read_metadata()
    except Exception as failure:  # whatever a pickle that was cut raises
        raise FileNotFoundError(
            f"checkpoint {path} is incomplete: {_METADATA} cannot be read: take an older one"
        ) from failure
    needed: dict[str, int] = {}
    for info in (metadata.storage_data or {}).values():
        needed[info.relative_path] = max(needed.get(info.relative_path, 0), info.offset + info.length)
    for name, size in sorted(needed.items()):
        found = (path / name).stat().st_size if (path / name).is_file() else None
        if found is None or found < size:
            what = "is missing" if found is None else f"has {found} bytes of {size}"
            raise FileNotFoundError(f"checkpoint {path} is incomplete: {name} {what}: take an older one")
    return dict(metadata.state_dict_metadata)


def _empty(entry: Any, device: torch.device, counts_too: bool = False) -> Tensor | None:
    """A tensor like a stored one; None for what is no tensor. Most optimizers keep counts of steps on the CPU."""
    size = getattr(entry, "size", None)
    if size is None:
        return None
    return torch.empty(size, dtype=entry.properties.dtype, device=device if size or counts_too else "cpu")


def _flat_optimizer(module: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """An optimizer's state by parameters' names.

    As torch's ``flatten_optimizer_state_dict``, which refuses optimizers without state and with frozen parameters.
    """
    names = {parameter: name for name, parameter in module.named_parameters()}
    flat: dict[str, Any] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter not in names:
                raise ValueError(
                    f"the optimizer has a parameter of shape {tuple(parameter.shape)} that is not of this pipeline's "
                    "stages: make it from pipe.parameters()"
                )
            name = names[parameter]
            flat |= {f"optimizer.group.{name}.{key}": value for key, value in group.items() if key != "params"}
            flat |= {
                f"optimizer.state.{name}.{key}": value for key, value in optimizer.state.get(parameter, {}).items()
            }
    return flat


def _set_optimizer(module: nn.Module, optimizer: Optimizer, flat: Mapping[str, Any]) -> None:
    """The inverse; a group takes the settings of its first parameter."""
    names = {parameter: name for name, parameter in module.named_parameters()}
    found: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        prefix, _, last = key.rpartition(".")
        found.setdefault(prefix, {})[last] = value
    optimizer.state.clear()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = found.get(f"optimizer.state.{names[parameter]}")
            if state:
                optimizer.state[parameter] = state
        for parameter in group["params"][:1]:
            group |= found.get(f"optimizer.group.{names[parameter]}", {})


def _flat_carried(carried: Carried, replica: int) -> dict[str, Any]:
    """Carried states by replica, layer and micro-batch: their tensors, and their form with numbers in their places."""
    flat: dict[str, Any] = {} if carried.units is None else {f"carried.{replica}.units": pickle.dumps(carried.units)}
    for layer, states in carried.states.items():
        for slot, state in enumerate(states):
            prefix = f"carried.{replica}.{layer.removeprefix('layers.')}.{slot}"
            flat |= {f"{prefix}.{number}": tensor for number, tensor in enumerate(state_tensors(state))}
            numbers = count()
            flat[f"{prefix}.form"] = pickle.dumps(map_tensors(partial(_next, numbers), state))
    if carried.cleared is not None:
        flat[f"carried.{replica}.cleared"] = carried.cleared
    return flat


def _next(numbers: Iterator[int], tensor: Tensor) -> int:
    return next(numbers)


def _read_carried(flat: Mapping[str, Any], replica: int) -> Carried:
    """The inverse of `_flat_carried`."""

    def built(form: Any, prefix: str) -> Any:
        if isinstance(form, tuple | list):
            parts = [built(part, prefix) for part in form]
            return type(form)(*parts) if hasattr(form, "_fields") else type(form)(parts)
        return None if form is None else flat[f"{prefix}.{form}"]

    units = flat.get(f"carried.{replica}.units")
    carried = Carried(
        units=None if units is None else pickle.loads(units), cleared=flat.get(f"carried.{replica}.cleared")
    )
    for key in sorted((k for k in flat if k.startswith("carried.") and k.endswith(".form")), key=_slot):
        prefix = key.removesuffix(".form")
        layer = f"layers.{prefix.split('.')[2]}"
        carried.states.setdefault(layer, []).append(built(pickle.loads(flat[key]), prefix))
    return carried


def _slot(key: str) -> int:
    return int(key.split(".")[3])


@contextmanager
def _quiet() -> Iterator[None]:
    """torch warns of its own deprecated calls, and of one process without a group."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
