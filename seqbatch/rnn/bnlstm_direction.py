"""One direction of a BN-LSTM layer: its parameters and statistics, and its walk over the rows of a batch."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from seqbatch.rnn.flush import move
from seqbatch.rnn.norm import SequenceBatchNorm
from seqbatch.rnn.norm_ops import bn_lstm
from seqbatch.rnn.reference import carry_dtype
from seqbatch.rnn.walks import Rows, Statistics, Walk, group_of

__all__ = ["TERMS", "Direction", "Options", "Variant"]

Variant = Literal["bn", "bn1", "bn2", "none"]


@dataclass(frozen=True)
class Options:
    """Settings of ``BNLSTM`` that its directions read, under their names there."""

    fill: Literal["wrap"] | None
    learn_state: bool
    noise: float
    weight_noise: float
    init: Literal["orthogonal", "identity"]
    forget_bias: float


TERMS = {"bn": "xhc", "bn1": "h", "bn2": "x", "none": ""}  # what is normalized


class Direction(nn.Module):
    """One direction of one layer: parameters, statistics, and a walk over rows."""

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool,
        variant: Variant,
        statistics: tuple[Statistics, Statistics],
        max_steps: int,
        norms: dict[str, Any],
        options: Options,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.variant, self.max_steps, self.options = variant, max_steps, options
        self.statistics, self.input_statistics = statistics

        def new(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))

        self.weight_ih, self.weight_hh = new(4 * hidden_size, input_size), new(4 * hidden_size, hidden_size)
        self.bias = new(4 * hidden_size) if bias else None
        self.h0 = new(hidden_size) if options.learn_state else None
        self.c0 = new(hidden_size) if options.learn_state else None

        def norm(term: str, width: int, kind: Statistics) -> SequenceBatchNorm | None:
            if term not in TERMS[variant]:
                return None
            return SequenceBatchNorm(width, max_steps, kind, bias=term == "c", device=device, dtype=dtype, **norms)

        self.norm_x = norm("x", 4 * hidden_size, self.input_statistics)
        self.norm_h = norm("h", 4 * hidden_size, self.statistics)
        self.norm_c = norm("c", hidden_size, self.statistics)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Orthogonal matrices, or with "identity" the candidate's recurrent block the identity; forget bias."""
        width = self.weight_hh.shape[1]

        def orthogonal(like: Tensor) -> Tensor:
            return nn.init.orthogonal_(torch.empty_like(like, dtype=carry_dtype(like.dtype)))

        self.weight_ih.copy_(orthogonal(self.weight_ih))
        if self.options.init == "identity":
            three, candidate = orthogonal(self.weight_hh[width:]), torch.eye(width, device=self.weight_hh.device)
            self.weight_hh.copy_(torch.cat([three[: 2 * width], candidate.to(three.dtype), three[2 * width :]]))
        else:
            self.weight_hh.copy_(orthogonal(self.weight_hh))
        for parameter in (self.bias, self.h0, self.c0):
            if parameter is not None:
                nn.init.zeros_(parameter)
        if self.bias is not None:
            self.bias[width : 2 * width] = self.options.forget_bias
        for norm in (self.norm_x, self.norm_h, self.norm_c):
            if norm is not None:
                norm.reset_parameters()

    def forward(
        self, x: Tensor, rows: Rows, entering: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Walk rows of the flattened batch x: the output, of as many rows as x, and the last h and c (B, H)."""
        if not len(rows.at):
            return self._nothing(x, rows, entering)
        walk = Walk.of(rows, self.statistics, self.max_steps, self.options.fill == "wrap" and self._uses_batch)
        counts, source, moments = walk.offsets.diff(), torch.arange(len(walk.runs)), []
        for norm in (self.norm_h, self.norm_c):
            if norm is None:
                moments += [self.weight_hh.new_empty(len(source), 0)] * 2
            else:
                found, *given = norm.sources(counts, walk.slots)
                if norm is self.norm_c and not torch.equal(found, source):
                    raise RuntimeError("norm_h and norm_c of a direction need the same mode and the same min_rows")
                source = found
                moments += given
        inside, outside = self._inputs(x, rows, walk)
        states = self._entering(walk, entering, outside)
        gammas = (
            None if self.norm_h is None else self.norm_h.weight,
            None if self.norm_c is None else self.norm_c.weight,
            None if self.norm_c is None else self.norm_c.bias,
        )
        h, c, used = bn_lstm(
            outside,
            inside,
            self._noisy(self.weight_hh),
            gammas,
            states,
            (walk.previous, walk.offsets, walk.runs, source),
            tuple(moments),  # type: ignore[arg-type]
            1e-5 if self.norm_h is None else self.norm_h.eps,
        )
        for norm, mean, var in ((self.norm_h, *used[:2]), (self.norm_c, *used[2:])):
            if norm is not None:
                norm.update(source, counts, walk.slots, mean, var)
        take, back = rows.at.new_zeros(rows.total), rows.at.new_zeros(len(h))
        at, stay = walk.entering + walk.place, rows.at.new_zeros(len(h), dtype=torch.bool)
        take[rows.at], back[at], stay[at] = at, rows.at, True
        last = [
            self._last(table, rows, walk, None if entering is None else entering[k], learned)
            for k, (table, learned) in enumerate(((h, self.h0), (c, self.c0)))
        ]
        return move(h, take, rows.real, back, stay), (last[0], last[1])

    def _nothing(
        self, x: Tensor, rows: Rows, entering: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """A batch of padding: zeros, with a gradient of 0, and the states as they came."""
        width, carry = self.weight_hh.shape[1], carry_dtype(x.dtype)
        last = []
        for k, learned in enumerate((self.h0, self.c0)):
            start = x.new_zeros(width, dtype=carry) if learned is None else learned.to(carry)
            start = start.expand(len(rows.lengths), width)
            came = start if entering is None else entering[k].to(carry)
            last.append(torch.where(rows.cleared[:, None], start, came))
        nothing = torch.where(torch.ones_like(x, dtype=torch.bool), 0.0, x).sum()
        nothing = nothing + sum(0 * parameter.sum() for parameter in self.parameters())  # which DDP asks for
        return x.new_zeros(rows.total, width) + nothing, (last[0], last[1])

    def _inputs(self, x: Tensor, rows: Rows, walk: Walk) -> tuple[Tensor | None, Tensor]:
        """What stands inside and outside the normalization of W_h h, one row for each walked row."""
        filled = len(walk.source) > len(rows.at)
        at, weight = rows.at if filled else rows.at[walk.source], self._noisy(self.weight_ih)
        back = at.new_zeros(rows.total)
        back[at] = torch.arange(len(at), device=at.device)
        product = linear(move(x, at, None, back, rows.real), weight)
        if filled and (self.norm_x is None or self.input_statistics == "frame"):
            product, filled = product[walk.source], False
        bias = product.new_zeros(product.shape[1]) if self.bias is None else self.bias
        if self.norm_x is None:
            return (product, bias.expand_as(product)) if self.variant == "bn1" else (None, product + bias)
        frame, age = (rows.frame, rows.age) if filled else (walk.frame, walk.age)
        group = group_of(self.input_statistics, frame, age, self.max_steps)
        product = self.norm_x.normalize(product, group, int(group.max()) + 1 if len(group) else 0, bias)
        return None, product[walk.source] if filled else product

    def _entering(self, walk: Walk, given: tuple[Tensor, Tensor] | None, like: Tensor) -> tuple[Tensor, Tensor]:
        """The states before the walk: those given; else, and where a piece begins, the learned one with noise."""
        width = self.weight_hh.shape[1]
        wide = like.to(carry_dtype(like.dtype))

        def fresh(learned: Tensor | None, count: int) -> Tensor:
            return wide.new_zeros(count, width) if learned is None else learned.to(wide.dtype).expand(count, width)

        count = walk.entering if given is None else walk.entering - len(walk.lanes)
        h, c = fresh(self.h0, count), fresh(self.c0, count)
        noise = self.options.noise
        if noise and self._uses_batch:
            h = h + noise * torch.randn_like(h)
        if given is not None:
            h = torch.cat([given[0].to(h.dtype)[walk.lanes], h])
            c = torch.cat([given[1].to(c.dtype)[walk.lanes], c])
        return h, c

    def _last(self, table: Tensor, rows: Rows, walk: Walk, given: Tensor | None, learned: Tensor | None) -> Tensor:
        """Each lane's state after the walk: of its last row, that with which it came, or after a reset the learned."""
        fresh = table.new_zeros(()) if learned is None else learned.to(table.dtype)
        came = fresh if given is None else given.to(table.dtype)
        walked = table.index_select(0, walk.last.clamp(min=0)) if len(table) else table.new_zeros(len(walk.last), 1)
        found = torch.where((walk.last < 0)[:, None], came, walked)
        return torch.where(rows.cleared[:, None], fresh, found)

    @property
    def _uses_batch(self) -> bool:
        norm = self.norm_h if self.norm_h is not None else self.norm_x
        return self.training if norm is None else norm.uses_batch

    def _noisy(self, weight: Tensor) -> Tensor:
        noise = self.options.weight_noise
        return weight + noise * torch.randn_like(weight) if noise and self.training else weight
