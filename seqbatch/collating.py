"""Turning pieces into tensors: `collate` for batches of a plan, and plug-ins for any DataLoader."""

import math
from collections.abc import Mapping
from typing import Any, TypeGuard

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from seqbatch.batch import SequenceBatch, marks
from seqbatch.datasets import Fetched, FetchedPair, Key
from seqbatch.ordering import IntArray
from seqbatch.pair_batch import PairBatch
from seqbatch.placement import Placement
from seqbatch.tensors import ignored, padding_of

__all__ = ["ModelInputs", "as_model_inputs", "as_pair_inputs", "collate"]


def collate(
    fetched: Fetched | FetchedPair,
    *,
    layout: str = "time_major",
    padding_value: float | Mapping[Any, float] = 0,
    as_dict: bool = False,
) -> "SequenceBatch | PairBatch | dict[str, Any]":
    """Lay fetched pieces on their grid; the ``collate_fn`` of loaders (with ``functools.partial`` for options).

    Args:
        fetched: What :class:`~seqbatch.datasets.PieceDataset` serves.
        layout: ``"time_major"``, ``"batch_first"`` or ``"flat"``.
        padding_value: What cells without a token hold; by field where it is a dict; ``labels``
            get -100 unless it says otherwise.
        as_dict: Return the inputs of Hugging Face models; see :func:`as_model_inputs`.

    Returns:
        The batch; integer fields become int64. Of pairs a :class:`~seqbatch.PairBatch`.

    Raises:
        TypeError: something else than pieces.
    """
    if isinstance(fetched, FetchedPair):
        batch = _collate_pair(fetched, "batch_first" if as_dict and layout == "time_major" else layout, padding_value)
        return as_pair_inputs(batch) if as_dict else batch
    if not isinstance(fetched, Fetched):
        raise TypeError(
            f"collate lays out the pieces that PieceDataset serves, got {type(fetched).__name__}: wrap the dataset in "
            "PieceDataset(dataset), or use PadCollate, FlattenCollate or SpliceCollate for plain items"
        )
    layout = "batch_first" if as_dict and layout == "time_major" else layout
    placement, columns = fetched.placement, fetched.columns
    shape, targets, flags = placement.shape(layout), None, None
    data: dict[Key, Tensor] = {}
    for key, (given, source) in columns.items():
        tokens, padding = _as_array(given), padding_of(padding_value, key)
        if flags is None and _is_plain(tokens):
            out = _grid(tokens, shape, padding)
            flags = marks(placement, layout, tokens, source, out)
            data[key] = torch.from_numpy(out.reshape(shape))
        else:
            data[key] = _place(tokens, source, placement.length, *placement.first(layout), shape, padding)
    mask, reset, loss_mask = marks(placement, layout) if flags is None else flags
    if placement.next_token:
        begin, count = placement.loss_spans()
        first, stride = placement.first(layout)
        column, padding = columns[fetched.target], ignored(data[fetched.target])
        at = first + begin * stride
        targets = _place(_as_array(column.tokens), column.source + begin + 1, count, at, stride, shape, padding)
    laid = SequenceBatch(
        data=_structure(data),
        placement=placement,
        loss_mask=loss_mask,
        mask=None if layout == "flat" else mask,
        reset=None if layout == "flat" else reset,
        targets=targets,
        per_sequence=fetched.per_sequence,
        layout=layout,
        padding_value=padding_value,
    )
    return as_model_inputs(laid) if as_dict else laid


def _collate_pair(fetched: FetchedPair, layout: str, padding_value: float | Mapping[Any, float]) -> PairBatch:
    sides = zip(fetched.keys, (fetched.source, fetched.target), strict=True)
    source, target = (collate(side, layout=layout, padding_value=padding_of(padding_value, key)) for key, side in sides)
    return PairBatch(source, target, fetched.keys)  # type: ignore[arg-type]


