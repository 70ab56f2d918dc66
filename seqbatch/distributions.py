"""Distributions of lengths: draw from them, and compute what padding will use (`fitting` fits them).

A batch of B random sequences padded to its longest uses ``E[L] / E[max of B]`` of its cells: the
long-run ratio of totals, which depends on a distribution's shape alone. Unno's 2015 talk takes sentence
lengths for gamma distributed; Furuhashi (2012, J. Phys. Soc. Japan 81, 034004) finds them lognormal.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import ArrayLike, NDArray

from seqbatch.lengths import as_lengths
from seqbatch.ordering import IntArray, random_bits
from seqbatch.strategy import check_integer

__all__ = ["Distribution", "expected_efficiency", "gamma", "lognormal", "negative_binomial", "resample"]

Floats = NDArray[np.float64]

_MOST = 2.0**53
"""Lengths from here on are no longer exact in float64."""
_EXACT_SUM = 2**18
"""Sums over whole lengths are taken term by term up to here; the midpoint rule is exact to 1e-8 beyond."""


@dataclass(frozen=True)
class Distribution(ABC):
    """A family of lengths with its parameters."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, (int, float, np.number)):
                raise TypeError(f"{field.name} of a {type(self).__name__} distribution must be a number, got {value!r}")
            if not np.isfinite(value) or (value <= 0 and field.name != "mu"):
                kind = "finite" if field.name == "mu" else "positive and finite"
                raise ValueError(f"{field.name} of a {type(self).__name__} distribution must be {kind}, got {value}")

    def __str__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{f.name}={getattr(self, f.name):.6g}' for f in fields(self))})"

    @abstractmethod
    def cdf(self, x: ArrayLike, *, above: bool = False) -> Floats:
        """Return the probability of a value of at most `x`; if `above`, that of a larger one, as precisely."""

    @abstractmethod
    def mean(self) -> float:
        """Return the mean."""

    @abstractmethod
    def _share_above(self, x: Floats) -> Floats:
        """Return which share of the mean is due to values above `x`."""

    @abstractmethod
    def quantile(self, u: Floats) -> Floats:
        """Return the smallest value whose `cdf` is at least `u`, each in (0, 1)."""

    def length_cdf(self, x: ArrayLike, *, above: bool = False) -> Floats:
        """Return the probability of a *length* of at most (or above) `x`, smooth between whole numbers from 1 up.

        A length is the value rounded to the nearest whole number, and at least 1.
        """
        return np.where(np.less(x, 1), float(above), self.cdf(np.asarray(x) + 0.5, above=above))

    def lengths(self, count: int, *, seed: int = 0) -> IntArray:
        """Draw lengths: (count,) int64, at least 1, the inverse `cdf` of fixed random bits for each seed.

        Raises:
            ValueError: for a length of 2**53 or more.

        >>> gamma(2, 10).lengths(4)
        array([16, 16, 34, 23])
        """
        uniforms = _uniforms(check_integer("count", count, at_least=1), seed)
        with np.errstate(over="ignore"):
            drawn = np.maximum(np.rint(self.quantile(uniforms)), 1)
        if not drawn.max() < _MOST:
            raise ValueError(f"{self} draws a length of {drawn.max():.3g}, more than int64 and float64 share (2**53)")
        return drawn.astype(np.int64)

    def expected_efficiency(self, batch_size: int, *, discrete: bool = False) -> float:
        """Return ``E[L] / E[max of B]``, the share of cells that random batches of B use.

        ``E[max of B]`` is the integral of ``1 - cdf(x)**B`` from 0 up (sum, for whole lengths).

        Args:
            batch_size: B.
            discrete: For lengths as `lengths` draws them instead of the distribution itself.

        Raises:
            ValueError: a mean of 2**53 or more, or a `batch_size` below 1.

        >>> round(gamma(2, 10).expected_efficiency(2), 6) == round(8 / 11, 6)
        True
        """
        check_integer("batch_size", batch_size, at_least=1)
        one, largest = (self._expected_max(size, discrete) for size in (1, batch_size))
        return one / largest

    def _expected_max(self, size: int, discrete: bool) -> float:
        if not discrete:
            return self._integral(self.cdf, size, 0)
        exact = np.arange(int(min(self._end(size), _EXACT_SUM)) + 1)
        terms = _any_above(self.length_cdf(exact, above=True), size)
        return float(terms.sum()) + self._integral(self.length_cdf, size, len(exact) - 0.5)

    def _integral(self, cdf: Callable[..., Floats], size: int, begin: float) -> float:
        """Integrate ``1 - cdf(x) ** size`` from `begin` on.

        By Gauss-Legendre over ``log x``, in which heavy tails are short, between quantiles, whose close
        tails also part the steep fall of the maximum of many, and every factor of e above the mean.
        """
        lowest, highest = max(begin, self.mean() * 1e-18), self._end(size)
        if lowest >= highest:
            return 0.0
        tails = 10.0 ** np.arange(-14.0, -1)
        levels = np.concatenate([tails, np.linspace(0.1, 0.9, 9), 1 - tails[::-1]])
        steep = self.quantile(levels)
        steps = self.mean() * np.exp(np.arange(np.log(highest / self.mean())))
        ends = np.log(np.unique(np.clip([lowest, *steep, *steps, highest], lowest, highest)))
        nodes, weights = np.polynomial.legendre.leggauss(40)
        middle, half = (ends[1:] + ends[:-1])[:, None] / 2, np.diff(ends)[:, None] / 2
        x = np.exp(middle + half * nodes)
        return float((half * weights * x * _any_above(cdf(x, above=True), size)).sum())

    def _end(self, size: int) -> float:
        """Return a value above which the largest of `size` owes less than 1e-17 of its mean."""
        steps = self.mean() * np.exp(np.arange(500.0))
        enough = steps[self._share_above(steps) * size < 1e-17]
        if not (self.mean() < _MOST and len(enough)):
            raise ValueError(f"{self} is no law of lengths: its mean is {self.mean():.3g}, or its tail too long")
        return float(enough[0])


