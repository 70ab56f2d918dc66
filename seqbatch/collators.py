"""Collate functions for any DataLoader: a list of plain items in, a :class:`SequenceBatch` out; no plan needed."""

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np

from seqbatch.batch import SequenceBatch
from seqbatch.collating import collate
from seqbatch.datasets import PieceDataset
from seqbatch.measuring import rows_of
from seqbatch.placement import PieceIndices, Placement, targets_of
from seqbatch.strategy import check_integer

__all__ = ["FlattenCollate", "PadCollate", "SpliceCollate"]


@dataclass(frozen=True)
class _Collate:
    _: KW_ONLY
    next_token: bool | str | int = False
    fields: Sequence[str | int] | None = None
    per_sequence: Sequence[str | int] = ()
    padding_value: float | Mapping[Any, float] = 0
    as_dict: bool = False

    def __call__(self, items: Sequence[Any]) -> SequenceBatch | dict[str, Any]:
        """Collate a list of items, each as :class:`~seqbatch.PieceDataset` takes them."""
        if not len(items):
            raise ValueError("there is nothing to collate: an empty list of items")
        field = self.fields[0] if self.fields else None
        lengths = np.array([len(rows_of(item, field, i, self.per_sequence)) for i, item in enumerate(items)], np.int64)
        placement = self._place(lengths)
        source = PieceDataset(
            items, fields=self.fields, per_sequence=self.per_sequence, target=targets_of(self.next_token)[1]
        )
        fetched = source.__getitems__(PieceIndices(placement.sequence.tolist(), placement))
        options = {"padding_value": self.padding_value, "as_dict": self.as_dict}
        return collate(fetched, layout=self._layout(), **options)  # type: ignore[arg-type, return-value]

    def _place(self, lengths: Any) -> Placement:
        return Placement.of_lengths(lengths, next_token=targets_of(self.next_token)[0])

    def _layout(self) -> str:
        return "flat"


@dataclass(frozen=True)
class PadCollate(_Collate):
    """One item a lane, padded to the longest.

    Args:
        batch_first: (B, T, ...) instead of (T, B, ...).
        pad_to_multiple_of: Round T up to a multiple.
        next_token: Make ``targets``; a text or number names the field they are of.
        fields: The per-token fields to use; by default all that are not in `per_sequence`.
        per_sequence: Fields with one value a sequence.
        padding_value: What padding holds, or a dict by field; ``labels`` get -100 by default.
        as_dict: Return the inputs of Hugging Face models, see :func:`~seqbatch.collating.as_model_inputs`.

    >>> import torch
    >>> PadCollate(batch_first=True)([torch.tensor([1, 2, 3]), torch.tensor([4])]).data.tolist()
    [[1, 2, 3], [4, 0, 0]]
    """

    batch_first: bool = False
    pad_to_multiple_of: int = 1

    def __post_init__(self) -> None:
        check_integer("pad_to_multiple_of", self.pad_to_multiple_of, at_least=1)

    def _place(self, lengths: Any) -> Placement:
        return Placement.of_lengths(
            lengths, multiple=self.pad_to_multiple_of, next_token=targets_of(self.next_token)[0]
        )

    def _layout(self) -> str:
        return "batch_first" if self.batch_first else "time_major"


@dataclass(frozen=True)
class FlattenCollate(_Collate):
    """All items end to end without padding: (S, ...) and ``cu_seqlens``; arguments as of :class:`PadCollate`.

    >>> batch = FlattenCollate()([[1, 2, 3], [4]])
    >>> batch.data.tolist(), batch.cu_seqlens.tolist(), batch.position_ids.tolist()
    ([1, 2, 3, 4], [0, 3, 4], [0, 1, 2, 0])
    """


@dataclass(frozen=True)
class SpliceCollate(_Collate):
    """Items end to end in `num_lanes` lanes, each where the lane that ends first ended; ``reset`` marks their starts.

    Args:
        num_lanes: Lanes (B).
        batch_first: (B, T, ...) instead of (T, B, ...).
        pad_to_multiple_of: Round T up to a multiple.

    The other arguments are those of :class:`PadCollate`.

    >>> batch = SpliceCollate(2)([[1, 2, 3], [4], [5, 6]])
    >>> batch.data.t().tolist(), batch.reset.t().int().tolist()
    ([[1, 2, 3], [4, 5, 6]], [[1, 0, 0], [1, 1, 0]])
    """

    num_lanes: int = 1
    batch_first: bool = False
    pad_to_multiple_of: int = 1

    def __post_init__(self) -> None:
        check_integer("num_lanes", self.num_lanes, at_least=1)
        check_integer("pad_to_multiple_of", self.pad_to_multiple_of, at_least=1)

    def _place(self, lengths: Any) -> Placement:
        return Placement.of_lengths(
            lengths,
            num_lanes=self.num_lanes,
            multiple=self.pad_to_multiple_of,
            next_token=targets_of(self.next_token)[0],
        )

    def _layout(self) -> str:
        return "batch_first" if self.batch_first else "time_major"
