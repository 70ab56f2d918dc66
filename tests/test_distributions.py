"""Distributions: scipy.stats, enumeration and published tables as twins of what is fitted, drawn and expected."""

import subprocess
import sys
from itertools import pairwise, permutations
from math import comb, nan

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, optimize, special, stats

from seqbatch import Padding
from seqbatch import distributions as d
from seqbatch.distributions import Distribution, expected_efficiency, gamma, lognormal, negative_binomial, resample
from seqbatch.fitting import Fit, fit
from seqbatch.lengths import corpus_names, load_corpus

FAMILIES = (gamma, lognormal, negative_binomial)
SIZES = (2, 4, 8, 16, 32, 64, 128, 256)
PUBLISHED = {
    gamma(0.5, 3): (0.611, 0.405, 0.289, 0.220, 0.175, 0.145, 0.123, 0.106),
    gamma(2, 12): (8 / 11, 0.564, 0.459, 0.387, 0.334, 0.295, 0.264, 0.240),
    gamma(10, 2.4): (0.850, 0.746, 0.670, 0.612, 0.566, 0.528, 0.496, 0.469),
    lognormal(3, 0.5): (0.783, 0.636, 0.530, 0.451, 0.390, 0.342, 0.303, 0.270),
    lognormal(3, 1.0): (0.658, 0.453, 0.324, 0.240, 0.182, 0.141, 0.112, 0.090),
}


def twin(law: Distribution) -> "stats.rv_continuous | stats.rv_discrete":
    """The same distribution in scipy.stats."""
    if isinstance(law, gamma):
        return stats.gamma(law.shape, scale=law.scale)
    if isinstance(law, lognormal):
        return stats.lognorm(law.sigma, scale=np.exp(law.mu))
    return stats.nbinom(law.r, law.p, loc=1)


shapes = st.floats(0.05, 50)
laws = st.one_of(
    st.builds(gamma, shapes, st.floats(0.5, 100)),
    st.builds(lognormal, st.floats(-1, 6), st.floats(0.05, 2)),
    st.builds(negative_binomial, shapes, st.floats(0.01, 1)),
)
small_lengths = st.lists(st.integers(0, 6), min_size=1, max_size=6).filter(any)


# --- distributions ---


@given(laws)
def test_a_distribution_is_scipys(law: Distribution) -> None:
    """Its cdf from both sides, its mean and its quantiles."""
    x = np.concatenate([[-1, 0], np.geomspace(0.1, 1e4, 60), np.arange(1, 40)])
    u = np.linspace(0.001, 0.999, 50)

    np.testing.assert_allclose(law.cdf(x), twin(law).cdf(x), rtol=1e-9, atol=1e-14)
    np.testing.assert_allclose(law.cdf(x, above=True), twin(law).sf(x), rtol=1e-9, atol=1e-250)
    np.testing.assert_allclose(law.quantile(u), twin(law).ppf(u), rtol=1e-8, atol=1e-300)
    assert law.mean() == pytest.approx(twin(law).mean())


@given(laws)
def test_lengths_are_rounded_values_of_at_least_one(law: Distribution) -> None:
    """The distribution of lengths is the one of the values, taken between halves."""
    x = np.arange(-1, 50)
    expected = np.where(x < 1, 0, twin(law).cdf(x + 0.5))

    np.testing.assert_allclose(law.length_cdf(x), expected, rtol=1e-9, atol=1e-14)
    np.testing.assert_allclose(law.length_cdf(x) + law.length_cdf(x, above=True), 1, rtol=1e-12)


@given(laws, st.integers(0, 2**70))
def test_lengths_are_drawn_by_inversion(law: Distribution, seed: int) -> None:
    """The same for the same seed, a longer draw goes on where a shorter one ends, and none is below 1."""
    lengths = law.lengths(50, seed=seed)

    assert lengths.dtype == np.int64
    assert lengths.min() >= 1
    assert law.lengths(20, seed=seed).tolist() == lengths[:20].tolist()
    ranks = d._uniforms(50, seed)
    assert (law.length_cdf(lengths) >= ranks * (1 - 1e-9)).all()
    assert (law.length_cdf(lengths - 1) <= ranks * (1 + 1e-9)).all()


