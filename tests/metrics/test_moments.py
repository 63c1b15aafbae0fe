"""Sums by group against moments of the features themselves."""

from __future__ import annotations

import numpy as np
import pytest

from sit.metrics.distances import RootedMoments, frechet, frechet_at_infinity, frechet_distance, frechet_gradient
from sit.metrics.moments import GroupSums, Moments

rng = np.random.default_rng(0)
FEATURES = (rng.normal(size=(300, 6)) @ rng.normal(size=(6, 6)) + 3).astype(np.float32)
GROUP = rng.integers(5, size=300)
REFERENCE = RootedMoments.of(Moments.of(rng.normal(size=(200, 6)) @ rng.normal(size=(6, 6)) + 2))


def same(found: Moments, features: np.ndarray) -> None:
    np.testing.assert_allclose(found.mu, features.mean(axis=0, dtype=np.float64), rtol=1e-12)
    np.testing.assert_allclose(found.sigma, np.cov(features.astype(np.float64), rowvar=False), rtol=1e-9, atol=1e-10)


def test_moments_of_all_and_without_each_group():
    sums = GroupSums.of(FEATURES, GROUP, block=64)
    same(sums.moments(), FEATURES)
    for number in range(5):
        same(sums.without(sums.pooled(), number), FEATURES[GROUP != number])


def test_sums_of_two_processes():
    parts = [GroupSums.empty(5, 6), GroupSums.empty(5, 6)]
    for part, rows in zip(parts, (slice(0, 130), slice(130, 300)), strict=True):
        part.add(FEATURES[rows], GROUP[rows])
    same((parts[0] + parts[1]).moments(), FEATURES)
    with pytest.raises(ValueError, match="different origins"):
        parts[0] + GroupSums.of(FEATURES, GROUP)


def test_means_that_are_large_against_the_deviations():
    far = FEATURES.astype(np.float64) + 1e6
    same(GroupSums.of(far, GROUP).moments(), far)


def test_the_distance_from_sums_and_without_each_group():
    found = frechet(GroupSums.of(FEATURES, GROUP), REFERENCE)
    whole = frechet_distance(Moments.of(FEATURES), REFERENCE.moments)
    left = [frechet_distance(Moments.of(FEATURES[GROUP != number]), REFERENCE.moments) for number in range(5)]
    share = 300 / np.bincount(GROUP)
    assert found.value == pytest.approx(whole, rel=1e-9)
    infinite = frechet_at_infinity(GroupSums.of(FEATURES, GROUP), REFERENCE, found)
    assert infinite.value == pytest.approx(5 * whole - ((1 - 1 / share) * left).sum(), rel=1e-9)
    assert infinite.error == pytest.approx(found.error)
    alone = frechet(GroupSums.of(FEATURES), REFERENCE)
    assert alone.value == pytest.approx(whole, rel=1e-9) and alone.error is None


def test_the_gradient_against_finite_differences():
    at = Moments.of(FEATURES)
    by_mean, by_covariance = frechet_gradient(at, REFERENCE)
    step, direction = 1e-6, rng.normal(size=(6, 6))
    direction = direction + direction.T
    for d_mu, d_sigma, expected in (
        (direction[0], 0 * direction, by_mean @ direction[0]),
        (0 * direction[0], direction, (by_covariance * direction).sum()),
    ):
        ahead, behind = (
            frechet_distance(Moments(at.mu + sign * step * d_mu, at.sigma + sign * step * d_sigma), REFERENCE)
            for sign in (1, -1)
        )
        assert (ahead - behind) / (2 * step) == pytest.approx(expected, rel=1e-6)


def test_the_error_is_that_of_each_samples_influence():
    """Computed from single samples; equal groups of one sample each give the plain standard error."""
    centered = FEATURES - FEATURES.mean(axis=0, dtype=np.float64)
    by_mean, by_covariance = frechet_gradient(Moments.of(FEATURES), REFERENCE)
    influence = centered @ by_mean + np.einsum("ni,ij,nj->n", centered, by_covariance, centered)
    found = frechet(GroupSums.of(FEATURES, np.arange(300), block=50), REFERENCE)
    assert found.standard_error == pytest.approx(influence.std(ddof=1) / np.sqrt(300), rel=1e-6)
    grouped = frechet(GroupSums.of(FEATURES, np.arange(300) % 10), REFERENCE)
    means = [influence[np.arange(300) % 10 == number].mean() for number in range(10)]
    assert grouped.standard_error == pytest.approx(np.std(means, ddof=1) / np.sqrt(10), rel=1e-6)
    assert grouped.value == pytest.approx(frechet_distance(Moments.of(FEATURES), REFERENCE))
