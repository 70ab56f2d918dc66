"""What all ranks must know before the first of them sends: that all can go on, and that they mean the same batch."""

import json
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["Council", "brief"]

_BYTES = 4096
_SHOWN = 200


class Council:
    """The ranks of a mesh, which exchange a few facts over the CPU.

    Every error that a rank finds by itself is raised on all of them, so that none waits for one that has stopped.

    Args:
        ranks: Of the default process group, those that take part; all of them must construct this.
    """

    def __init__(self, ranks: Sequence[int]) -> None:
        self.ranks = list(ranks)
        self.group = _group_of(self.ranks) if len(self.ranks) > 1 else None

    def share(self, facts: Mapping[str, Any], error: Exception | None = None) -> list[dict[str, Any]]:
        """Exchange facts: JSON of a few kilobytes.

        Returns:
            Those of each rank.

        Raises:
            Exception: The `error` of this rank; where another has one, TypeError, ValueError, FileNotFoundError as
                there, else RuntimeError, which says which rank.
        """
        if self.group is None:
            if error is not None:
                raise error
            return [dict(facts)]
        text = _encoded(facts, error)
        buffer = torch.zeros(_BYTES, dtype=torch.uint8)
        buffer[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        found = [torch.empty_like(buffer) for _ in self.ranks]
        try:
            dist.all_gather(found, buffer, group=self.group)
        except RuntimeError as failure:
            raise error or RuntimeError(
                f"a rank of the pipeline is gone: {failure}; restart from the last checkpoint"
            ) from failure
        everyone = [json.loads(bytes(row.numpy()).rstrip(b"\0")) for row in found]
        if error is not None:
            raise error
        for rank, other in zip(self.ranks, everyone, strict=True):
            if other["error"] is not None:
                kind, message = other["error"]
                raise _KINDS.get(kind, RuntimeError)(f"rank {rank} stopped: {message}")
        return everyone

    def gather(self, mine: Any) -> list[Any]:
        """What each rank has, of any size."""
        if self.group is None:
            return [mine]
        everyone: list[Any] = [None] * len(self.ranks)
        dist.all_gather_object(everyone, mine, group=self.group)
        return everyone

    def same(
        self, facts: Mapping[str, Any], notes: Mapping[str, Any], error: Exception | None = None
    ) -> list[dict[str, Any]]:
        """As `share`; raises where ranks with the same ``facts["replica"]`` differ in any, `notes` aside."""
        everyone = self.share({**facts, **notes}, error)
        first: dict[Any, tuple[int, dict[str, Any]]] = {}
        for rank, other in zip(self.ranks, everyone, strict=True):
            head, expected = first.setdefault(other["replica"], (rank, other))
            different = [f"{key}={other[key]!r} ({expected[key]!r})" for key in facts if other[key] != expected[key]]
            for key in (key for key in facts if key in _EVERYWHERE and not different):
                head, expected = self.ranks[0], everyone[0]
                different = [f"{key}={other[key]!r} ({expected[key]!r})"] if other[key] != expected[key] else []
            if different:
                raise ValueError(
                    f"the ranks of a pipeline were given different things: rank {rank} (rank {head}) has "
                    f"{', '.join(different)}; give all the same layers and settings, and all stages of a replica the "
                    "same batch: make_loader(..., mesh=pipe.mesh) reads by mesh['dp'], not by rank"
                )
        return everyone


def brief(value: Any) -> str:
    """A value of any size as a fact: its text, of a long one the beginning and a digest.

    >>> brief([2, 1])
    '[2, 1]'
    >>> len(brief([1] * 400)), brief([1] * 400) == brief([1] * 399 + [2])
    (229, False)
    """
    text = repr(value)
    if len(text) <= _SHOWN:
        return text
    return f"{text[:_SHOWN]}... (sha256 {sha256(text.encode()).hexdigest()[:16]})"


def _group_of(ranks: Sequence[int]) -> Any:
    """A group that talks over the CPU: the default one where it can."""
    everyone = len(ranks) == dist.get_world_size()
    if everyone and dist.get_backend() == "gloo":
        return dist.group.WORLD
    # by local synchronization only where the others do not take part: it needs as many groups on all ranks
    return dist.new_group(ranks, backend="gloo", use_local_synchronization=not everyone)


def _encoded(facts: Mapping[str, Any], error: Exception | None) -> bytes:
    """As JSON that fits; of a long error the beginning."""
    length = _BYTES
    while True:
        told = None if error is None else [type(error).__name__, str(error)[:length]]
        text = json.dumps({"error": told, **facts}, ensure_ascii=False).encode(errors="replace")
        if len(text) <= _BYTES or length == 0:
            return text[:_BYTES]
        length //= 2


_EVERYWHERE = ("learning", "training", "step", "autocast", "dtype", "features", "targets")  # the same in all replicas
_KINDS = {kind.__name__: kind for kind in (TypeError, ValueError, RuntimeError, FileNotFoundError)}