@settings(max_examples=8)
@given(st.floats(0.05, 5), st.floats(1e-8, 1e-4))
def test_quantiles_of_long_counts_are_exact(r: float, p: float) -> None:
    """More lengths than are looked up in one table: the smallest whose probability is reached."""
    law, u = negative_binomial(r, p), np.linspace(0.01, 0.99, 9)
    found = law.quantile(u)

    assert (law.cdf(found) >= u).all()
    assert ((law.cdf(found - 1) < u) | (found == 1)).all()


@pytest.mark.parametrize(
    "law", [gamma(2, 12), lognormal(3, 0.7), negative_binomial(3, 0.1), negative_binomial(0.2, 1e-6)], ids=str
)
def test_many_lengths_have_the_distribution(law: Distribution) -> None:
    """By a Kolmogorov-Smirnov test that a right sampler fails once in a million seeds; another seed, others."""
    lengths = law.lengths(20_000, seed=5)
    values, counts = np.unique(lengths, return_counts=True)
    gap = np.abs(np.cumsum(counts) / len(lengths) - law.length_cdf(values)).max()

    assert gap < np.sqrt(np.log(2e6) / 2 / len(lengths))
    assert (lengths != law.lengths(20_000, seed=6)).any()


def test_the_bits_of_a_draw_are_fixed() -> None:
    """Published numbers stay what they are: a change of this line is a change of every drawn data set."""
    assert gamma(2, 12).lengths(6, seed=1).tolist() == [41, 39, 23, 11, 13, 41]


