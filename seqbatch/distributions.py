"""Distributions of lengths: fit them, draw from them, and compute what padding will use.

A batch of B random sequences padded to its longest uses ``E[L] / E[max of B]`` of its cells: the
long-run ratio of totals, which depends on a distribution's shape alone. Unno's 2015 talk takes sentence
lengths for gamma distributed; Furuhashi (2012, J. Phys. Soc. Japan 81, 034004) finds them lognormal.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from seqbatch.lengths import as_lengths
from seqbatch.ordering import IntArray, random_bits
from seqbatch.strategy import check_integer

__all__ = ["Distribution", "Fit", "expected_efficiency", "fit", "gamma", "lognormal", "negative_binomial", "resample"]

Floats = NDArray[np.float64]

_POISSON_LIMIT = 1e6
"""The largest r of a negative binomial that is fitted: its variance is then the mean's, to one in a million."""


@dataclass(frozen=True)
class Distribution(ABC):
    """A family of lengths with its parameters."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not np.isfinite(value) or (value <= 0 and field.name != "mu"):
                kind = "finite" if field.name == "mu" else "positive and finite"
                raise ValueError(f"{field.name} of a {type(self).__name__} distribution must be {kind}, got {value}")

    def __str__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{f.name}={getattr(self, f.name):.6g}' for f in fields(self))})"

    @abstractmethod
    def cdf(self, x: ArrayLike) -> Floats:
        """Return the probability of a value of at most `x`."""

    @abstractmethod
    def mean(self) -> float:
        """Return the mean."""

    @abstractmethod
    def quantile(self, u: Floats) -> Floats:
        """Return the smallest value whose `cdf` is at least `u`, each in (0, 1)."""

    def length_cdf(self, x: IntArray) -> Floats:
        """Return the probability of a *length* of at most `x`, whole numbers from 1 up.

        A length is the value rounded to the nearest whole number, and at least 1.
        """
        return np.where(x < 1, 0.0, self.cdf(np.asarray(x) + 0.5))

    def lengths(self, count: int, *, seed: int = 0) -> IntArray:
        """Draw lengths: (count,) int64, at least 1, the same for the same seed on every platform's Philox.

        >>> gamma(2, 10).lengths(4)
        array([16, 16, 34, 23])
        """
        drawn = self.quantile(_uniforms(check_integer("count", count, at_least=1), seed))
        return np.maximum(np.rint(drawn), 1).astype(np.int64)

    def expected_efficiency(self, batch_size: int, *, discrete: bool = False) -> float:
        """Return ``E[L] / E[max of B]``, the share of cells that random batches of B use.

        ``E[max of B]`` is the integral of ``1 - cdf(x)**B`` from 0 up (sum, for whole lengths).

        Args:
            batch_size: B.
            discrete: For lengths as `lengths` draws them instead of the distribution itself.

        >>> round(gamma(2, 10).expected_efficiency(2), 6) == round(8 / 11, 6)
        True
        """
        check_integer("batch_size", batch_size, at_least=1)
        one, largest = (self._expected_max(size, discrete) for size in (1, batch_size))
        return one / largest

    def _expected_max(self, size: int, discrete: bool) -> float:
        if discrete:
            support = np.arange(int(self.quantile(np.array([1 - 1e-15 / size]))[0]) + 2)
            return float((1 - self.length_cdf(support) ** size).sum())
        # Gauss-Legendre between quantiles of the maximum, close to each other where it falls steeply.
        tails = 10.0 ** np.arange(-14.0, -1)
        levels = np.concatenate([tails, np.linspace(0.1, 0.9, 9), 1 - tails[::-1]])
        ends = np.append(0.0, self.quantile(np.minimum(levels ** (1 / size), 1 - 2.0**-53)))
        nodes, weights = np.polynomial.legendre.leggauss(40)
        middle, half = (ends[1:] + ends[:-1])[:, None] / 2, np.diff(ends)[:, None] / 2
        return float((half * weights * (1 - self.cdf(middle + half * nodes) ** size)).sum())


@dataclass(frozen=True)
class gamma(Distribution):
    """Gamma distribution of the given shape k and scale.

    >>> gamma(2, 12).mean()
    24.0
    """

    shape: float
    scale: float

    def cdf(self, x: ArrayLike) -> Floats:
        """Return the regularised incomplete gamma function of ``x / scale``."""
        from scipy.special import gammainc

        return np.asarray(gammainc(self.shape, np.maximum(x, 0) / self.scale))

    def mean(self) -> float:
        """Return shape times scale."""
        return float(self.shape * self.scale)

    def quantile(self, u: Floats) -> Floats:
        """Return the inverse of `cdf`."""
        from scipy.special import gammaincinv

        return self.scale * np.asarray(gammaincinv(self.shape, u))


@dataclass(frozen=True)
class lognormal(Distribution):
    """Lognormal distribution: the logarithm is normal with mean mu and standard deviation sigma.

    >>> round(lognormal(4.5, 1.0).mean(), 2)
    148.41
    """

    mu: float
    sigma: float

    def cdf(self, x: ArrayLike) -> Floats:
        """Return the normal distribution function of ``(log x - mu) / sigma``."""
        from scipy.special import ndtr

        with np.errstate(divide="ignore"):
            return np.asarray(ndtr((np.log(np.maximum(x, 0)) - self.mu) / self.sigma))

    def mean(self) -> float:
        """Return ``exp(mu + sigma**2 / 2)``."""
        return float(np.exp(self.mu + self.sigma**2 / 2))

    def quantile(self, u: Floats) -> Floats:
        """Return the inverse of `cdf`."""
        from scipy.special import ndtri

        return np.exp(self.mu + self.sigma * np.asarray(ndtri(u)))


@dataclass(frozen=True)
class negative_binomial(Distribution):
    """One plus a negative binomial: the smallest length is 1. A gamma mixture of Poisson counts.

    >>> negative_binomial(2, 0.25).mean()
    7.0
    """

    r: float
    p: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.p > 1:
            raise ValueError(f"p of a negative_binomial distribution must be at most 1, got {self.p}")

    def cdf(self, x: ArrayLike) -> Floats:
        """Return the regularised incomplete beta function at p; steps at whole numbers from 1 up."""
        from scipy.special import betainc

        failures = np.floor(np.asarray(x, dtype=np.float64)) - 1
        return np.where(failures < 0, 0.0, betainc(self.r, np.maximum(failures, 0) + 1, self.p))

    def mean(self) -> float:
        """Return ``1 + r (1 - p) / p``."""
        return 1 + self.r * (1 - self.p) / self.p

    def quantile(self, u: Floats) -> Floats:
        """Return the inverse of `cdf`, looked up among all lengths that occur."""
        spread = np.sqrt(self.r * (1 - self.p)) / self.p
        top = self.mean() + 8 * spread + 8
        while self.cdf(top) < np.max(u):
            top *= 1.5
        support = np.arange(1, int(top) + 2)
        return support[np.searchsorted(self.cdf(support), u)].astype(np.float64)

    def length_cdf(self, x: IntArray) -> Floats:
        """Return `cdf`: values are whole lengths already."""
        return self.cdf(x)

    def expected_efficiency(self, batch_size: int, *, discrete: bool = True) -> float:
        """Return ``E[L] / E[max of B]`` by summing over whole lengths."""
        return super().expected_efficiency(batch_size, discrete=True)


class Fit(NamedTuple):
    """A distribution fitted to lengths by maximum likelihood."""

    distribution: Distribution
    log_likelihood: float
    """Of the whole lengths: the sum of ``log(length_cdf(l) - length_cdf(l - 1))``, comparable over families."""
    ks_distance: float
    """Kolmogorov-Smirnov: the largest gap between the two distribution functions at whole lengths."""


def fit(lengths: ArrayLike) -> list[Fit]:
    """Fit all families to the non-empty lengths, the closest by Kolmogorov-Smirnov distance first.

    The parameters of gamma and lognormal maximise the likelihood of the continuous density.

    Raises:
        ValueError: fewer than two distinct lengths, which no family can be fitted to.

    >>> best = fit(lognormal(3, 0.7).lengths(4000))[0]
    >>> type(best.distribution).__name__, best.ks_distance < 0.02
    ('lognormal', True)
    """
    array = as_lengths(lengths)
    values, counts = np.unique(array[array > 0], return_counts=True)
    if len(values) < 2:
        what = f"all lengths are {values[0]}" if len(values) else "all sequences are empty"
        raise ValueError(f"{what}: a distribution needs at least two different lengths to be fitted to")
    empirical = np.cumsum(counts) / counts.sum()
    fits = []
    for find in (_fit_gamma, _fit_lognormal, _fit_negative_binomial):
        found = find(values, counts)
        after, before = found.length_cdf(values), found.length_cdf(values - 1)
        gap = max(np.abs(after - empirical).max(), np.abs(before - np.append(0, empirical[:-1])).max())
        likelihood = np.log(np.maximum(after - before, np.finfo(float).tiny))
        fits.append(Fit(found, float((counts * likelihood).sum()), float(gap)))
    return sorted(fits, key=lambda f: f.ks_distance)


def _fit_gamma(values: IntArray, counts: IntArray) -> Distribution:
    """Solve ``log k - digamma(k) = log(mean) - mean(log)``, which falls in k."""
    from scipy.optimize import brentq
    from scipy.special import digamma

    mean = np.average(values, weights=counts)
    gap = np.log(mean) - np.average(np.log(values), weights=counts)
    # log k - digamma(k) lies between 1/2k and 1/k (Alzer 1997), which brackets the root.
    shape = brentq(lambda k: np.log(k) - digamma(k) - gap, 0.4 / gap, 1.1 / gap, xtol=1e-12)
    return gamma(float(shape), float(mean / shape))


def _fit_lognormal(values: IntArray, counts: IntArray) -> Distribution:
    logs = np.log(values)
    mu = np.average(logs, weights=counts)
    return lognormal(float(mu), float(np.sqrt(np.average((logs - mu) ** 2, weights=counts))))


def _fit_negative_binomial(values: IntArray, counts: IntArray) -> Distribution:
    """Maximise over log r; p follows from the mean. Less spread than Poisson's ends at the largest r."""
    from scipy.optimize import minimize_scalar
    from scipy.special import gammaln

    failures = values - 1
    mean = float(np.average(failures, weights=counts))

    def loss(log_r: float) -> float:
        r = np.exp(log_r)
        p = r / (r + mean)
        terms = gammaln(failures + r) - gammaln(r) + r * np.log(p) + failures * np.log1p(-p)
        return -float(np.average(terms, weights=counts))

    bounds = (np.log(1e-3), np.log(_POISSON_LIMIT))
    r = float(np.exp(minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-10}).x))
    return negative_binomial(r, r / (r + mean))


