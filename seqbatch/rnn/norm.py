"""Batch normalization that padding cannot reach: statistics over real steps, per time step, per age or over all."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from seqbatch.rnn.calls import Call
from seqbatch.rnn.norm_ops import batch_norm_groups
from seqbatch.rnn.reference import carry_dtype
from seqbatch.rnn.walks import Rows, Statistics, group_of

__all__ = ["STATISTICS", "MaskedBatchNorm1d", "Population", "SequenceBatchNorm", "check_age"]

STATISTICS = ("frame", "sequence", "age")


@dataclass
class Population:
    """What a pass over data has found so far: (max_steps, D) means, rows and batches of each step."""

    mean: Tensor
    var: Tensor
    rows: Tensor
    batches: Tensor


class SequenceBatchNorm(nn.Module):
    """Batch normalization of sequences, with statistics over the real steps of a batch.

    ``y = gamma * (x - mean) / sqrt(var + eps) + beta`` with the mean and biased variance of a group of rows:

    * ``"frame"``: the rows of each lane's n-th real step (Laurent et al., arXiv 1510.01378, frame-wise; Cooijmans et
      al., arXiv 1603.09025, per time step).
    * ``"sequence"``: all real rows (Laurent et al., sequence-wise).
    * ``"age"``: the rows that are n steps into their piece, which is what "per time step" means where lanes are
      spliced; from age ``max_steps - 1`` on rows share one group.

    In training a group with fewer than `min_rows` rows is normalized with the statistics of the last group before it
    that has as many (gradients included); where there is none, with the running statistics. In evaluation a row takes
    the running statistics of its step; steps from the last one that was ever seen on take that one's. Running
    statistics are means over the batches at first, and exponential once `momentum` is the larger weight.
    The running variance is the mean of the batches' variances. No gradient goes through a feature that is equal in all
    rows of a group (variance of at most 1e-10, or eps ** 2).

    Args:
        num_features: D.
        max_steps: Number of running statistics, the longest sequence in training; ``"sequence"`` needs none.
        statistics: ``"frame"``, ``"sequence"`` or ``"age"``.
        bias: Whether there is a beta.
        gamma: Initial gamma; 0.1 keeps the slope of a tanh that follows (arXiv 1603.09025, section 4).
        eps: Added to the variance.
        momentum: Weight of a batch in the running statistics; None: they are the mean over all batches.
        min_rows: Rows that a group needs for statistics of its own.
        synchronize: Share statistics over the processes of ``torch.distributed``'s default group, in training.
        batch_first: Whether input, reset and mask are (B, T, ...).
        device: Where parameters are made.
        dtype: Of the parameters; running statistics are float32 at least.

    Raises:
        ValueError: A setting is out of its range.

    >>> norm = SequenceBatchNorm(3, max_steps=5, statistics="frame")
    >>> mask = torch.arange(5)[:, None] < torch.tensor([5, 4, 4, 5])
    >>> norm(torch.randn(5, 4, 3), mask=mask).shape
    torch.Size([5, 4, 3])
    """

    def __init__(
        self,
        num_features: int,
        max_steps: int | None = None,
        statistics: Statistics = "sequence",
        *,
        bias: bool = True,
        gamma: float = 0.1,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        min_rows: int = 4,
        synchronize: bool = False,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if statistics not in STATISTICS:
            raise ValueError(f"statistics must be one of {', '.join(STATISTICS)}, got {statistics!r}")
        if statistics == "sequence":
            max_steps = 1
        elif max_steps is None:
            raise ValueError(f"{statistics!r} statistics need max_steps, the longest sequence in training")
        for name, value, least in (
            ("num_features", num_features, 1),
            ("max_steps", max_steps, 1),
            ("min_rows", min_rows, 2),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer of {least} or more, got {value!r}")
        if momentum is not None and not 0 < momentum <= 1:
            raise ValueError(f"momentum must lie above 0 and be at most 1, or be None, got {momentum!r}")
        if not eps > 0:
            raise ValueError(f"eps must be positive, got {eps!r}: a step at which all rows are equal has variance 0")
        self.num_features, self.statistics, self.eps, self.momentum = num_features, statistics, eps, momentum
        self.max_steps = max_steps
        self.gamma, self.min_rows, self.synchronize, self.batch_first = gamma, min_rows, synchronize, batch_first
        self.weight = nn.Parameter(torch.full((num_features,), float(gamma), device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(num_features, device=device, dtype=dtype)) if bias else None
        wide, shape = carry_dtype(self.weight.dtype), (self.max_steps, num_features)
        self.register_buffer("running_mean", torch.zeros(shape, device=device, dtype=wide))
        self.register_buffer("running_var", torch.ones(shape, device=device, dtype=wide))
        self.register_buffer("num_batches_tracked", torch.zeros(self.max_steps, device=device, dtype=torch.long))
        self.running_mean: Tensor
        self.running_var: Tensor
        self.num_batches_tracked: Tensor
        self._population: Population | None = None  # while the population's statistics are taken

    def _apply(self, fn: Any, recurse: bool = True) -> "SequenceBatchNorm":
        """Running statistics follow to another device, not to half precision."""
        before = self.running_mean, self.running_var
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.running_mean.dtype.itemsize < 4:
            self.running_mean, self.running_var = (x.to(self.running_mean.device) for x in before)
        return self

    def reset_parameters(self) -> None:
        """Set gamma and beta to their start and forget the running statistics."""
        nn.init.constant_(self.weight, self.gamma)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        self.reset_running_stats()

    def reset_running_stats(self) -> None:
        """Forget the running statistics."""
        self.running_mean.zero_()
        self.running_var.fill_(1)
        self.num_batches_tracked.zero_()

    def forward(
        self,
        input: Tensor | PackedSequence,
        *,
        reset: Tensor | None = None,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        age: Tensor | None = None,
    ) -> Tensor | PackedSequence:
        """Normalize; padding becomes 0.

        Args:
            input: (T, B, D), (B, T, D) with batch_first, (T, D), flat (S, D) with cu_seqlens, or a PackedSequence.
            reset: (T, B) bool, true at the first step of every piece; only ``"age"`` depends on it.
            mask: (T, B) bool, true on real steps.
            cu_seqlens: (N + 1,) offsets of a flat input's sequences.
            age: (B,) int64, for ``"age"``: the steps that each lane's first piece had in earlier batches.

        Raises:
            RuntimeError: Sizes or devices do not fit; or statistics are needed that do not exist: too few rows in
                the first groups of a training batch, or evaluation before any training.
            ValueError: Dtypes, dimensions or flags do not fit.
        """
        name, width = "SequenceBatchNorm", self.num_features
        if age is not None and self.statistics != "age":
            raise ValueError(f"age is of no use to {self.statistics!r} statistics: leave it out")
        call = Call.of(
            name, input, reset, mask, cu_seqlens, weight=self.weight, input_size=width, batch_first=self.batch_first
        )
        group, groups = self._groups(call, age)
        y = self.normalize(call.rows.reshape(len(group), width), group, groups)
        return call.close(y.view(call.rows.shape))

    def _groups(self, call: Call, age: Tensor | None) -> tuple[Tensor, int]:
        """The group of each row of the batch, -1 for padding, and their number."""
        if self.statistics == "sequence" and call.cu_seqlens is None:  # neither steps nor pieces matter
            shape, mask = call.rows.shape[:2], call.mask
            real = torch.ones(shape, dtype=torch.bool, device=call.rows.device) if mask is None else mask
            return torch.where(real.flatten(), 0, -1), int(real.any())
        rows = Rows.of(call, check_age(age, call))
        index = group_of(self.statistics, rows.frame, rows.age, self.max_steps)
        groups = int(index.max()) + 1 if len(index) else 0
        return index.new_full((rows.total,), -1).index_copy_(0, rows.at, index), groups

    def normalize(self, x: Tensor, group: Tensor, groups: int, bias: Tensor | None = None) -> Tensor:
        """Normalize rows (R, D) of numbered groups (R,); group -1 becomes 0; group g has the running statistics g.

        `bias` (D,) stands in for a beta that the layer does not have.
        """
        bias = self.bias if bias is None else bias
        bias = torch.zeros_like(self.weight) if bias is None else bias
        if self.synchronize and self.uses_batch and dist.is_available() and dist.is_initialized():
            return self._normalize_together(x, group, groups, bias)
        if not groups:
            return torch.where(group[:, None] >= 0, x, 0.0) + 0 * (self.weight + bias)  # gradients of 0, for DDP
        counts = torch.bincount(group + 1, minlength=groups + 1)[1:]
        if len(counts) != groups:
            raise ValueError(f"groups must lie in -1..{groups - 1}, got {len(counts) - 1}")
        slots = torch.arange(groups, device=x.device).clamp(max=self.max_steps - 1)
        source, mean, var = self.sources(counts, slots)
        y, mean, var = batch_norm_groups(x, group, source, mean, var, self.weight, bias, self.eps)
        self.update(source, counts, slots, mean, var)
        return y

    @property
    def uses_batch(self) -> bool:
        """Whether statistics come from the batch."""
        return self.training or self._population is not None

    def sources(self, counts: Tensor, slots: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Where each group's statistics come from, and the running ones, for groups of so many rows.

        Returns:
            source (G,) int64, the group itself, an earlier one, or -1 for the running statistics; and those, (G, D).
        """
        steps = torch.arange(self.max_steps, device=slots.device)
        seen = self.num_batches_tracked > 0
        known = torch.where(seen, steps, -1).cummax(0).values
        known = torch.where(known < 0, seen.long().argmax(), known)[slots]
        source = torch.full_like(counts, -1)
        if self.uses_batch and len(counts):
            own = torch.where(counts >= self.min_rows, torch.arange(len(counts), device=counts.device), -1)
            source = own.cummax(0).values
        lacking = ((source < 0) & (counts > 0)).to(slots.device)
        if not bool(seen.any()) and bool(lacking.any()):
            if not self.uses_batch:
                raise RuntimeError(
                    "there are no statistics to evaluate with yet: train first, or call "
                    "estimate_population(model, batches)"
                )
            raise RuntimeError(
                f"batch statistics need {self.min_rows} rows, got {int(counts[lacking.to(counts.device)][0])} in the "
                f"first group with {self.statistics!r} statistics, and there are no running ones yet: "
                "use batches of more lanes, or a smaller min_rows (2 at least)"
            )
        return source, self.running_mean[known], self.running_var[known]

    @torch.no_grad()
    def update(self, source: Tensor, counts: Tensor, slots: Tensor, mean: Tensor, var: Tensor) -> None:
        """Let the groups that had statistics of their own move the running ones."""
        if not self.uses_batch:
            return
        index = torch.arange(len(source), device=source.device)
        rows = torch.where((source == index) & (counts > 0), counts, 0).to(slots.device)
        by_slot = torch.zeros(self.max_steps, device=slots.device, dtype=torch.long).index_add_(0, slots, rows)
        hit, dtype = by_slot > 0, self.running_mean.dtype
        weight = by_slot.to(dtype)
        share = (rows.to(dtype) / weight.clamp(min=1)[slots])[:, None]
        population = self._population
        if population is not None:
            population.rows += by_slot
            rate = weight / population.rows.to(dtype).clamp(min=1)
            averages, tracked = (population.mean, population.var), population.batches
        else:
            rate = 1 / (self.num_batches_tracked + 1).to(dtype)
            rate = rate if self.momentum is None else rate.clamp(min=self.momentum)
            averages, tracked = (self.running_mean, self.running_var), self.num_batches_tracked
        rate = torch.where(hit, rate, 0)[:, None]
        for average, found in zip(averages, (mean, var), strict=True):
            batch = torch.zeros_like(average).index_add_(0, slots, share * found.to(dtype))
            average.lerp_(batch, rate.expand_as(average))  # exact where the weight is 1
        tracked += hit

    def _normalize_together(self, x: Tensor, group: Tensor, groups: int, bias: Tensor) -> Tensor:
        """The same with sums over all processes, in plain torch."""
        number = torch.tensor(groups, device=x.device)
        dist.all_reduce(number, dist.ReduceOp.MAX)
        groups, dtype = int(number), x.dtype
        x, real = x.to(carry_dtype(dtype)), group >= 0
        kept, where = x[real], group[real]
        counts = torch.bincount(where, minlength=groups)
        dist.all_reduce(counts)
        empty, size = x.new_zeros(groups, x.shape[1]), counts.clamp(min=1)[:, None]
        mean = _over_processes(empty.index_add(0, where, kept)) / size
        var = _over_processes(empty.index_add(0, where, (kept - mean[where]).square())) / size
        slots = torch.arange(groups, device=x.device).clamp(max=self.max_steps - 1)
        source, given_mean, given_var = self.sources(counts, slots)
        given, at = (source < 0)[:, None], source.clamp(min=0)
        self.update(source, counts, slots, mean, var)
        flat = var <= min(self.eps * self.eps, 1e-10)  # rows that are equal: see the reference
        mean, var = torch.where(flat, mean.detach(), mean), torch.where(flat, var.detach(), var)
        flat = flat & (source == torch.arange(groups, device=source.device))[:, None]
        mean, var = torch.where(given, given_mean, mean[at]), torch.where(given, given_var, var[at])
        y = (kept - mean[where]) / torch.sqrt(var[where] + self.eps)
        y = self.weight * torch.where(flat[where], y.detach(), y) + bias
        return torch.zeros_like(x).masked_scatter(real[:, None], y).to(dtype)

    def extra_repr(self) -> str:
        """The size and the kind of statistics."""
        steps = "" if self.statistics == "sequence" else f", max_steps={self.max_steps}"
        return f"{self.num_features}{steps}, statistics={self.statistics!r}, eps={self.eps}, momentum={self.momentum}"


