"""Batch statistics in plain torch: the specification of :mod:`seqbatch.rnn.norm_ops`, differentiable as it stands."""

from itertools import pairwise

import torch
from torch import Tensor

from seqbatch.rnn.reference import carry_dtype

__all__ = ["bn_lstm", "normalize"]


def normalize(
    x: Tensor,
    group: Tensor,
    source: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    """Batch normalization of rows by groups: ``weight * (x - mean) / sqrt(var + eps) + bias``.

    Args:
        x: (R, D) rows.
        group: (R,) int64, the group of each row; -1: none, and the row becomes 0.
        source: (G,) int64, where a group's statistics come from: itself, an earlier group, or -1: given.
        mean: (G, D), used for the groups whose statistics are given.
        var: (G, D), likewise.
        weight: (D,) gamma.
        bias: (D,) beta.
        eps: Added to the variance.

    Returns:
        The rows in x's dtype, and the mean and biased variance that each group was normalized with.

    >>> x, zero = torch.tensor([[1.0], [3.0], [9.0]]), torch.zeros(1)
    >>> y, mean, var = normalize(x, torch.tensor([0, 0, -1]), torch.tensor([0]), x[:1], x[:1], zero + 1, zero, 0.0)
    >>> y.T.tolist(), mean.tolist(), var.tolist()
    ([[-1.0, 1.0, 0.0]], [[2.0]], [[1.0]])
    """
    out, x = x.dtype, x.to(carry_dtype(x.dtype))
    means: list[Tensor] = []
    variances: list[Tensor] = []
    y = torch.zeros_like(x)
    for g, s in enumerate(source.tolist()):
        members = (group == g).nonzero()[:, 0]
        if s == g and len(members):
            m, v = _moments(x[members], eps)
            means.append(m)
            variances.append(v)
        else:
            means.append(means[s] if 0 <= s < g else mean[g].to(x.dtype))
            variances.append(variances[s] if 0 <= s < g else var[g].to(x.dtype))
        rows = weight * _normal(x[members], means[-1], variances[-1], eps, s == g) + bias
        y = y.index_put((members,), rows.to(x.dtype))
    if not means:
        return y.to(out), mean, var
    return y.to(out), torch.stack(means), torch.stack(variances)


def _moments(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of rows, without a gradient where the rows are equal."""
    mean = x.mean(0)
    var = (x - mean).square().mean(0)
    flat = _flat(var, eps)
    return torch.where(flat, mean.detach(), mean), torch.where(flat, var.detach(), var)


def _normal(x: Tensor, mean: Tensor, var: Tensor, eps: float, own: bool) -> Tensor:
    """(x - mean) / sqrt(var + eps), with the rows' own statistics without a gradient where the rows are equal.

    There the result is 0 whatever x is, and 1 / sqrt(eps), which the formula has as its derivative, would multiply the
    gradient some hundred times at each step: images whose first pixels are black everywhere have a hundred such steps.
    """
    result = (x - mean) / torch.sqrt(var + eps)
    return torch.where(_flat(var, eps), result.detach(), result) if own else result


def _flat(var: Tensor, eps: float) -> Tensor:
    return var <= min(eps * eps, 1e-10)


def bn_lstm(
    outside: Tensor,
    inside: Tensor | None,
    weight: Tensor,
    gamma_h: Tensor | None,
    gamma_c: Tensor | None,
    beta_c: Tensor | None,
    h0: Tensor,
    c0: Tensor,
    previous: Tensor,
    offsets: Tensor,
    source: Tensor,
    moments: tuple[Tensor, Tensor, Tensor, Tensor],
    eps: float = 1e-5,
) -> tuple[Tensor, ...]:
    """The recurrence of BN-LSTM (Cooijmans et al., arXiv 1603.09025, equations 6 to 8), group after group of rows.

    With h and c those before the row, and BN the statistics of the row's group::

        i, f, g, o = BN(W h + inside; gamma_h) + outside
        c' = sigmoid(f) c + sigmoid(i) tanh(g)
        h' = sigmoid(o) tanh(BN(c'; gamma_c, beta_c))

    Args:
        outside: (R, 4H), all that stands outside the first normalization, bias included.
        inside: (R, 4H) or None: 0.
        weight: (4H, H), W.
        gamma_h: (4H,); None: the sum is not normalized.
        gamma_c: (H,); None: c' is not normalized.
        beta_c: (H,) or None, as gamma_c.
        h0: (S, H), the states before any row.
        c0: (S, H).
        previous: (R,) int64: row r goes on from state ``previous[r]`` of the S, or from row ``previous[r] - S``.
        offsets: (G + 1,) int64, where groups of rows begin.
        source: (G,) int64, where their statistics come from: the group itself, an earlier one, or -1: given.
        moments: Mean and variance of W h + inside (G, 4H), and of c' (G, H), for groups whose statistics are given.
        eps: Added to variances.

    Returns:
        h and c of the S states and the R rows, (S + R, H), and the four moments that were used.

    >>> one = torch.ones(1, 1)
    >>> still = (torch.zeros(1, 4), torch.ones(1, 4), torch.zeros(1, 1), torch.ones(1, 1))
    >>> index = torch.tensor([0])
    >>> where = (index, torch.tensor([0, 1]), index - 1)
    >>> h, c, *_ = bn_lstm(torch.zeros(1, 4), None, torch.zeros(4, 1), None, None, None, one, one, *where, still)
    >>> c.tolist()
    [[1.0], [0.5]]
    """
    spans, sources = list(pairwise(offsets.tolist())), source.tolist()
    h, c = [h0], [c0]
    used: list[list[Tensor]] = [[], [], [], []]

    def norm(x: Tensor, term: int, g: int, gamma: Tensor) -> Tensor:
        s = sources[g]
        if s == g:
            m, v = _moments(x, eps)
            used[term].append(m)
            used[term + 1].append(v)
        else:
            for k in (term, term + 1):
                used[k].append(used[k][s] if s >= 0 else moments[k][g])
        return gamma * _normal(x, used[term][-1], used[term + 1][-1], eps, s == g)

    for g, (begin, end) in enumerate(spans):
        before = previous[begin:end]
        a = torch.nn.functional.linear(torch.cat(h)[before], weight)
        if inside is not None:
            a = a + inside[begin:end]
        if gamma_h is not None:
            a = norm(a, 0, g, gamma_h)
        i, f, new, o = (a + outside[begin:end]).chunk(4, -1)
        after = torch.sigmoid(f) * torch.cat(c)[before] + torch.sigmoid(i) * torch.tanh(new)
        squashed = after if gamma_c is None or beta_c is None else norm(after, 2, g, gamma_c) + beta_c
        h.append(torch.sigmoid(o) * torch.tanh(squashed))
        c.append(after)
    found = [torch.stack(part) if part else given for part, given in zip(used, moments, strict=True)]
    return (torch.cat(h), torch.cat(c), *found)
