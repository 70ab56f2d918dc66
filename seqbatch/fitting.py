"""Which distribution lengths follow: maximum likelihood fits of each family, the closest first."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from seqbatch.distributions import Distribution, gamma, lognormal, negative_binomial
from seqbatch.lengths import as_lengths
from seqbatch.ordering import IntArray

__all__ = ["Fit", "fit"]

_POISSON_LIMIT = 1e4
"""The largest r of a negative binomial that is fitted, over its mean: its variance is then the mean, to 0.01%."""


class Fit(NamedTuple):
    """A distribution fitted to lengths by maximum likelihood."""

    distribution: Distribution
    log_likelihood: float
    """Of the whole lengths: the sum of ``log(length_cdf(l) - length_cdf(l - 1))``, comparable over families.

    A length of a probability below 2.2e-308 counts as if it had that.
    """
    ks_distance: float
    """Kolmogorov-Smirnov: the largest gap between the two distribution functions at whole lengths."""


def fit(lengths: ArrayLike) -> list[Fit]:
    """Fit all families to the non-empty lengths, the closest by Kolmogorov-Smirnov distance first.

    The parameters of gamma and lognormal maximise the likelihood of the continuous density, those of the
    negative binomial that of the lengths less one. Lengths that vary no more than a Poisson distribution
    have no largest likelihood: they get an r of 10,000 times their mean, which is Poisson's to 0.01%.

    Args:
        lengths: (N,) integers.

    Returns:
        One :class:`Fit` for each of the three families.

    Raises:
        ValueError: fewer than two different lengths, or all the same to 1e-7, which no family can be fitted to.

    >>> best = fit(lognormal(3, 0.7).lengths(4000))[0]
    >>> type(best.distribution).__name__, best.ks_distance < 0.02
    ('lognormal', True)
    """
    array = as_lengths(lengths)
    values, counts = np.unique(array[array > 0], return_counts=True)
    if not len(values) or values[-1] - values[0] <= 1e-7 * values[0]:
        alike = f"all {counts.sum()} lengths are equal to {values[0]}" if len(values) else "all sequences are empty"
        what = alike if len(values) < 2 else f"all lengths are between {values[0]} and {values[-1]}"
        raise ValueError(f"{what}: a distribution needs lengths that differ to be fitted to")
    empirical = np.cumsum(counts) / counts.sum()
    fits = []
    for find in (_fit_gamma, _fit_lognormal, _fit_negative_binomial):
        found = find(values, counts)
        after, before = found.length_cdf(values), found.length_cdf(values - 1)
        gap = max(np.abs(after - empirical).max(), np.abs(before - np.append(0, empirical[:-1])).max())
        upper = found.length_cdf(values - 1, above=True) - found.length_cdf(values, above=True)
        probability = np.where(after > 0.5, upper, after - before)  # each loses no digits on its side
        likelihood = np.log(np.maximum(probability, np.finfo(float).tiny))
        fits.append(Fit(found, float((counts * likelihood).sum()), float(gap)))
    return sorted(fits, key=lambda f: f.ks_distance)


def _fit_gamma(values: IntArray, counts: IntArray) -> Distribution:
    """Solve ``log k - digamma(k) = log(mean) - mean(log)``, which falls in k."""
    from scipy.optimize import brentq
    from scipy.special import digamma

    mean = np.average(values, weights=counts)
    apart = (values - mean) / mean
    # log(mean) - mean(log) as a sum of terms that are not negative, so that it keeps its digits.
    logs = np.where(apart < -0.5, np.log(values / mean), np.log1p(np.maximum(apart, -0.5)))
    gap = np.average(apart - logs, weights=counts)
    if gap < 1e-6:
        shape = 0.5 / gap + 1 / 6  # of log k - digamma(k) = 1/2k + 1/12k**2, which then is below the rounding
    else:
        # log k - digamma(k) lies between 1/2k and 1/k (Alzer 1997), which brackets the root.
        shape = brentq(lambda k: np.log(k) - digamma(k) - gap, 0.4 / gap, 1.1 / gap, xtol=1e-12)
    return gamma(float(shape), float(mean / shape))


def _fit_lognormal(values: IntArray, counts: IntArray) -> Distribution:
    logs = np.log(values)
    mu = np.average(logs, weights=counts)
    return lognormal(float(mu), float(np.sqrt(np.average((logs - mu) ** 2, weights=counts))))


def _fit_negative_binomial(values: IntArray, counts: IntArray) -> Distribution:
    """Maximise over log r; p follows from the mean. No more spread than Poisson's is the largest r."""
    from scipy.optimize import minimize_scalar
    from scipy.special import gammaln

    failures = values - 1
    mean = float(np.average(failures, weights=counts))
    limit = _POISSON_LIMIT * max(mean, 1.0)
    if np.average((failures - mean) ** 2, weights=counts) <= mean:
        return negative_binomial(limit, limit / (limit + mean))

    def loss(log_r: float) -> float:
        r = np.exp(log_r)
        p = r / (r + mean)
        terms = gammaln(failures + r) - gammaln(r) + r * np.log(p) + failures * np.log1p(-p)
        return -float(np.average(terms, weights=counts))

    bounds = (np.log(1e-9), np.log(limit))
    r = float(np.exp(minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-10}).x))
    return negative_binomial(r, r / (r + mean))
