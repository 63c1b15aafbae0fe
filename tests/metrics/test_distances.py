"""Metrics against independent float64 computations, torch-fidelity's and SciPy's, degenerate sets included."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import linalg
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric

from sit.metrics import distances
from sit.metrics.distances import (
    RootedMoments,
    frechet,
    frechet_at_infinity,
    frechet_distance,
    inception_score,
    kernel_distance,
)
from sit.metrics.estimate import jackknife_groups
from sit.metrics.moments import GroupSums, Moments
from sit.utils.errors import UserError

rng = np.random.default_rng(0)


def features(count: int, dim: int, shift: float = 0.0) -> np.ndarray:
    mixing = np.random.default_rng(dim).normal(size=(dim, dim))
    return (rng.normal(size=(count, dim)) @ mixing + shift).astype(np.float32)


def test_frechet_against_scipys_matrix_square_root():
    a, b = Moments.of(features(300, 24)), Moments.of(features(200, 24, 0.3))
    cross = linalg.sqrtm(a.sigma @ b.sigma)
    expected = ((a.mu - b.mu) ** 2).sum() + np.trace(a.sigma + b.sigma - 2 * cross.real)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


def test_frechet_against_torch_fidelity():
    a, b = features(400, 32), features(300, 32, 0.1)
    theirs = fid_statistics_to_metric(
        *(fid_features_to_statistics(torch.from_numpy(x).double()) for x in (a, b)), verbose=False
    )["frechet_inception_distance"]
    assert frechet_distance(Moments.of(a), Moments.of(b)) == pytest.approx(theirs, rel=1e-6)


def test_frechet_of_gaussians_in_closed_form():
    """Commuting covariances: the distance is that of the square roots of the variances."""
    variances = rng.uniform(0.1, 3, size=(2, 40))
    mus = rng.normal(size=(2, 40))
    expected = ((mus[0] - mus[1]) ** 2).sum() + ((variances[0] ** 0.5 - variances[1] ** 0.5) ** 2).sum()
    a, b = (Moments(mu, np.diag(variance)) for mu, variance in zip(mus, variances, strict=True))
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)


def test_frechet_of_singular_covariances():
    """Fewer samples than dimensions: computed independently in the subspace that the samples span."""
    a, b = features(12, 30).astype(np.float64), features(9, 30, 0.5).astype(np.float64)
    ca, cb = a - a.mean(0), b - b.mean(0)
    singular = np.linalg.svd(ca @ cb.T / np.sqrt((len(a) - 1) * (len(b) - 1)), compute_uv=False)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() - 2 * singular.sum()
    expected += (ca**2).sum() / (len(a) - 1) + (cb**2).sum() / (len(b) - 1)
    assert frechet_distance(Moments.of(a), Moments.of(b)) == pytest.approx(expected, rel=1e-6)
    scale = (ca**2).sum()
    assert abs(frechet_distance(Moments.of(a), Moments.of(a))) < 1e-6 * scale


def test_the_error_is_the_spread_over_repeated_draws():
    reference = RootedMoments.of(Moments(np.zeros(4), np.eye(4)))
    group = jackknife_groups(1000)
    found = [frechet(GroupSums.of(rng.normal(size=(1000, 4)) + 0.5, group), reference) for _ in range(60)]
    spread = np.std([one.value for one in found])
    assert np.mean([one.standard_error for one in found]) == pytest.approx(spread, rel=0.35)


def test_infinity_takes_away_the_bias_of_few_samples():
    reference = RootedMoments.of(Moments(np.zeros(16), np.eye(16)))
    group = jackknife_groups(400)
    draws = [GroupSums.of(rng.normal(size=(400, 16)), group) for _ in range(20)]
    plain = [frechet(sums, reference) for sums in draws]
    infinite = [frechet_at_infinity(sums, reference, one) for sums, one in zip(draws, plain, strict=True)]
    assert abs(np.mean([one.value for one in infinite])) < 0.1 * np.mean([one.value for one in plain])


@pytest.mark.parametrize("count, told", [(47, False), (48, True)])
def test_infinity_has_no_error_with_few_samples_for_the_dimensions(count, told):
    reference = RootedMoments.of(Moments(np.zeros(16), np.eye(16)))
    sums = GroupSums.of(rng.normal(size=(count, 16)), jackknife_groups(count))
    plain = frechet(sums, reference)
    assert plain.error and bool(frechet_at_infinity(sums, reference, plain).replicates) is told


def score_by_hand(part):
    p = np.exp(part) / np.exp(part).sum(1, keepdims=True)
    return np.exp((p * (np.log(p) - np.log(p.mean(0)))).sum(1).mean())


def test_inception_score_by_hand_in_splits_of_5000():
    logits = (rng.normal(size=(10_000, 12)) * 2).astype(np.float32)
    parts = np.split(logits.astype(np.float64), 2)
    assert inception_score(logits).value == pytest.approx(np.mean([score_by_hand(part) for part in parts]), rel=1e-9)
    assert inception_score(logits[:500]).value == pytest.approx(score_by_hand(parts[0][:500]), rel=1e-9)
    group = jackknife_groups(10_000)
    found = inception_score(logits, group)
    left = [np.mean([score_by_hand(part[which != 3]) for part, which in zip(parts, np.split(group, 2), strict=True)])]
    assert 10 * found.value - 9 * left[0] == pytest.approx(found.replicates[3], abs=1e-6)


def test_inception_score_of_a_folder_that_is_sorted_by_class():
    """As much as in any other order, where consecutive splits of one class each would give about 1."""
    labels = np.repeat(np.arange(10), 1000)
    logits = 6 * np.eye(10, dtype=np.float32)[labels] + rng.normal(size=(10_000, 10)).astype(np.float32)
    mixed = inception_score(logits[rng.permutation(10_000)]).value
    assert mixed > 7
    assert score_by_hand(logits[:5000].astype(np.float64)) < 5, "what a split of half the classes would give"
    assert inception_score(logits).value == pytest.approx(mixed, rel=0.01)
    assert not distances.sorted_by_class(np.arange(10_000) % 10)
    assert not distances.sorted_by_class(np.zeros(100, dtype=int))


def test_degenerate_sets():
    a = features(50, 6)
    assert abs(frechet_distance(Moments.of(a), Moments.of(a))) < 1e-6 * np.trace(Moments.of(a).sigma)


def test_kid_is_the_unbiased_estimate():
    a, b = features(80, 10), features(80, 10, 0.2)

    def kernel(x, y):
        return (x.astype(np.float64) @ y.T.astype(np.float64) / 10 + 1) ** 3

    n = 80
    expected = (kernel(a, a).sum() - np.trace(kernel(a, a)) + kernel(b, b).sum() - np.trace(kernel(b, b))) / (
        n * (n - 1)
    )
    expected -= 2 * kernel(a, b).mean()
    assert kernel_distance(a, b).value == pytest.approx(expected, rel=1e-9)  # every subset is the whole set


def test_the_error_of_kid_leaves_groups_out():
    """Every subset is the whole set: without a group it is the estimate of the others."""
    a, b = features(80, 4), features(80, 4, 0.2)
    group = rng.permutation(80) % 5
    found = kernel_distance(a, b, group)
    for number in range(5):
        left, m = (a[group != number].astype(np.float64) @ a[group != number].T.astype(np.float64) / 4 + 1) ** 3, 64
        real = (b.astype(np.float64) @ b.T.astype(np.float64) / 4 + 1) ** 3
        cross = (a[group != number].astype(np.float64) @ b.T.astype(np.float64) / 4 + 1) ** 3
        without = (left.sum() - np.trace(left)) / (m * (m - 1)) + (real.sum() - np.trace(real)) / (80 * 79)
        without -= 2 * cross.mean()
        assert found.replicates[number] == pytest.approx(5 * found.value - 4 * without, rel=1e-6)


def test_kid_is_torch_fidelitys_with_its_subsets():
    a, b = features(300, 10), features(250, 10, 0.2)
    theirs = kid_features_to_metric(
        *(torch.from_numpy(x).double() for x in (a, b)), kid_subset_size=100, kid_subsets=20, verbose=False
    )["kernel_inception_distance_mean"]
    found = kernel_distance(a, b, jackknife_groups(300), size=100, subsets=20)
    assert found.value == pytest.approx(theirs, rel=1e-9)
    assert len(found.replicates) == 10


def test_too_few_images():
    with pytest.raises(UserError, match="needs at least 2 images, and there are 1"):
        distances.enough(1, 2, "a Fréchet distance")
