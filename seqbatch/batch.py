"""SequenceBatch: a batch of pieces as tensors, its masks and flags, and the way back."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence, unpack_sequence

from seqbatch.placement import LAYOUTS, Placement
from seqbatch.strategy import check_choice
from seqbatch.tensors import as_bytes, as_tensors, detach_state, ignored, map_tensors, padding_of

__all__ = ["SequenceBatch", "marks"]

_FORMS = (*LAYOUTS, "packed", "nested")
_TENSORS = ("data", "mask", "reset", "targets", "loss_mask", "per_sequence")


@dataclass(eq=False, repr=False)  # not frozen, as Placement
class SequenceBatch:
    """What a loader yields: the tokens of a batch, and what a model and a loss need to know of them.

    Shapes are those of ``layout="time_major"``, the default; ``"batch_first"`` swaps T and B. The layout
    ``"flat"`` has the tokens of all pieces end to end, lane by lane: (S, ...) with `cu_seqlens`, and no
    `mask` and `reset`, since it has no padding.

    Attributes:
        data: (T, B, ...) tokens, 0 (or the padding value) where there is none; a dict or tuple of such
            tensors where the dataset's items are dicts or tuples.
        mask: (T, B) bool, true on real tokens.
        reset: (T, B) bool, true at the first step of every piece, except where it continues the sequence
            that its lane held at the end of the batch before.
        targets: (T, B, ...) the next token of the same sequence, -100 (0 if not integer) where
            `loss_mask` is false; None without ``next_token``.
        loss_mask: (T, B) bool: real tokens outside context and, with ``next_token``, but the last of a sequence.
        per_sequence: What was declared to be one value a sequence, by name: stacked, one row a piece.
        placement: Which tokens lie where, as numpy columns sorted by lane and step.
        layout: ``"time_major"``, ``"batch_first"`` or ``"flat"``.
        padding_value: What cells of `data` without a token hold, or a dict by field.

    >>> batch = SequenceBatch.of_sequences([torch.tensor([1, 2, 3]), torch.tensor([4, 5])])
    >>> batch.data.tolist(), batch.mask[2].tolist(), batch.lengths.tolist()
    ([[1, 4], [2, 5], [3, 0]], [True, False], [3, 2])
    >>> batch.to_layout("flat").data.tolist(), batch.cu_seqlens.tolist()
    ([1, 2, 3, 4, 5], [0, 3, 5])
    """

    data: Any
    placement: Placement
    loss_mask: Tensor
    mask: Tensor | None = None
    reset: Tensor | None = None
    targets: Tensor | None = None
    per_sequence: Mapping[Any, Any] = field(default_factory=dict)
    layout: str = "time_major"
    padding_value: float | Mapping[Any, float] = 0

    @staticmethod
    def of_sequences(sequences: list[Any], **options: Any) -> "SequenceBatch":
        """Return the zero-padded batch of whole sequences; `options` as of :class:`~seqbatch.PadCollate`."""
        from seqbatch.collators import PadCollate

        return PadCollate(**options)(sequences)  # type: ignore[return-value]

    def __repr__(self) -> str:
        grid = " x ".join(map(str, self.placement.shape(self.layout)))
        return (
            f"<SequenceBatch {self.layout} {grid}, {len(self.placement.length)} pieces, {self.placement.tokens} tokens>"
        )

    # What the plan says of the batch.

    @property
    def position(self) -> Mapping[str, Any] | None:
        """The state to resume from after this batch; see :meth:`seqbatch.loader.PlanLoader.state_dict`."""
        return self.placement.position

    @property
    def loss_tokens(self) -> int:
        """``loss_mask.sum()``, known from the plan."""
        return self.placement.loss_tokens

    @property
    def step_loss_tokens(self) -> int:
        """`loss_tokens` of the whole optimizer step: over all ranks and accumulated micro-steps."""
        return self.placement.step_loss_tokens

    @property
    def loss_scale(self) -> float:
        """What to multiply the *sum* of the losses of this batch's tokens by.

        Where ranks average gradients (DDP) and micro-steps add them, the step then equals one big batch
        with the mean loss over its tokens: ``num_replicas / step_loss_tokens``.
        """
        return self.placement.num_replicas / max(self.placement.step_loss_tokens, 1)

    @property
    def update(self) -> bool:
        """Whether an optimizer step ends here: always, without ``accumulation``."""
        return self.placement.update

    # What lies where, as tensors on the device of the data.

    @property
    def device(self) -> torch.device:
        """Where the batch's tensors are."""
        return self.loss_mask.device

    def _tensor(self, column: NDArray[Any]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(column)).to(self.device, non_blocking=True)

    @cached_property
    def cells(self) -> Tensor:
        """(S,) int64, the cell of every real token in the layout flattened to rows: ``data.flatten(0, 1)[cells]``."""
        return self._tensor(self.placement.cells(self.layout))

    def _spread(self, per_piece: NDArray[np.int64], slope: int, empty: int) -> Tensor:
        """A number for each token - its piece's, rising by `slope` a step - on the grid."""
        out = np.full(self.placement.shape(self.layout), empty, np.int64)
        length, begin = self.placement.length, self.placement.cu_seqlens[:-1]
        values = np.repeat(per_piece - slope * begin, length) + slope * np.arange(self.placement.tokens)
        out.reshape(-1)[self.placement.cells(self.layout)] = values
        return self._tensor(out)

    @cached_property
    def sequence_ids(self) -> Tensor:
        """(T, B) int64, the dataset's index of the sequence a token is of; -1 on padding."""
        return self._spread(self.placement.sequence, 0, -1)

    @cached_property
    def segment_ids(self) -> Tensor:
        """(T, B) int64, the number of the piece within the batch; -1 on padding."""
        return self._spread(np.arange(len(self.placement.length)), 0, -1)

    @cached_property
    def position_ids(self) -> Tensor:
        """(T, B) int64, steps since the last reset - the true position in a piece that continues; 0 on padding."""
        return self._spread(np.where(self.placement.continues, self.placement.start, 0), 1, 0)

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """(P + 1,) int32, where pieces begin in the flat layout, for kernels that take several sequences end to end."""
        return self._tensor(self.placement.cu_seqlens.astype(np.int32))

    @property
    def max_seqlen(self) -> int:
        """The longest piece."""
        return int(self.placement.length.max(initial=0))

    @property
    def lengths(self) -> Tensor:
        """(B,) int64, on the CPU: real steps of each lane, where no lane holds two pieces.

        Raises:
            ValueError: a lane holds several pieces.
        """
        if not self.placement.single:
            raise ValueError(
                "lengths are those of lanes with one piece from step 0 on, and a lane of this batch holds several, as "
                "splicing and packing make them: use reset and mask, or cu_seqlens"
            )
        lengths = np.zeros(self.placement.lanes, np.int64)
        lengths[self.placement.lane] = self.placement.length
        return torch.from_numpy(lengths)

    # Moving.

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "SequenceBatch":
        """Return the batch on `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "SequenceBatch":
        """Return the batch in page-locked memory; ``DataLoader(pin_memory=True)`` calls this."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, function: Callable[[Tensor], Tensor]) -> "SequenceBatch":
        return replace(self, **{name: map_tensors(function, getattr(self, name)) for name in _TENSORS})

    def __getstate__(self) -> dict[str, Any]:
        """Send small tensors to another process as bytes: a file handle for each takes ten times as long."""
        names = (*_TENSORS, "placement", "layout", "padding_value")
        return {name: map_tensors(as_bytes, getattr(self, name)) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update({name: as_tensors(value) for name, value in state.items()})

    # Other forms of the same tokens.

    def flatten(self, values: Tensor | PackedSequence) -> Tensor:
        """Return (S, ...): the rows of real tokens of `values`, piece by piece.

        Args:
            values: One row for each cell in the batch's layout, or for each token as a ``PackedSequence`` or
                nested tensor of the pieces. Gradients flow back.
        """
        if isinstance(values, PackedSequence) or values.is_nested:
            flat = torch.cat(unpack_sequence(values)) if isinstance(values, PackedSequence) else values.values()
            if len(flat) != self.placement.tokens:
                raise ValueError(f"values have {len(flat)} rows, but the batch has {self.placement.tokens} tokens")
            return flat
        shape = self.placement.shape(self.layout)
        if values.shape[: len(shape)] != shape:
            raise ValueError(f"values have shape {tuple(values.shape)}, but the {self.layout} batch has {shape} cells")
        return values if self.layout == "flat" else values.flatten(0, 1)[self.cells]

    def convert(
        self, values: Tensor | PackedSequence, form: str, *, padding_value: float = 0
    ) -> Tensor | PackedSequence:
        """Bring per-token values - the data, or a model's output - into another form.

        Args:
            values: As for `flatten`.
            form: ``"time_major"``, ``"batch_first"``, ``"flat"``; or, of the pieces in order of lane and step,
                ``"packed"`` (``PackedSequence``) or ``"nested"`` (jagged nested tensor).
            padding_value: What cells without a token get.

        >>> batch = SequenceBatch.of_sequences([torch.tensor([1, 2, 3]), torch.tensor([4, 5])])
        >>> batch.convert(batch.data, "packed").batch_sizes.tolist()
        [2, 2, 1]
        >>> batch.convert(batch.convert(batch.data, "nested"), "batch_first").tolist()
        [[1, 2, 3], [4, 5, 0]]
        """
        check_choice("form", form, _FORMS)
        flat = self.flatten(values)
        if form == "flat":
            return flat
        if form == "packed":
            if not self.placement.length.all():
                raise ValueError(
                    "a PackedSequence cannot hold an empty sequence, and this batch has one: use nested or flat"
                )
            return pack_sequence(list(torch.split(flat, self.placement.length.tolist())), enforce_sorted=False)
        if form == "nested":
            offsets = self._tensor(self.placement.cu_seqlens)
            return torch.nested.nested_tensor_from_jagged(flat, offsets)
        shape = self.placement.shape(form)
        cells = self._tensor(self.placement.cells(form))
        out = flat.new_full((shape[0] * shape[1], *flat.shape[1:]), padding_value)
        return out.index_copy(0, cells, flat).view(*shape, *flat.shape[1:])

    def to_layout(self, layout: str) -> "SequenceBatch":
        """Return the same batch in another layout, padded as it was made."""
        check_choice("layout", layout, LAYOUTS)

        def move(values: Any, key: Any = None) -> Any:
            if isinstance(values, Mapping):
                return {name: move(value, name) for name, value in values.items()}
            if isinstance(values, tuple):
                return tuple(move(value, index) for index, value in enumerate(values))
            return self.convert(values, layout, padding_value=padding_of(self.padding_value, key))

        targets = self.targets
        if targets is not None:
            targets = self.convert(targets, layout, padding_value=ignored(targets))  # type: ignore[assignment]
        mask, reset, loss_mask = (flags.to(self.device) for flags in marks(self.placement, layout))
        return replace(
            self,
            data=move(self.data),
            targets=targets,
            loss_mask=loss_mask,
            mask=None if layout == "flat" else mask,
            reset=None if layout == "flat" else reset,
            layout=layout,
        )

    def unbatch(self, values: Any = None) -> list[Any]:
        """Return the pieces, in the order of `placement`: the exact inverse of batching.

        Args:
            values: Per-token values in any form that `flatten` takes, or a dict or tuple of them; the batch's
                data by default.

        Returns:
            One (length, ...) tensor for each piece, or one dict or tuple of tensors.
        """
        values = self.data if values is None else values
        if isinstance(values, Tensor | PackedSequence):
            return list(torch.split(self.flatten(values), self.placement.length.tolist()))
        if isinstance(values, Mapping):
            parts = {name: self.unbatch(value) for name, value in values.items()}
            return [{name: part[i] for name, part in parts.items()} for i in range(len(self.placement.length))]
        return list(zip(*(self.unbatch(value) for value in values), strict=True))

    # Carried state.

    def carry_in(self, state: Any) -> Any:
        """Return the state to start from: `state` without its graph, or None where the plan does not carry."""
        return detach_state(state) if self.placement.carry else None

    def to_segments(self, state: Any) -> Any:
        """Return the initial state of every piece, for a call with `cu_seqlens`: (..., B, H) becomes (..., P, H).

        A piece that continues gets its lane's state, every other one zeros.
        """
        lane, goes_on = self._tensor(self.placement.lane), self._tensor(self.placement.continues)[:, None]
        return map_tensors(
            lambda t: torch.where(goes_on, t.index_select(-2, lane), torch.zeros_like(t[..., :1, :])), state
        )

    def to_lanes(self, state: Any) -> Any:
        """Return the state in which every lane ends: (..., P, H) becomes (..., B, H), zeros in empty lanes."""
        some = np.flatnonzero(self.placement.length)  # an empty piece ends nothing
        lane = self.placement.lane[some]
        last = np.append(np.diff(lane) != 0, True)[: len(lane)]
        pieces, lanes = self._tensor(some[last]), self._tensor(lane[last])

        def gather(tensor: Tensor) -> Tensor:
            out = tensor.new_zeros(*tensor.shape[:-2], self.placement.lanes, tensor.shape[-1])
            return out.index_copy(-2, lanes, tensor.index_select(-2, pieces))

        return map_tensors(gather, state)

    # Attention that stays inside pieces.

    def attention_mask(self, *, causal: bool = False) -> Tensor:
        """Return (B, 1, T, T) bool for ``scaled_dot_product_attention``: true where a token may look.

        Tokens see their own piece - with `causal` no later token of it - and padding sees padding, so that
        no row is empty (a softmax over nothing is NaN). The flat layout is one row: (1, 1, S, S). A mask keeps
        numbers apart, not NaN and infinity: 0 times NaN is NaN, in every piece of that row.
        """
        ids = self._rows(self.segment_ids)
        allowed = ids[:, :, None] == ids[:, None, :]
        return (allowed.tril() if causal else allowed)[:, None]

    def mask_mod(self, *, causal: bool = False) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """Return the ``mask_mod`` for FlexAttention's ``create_block_mask``: `attention_mask` without its T by T.

        Make a block mask for each batch, of all its B lanes, T by T: compiled attention skips blocks by that table, so
        that one of the first lane alone (``B=None``) is an error here, unless ``create_block_mask`` itself is compiled.
        Steps need not be a multiple of the blocks. The flat layout is one lane, S by S; without any token it has
        no block mask. On CPU torch has no backward, and compiles no T that varies from call to call.

        >>> from torch.nn.attention.flex_attention import create_block_mask
        >>> batch = SequenceBatch.of_sequences([torch.arange(300), torch.arange(90)])  # 3 by 3 blocks of 128 steps
        >>> blocks = create_block_mask(batch.mask_mod(causal=True), 2, None, 300, 300, device="cpu")
        >>> blocks.to_dense()[1, 0].tolist()  # the second lane's padding sees itself
        [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
        """
        ids = self._rows(self.segment_ids)

        def within_piece(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            if not torch.compiler.is_compiling():
                # create_block_mask maps this function over b: one number as seen here, all of them underneath.
                every = torch.func.debug_unwrap(b)
                if every is not b and every.numel() == 1 < len(ids):
                    raise ValueError(
                        f"create_block_mask was given B=None or 1, and this batch has {len(ids)} lanes whose pieces "
                        f"differ: give it B={len(ids)}"
                    )
            same = ids[b, query] == ids[b, key]
            return same & (query >= key) if causal else same

        return within_piece

    def _rows(self, grid: Tensor) -> Tensor:
        if self.layout == "flat":
            return grid[None]
        return grid.t() if self.layout == "time_major" else grid


def marks(
    placement: Placement,
    layout: str,
    tokens: NDArray[Any] | None = None,
    source: NDArray[np.int64] | None = None,
    out: NDArray[Any] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return mask, reset and loss_mask, each (T, B) bool or of another layout's shape.

    With (S,) `tokens`, (P,) `source` and (cells,) `out` it also copies the rows of each piece from its source on to
    their cells of `out`, in the same pass.

    >>> mask, reset, loss_mask = marks(Placement.of_lengths([2, 1], next_token=True), "batch_first")
    >>> mask.tolist(), reset.tolist(), loss_mask.tolist()
    ([[True, True], [True, False]], [[True, False], [True, False]], [[True, False], [False, False]])
    """
    from seqbatch.fill_kernels import lay_pieces, mark_cells

    shape = placement.shape(layout)
    first, stride = placement.first(layout)
    mask, reset, loss_mask = flags = np.zeros((3, math.prod(shape)), np.bool_)
    if tokens is None or source is None or out is None:
        tokens, source, out = _NOTHING, _NOTHING, _NOTHING
    lay_pieces(tokens, source, first, stride, placement.length, placement.continues, out, mask, reset)
    if placement.loss_tokens == placement.tokens:
        loss_mask[:] = mask
    else:
        begin, count = placement.loss_spans()
        mark_cells(first + begin * stride, stride, count, loss_mask)
    mask, reset, loss_mask = flags.reshape(3, *shape)
    return torch.from_numpy(mask), torch.from_numpy(reset), torch.from_numpy(loss_mask)


_NOTHING = np.empty(0, np.int64)
