"""BN-LSTM: an LSTM with batch-normalized hidden-to-hidden, input-to-hidden and cell-to-output transitions."""

import warnings
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout
from torch.nn.utils.rnn import PackedSequence

from seqbatch.rnn.bnlstm_direction import TERMS, Direction, Options, Variant
from seqbatch.rnn.calls import Call
from seqbatch.rnn.norm import check_age
from seqbatch.rnn.reference import carry_dtype
from seqbatch.rnn.walks import Rows, Statistics

__all__ = ["BNLSTM"]

State = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]


class BNLSTM(nn.Module):
    """LSTM with recurrent batch normalization whose statistics see real steps only.

    Per step, with h and c those before it and BN normalizing over the rows of a group (``statistics``)::

        i, f, g, o = BN(W_h h; gamma_h) + BN(W_x x; gamma_x) + b
        c' = sigmoid(f) c + sigmoid(i) tanh(g)         h' = sigmoid(o) tanh(BN(c'; gamma_c, beta_c))

    Source: Cooijmans et al. (arXiv 1603.09025), equations 6 to 8; ``"bn1"`` and ``"bn2"`` are Laurent et al.'s (arXiv
    1510.01378) BN(W_h h + W_x x) and W_h h + BN(W_x x), neither of which normalizes c; ``"none"`` is LSTM. Arguments,
    shapes and returns are those of ``torch.nn.LSTM``. Padding is in no group and costs no computation: adding padded
    steps or lanes changes no output, gradient or statistic. A training batch's rows depend on each other, as always
    with batch statistics, spliced pieces included; in evaluation they do not. Statistics are each process's own.
    Differentiable once.

    Args:
        input_size: Features of the input.
        hidden_size: Features of a direction.
        num_layers: Number of layers.
        bias: Whether the gates have a bias (one, not two).
        batch_first: Whether input, output, reset and mask are (B, T, ...).
        dropout: Probability of dropping an output of every layer but the last.
        bidirectional: Adds a reverse direction, which starts at each lane's last real step: only the valid part is
            reversed (BN-e**).
        variant: ``"bn"``, ``"bn1"``, ``"bn2"`` or ``"none"``.
        statistics: Of W_h h and c: ``"frame"``, rows with as many real steps of their lane before them, or ``"age"``,
            rows that are equally far into their piece, for spliced lanes: pieces are walked side by side from their
            starts, in as many steps as there are ages, and rows of age ``max_steps - 1`` and more step by step after
            them. ``"sequence"`` cannot be: it would need the future.
        input_statistics: Of W_x x, also ``"sequence"``, over all real steps (BN-e*); None: as `statistics`.
        max_steps: Number of running statistics of a term, the longest sequence in training; beyond, the last is used.
        gamma: Initial gamma; 1 saturates tanh, and gradients vanish.
        eps: Added to variances.
        momentum: Weight of a batch in the running statistics; None: their mean over all batches.
        min_rows: Rows that a group needs; see :class:`~seqbatch.rnn.SequenceBatchNorm` for what happens below.
        fill: ``"wrap"`` lets shorter lanes count in the statistics of later steps with their own data from the start,
            as the code of BN-e** does; needs ``"frame"``.
        learn_state: Whether the state before a piece is learned, from 0.
        noise: Standard deviation of noise on that h in training: where a step is equal in all rows, as the first black
            pixels of images are, it keeps the variance of W_h h above 0.
        weight_noise: Standard deviation of noise on the matrices in training.
        init: ``"orthogonal"`` for both matrices, or ``"identity"``: the candidate's recurrent block is the identity.
        forget_bias: Initial bias of the forget gate.
        device: Where parameters are made.
        dtype: Of the parameters.

    Raises:
        ValueError: A setting is out of its range.

    >>> rnn = BNLSTM(3, 4, max_steps=5)
    >>> mask = torch.arange(5)[:, None] < torch.tensor([5, 5, 5, 5, 4, 4, 2, 1])
    >>> output, (h, c) = rnn(torch.randn(5, 8, 3), mask=mask)
    >>> output.shape, h.shape
    (torch.Size([5, 8, 4]), torch.Size([1, 8, 4]))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        variant: Variant = "bn",
        statistics: Literal["frame", "age"] = "frame",
        input_statistics: Statistics | None = None,
        max_steps: int | None = None,
        gamma: float = 0.1,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        min_rows: int = 4,
        fill: Literal["wrap"] | None = None,
        learn_state: bool = True,
        noise: float = 0.0,
        weight_noise: float = 0.0,
        init: Literal["orthogonal", "identity"] = "orthogonal",
        forget_bias: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("input_size", input_size), ("hidden_size", hidden_size), ("num_layers", num_layers)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        inputs: Statistics = statistics if input_statistics is None else input_statistics
        _check_settings(variant, statistics, inputs, max_steps, fill, init)
        _check_numbers(dropout, noise, weight_noise)
        if dropout and num_layers == 1:
            warnings.warn(f"dropout={dropout} acts between layers, and there is one: it has no effect", stacklevel=2)
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.batch_first, self.dropout, self.bidirectional = batch_first, float(dropout), bool(bidirectional)
        self.variant, self.statistics, self.input_statistics = variant, statistics, inputs
        options = Options(fill, learn_state, noise, weight_noise, init, forget_bias)
        norms = {"gamma": gamma, "eps": eps, "momentum": momentum, "min_rows": min_rows}
        self.layers = nn.ModuleList(
            nn.ModuleList(
                Direction(
                    hidden_size * (1 + self.bidirectional) if layer else input_size,
                    hidden_size,
                    bias,
                    variant,
                    (statistics, inputs),
                    1 if max_steps is None else max_steps,
                    norms,
                    options,
                    device,
                    dtype,
                )
                for _ in range(1 + self.bidirectional)
            )
            for layer in range(num_layers)
        )

    def reset_parameters(self) -> None:
        """Draw new parameters and forget all running statistics."""
        for layer in self._layers():
            for direction in layer:
                direction.reset_parameters()

    def _layers(self) -> list[list[Direction]]:
        return [list(layer) for layer in self.layers]  # type: ignore[call-overload]

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: State | None = None,
        *,
        reset: Tensor | None = None,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor | PackedSequence, State]:
        """Run the layers.

        Args:
            input: (T, B, input_size), (B, T, input_size) with batch_first, (T, input_size), flat (S, input_size) with
                cu_seqlens, or a PackedSequence.
            hx: (h, c), each (num_layers * directions, B or N, hidden_size), float32; with ``"age"`` statistics (h, c,
                age), age (B,) int64 the steps that each lane's piece has had. None: the learned state. ``"frame"``
                counts from 0 in every call: a sequence that is cut over several needs ``"age"``.
            reset: (T, B) bool, true at the first step of every piece.
            mask: (T, B) bool, true on real steps.
            cu_seqlens: (N + 1,) offsets of a flat input's sequences.

        Returns:
            The output, (T, B, directions * hidden_size) or as the input's form asks, 0 on padding; and the state after
            the last step, like `hx`.

        Raises:
            RuntimeError: Sizes or devices do not fit; or there are too few rows, or no statistics to evaluate with.
            ValueError: Dtypes, dimensions or flags do not fit.
        """
        call = Call.of(
            "BNLSTM",
            input,
            reset,
            mask,
            cu_seqlens,
            weight=self._layers()[0][0].weight_ih,
            input_size=self.input_size,
            batch_first=self.batch_first,
        )
        state, age = self._state(call, hx)
        rows = [Rows.of(call, None if reverse else age, bool(reverse)) for reverse in range(1 + self.bidirectional)]
        x = call.rows.reshape(rows[0].total, self.input_size)
        after: list[tuple[Tensor, Tensor]] = []
        for i, layer in enumerate(self._layers()):
            x = dropout(x, self.dropout, self.training) if i else x
            outputs = []
            for d, direction in enumerate(layer):
                entering = None if state is None else (state[0][len(after)], state[1][len(after)])
                output, last = direction(x, rows[d], entering)
                outputs.append(output.to(call.result_dtype))
                after.append(last)
            x = torch.cat(outputs, -1)
        h, c = (call.close_state(torch.stack(part)) for part in zip(*after, strict=True))
        output = call.close(x.view(*call.rows.shape[:-1], x.shape[-1]))
        if not self._ages:
            return output, (h, c)
        return output, (h, c, _ages_after(rows[0], age))

    @property
    def _ages(self) -> bool:
        return "age" in (self.statistics, self.input_statistics)

    def _state(self, call: Call, hx: State | None) -> tuple[tuple[Tensor, Tensor] | None, Tensor | None]:
        if hx is None:
            return None, None
        wanted = "(h, c, age)" if self._ages else "(h, c)"
        if not isinstance(hx, tuple | list) or len(hx) not in ((2, 3) if self._ages else (2,)):
            given = f"{len(hx)} parts" if isinstance(hx, tuple | list) else type(hx).__name__
            raise TypeError(f"hx must be {wanted}, got {given}")
        shape = (self.num_layers * (1 + self.bidirectional), call.lanes, self.hidden_size)
        carry = carry_dtype(call.rows.dtype)
        h, c = (call.state(f"hx[{i}]", x, shape, carry) for i, x in enumerate(hx[:2]))
        return (h, c), check_age(hx[2], call) if len(hx) == 3 else None

    def extra_repr(self) -> str:
        """The sizes, and what is normalized how."""
        kinds = f"statistics={self.statistics!r}, input_statistics={self.input_statistics!r}"
        return f"{self.input_size}, {self.hidden_size}, num_layers={self.num_layers}, variant={self.variant!r}, {kinds}"


def _ages_after(rows: Rows, age: Tensor | None) -> Tensor:
    """(B,) int64: how many steps each lane's piece has had after the batch."""
    before = torch.zeros_like(rows.lengths) if age is None else age
    ends = (rows.lengths.cumsum(0) - 1).clamp(min=0)
    grown = torch.where(rows.lengths > 0, rows.age[ends] + 1, before) if len(rows.age) else before
    return torch.where(rows.cleared, 0, grown)