class MaskedBatchNorm1d(nn.BatchNorm1d):
    """``torch.nn.BatchNorm1d`` with a mask: statistics over real positions only, and padding becomes 0.

    Constructor, parameters, buffers and state dict are ``torch.nn.BatchNorm1d``'s, and so is a call without mask.

    >>> norm = MaskedBatchNorm1d(3)
    >>> mask = torch.tensor([[True, True, False, False], [True, True, True, True]])
    >>> norm(torch.randn(2, 3, 4), mask)[0, :, 2:].tolist()
    [[0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]
    """

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalize (N, C) with a mask (N,), or (N, C, L) with a mask (N, L), bool, true on real positions.

        A batch without any real position becomes 0 and changes no statistic.

        Raises:
            RuntimeError: The mask's size or device does not fit.
            ValueError: The mask is not bool; or in training there is only one real position.
        """
        if mask is None:
            return super().forward(input)
        self._check_input_dim(input)
        expected = (*input.shape[:1], *input.shape[2:])
        if mask.dtype != torch.bool:
            raise ValueError(f"mask must be bool, got {mask.dtype}; convert it: mask.bool()")
        if mask.shape != expected or mask.device != input.device:
            raise RuntimeError(
                f"mask must have shape {tuple(expected)}, one flag for each position, on {input.device}, "
                f"got {tuple(mask.shape)} on {mask.device}"
            )
        rows = input if input.dim() == 2 else input.transpose(1, 2)
        real = rows[mask]
        scale = 1 if self.weight is None else self.weight  # a gradient of 0 for a batch of padding, which DDP asks for
        done = super().forward(real) if len(real) else real * scale
        y = torch.zeros_like(rows, dtype=done.dtype).masked_scatter(mask[..., None], done)
        return y if input.dim() == 2 else y.transpose(1, 2)


def check_age(age: Tensor | None, call: Call) -> Tensor | None:
    """Refuse ages that do not fit a call."""
    if age is None:
        return None
    if not isinstance(age, Tensor) or age.dtype != torch.int64:
        raise ValueError(f"age must be an int64 tensor, got {getattr(age, 'dtype', type(age).__name__)}")
    if age.shape != (call.lanes,) or age.device != call.rows.device:
        raise RuntimeError(
            f"age must have shape {(call.lanes,)} on {call.rows.device}, got {tuple(age.shape)} on {age.device}"
        )
    if bool((age < 0).any()):
        raise ValueError(f"age must not be negative, got {int(age.min())}")
    return age


def _over_processes(x: Tensor) -> Tensor:
    """The sum over all processes, with its derivative."""
    total: Tensor = _SumOverProcesses.apply(x)  # type: ignore[no-untyped-call]
    return total


class _SumOverProcesses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.clone()
        dist.all_reduce(total)
        return total
