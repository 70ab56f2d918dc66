"""One call of a layer, whatever the form of its input: brought to time-major rows, and its output back.

The layers take what ``torch.nn.LSTM`` takes - (T, B, D), (B, T, D) with ``batch_first``, (T, D) unbatched,
``PackedSequence`` - and the flat (S, D) with ``cu_seqlens``. Inside they see (T, B, D), or (S, D) with
offsets; errors have the classes of ``torch.nn.LSTM``.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from seqbatch.rnn.checks import check_flags

__all__ = ["Call"]


@dataclass(frozen=True)
class Call:
    """The input of a layer as time-major rows, with its flags.

    Attributes:
        rows: (T, B, D), or (S, D) with ``cu_seqlens``.
        reset: (T, B) bool or None.
        mask: (T, B) bool or None; a ``PackedSequence`` becomes rows with a mask.
        cu_seqlens: (N + 1,) or None.
        lanes: B or N.
    """

    rows: Tensor
    reset: Tensor | None
    mask: Tensor | None
    cu_seqlens: Tensor | None
    batched: bool
    batch_first: bool
    packed: PackedSequence | None
    lengths: Tensor | None

    @classmethod
    def of(
        cls,
        name: str,
        given: Tensor | PackedSequence,
        reset: Tensor | None,
        mask: Tensor | None,
        cu_seqlens: Tensor | None,
        *,
        weight: Tensor,
        input_size: int,
        batch_first: bool,
    ) -> "Call":
        """Check and bring into order what a layer of that name was given.

        >>> x = torch.zeros(2, 5, 3)
        >>> Call.of("SRU", x, None, None, None, weight=x, input_size=3, batch_first=True).rows.shape
        torch.Size([5, 2, 3])
        """
        packed, lengths = None, None
        if isinstance(given, PackedSequence):
            if reset is not None or mask is not None or cu_seqlens is not None:
                raise ValueError(f"{name}: a PackedSequence has its own lengths: leave reset, mask and cu_seqlens out")
            packed, (given, lengths) = given, pad_packed_sequence(given)
            mask = torch.arange(len(given), device=given.device)[:, None] < lengths.to(given.device)
            batch_first = False
        _check_rows(name, given, weight, input_size, cu_seqlens)
        batched = given.dim() == 3
        if cu_seqlens is None:
            lane = 0 if batch_first else 1
            check_flags(given, reset, mask, None)
            if not batched:
                given = given.unsqueeze(lane)
                reset = None if reset is None else reset.unsqueeze(lane)
                mask = None if mask is None else mask.unsqueeze(lane)
            if batch_first:
                given = given.transpose(0, 1)
                reset = None if reset is None else reset.transpose(0, 1)
                mask = None if mask is None else mask.transpose(0, 1)
            if not len(given):
                raise RuntimeError(f"{name}: expected at least one time step, got an input of 0 steps")
        else:
            check_flags(given, reset, mask, cu_seqlens)
        return cls(given, reset, mask, cu_seqlens, batched, batch_first, packed, lengths)

    @property
    def lanes(self) -> int:
        """Number of states: lanes, or sequences of the flat form."""
        return self.rows.shape[1] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    @property
    def result_dtype(self) -> torch.dtype:
        """The dtype of stock kernels' results: the rows', or autocast's."""
        kind, dtype = self.rows.device.type, self.rows.dtype
        enabled = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        return torch.get_autocast_dtype(kind) if enabled and dtype != torch.float64 else dtype

    def state(self, name: str, given: Tensor, shape: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
        """A state that the caller gave, as (layers * directions, lanes, width), checked.

        >>> x = torch.zeros(5, 3)
        >>> call = Call.of("SRU", x, None, None, None, weight=x, input_size=3, batch_first=False)
        >>> call.state("hx", torch.zeros(2, 4), (2, 1, 4), x.dtype).shape
        torch.Size([2, 1, 4])
        """
        expected = shape if self.batched or self.cu_seqlens is not None else (shape[0], shape[2])
        if not isinstance(given, Tensor):
            raise TypeError(f"{name} must be a tensor of shape {expected}, got {type(given).__name__}")
        if given.shape != expected:
            raise RuntimeError(f"{name} must have shape {expected}, got {tuple(given.shape)}")
        if given.dtype not in (dtype, self.rows.dtype, self.result_dtype):
            raise ValueError(f"{name} must have dtype {dtype}, got {given.dtype}; convert it: {name}.to({dtype})")
        if given.device != self.rows.device:
            raise RuntimeError(f"{name} must be on the input's device, {self.rows.device}, got {given.device}")
        return given.reshape(shape)

    def onward(self, rows: Tensor) -> "Call":
        """The same call of the next layer."""
        return replace(self, rows=rows)

    def close(self, output: Tensor) -> Tensor | PackedSequence:
        """Bring the layer's output into the form of its input."""
        if self.packed is not None and self.lengths is not None:
            order, lengths = self.packed.sorted_indices, self.lengths
            if order is not None:  # the caller's own order: lanes of equal length may be sorted in several ways
                output, lengths = output.index_select(1, order), lengths[order.cpu()]
            again = pack_padded_sequence(output, lengths)
            return PackedSequence(again.data, self.packed.batch_sizes, order, self.packed.unsorted_indices)
        if self.cu_seqlens is not None:
            return output
        if self.batch_first:
            output = output.transpose(0, 1)
        return output if self.batched else output.squeeze(0 if self.batch_first else 1)

    def close_state(self, state: Tensor) -> Tensor:
        """Bring a state into the form of the input: without lanes where the input has none."""
        return state if self.batched or self.cu_seqlens is not None else state.squeeze(1)


def _check_rows(name: str, given: Tensor, weight: Tensor, input_size: int, cu_seqlens: Tensor | None) -> None:
    if not isinstance(given, Tensor):
        raise TypeError(f"{name}: input must be a tensor or a PackedSequence, got {type(given).__name__}")
    if cu_seqlens is not None and given.dim() != 2:
        raise ValueError(f"{name}: with cu_seqlens the input must be flat, (S, {input_size}), got {given.dim()}-D")
    if given.dim() not in (2, 3):
        raise ValueError(f"{name}: expected input to be 2-D or 3-D, got {given.dim()}-D")
    if given.shape[-1] != input_size:
        raise RuntimeError(f"{name}: input.size(-1) must be input_size, {input_size}, got {given.shape[-1]}")
    if given.device != weight.device:
        raise RuntimeError(
            f"{name}: input and parameters must be on one device, got input on {given.device} and parameters on "
            f"{weight.device}; move one: module.to({str(given.device)!r})"
        )
    kind = given.device.type
    autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind) and given.is_floating_point()
    if given.dtype != weight.dtype and not (autocast and torch.float64 not in (given.dtype, weight.dtype)):
        raise ValueError(
            f"{name}: input must have the parameters' dtype, {weight.dtype}, got {given.dtype}; "
            f"convert it: input.to({weight.dtype})"
        )
