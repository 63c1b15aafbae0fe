"""Paired differences and their verdicts against SciPy's tests, tables of power, and draws."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from sit.metrics.estimate import Estimate, of_mean
from sit.metrics.paired import Difference, holm, over_images, over_samples, over_seeds, power, seeds_needed
from sit.metrics.verdict import verdict, verdicts

rng = np.random.default_rng(0)


def test_seeds_against_scipys_paired_t():
    first, second = {1: 5.0, 2: 6.0, 3: 5.5, 4: 7.0, 9: 1.0}, {4: 6.1, 3: 5.2, 2: 5.1, 1: 4.9, 8: 2.0}
    found = over_seeds(first, second)
    expected = stats.ttest_rel([4.9, 5.1, 5.2, 6.1], [5.0, 6.0, 5.5, 7.0])
    assert found.value == pytest.approx(expected.statistic * found.standard_error)
    assert found.p_value == pytest.approx(expected.pvalue) and found.count == 4
    low, high = expected.confidence_interval(0.95)
    assert (found.value - found.error, found.value + found.error) == pytest.approx((low, high))
    with pytest.raises(ValueError, match="at least two training seeds, not 1"):
        over_seeds({1: 1.0, 2: 2.0}, {2: 2.0, 3: 3.0})


def test_images_against_scipys_paired_t():
    first = rng.normal(size=200)
    second = first + 0.1 * rng.normal(size=200) - 0.02
    found, expected = over_images(first, second), stats.ttest_rel(second, first)
    assert found.p_value == pytest.approx(expected.pvalue) and found.over == "images"
    with pytest.raises(ValueError, match="200 images can't be paired with those of 199"):
        over_images(first, second[1:])


def test_what_both_runs_share_drops_out_of_the_error():
    group, shared = np.arange(1000) % 10, rng.normal(size=1000)
    first, second = of_mean(shared, group), of_mean(shared + 0.5, group)
    found = over_samples(first, second)
    assert found.value == pytest.approx(0.5) and found.error == pytest.approx(0, abs=1e-12)
    assert first.error > 0.01
    with pytest.raises(ValueError, match="10 groups can't be paired with 0"):
        over_samples(first, Estimate(1.0))


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []
    assert holm([float("nan"), 0.01]) == [1.0, 0.02]


@pytest.mark.parametrize(
    ("effect", "arms", "needed"),
    # Cohen's tables (1988, table 2.4.1) for two arms at 80 % power; G*Power 3.1 for paired differences
    [(0.5, 2, 64), (0.8, 2, 26), (0.2, 2, 394), (0.5, 1, 34), (0.8, 1, 15), (1.0, 1, 10)],
)
def test_seeds_needed_against_published_tables(effect, arms, needed):
    assert seeds_needed(1.0, effect, arms=arms) == needed


def test_power_against_draws():
    draws = rng.normal(0.15, 0.2, size=(20_000, 8))
    told = stats.ttest_1samp(draws, 0, axis=1).pvalue < 0.05
    assert power(8, 0.2, 0.15) == pytest.approx(told.mean(), abs=0.01)
    assert seeds_needed(0.0, 0.15) == 2 and seeds_needed(1e6, 0.15) is None


def integrated_power(count: int, effect: float, level: float, arms: int) -> float:
    """By Gauss's rule over the standard deviation that the test estimates, which is a chi variable."""
    degrees = arms * (count - 1)
    away, limit = effect / np.sqrt(arms / count), stats.t.ppf(1 - level / 2, degrees)
    ends = np.linspace(*(stats.chi.ppf(q, degrees) for q in (1e-13, 1 - 1e-13)), 9)
    nodes, weights = np.polynomial.legendre.leggauss(120)
    half = np.diff(ends)[:, None] / 2
    drawn = half * nodes + (ends[1:] + ends[:-1])[:, None] / 2
    beyond = limit * drawn / np.sqrt(degrees)
    told = stats.norm.sf(beyond - away) + stats.norm.cdf(-beyond - away)
    return float((half * weights * told * stats.chi.pdf(drawn, degrees)).sum())


