"""Layers over devices: recurrent networks trained in a pipeline, over time chunks or over micro-batches.

The layers of a network lie on several devices; a batch is cut into *units* - time chunks, or micro-batches of
lanes - and while one device runs a unit, the next one runs the unit before. :class:`LayerPipeline` trains so on
``torch.distributed``; :func:`schedule` and :func:`simulate` say what any such order costs, before anything runs.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOME = {
    "LINKS": "costs",
    "LayerPipeline": "layer_pipeline",
    "Link": "costs",
    "PartCost": "costs",
    "Result": "layer_pipeline",
    "predict": "costs",
    "schedule": "schedules",
    "simulate": "timeline",
}

__all__ = ["LINKS", "LayerPipeline", "Link", "PartCost", "Result", "predict", "schedule", "simulate"]

if TYPE_CHECKING:
    from seqbatch.pipeline.costs import LINKS, Link, PartCost, predict
    from seqbatch.pipeline.layer_pipeline import LayerPipeline, Result
    from seqbatch.pipeline.schedules import schedule
    from seqbatch.pipeline.timeline import simulate


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value
