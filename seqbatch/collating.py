"""Turning pieces into tensors: `collate` for batches of a plan, and plug-ins for any DataLoader."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from seqbatch.batch import SequenceBatch, ignored, resets
from seqbatch.datasets import Column, Fetched, Key
from seqbatch.ordering import IntArray

__all__ = ["as_model_inputs", "collate"]


def collate(
    fetched: Fetched,
    *,
    layout: str = "time_major",
    padding_value: float | Mapping[Any, float] = 0,
    as_dict: bool = False,
) -> "SequenceBatch | dict[str, Any]":
    """Lay fetched pieces on their grid; the ``collate_fn`` of loaders (with ``functools.partial`` for options).

    Args:
        fetched: What :class:`~seqbatch.datasets.PieceDataset` serves.
        layout: ``"time_major"``, ``"batch_first"`` or ``"flat"``.
        padding_value: What cells without a token hold; by field where it is a dict; ``labels``
            get -100 unless it says otherwise.
        as_dict: Return the inputs of Hugging Face models; see :func:`as_model_inputs`.

    Returns:
        The batch; integer fields become int64.

    Raises:
        TypeError: something else than pieces.
    """
    if not isinstance(fetched, Fetched):
        raise TypeError(
            f"collate lays out the pieces that PieceDataset serves, got {type(fetched).__name__}: wrap the dataset in "
            "PieceDataset(dataset), or use PadCollate, FlattenCollate or SpliceCollate for plain items"
        )
    from seqbatch.fill_kernels import mark

    placement, columns = fetched.placement, fetched.columns
    size = int(np.prod(placement.shape(layout)))
    first, stride = placement.first(layout)
    mask = np.zeros(size, np.bool_)
    data = {
        key: _place(column, 0, placement.length, first, stride, size, _padding(padding_value, key), mask)
        for key, column in columns.items()
    }
    begin, count = placement.loss_spans()
    loss_mask, targets = np.zeros(size, np.bool_), None
    at = first + begin * stride
    if placement.next_token:
        column = columns[fetched.target]
        fill = ignored(data[fetched.target])
        targets = _place(column, begin + 1, count, at, stride, size, fill, loss_mask)
    else:
        mark(at, count, stride, loss_mask)
    shape = placement.shape(layout)

    def grid(values: Any) -> Tensor:
        rows = torch.as_tensor(values)
        return rows.view(*shape, *rows.shape[1:])

    batch = SequenceBatch(
        data=_structure({key: grid(values) for key, values in data.items()}),
        placement=placement,
        loss_mask=grid(loss_mask),
        mask=None if layout == "flat" else grid(mask),
        reset=None if layout == "flat" else torch.from_numpy(resets(placement, layout)),
        targets=None if targets is None else grid(targets),
        per_sequence=fetched.per_sequence,
        layout=layout,
    )
    return as_model_inputs(batch) if as_dict else batch


def as_model_inputs(batch: SequenceBatch) -> dict[str, Any]:
    """Return the keyword arguments of Hugging Face models for a batch, as (B, T), or (1, S) if it is flat.

    ``input_ids``, ``position_ids`` (from 0 in every piece) and ``labels``: the data's own ``labels``, or the
    ``input_ids``, with -100 on padding, on context, and where a piece begins inside a row, since causal models
    compare each position with the *next* label and no piece may predict another's. ``attention_mask`` only
    where a row holds one piece. Without it the models keep pieces apart by their ``position_ids``, but not
    while they keep a cache of keys, which is their default outside ``Trainer``: hence ``use_cache=False`` then.

    >>> batch = SequenceBatch.of_sequences([torch.tensor([1, 2, 3]), torch.tensor([4, 5])])
    >>> as_model_inputs(batch)["labels"].tolist()
    [[1, 2, 3], [4, 5, -100]]
    """
    if batch.targets is not None:
        raise ValueError("Hugging Face models shift their labels themselves: leave next_token out with as_dict=True")
    batch = batch.to_layout("batch_first") if batch.layout == "time_major" else batch
    data = dict(batch.data) if isinstance(batch.data, Mapping) else {"input_ids": batch.data}
    if "input_ids" not in data:
        raise ValueError(f"Hugging Face models take input_ids, and the batch has {list(data)}")
    counted, placement = batch.loss_mask.clone(), batch.placement
    begins = batch.cells[torch.from_numpy(placement.cu_seqlens[:-1][placement.length > 0])]
    inside = begins if batch.layout == "flat" else begins[begins % max(placement.steps, 1) > 0]
    counted.view(-1)[inside] = False
    data["labels"] = data.get("labels", data["input_ids"]).masked_fill(~counted, -100)
    data["position_ids"] = batch.position_ids
    if batch.mask is not None and placement.single:
        data["attention_mask"] = batch.mask.long()
    rows = {name: values[None] for name, values in data.items()} if batch.layout == "flat" else data
    alone = {} if "attention_mask" in data else {"use_cache": False}
    return rows | alone | dict(batch.per_sequence)


def _padding(value: float | Mapping[Any, float], key: Key) -> float:
    if isinstance(value, Mapping):
        return value.get(key, -100 if key == "labels" else 0)
    return -100 if key == "labels" and value == 0 else value


def _place(
    column: Column,
    offset: IntArray | int,
    count: IntArray,
    first: IntArray,
    stride: int,
    size: int,
    padding: float,
    mask: NDArray[np.bool_],
) -> Tensor:
    """Return (size, ...): row ``source + offset + i`` at cell ``first + i * stride``, i < `count`; mark those cells."""
    tokens, source = column.tokens, column.source + offset
    if isinstance(tokens, Tensor) and tokens.ndim == 1 and tokens.dtype in _AS_NUMPY:
        tokens = tokens.numpy(force=True)
    if isinstance(tokens, np.ndarray) and tokens.ndim == 1:
        from seqbatch.fill_kernels import fill

        out = np.full(size, padding, np.int64 if tokens.dtype.kind in "iu" else tokens.dtype)
        fill(tokens, source, count, first, stride, out, mask)
        return torch.from_numpy(out)
    cells, rows = _ramps(first, stride, count), _ramps(source, 1, count)
    flat = torch.as_tensor(tokens[rows])
    flat = flat if flat.dtype.is_floating_point or flat.dtype == torch.bool else flat.long()
    mask[cells] = True
    return flat.new_full((size, *flat.shape[1:]), padding).index_copy(0, torch.from_numpy(cells), flat)


_AS_NUMPY = {torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.float32, torch.float64, torch.bool}


def _ramps(first: IntArray, stride: int, count: IntArray) -> IntArray:
    """``first[p] + i * stride`` for i below ``count[p]``, piece by piece."""
    ends = np.cumsum(count)
    begins: IntArray = np.repeat(first - (ends - count) * stride, count)
    return begins + np.arange(len(begins)) * stride


def _structure(data: dict[Key, Tensor]) -> Any:
    """Give fields the shape of the dataset's items: the tokens alone, a tuple, or a dict."""
    if set(data) == {None}:
        return data[None]
    if all(isinstance(key, int) for key in data):
        return tuple(data.values())
    return data