@pytest.mark.parametrize("level", (0.05, 0.01, 0.005, 0.05 / 48))
@pytest.mark.parametrize("arms", (1, 2))
def test_power_against_an_integral(level, arms):
    """Where SciPy's tails are not numbers too; and the seeds needed are where it passes the power that is wanted."""
    for effect in (0.0, 0.1, 0.3, 1.0, 1.7, 2.5, 4.55, 10.0):
        for count in (2, 3, 4, 5, 8, 9, 12, 13, 14, 20, 60, 400):
            found = power(count, 1.0, effect, level=level, arms=arms)
            assert found == pytest.approx(integrated_power(count, effect, level, arms), abs=1e-4)
            assert power(count, 1.0, -effect, level=level, arms=arms) == found
        if effect >= 0.3:
            needed = seeds_needed(1.0, effect, level=level, arms=arms)
            assert integrated_power(needed, effect, level, arms) >= 0.8
            assert needed == 2 or integrated_power(needed - 1, effect, level, arms) < 0.8


def test_seeds_needed_have_a_limit():
    assert seeds_needed(1.0, 0.0225, most=10_000) is None and 15_000 < seeds_needed(1.0, 0.0225, most=20_000) < 16_000
    with pytest.raises(ValueError, match="no power of 2 seeds, spread nan"):
        seeds_needed(float("nan"), 0.1)


def test_no_spread_proves_nothing():
    """Shares of 200 samples and two training seeds: at most a table in twenty has a false verdict."""
    equal = over_seeds({0: 0.960, 1: 0.954}, {0: 0.963, 1: 0.957})
    rounded = over_seeds({0: 0.1, 1: 0.3}, {0: 0.2, 1: 0.4})
    assert equal.spread == 0 < rounded.spread < 1e-12 and equal.p_value == rounded.p_value == 1
    chances = {"Class accuracy": 0.95, "Precision": 0.6, "Recall": 0.8, "Coverage": 0.9}
    metrics, false = {metric: metric for metric in chances}, 0
    for _ in range(400):
        drawn = rng.binomial(200, list(chances.values()), size=(2, 2, 4)) / 200  # run, seed, metric
        first, second = ([dict(enumerate(run[:, i])) for i in range(4)] for run in drawn)
        said = verdicts({m: over_seeds(a, b) for m, a, b in zip(metrics, first, second, strict=True)}, metrics)
        false += any(not word.startswith("not told apart") for word in said.values())
    assert false <= 0.08 * 400  # a twentieth, and three standard errors


def test_verdicts_in_words():
    clear, unclear = Difference(-0.4, 0.2, 5, "training seeds"), Difference(-0.05, 0.2, 3, "training seeds")
    assert verdict(clear, lower=True) == "better" and verdict(clear, lower=False) == "worse"
    assert verdict(clear, lower=True, p_value=0.06).startswith("not told apart: ")
    needed = seeds_needed(0.2, 0.05)
    said = f"not told apart: {needed - 3} more training seeds would tell it at 80 % power"
    assert verdict(unclear, lower=True) == said
    assert verdict(unclear, lower=True, further=False) == "not told apart"
    harder = seeds_needed(0.2, 0.05, level=0.01)
    assert harder > needed and f" {harder - 3} more" in verdict(unclear, lower=True, level=0.01)
    almost = Difference(-0.2, 0.2, seeds_needed(0.2, 0.2), "training seeds")
    assert verdict(almost, lower=True, p_value=0.06).startswith("not told apart: 1 more training seed would tell")
    one_run = Difference(-0.4, 0.2, 10, "samples")
    assert verdict(one_run, lower=True) == "better, for these weights only"
    assert verdict(Difference(0.0, 0.2, 10, "images"), lower=True) == "not told apart, for these weights only"
    wild = Difference(0.1, 1e9, 3, "training seeds")
    said = "not told apart: more training seeds than can be had would tell it"
    assert verdict(wild, lower=True) == said
    for value, spread in ((0.0, 1.0), (float("nan"), 1.0), (0.1, float("nan")), (float("inf"), float("nan"))):
        assert verdict(Difference(value, spread, 3, "training seeds"), lower=True) == "not told apart"


def test_a_table_is_adjusted_as_one():
    just = Difference(-0.25, 0.2, 5, "training seeds")
    assert 0.025 < just.p_value < 0.05
    table = {"a": just, "b": Difference(0.0, 0.2, 5, "training seeds"), "c": just}
    assert verdicts({"a": just}, {"a": "FID"}) == {"a": "better"}
    said = verdicts(table, {"a": "FID", "b": "Recall (digits features)", "c": "Class accuracy"})
    assert said["a"].startswith("not told apart: ") and said["c"] == "not told apart" == said["b"]
    assert str(seeds_needed(0.2, 0.25, level=0.05 / 3) - 5) in said["a"], "one of three comparisons has a third of it"
    with pytest.raises(ValueError, match="whether less of `Beauty` is better"):
        verdicts({"a": just}, {"a": "Beauty"})