def expected_efficiency(lengths: ArrayLike, batch_size: int) -> float:
    """Return what random batches of these very lengths use: tokens / expected cells, exactly.

    :class:`seqbatch.Padding` draws its batches without replacement, so the largest of B has
    ``P(max <= l) = C(n_l, B) / C(N, B)`` with n_l lengths up to l; a last batch of ``N mod B`` counts
    with its own size. Empty sequences take no part.

    Args:
        lengths: (N,) integers.
        batch_size: B; from N on, all lengths are one batch.

    >>> round(expected_efficiency([1, 2, 3], 2), 6)
    0.818182
    """
    array = as_lengths(lengths)
    values, counts = np.unique(array[array > 0], return_counts=True)
    if not len(values):
        raise ValueError("all sequences are empty: there are no batches")
    count = int(counts.sum())
    batches, rest = divmod(count, check_integer("batch_size", batch_size, at_least=1))
    up_to = np.cumsum(counts)
    cells = sum(number * size * _expected_max_of(values, up_to, size)
                for number, size in ((batches, batch_size), (1, rest)) if number and size)  # fmt: skip
    return float((values * counts).sum() / cells)


def _expected_max_of(values: IntArray, up_to: IntArray, size: int) -> float:
    """The mean of the largest of `size` lengths drawn without replacement."""
    from scipy.special import gammaln

    most = up_to[-1]
    enough = up_to >= size
    chosen = up_to[enough]
    logs = gammaln(chosen + 1) - gammaln(chosen - size + 1) - gammaln(most + 1) + gammaln(most - size + 1)
    at_most = np.zeros(len(values))
    at_most[enough] = np.exp(np.minimum(logs, 0))
    return float((values * np.diff(at_most, prepend=0)).sum())


def resample(lengths: ArrayLike, count: int, *, seed: int = 0) -> IntArray:
    """Draw lengths from the data with replacement: (count,) int64.

    >>> resample([5], 3)
    array([5, 5, 5])
    """
    array = as_lengths(lengths)
    drawn = _uniforms(check_integer("count", count, at_least=1), seed) * len(array)
    return array[np.minimum(drawn.astype(np.int64), len(array) - 1)]


def _uniforms(count: int, seed: int) -> Floats:
    """Uniform numbers strictly between 0 and 1, of 53 random bits each."""
    words = random_bits(count, check_integer("seed", seed, at_least=0), "lengths")
    return ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