@dataclass(frozen=True)
class gamma(Distribution):
    """Gamma distribution of the given shape k and scale.

    >>> gamma(2, 12).mean()
    24.0
    """

    shape: float
    scale: float

    def cdf(self, x: ArrayLike, *, above: bool = False) -> Floats:
        """Return the regularised incomplete gamma function of ``x / scale``, lower or upper."""
        from scipy.special import gammainc, gammaincc

        return np.asarray((gammaincc if above else gammainc)(self.shape, np.maximum(x, 0) / self.scale))

    def mean(self) -> float:
        """Return shape times scale."""
        return float(self.shape * self.scale)

    def _share_above(self, x: Floats) -> Floats:
        return gamma(self.shape + 1, self.scale).cdf(x, above=True)

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

    def cdf(self, x: ArrayLike, *, above: bool = False) -> Floats:
        """Return the normal distribution function of ``(log x - mu) / sigma``, or of its negative."""
        from scipy.special import ndtr

        with np.errstate(divide="ignore"):
            score = (np.log(np.maximum(x, 0)) - self.mu) / self.sigma
        return np.asarray(ndtr(-score if above else score))

    def _share_above(self, x: Floats) -> Floats:
        return lognormal(self.mu + self.sigma**2, self.sigma).cdf(x, above=True)

    def mean(self) -> float:
        """Return ``exp(mu + sigma**2 / 2)``."""
        with np.errstate(over="ignore"):
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

    def cdf(self, x: ArrayLike, *, above: bool = False) -> Floats:
        """Return `length_cdf` at the whole number below `x`: values are lengths already."""
        return self.length_cdf(np.floor(x), above=above)

    def length_cdf(self, x: ArrayLike, *, above: bool = False) -> Floats:
        """Return the regularised incomplete beta function at p, or its complement."""
        from scipy.special import betainc, betaincc

        return np.where(np.less(x, 1), float(above), (betaincc if above else betainc)(self.r, np.maximum(x, 1), self.p))

    def _share_above(self, x: Floats) -> Floats:
        # That of the "one plus" is left out, which falls faster.
        return negative_binomial(self.r + 1, self.p).length_cdf(x, above=True)

    def mean(self) -> float:
        """Return ``1 + r (1 - p) / p``."""
        return 1 + self.r * (1 - self.p) / self.p

    def quantile(self, u: Floats) -> Floats:
        """Return the inverse of `cdf`, looked up among at most 65,536 lengths and bisected between them."""
        top = 2 * self.mean() + 8
        while self.cdf(top) < np.max(u):
            top *= 1.5
        knots = np.unique(np.linspace(0, np.ceil(top), min(int(top) + 2, 2**16)).astype(np.int64))
        index = np.searchsorted(self.cdf(knots), u)
        low, high = knots[index - 1], knots[index]
        while (high - low).max() > 1:
            middle = (low + high) // 2
            reached = self.cdf(middle) >= u
            low, high = np.where(reached, low, middle), np.where(reached, middle, high)
        return high.astype(np.float64)

    def expected_efficiency(self, batch_size: int, *, discrete: bool = True) -> float:
        """Return ``E[L] / E[max of B]`` by summing over whole lengths."""
        return super().expected_efficiency(batch_size, discrete=True)


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


def _any_above(above: Floats, size: int) -> Floats:
    """Return ``1 - (1 - above) ** size`` with all digits of small ones."""
    from scipy.special import xlog1py

    return np.asarray(-np.expm1(xlog1py(size, -above)))