def _check_settings(
    variant: str, statistics: str, inputs: str, max_steps: int | None, fill: str | None, init: str
) -> None:
    choices = {
        "variant": (variant, tuple(TERMS)),
        "statistics": (statistics, ("frame", "age")),
        "input_statistics": (inputs, ("frame", "sequence", "age")),
        "fill": (fill, (None, "wrap")),
        "init": (init, ("orthogonal", "identity")),
    }
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            why = "; statistics of a recurrent term over all steps would need the future" if value == "sequence" else ""
            raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}{why}")
    terms = TERMS[variant]
    if max_steps is None and ("h" in terms or ("x" in terms and inputs != "sequence")):
        raise ValueError("max_steps must be given: the number of running statistics, the longest sequence in training")
    if fill and (statistics != "frame" or inputs == "age"):
        raise ValueError(
            "fill='wrap' continues lanes step by step: it needs 'frame' statistics, and no 'age' for inputs"
        )


def _check_numbers(dropout: float, noise: float, weight_noise: float) -> None:
    if not 0 <= dropout <= 1:
        raise ValueError(f"dropout must lie in 0..1, got {dropout!r}")
    for name, value in (("noise", noise), ("weight_noise", weight_noise)):
        if not value >= 0:
            raise ValueError(f"{name} must not be negative, got {value!r}")
