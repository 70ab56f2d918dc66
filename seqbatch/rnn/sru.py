"""SRU, the simple recurrent unit (Lei et al., arXiv 1709.02755): one matrix product for all steps, then a scan."""

import math
import warnings
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.utils.rnn import PackedSequence

from seqbatch.rnn.calls import Call
from seqbatch.rnn.ops import sru_scan
from seqbatch.rnn.reference import ACTIVATIONS, carry_dtype

__all__ = ["SRU", "SRULayer"]

Activation = Literal["identity", "tanh", "relu"]


class SRULayer(nn.Module):
    """One layer of :class:`SRU`, for those who place layers themselves (pipelines, residual stacks).

    Takes the arguments of :class:`SRU` for one layer, without ``batch_first``; ``dropout`` applies, which a
    stack sets to 0 in its last layer. ``weight`` is (k * H, input_size or projection_size) with the planes
    z, f, r and, where the highway needs a projection, x' one after the other; H = directions * hidden_size.

    >>> layer = SRULayer(3, 4)
    >>> output, state = layer(torch.zeros(5, 2, 3))
    >>> output.shape, state.shape
    (torch.Size([5, 2, 4]), torch.Size([1, 2, 4]))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        version: Literal["v1", "v2"] = "v2",
        activation: Activation | None = None,
        highway: bool = True,
        highway_bias: float = 0.0,
        rescale: bool | float | None = None,
        variational_dropout: float = 0.0,
        layer_norm: bool = False,
        normalize_after: bool = False,
        projection_size: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_sizes(input_size=input_size, hidden_size=hidden_size)
        if version not in ("v1", "v2"):
            raise ValueError(f"version must be 'v1' or 'v2', got {version!r}")
        if activation is None:
            activation = "tanh" if version == "v1" else "identity"
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        _check_probability("dropout", dropout)
        _check_probability("variational_dropout", variational_dropout)
        if highway_bias and not bias:
            raise ValueError(f"highway_bias needs a bias, got highway_bias={highway_bias} with bias=False")
        if normalize_after and not layer_norm:
            raise ValueError("normalize_after says where layer_norm stands: set layer_norm=True too")
        if isinstance(projection_size, bool) or not isinstance(projection_size, int):
            raise TypeError(f"projection_size must be an int, got {type(projection_size).__name__}")
        if projection_size and not 0 < projection_size < min(input_size, hidden_size * (1 + bidirectional)):
            raise ValueError(
                f"projection_size must be smaller than the input and the output, got {projection_size} for "
                f"{input_size} and {hidden_size * (1 + bidirectional)}; 0 means none"
            )
        self.input_size, self.hidden_size, self.bidirectional = input_size, hidden_size, bidirectional
        self.version, self.activation, self.highway, self.highway_bias = version, activation, highway, highway_bias
        self.dropout, self.variational_dropout = float(dropout), float(variational_dropout)
        self.normalize_after, self.projection_size = normalize_after, projection_size
        if rescale is None:
            rescale = version == "v2"
        # True and False are 1.0 and 0.0 as numbers, so they come first.
        alpha = math.sqrt(1 + 2 * math.exp(highway_bias)) if rescale is True else 1.0 if rescale is False else rescale
        self.scale = float(alpha)
        columns = self.output_size = hidden_size * (1 + bidirectional)
        self.planes = 4 if highway and input_size != columns else 3
        factory = {"device": device, "dtype": dtype}
        self.weight_proj = (
            nn.Parameter(torch.empty(projection_size, input_size, **factory)) if projection_size else None  # type: ignore[arg-type]
        )
        self.weight = nn.Parameter(torch.empty(self.planes * columns, projection_size or input_size, **factory))  # type: ignore[arg-type]
        self.weight_c = nn.Parameter(torch.empty(2, columns, **factory)) if version == "v2" else None  # type: ignore[arg-type]
        self.bias = nn.Parameter(torch.empty(2, columns, **factory)) if bias else None  # type: ignore[arg-type]
        self.layer_norm = nn.LayerNorm(columns if normalize_after else input_size, **factory) if layer_norm else None  # type: ignore[arg-type]
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw new parameters, as the authors' library does since 2.0.

        W has variance 1 / fan-in, times alpha where the highway is projected, times 1 - dropout for z, times
        1 - variational_dropout and, with layer_norm, times 0.01. Version v2 also keeps the variance through the
        gates: gate planes and v times 1/2.
        """
        for weight in (self.weight, self.weight_proj):
            if weight is not None:
                bound = math.sqrt(3 / weight.shape[1])
                nn.init.uniform_(weight, -bound, bound)
        if self.bias is not None:
            self.bias[0] = 0
            self.bias[1] = self.highway_bias
        planes = self.weight.view(self.planes, self.output_size, -1)
        if self.weight_c is not None:
            nn.init.uniform_(self.weight_c, -math.sqrt(1.5), math.sqrt(1.5))
            planes[1:3] *= math.sqrt(0.5)
        planes[0] *= math.sqrt(1 - self.dropout)
        if self.planes == 4:
            planes[3] *= self.scale
        planes *= math.sqrt(1 - self.variational_dropout) * (0.1 if self.layer_norm is not None else 1.0)

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        *,
        reset: Tensor | None = None,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """Run the layer.

        Args:
            input: (T, B, input_size), (T, input_size), (S, input_size) with ``cu_seqlens``, or a PackedSequence.
            hx: (directions, B or N, hidden_size), the state before the first step; None: 0.
            reset: (T, B) bool, true where a new piece starts.
            mask: (T, B) bool, true on real tokens.
            cu_seqlens: (N + 1,) offsets of the sequences of a flat input.

        Returns:
            The output, (T, B, H) or (S, H), and the state after the last step, like ``hx``.
        """
        call = Call.of(
            "SRULayer",
            input,
            reset,
            mask,
            cu_seqlens,
            weight=self.weight,
            input_size=self.input_size,
            batch_first=False,
        )
        carry, shape = carry_dtype(call.rows.dtype), (1 + self.bidirectional, call.lanes, self.hidden_size)
        state = call.rows.new_zeros(shape, dtype=carry) if hx is None else call.state("hx", hx, shape, carry)
        output, last = self._run(call, state)
        return call.close(output), call.close_state(last)

    def _run(self, call: Call, state: Tensor) -> tuple[Tensor, Tensor]:
        """The layer on a call that was checked; state in and out are (directions, lanes, hidden_size)."""
        x, mask = call.rows, call.mask
        if mask is not None:  # a NaN in padding would spoil the weights' gradient
            x = torch.where(mask[..., None], x, 0.0)
        initial = state.transpose(0, 1).flatten(1)
        source = x if self.layer_norm is None or self.normalize_after else self.layer_norm(x)
        source = self._drop_input(source, call)
        if self.weight_proj is not None:
            source = linear(source, self.weight_proj)
        u = linear(source, self.weight)
        u = u.view(*u.shape[:-1], self.planes, self.output_size)
        skip = x.to(u.dtype) if self.highway and self.planes == 3 else None
        output, last = sru_scan(
            u,
            skip,
            self.weight_c,
            self.bias,
            initial,
            dropout=self._draw(self.dropout, initial),
            reset=call.reset,
            mask=mask,
            cu_seqlens=call.cu_seqlens,
            activation=self.activation,
            bidirectional=self.bidirectional,
            scale=self.scale,
            dropout_inside=self.version == "v1",
        )
        if self.layer_norm is not None and self.normalize_after:
            output = self.layer_norm(output)
            output = output if mask is None else torch.where(mask[..., None], output, 0.0)
        return output, last.view(call.lanes, 1 + self.bidirectional, self.hidden_size).transpose(0, 1)

    def _draw(self, p: float, like: Tensor) -> Tensor | None:
        """A dropout mask of like's shape that is constant over time."""
        if not self.training or p == 0:
            return None
        return torch.empty_like(like).bernoulli_(1 - p).div_(1 - p)

    def _drop_input(self, x: Tensor, call: Call) -> Tensor:
        kept = self._draw(self.variational_dropout, x.new_empty(call.lanes, x.shape[-1]))
        if kept is None:
            return x
        if call.cu_seqlens is None:
            return x * kept
        rows = torch.arange(len(x), device=x.device, dtype=call.cu_seqlens.dtype)
        owner = torch.searchsorted(call.cu_seqlens, rows, right=True) - 1
        return x * kept[owner.clamp(0, call.lanes - 1)]  # bad offsets are named by the scan

    def extra_repr(self) -> str:
        """The sizes and what differs from the defaults, as ``torch.nn`` modules show them."""
        shown = [f"{self.input_size}, {self.hidden_size}", f"version={self.version!r}"]
        shown += [f"activation={self.activation!r}"] + (["bidirectional=True"] if self.bidirectional else [])
        return ", ".join(shown)