@pytest.mark.parametrize(
    ("law", "text"),
    [(gamma(2, 12), "gamma(shape=2, scale=12)"), (lognormal(3.5, 0.25), "lognormal(mu=3.5, sigma=0.25)"),
     (negative_binomial(1 / 3, 0.5), "negative_binomial(r=0.333333, p=0.5)")],
)  # fmt: skip
def test_a_distribution_says_what_it_is(law: Distribution, text: str) -> None:
    """With six digits, as a call that makes it."""
    assert str(law) == text


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: gamma(0, 1), ValueError, "shape of a gamma distribution must be positive and finite, got 0"),
        (lambda: gamma(1, -1), ValueError, "scale of a gamma .* got -1"),
        (lambda: gamma(nan, 1), ValueError, "shape of a gamma .* got nan"),
        (lambda: gamma("2", 1), TypeError, "shape of a gamma distribution must be a number, got '2'"),
        (lambda: gamma(True, 1), TypeError, "must be a number, got True"),
        (lambda: lognormal(np.inf, 1), ValueError, "mu of a lognormal distribution must be finite, got inf"),
        (lambda: lognormal(1, 0), ValueError, "sigma of a lognormal .* positive"),
        (lambda: negative_binomial(0, 0.5), ValueError, "r of a negative_binomial .* positive"),
        (lambda: negative_binomial(1, 1.5), ValueError, "p of a negative_binomial .* at most 1, got 1.5"),
        (lambda: gamma(2, 1).lengths(0), ValueError, "count must be at least 1, got 0"),
        (lambda: gamma(2, 1).lengths(1, seed=-1), ValueError, "seed must be at least 0, got -1"),
        (lambda: gamma(2, 1).expected_efficiency(0), ValueError, "batch_size must be at least 1, got 0"),
        (lambda: gamma(2, 1).expected_efficiency(2.5), TypeError, "batch_size must be an integer"),
        (lambda: lognormal(1, 50).lengths(100), ValueError, r"draws a length of .* \(2\*\*53\)"),
        (lambda: lognormal(1, 50).expected_efficiency(4), ValueError, "no law of lengths: its mean is inf"),
        (lambda: resample([1], 0), ValueError, "count must be at least 1"),
        (lambda: resample([1.5], 3), TypeError, "must be integers"),
        (lambda: expected_efficiency([1, 2], -1), ValueError, "batch_size must be at least 1, got -1"),
        (lambda: expected_efficiency([0, 0], 2), ValueError, "all sequences are empty"),
        (lambda: expected_efficiency([], 2), ValueError, "at least one sequence"),
        (lambda: fit([0, 0]), ValueError, "all sequences are empty: a distribution needs"),
        (lambda: fit([7, 7, 0, 7]), ValueError, "all 3 lengths are equal to 7"),
        (lambda: fit([5]), ValueError, "all 1 lengths are equal to 5"),
        (lambda: fit([10**9, 10**9 + 1]), ValueError, "all lengths are between 1000000000 and 1000000001"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(make: "object", error: type[Exception], message: str) -> None:
    """With the name of the setting and what came."""
    with pytest.raises(error, match=message):
        make()


# --- what random batches use ---


@pytest.mark.parametrize("law", PUBLISHED, ids=str)
def test_efficiency_is_the_published_one(law: Distribution) -> None:
    """Unno's table for gamma lengths, and its lognormal counterpart, whatever the scale."""
    assert [law.expected_efficiency(size) for size in SIZES] == pytest.approx(PUBLISHED[law], abs=6e-4)


@given(st.integers(1, 10**6), st.floats(0.01, 1000))
def test_exponential_lengths_use_one_over_the_harmonic_number(size: int, scale: float) -> None:
    """E[max of B] is H_B times the mean (Rényi 1953)."""
    harmonic = (1 / np.arange(1, size + 1)).sum()

    assert gamma(1, scale).expected_efficiency(size) * harmonic == pytest.approx(1, abs=1e-10)


@settings(max_examples=20)
@given(laws, st.booleans())
def test_a_batch_of_one_has_no_padding(law: Distribution, discrete: bool) -> None:
    """And the integral or sum that says so finds the mean, on which the quadrature is judged."""
    assert law.expected_efficiency(1, discrete=discrete) == pytest.approx(1)
    if not isinstance(law, negative_binomial):
        assert law._expected_max(1, False) == pytest.approx(law.mean(), rel=1e-11)
    else:
        assert law._expected_max(1, True) == pytest.approx(law.mean(), rel=1e-10)


@pytest.mark.parametrize("law", [lognormal(0, 5), lognormal(2, 4), gamma(0.01, 1), gamma(1e6, 1e-3), gamma(1e-3, 1e4)])
def test_extreme_distributions_are_integrated_too(law: Distribution) -> None:
    """Where the mean is owed to one length in a million, and where all lengths are nearly the same."""
    assert law._expected_max(1, False) == pytest.approx(law.mean(), rel=1e-11)


@settings(max_examples=5)
@given(laws.filter(lambda law: not isinstance(law, negative_binomial)), st.integers(2, 500))
def test_quadrature_agrees_with_scipys(law: Distribution, size: int) -> None:
    """With adaptive quadrature of the twin's quantile function, ``E[max] = integral of F^-1(v ** (1/B))``."""

    quantile = twin(law).isf

    def largest(log_miss: float) -> float:
        return quantile(-np.expm1(np.log1p(-np.exp(log_miss)) / size)) * np.exp(log_miss)

    parts = [-80, -40, -20, -8, -4, -2, -1, -0.3, -0.05, -1e-3, -1e-6, -1e-12]
    expected = sum(integrate.quad(largest, a, b, limit=200)[0] for a, b in pairwise(parts))

    assert law._expected_max(size, False) == pytest.approx(expected, rel=1e-7)


@settings(max_examples=20)
@given(laws.filter(lambda law: law.mean() < 500), st.integers(1, 300))
def test_whole_lengths_are_summed(law: Distribution, size: int) -> None:
    """The mean of the largest, length by length, from scipy's distribution function."""
    support = np.arange(0, 60_000)
    below = np.where(support < 1, 0, twin(law).cdf(support + 0.5))
    above = np.where(support < 1, 1, twin(law).sf(support + 0.5))
    largest = -np.expm1(size * np.log1p(-np.minimum(above, 0.5)))
    largest = np.where(above < 0.5, largest, 1 - below**size)
    if above[-1] * size * 1e6 > 1e-9:
        return  # a tail longer than this twin

    assert law._expected_max(size, True) == pytest.approx(largest.sum(), rel=1e-9)


@pytest.mark.parametrize(
    "law",
    [lognormal(9, 1.5), gamma(0.5, 2e4), gamma(400, 50), negative_binomial(2, 1e-4)],
    ids=str,
)
def test_beyond_the_sum_comes_an_integral(law: Distribution, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lengths that are too many to sum up are integrated, to the same 1e-8."""
    summed = law.expected_efficiency(32, discrete=True)
    monkeypatch.setattr(d, "_EXACT_SUM", 2**12)

    assert law.expected_efficiency(32, discrete=True) == pytest.approx(summed, rel=1e-8)


@given(laws.filter(lambda law: not isinstance(law, negative_binomial)), st.integers(2, 64))
def test_rounding_long_lengths_changes_little(law: Distribution, size: int) -> None:
    """Whole lengths use what the values use, for long lengths: both are computed for the same thing."""
    if law.mean() > 200 and law.quantile(np.array([0.001]))[0] > 20:
        expected = law.expected_efficiency(size)

        assert law.expected_efficiency(size, discrete=True) == pytest.approx(expected, rel=1e-3)


def test_a_larger_batch_uses_less() -> None:
    """Strictly, for every family; an unspread one uses all."""
    for law in (gamma(3, 5), lognormal(2, 0.4), negative_binomial(2, 0.2)):
        used = [law.expected_efficiency(size) for size in SIZES]

        assert used == sorted(used, reverse=True)
        assert len(set(used)) == len(used)
    assert negative_binomial(2, 1).expected_efficiency(100) == pytest.approx(1)


# --- lengths at hand ---


@given(small_lengths, st.integers(1, 8))
def test_the_efficiency_of_a_set_is_that_of_all_its_orders(lengths: list[int], size: int) -> None:
    """Tokens over the mean of the cells of every order, cut into batches, the last one included."""
    filled = [length for length in lengths if length]
    starts = range(0, len(filled), size)
    cells = [sum(max(order[i : i + size]) * len(order[i : i + size]) for i in starts) for order in permutations(filled)]

    assert expected_efficiency(lengths, size) == pytest.approx(sum(filled) / np.mean(cells), rel=1e-12)


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=60), st.integers(1, 60))
def test_the_largest_without_replacement_is_hypergeometric(values: list[int], size: int) -> None:
    """In exact integers: C(rank, B - 1) of the C(N, B) sets have their largest at that rank."""
    values, size = sorted(values), min(size, len(values))
    exact = sum(value * comb(rank, size - 1) for rank, value in enumerate(values)) / comb(len(values), size)
    distinct, counts = np.unique(values, return_counts=True)

    assert d._expected_max_of(distinct, np.cumsum(counts), size) == pytest.approx(exact, rel=1e-10)


def test_padding_uses_what_is_expected() -> None:
    """The mean over 300 epochs of its plans, with three standard errors."""
    lengths = gamma(1.5, 8).lengths(1003, seed=2)
    cells = np.array([Padding(16).plan(lengths, epoch=epoch).cells for epoch in range(300)])
    error = cells.std() / np.sqrt(len(cells))

    assert lengths.sum() / expected_efficiency(lengths, 16) == pytest.approx(cells.mean(), abs=3 * error)


def test_many_lengths_use_what_their_distribution_does() -> None:
    """Drawing without replacement from 200,000 is nearly drawing from the distribution."""
    law = gamma(2, 12)

    assert expected_efficiency(law.lengths(200_000), 32) == pytest.approx(
        law.expected_efficiency(32, discrete=True), rel=5e-3
    )


def test_one_batch_of_all_is_as_long_as_the_longest() -> None:
    """From a batch size of N on."""
    for size in (3, 4, 2**40):
        assert expected_efficiency([1, 0, 2, 6], size) == pytest.approx(9 / 18)


@given(st.lists(st.integers(0, 50), min_size=1, max_size=20), st.integers(1, 100), st.integers(0, 2**64))
def test_a_resample_is_drawn_from_the_data(lengths: list[int], count: int, seed: int) -> None:
    """Nothing else comes, as many as asked for, the same for the same seed."""
    drawn = resample(lengths, count, seed=seed)

    assert len(drawn) == count
    assert set(drawn.tolist()) <= set(lengths)
    assert drawn.tolist() == resample(lengths, count, seed=seed).tolist()


def test_a_resample_takes_each_length_as_often() -> None:
    """Ten lengths 2,000 times each, within five standard deviations."""
    counts = np.bincount(resample(np.arange(10), 20_000), minlength=10)

    assert abs(counts - 2000).max() < 5 * np.sqrt(1800)


# --- fits ---


def by_family(lengths: "list[int] | np.ndarray") -> dict[type[Distribution], Fit]:
    return {type(found.distribution): found for found in fit(lengths)}


@pytest.mark.parametrize(
    ("law", "tolerance"),
    [(gamma(2, 40), 0.02), (gamma(30, 5), 0.02), (lognormal(4, 0.6), 0.01), (negative_binomial(3, 0.05), 0.03),
     (negative_binomial(0.3, 0.01), 0.03)],
    ids=str,
)  # fmt: skip
def test_a_fit_finds_the_distribution_again(law: Distribution, tolerance: float) -> None:
    """Its family first, with its parameters, from 50,000 lengths."""
    best = fit(law.lengths(50_000, seed=3))[0]

    assert type(best.distribution) is type(law)
    assert list(vars(best.distribution).values()) == pytest.approx(list(vars(law).values()), rel=tolerance)
    assert best.ks_distance < 0.01


@settings(max_examples=20)
@given(st.lists(st.integers(1, 300), min_size=2, max_size=60).filter(lambda v: len(set(v)) > 1))
def test_fits_are_the_most_likely(lengths: list[int]) -> None:
    """No step of 1% away from the parameters is more likely, by scipy's densities; fits come by KS distance."""
    fits = fit(lengths)
    assert [f.ks_distance for f in fits] == sorted(f.ks_distance for f in fits)
    assert {type(f.distribution) for f in fits} == set(FAMILIES)
    for law in (f.distribution for f in fits):
        if isinstance(law, negative_binomial) and np.var(lengths) <= np.mean(lengths) - 1:
            continue  # the limit, see below
        names, values = list(vars(law)), list(vars(law).values())
        best = likelihood(law, lengths)
        for steps in [(1.01, 1), (0.99, 1), (1, 1.01), (1, 0.99)]:
            near = [min(v * s, 1.0) if n == "p" else v * s for n, v, s in zip(names, values, steps, strict=True)]
            assert likelihood(type(law)(*near), lengths) <= best + 1e-6 * abs(best) + 1e-9


@pytest.mark.parametrize("spread", [3, 600, 10**6])
@settings(max_examples=20)
@given(st.data())
def test_the_gamma_fit_solves_its_equation(spread: int, data: st.DataObject) -> None:
    """``log k - digamma(k) = log(mean) - mean(log)``, for nearly equal and for very different lengths."""
    lengths = data.draw(
        st.lists(st.integers(1000, 1000 + spread), min_size=2, max_size=9).filter(lambda v: len({*v}) > 1)
    )
    shape = by_family(lengths)[gamma].distribution.shape
    gap = np.log(np.mean(lengths)) - np.mean(np.log(lengths))

    # Both sides are differences of logarithms of a size of 15.
    assert np.log(shape) - special.digamma(shape) == pytest.approx(gap, rel=1e-10, abs=2e-14)


def likelihood(law: Distribution, lengths: list[int]) -> float:
    density = twin(law).logpmf if isinstance(law, negative_binomial) else twin(law).logpdf
    return float(np.sum(density(lengths)))


@pytest.mark.parametrize("name", ["ud_en_ewt", "sft_oasst1_conversation"])
def test_fits_agree_with_scipys(name: str) -> None:
    """With the optimiser of scipy.stats and its Kolmogorov-Smirnov distance, on real lengths."""
    lengths = load_corpus(name)
    fits = by_family(lengths)
    shape, _, scale = stats.gamma.fit(lengths, floc=0)
    sigma, _, median = stats.lognorm.fit(lengths, floc=0)
    found = optimize.minimize(
        lambda x: -stats.nbinom.logpmf(lengths - 1, np.exp(x[0]), 1 / (1 + np.exp(x[1]))).mean(),
        x0=[0.0, 3.0],
        method="Nelder-Mead",
        options={"xatol": 1e-8, "fatol": 1e-14},
    ).x
    r, p = np.exp(found[0]), 1 / (1 + np.exp(found[1]))

    assert vars(fits[gamma].distribution) == pytest.approx({"shape": shape, "scale": scale}, rel=1e-5)
    assert vars(fits[lognormal].distribution) == pytest.approx({"mu": np.log(median), "sigma": sigma}, rel=1e-8)
    assert vars(fits[negative_binomial].distribution) == pytest.approx({"r": r, "p": p}, rel=1e-5)


@settings(max_examples=30)
@given(st.lists(st.integers(0, 40), min_size=2, max_size=40).filter(lambda v: len({*v} - {0}) > 1))
def test_a_fit_is_judged_by_its_whole_lengths(lengths: list[int]) -> None:
    """Distance and likelihood, by brute force over every length, from the distribution function alone."""
    filled = np.array([length for length in lengths if length])
    for law, log_likelihood, ks_distance in fit(lengths):
        x = np.arange(0, 60)
        gaps = [abs((filled <= value).mean() - float(law.length_cdf(value))) for value in x]
        mass = law.length_cdf(filled) - law.length_cdf(filled - 1)

        assert ks_distance == pytest.approx(max(gaps), abs=1e-12)
        if mass.min() > 1e-6:
            assert log_likelihood == pytest.approx(np.log(mass).sum())


def test_far_tails_keep_their_likelihood() -> None:
    """A length at which the distribution function rounds to 1 is unlikely by the right amount."""
    found = by_family([*[10, 11, 12, 13] * 10, 60])[gamma]
    law = found.distribution
    x = np.array([*[10, 11, 12, 13] * 10, 60])
    mass = np.array([integrate.quad(twin(law).pdf, value - 0.5, value + 0.5, epsabs=0)[0] for value in x])

    assert law.length_cdf(59) > 1 - 1e-6
    assert found.log_likelihood == pytest.approx(np.log(mass).sum(), rel=1e-10)


def test_lengths_of_little_spread_are_poissons() -> None:
    """The documented limit: r is 10,000 times the mean of the lengths less one."""
    lengths = np.repeat([20, 21, 22], [1, 2, 1])
    law = by_family(lengths)[negative_binomial].distribution

    assert law == negative_binomial(2e5, 2e5 / (2e5 + 20))
    x = np.arange(1, 60)
    assert np.abs(law.cdf(x) - stats.poisson(20).cdf(x - 1)).max() < 1e-4


@pytest.mark.parametrize(
    "lengths",
    [
        [1, 2],
        [1] * 9999 + [2],
        [100_000] * 9999 + [100_001],
        [1] * 1000 + [10**9],
        [10**12, 10**12 + 10**7],
        [1, 2**60],
    ],
    ids=lambda lengths: f"{len(lengths)} from {lengths[0]} to {lengths[-1]}",
)
def test_strange_lengths_are_fitted(lengths: list[int]) -> None:
    """Without a warning, and with finite numbers."""
    for law, log_likelihood, ks_distance in fit(lengths):
        assert np.isfinite([*vars(law).values(), log_likelihood]).all()
        assert 0 <= ks_distance <= 1


@pytest.mark.parametrize("name", corpus_names())
def test_real_lengths_are_fitted(name: str) -> None:
    """Some family comes within 0.11 of each corpus, of which random batches of 32 use more than a tenth."""
    lengths = load_corpus(name)

    assert fit(lengths)[0].ks_distance < 0.11
    assert 0.1 < expected_efficiency(lengths, 32) < 1


def test_scipy_stats_is_not_loaded() -> None:
    """It takes seconds: no function here needs it."""
    code = (
        "import sys; from seqbatch import distributions as d, fitting; early = 'scipy' in sys.modules;"
        "lengths = d.gamma(2, 9).lengths(99); fitting.fit(lengths); d.expected_efficiency(lengths, 4);"
        "d.negative_binomial(2, 0.1).expected_efficiency(4); d.lognormal(2, 1).expected_efficiency(4);"
        "print(early, 'scipy.stats' in sys.modules)"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout

    assert printed.split() == ["False", "False"]