def as_pair_inputs(batch: PairBatch) -> "ModelInputs":
    """Return the keyword arguments of Hugging Face encoder-decoder models for a batch of pairs, (B, T) each.

    ``input_ids`` and ``attention_mask`` of the sources, and the targets as ``labels``, -100 on padding, from which such
    models make their decoder's inputs.
    """
    source, target = batch
    if target.targets is not None or target.mask is None or source.mask is None:
        raise ValueError(
            "Hugging Face models shift labels themselves and take padded rows: leave next_token and layout='flat' out "
            "with as_dict=True"
        )
    inputs = ModelInputs({"input_ids": source.data, "labels": target.data.masked_fill(~target.mask, -100)})
    inputs.update({"attention_mask": source.mask.long()})
    inputs.update(batch.per_sequence)
    inputs.placement = batch.placement
    return inputs


def as_model_inputs(batch: SequenceBatch) -> "ModelInputs":
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
    data.pop("attention_mask", None)  # the dataset's own says that a row is one document
    if batch.mask is not None and placement.single:
        data["attention_mask"] = batch.mask.long()
    rows = {name: values[None] for name, values in data.items()} if batch.layout == "flat" else data
    alone = {} if "attention_mask" in data else {"use_cache": False}
    inputs = ModelInputs(rows | alone | dict(batch.per_sequence))
    inputs.placement = placement
    return inputs


class ModelInputs(dict[str, Any]):
    """Keyword arguments for a model that know their place in the epoch, as long as no wrapper copies them."""

    placement: Placement | None = None

    @property
    def position(self) -> Mapping[str, Any] | None:
        """As :attr:`SequenceBatch.position`."""
        return None if self.placement is None else self.placement.position


def _place(
    tokens: NDArray[Any] | Tensor,
    source: IntArray,
    count: IntArray,
    first: IntArray,
    stride: int,
    shape: tuple[int, ...],
    padding: float,
) -> Tensor:
    """Return (*shape, ...): row ``source[p] + i`` of `tokens` at cell ``first[p] + i * stride``, for i < `count`."""
    if _is_plain(tokens):
        from seqbatch.fill_kernels import copy_rows

        out = _grid(tokens, shape, padding)
        copy_rows(tokens, source, count, first, stride, out)
        return torch.from_numpy(out.reshape(shape))
    cells, rows = _ramps(first, stride, count), _ramps(source, 1, count)
    flat = torch.as_tensor(tokens[rows])
    flat = flat if flat.dtype.is_floating_point or flat.dtype == torch.bool else flat.long()
    grid = flat.new_full((math.prod(shape), *flat.shape[1:]), padding).index_copy(0, torch.from_numpy(cells), flat)
    return grid.view(*shape, *flat.shape[1:])


_AS_NUMPY = {torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.float32, torch.float64, torch.bool}


def _as_array(tokens: NDArray[Any] | Tensor) -> NDArray[Any] | Tensor:
    """Return the tokens as the kernels take them, where they can."""
    if isinstance(tokens, Tensor) and tokens.ndim == 1 and tokens.dtype in _AS_NUMPY:
        return tokens.numpy(force=True)
    return tokens


def _is_plain(tokens: NDArray[Any] | Tensor) -> TypeGuard[NDArray[Any]]:
    """Whether the kernels can copy the tokens: a row of numbers that numba knows."""
    return isinstance(tokens, np.ndarray) and tokens.ndim == 1 and tokens.dtype != np.float16


def _grid(tokens: NDArray[Any], shape: tuple[int, ...], padding: float) -> NDArray[Any]:
    """Return the cells of a (S,) field, row by row: integers as int64, as embeddings take them."""
    dtype = np.dtype(np.int64) if tokens.dtype.kind in "iu" else tokens.dtype
    if dtype.kind == "i" and padding != int(padding):
        raise ValueError(f"padding_value={padding} cannot pad integers: give a whole number, by field if need be")
    return np.full(math.prod(shape), padding, dtype) if padding else np.zeros(math.prod(shape), dtype)


def _ramps(first: IntArray, stride: int, count: IntArray) -> IntArray:
    """``first[p] + i * stride`` for i below ``count[p]``, piece by piece."""
    ends = np.cumsum(count)
    begins: IntArray = np.repeat(first - (ends - count) * stride, count)
    return begins + np.arange(len(begins)) * stride


def _structure(data: dict[Key, Tensor]) -> Any:
    """Give fields the shape of the dataset's items: the tokens alone, a tuple of all, or a dict."""
    if set(data) == {None}:
        return data[None]
    if list(data) == list(range(len(data))):
        return tuple(data.values())
    return data