class SRU(nn.Module):
    """Stacked SRU with ``torch.nn.LSTM``'s arguments and shapes, and resets, padding and flat input.

    Per layer, with x the layer's input and c* the state before the step::

        z, u_f, u_r = W x                          (and x' = W_x x where input and output differ in size)
        f = sigmoid(u_f + v_f c* + b_f)            r = sigmoid(u_r + v_r c* + b_r)
        c = f c* + (1 - f) z                       h = r g(c) + (1 - r) alpha x      (or x', without alpha)

    Source: Lei et al. 2017 (arXiv 1709.02755 v2) for ``version="v1"``, where v = 0; the EMNLP 2018 version for
    ``"v2"``. Only c is carried: the state is one tensor (num_layers * directions, B, hidden_size), float32
    even where the layer computes in half precision.

    Args:
        input_size: Features of the input.
        hidden_size: Features of a direction.
        num_layers: Number of layers; ``layers[i]`` can be called by itself, with the same result.
        bias: Whether the gates have a bias.
        batch_first: Whether input, output, reset and mask are (B, T, ...).
        dropout: Probability of dropping an output of every layer but the last, with one mask for all steps.
            In v1 a dropped unit gives (1 - r) x, in v2 it gives x (the library's placement since 2.3.3).
        bidirectional: Adds a reverse direction, which starts at each sequence's true end.
        version: "v2" lets the gates see c*; "v1" does not.
        activation: g: "identity" (v2's default), "tanh" (v1's default) or "relu".
        highway: Whether the input is added at all.
        highway_bias: Initial b_r; 0 to -3 are usual, more negative for deeper stacks.
        rescale: True: alpha = sqrt(1 + 2 exp(highway_bias)), which keeps the variance (v2's default); False: 1
            (v1's default); or a number.
        variational_dropout: Probability of dropping an input of the matrix product, one mask for all steps;
            the highway sees the input undropped.
        layer_norm: Normalize the input of the matrix product; with normalize_after the output instead.
        normalize_after: See layer_norm.
        projection_size: Rank of W, if positive: W = W_2 W_1.
        device: Where the parameters are made.
        dtype: Of the parameters.

    Raises:
        ValueError: A setting is out of its range.
        TypeError: A size is no integer.

    >>> rnn = SRU(3, 4, num_layers=2, bidirectional=True)
    >>> output, state = rnn(torch.zeros(5, 2, 3))
    >>> output.shape, state.shape
    (torch.Size([5, 2, 8]), torch.Size([4, 2, 4]))
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
        version: Literal["v1", "v2"] = "v2",
        activation: Activation | None = None,
        highway: bool = True,
        highway_bias: float = 0.0,
        rescale: bool | float | None = None,
        variational_dropout: float = 0.0,
        layer_norm: bool = False,
        normalize_after: bool = False,
        projection_size: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_sizes(input_size=input_size, hidden_size=hidden_size, num_layers=num_layers)
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.bias, self.batch_first, self.bidirectional = bias, batch_first, bidirectional
        _check_probability("dropout", dropout)
        if dropout and num_layers == 1:
            warnings.warn(f"dropout={dropout} acts between layers, and there is one: it has no effect", stacklevel=2)
        self.layers = nn.ModuleList(
            SRULayer(
                hidden_size * (1 + bidirectional) if i else input_size,
                hidden_size,
                bias,
                dropout if i + 1 < num_layers else 0.0,
                bidirectional,
                version=version,
                activation=activation,
                highway=highway,
                highway_bias=highway_bias,
                rescale=rescale,
                variational_dropout=variational_dropout,
                layer_norm=layer_norm,
                normalize_after=normalize_after,
                projection_size=projection_size,
                device=device,
                dtype=dtype,
            )
            for i in range(num_layers)
        )
        self._dropout = float(dropout)

    @property
    def dropout(self) -> float:
        """The probability with which every layer but the last drops outputs; may be changed."""
        return self._dropout

    @dropout.setter
    def dropout(self, p: float) -> None:
        self._dropout = _check_probability("dropout", p)
        for layer in list(self.layers)[:-1]:
            layer.dropout = self._dropout  # type: ignore[assignment]

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        *,
        reset: Tensor | None = None,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """Run the stack.

        Args:
            input: (T, B, input_size); (B, T, input_size) with batch_first; (T, input_size) unbatched;
                (S, input_size) with cu_seqlens; or a PackedSequence.
            hx: (num_layers * directions, B, hidden_size), the state before the first step; None: 0. N in
                place of B with cu_seqlens; (num_layers * directions, hidden_size) for unbatched input.
            reset: (T, B) bool, true at the first step of every piece: the state is cleared before it, in
                the reverse direction after it.
            mask: (T, B) bool, true on real tokens: elsewhere the state is held and the output is 0.
            cu_seqlens: (N + 1,) int32, from 0 to S: the sequences of a flat input. An empty one returns its
                initial state.

        Returns:
            The output, like the input with directions * hidden_size features, and the state after the last
            step, like ``hx``, in float32 (float64 for float64).

        Raises:
            RuntimeError: Sizes or devices do not fit.
            ValueError: Dtypes, dimensions or flags do not fit.
        """
        call = Call.of(
            "SRU",
            input,
            reset,
            mask,
            cu_seqlens,
            weight=self.layers[0].weight,  # type: ignore[arg-type]
            input_size=self.input_size,
            batch_first=self.batch_first,
        )
        directions, carry = 1 + self.bidirectional, carry_dtype(call.rows.dtype)
        shape = (self.num_layers * directions, call.lanes, self.hidden_size)
        states = call.rows.new_zeros(shape, dtype=carry) if hx is None else call.state("hx", hx, shape, carry)
        last = []
        flags = {"reset": call.reset, "mask": call.mask, "cu_seqlens": call.cu_seqlens}
        for layer, state in zip(self.layers, torch.split(states, directions), strict=True):
            # A call, not a method: hooks, checkpointing and sharding wrap the modules' calls.
            output, after = layer(call.rows, state, **flags)
            call = call.onward(output)
            last.append(after)
        return call.close(call.rows), call.close_state(torch.cat(last))


def _check_probability(name: str, p: float) -> float:
    if isinstance(p, bool) or not isinstance(p, int | float) or not 0 <= p < 1:
        raise ValueError(f"{name} must be a probability in [0, 1), got {p!r}")
    return float(p)


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"{name} must be an int, got {type(size).__name__}")
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
