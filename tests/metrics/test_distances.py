"""Metrics against independent float64 computations, torch-fidelity's and SciPy's, degenerate sets included."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import linalg
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from sit.metrics import distances
from sit.metrics.distances import Moments, frechet_distance, inception_score, kernel_distance, precision_recall
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
    reference = Moments(np.zeros(4), np.eye(4))
    draws = [rng.normal(size=(1000, 4)) + 0.5 for _ in range(60)]
    found = np.array([distances.frechet_with_error(draw, reference) for draw in draws])
    assert found[:, 1].mean() == pytest.approx(found[:, 0].std(), rel=0.35)


def test_infinity_takes_away_the_bias_of_few_samples():
    reference = Moments(np.zeros(16), np.eye(16))
    draws = [rng.normal(size=(400, 16)) for _ in range(20)]
    plain = np.mean([frechet_distance(Moments.of(draw), reference) for draw in draws])
    infinite = np.array([distances.frechet_at_infinity(draw, reference) for draw in draws])
    assert abs(infinite[:, 0].mean()) < 0.25 * plain
    assert (infinite[:, 1] > 0).all()


def test_inception_score_in_float64():
    logits = rng.normal(size=(500, 12)) * 2
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    scores = []
    for part in np.split(p, 10):
        scores.append(np.exp((part * (np.log(part) - np.log(part.mean(0)))).sum(1).mean()))
    mean, std = inception_score(logits.astype(np.float32))
    assert mean == pytest.approx(np.mean(scores), rel=1e-4) and std == pytest.approx(np.std(scores), rel=1e-3)


def naive_share(points, centers, k):
    inside = 0
    radii = [np.sort([np.linalg.norm(c - d) for d in centers])[k] for c in centers]
    for p in points:
        inside += any(np.linalg.norm(p - c) <= r for c, r in zip(centers, radii, strict=True))
    return inside / len(points)


def test_precision_and_recall_against_loops_in_any_block():
    a, b = features(60, 5).astype(np.float64), features(45, 5, 1.0).astype(np.float64)
    expected = naive_share(a, b, 3), naive_share(b, a, 3)
    assert 0 < expected[0] < 1
    for block in (7, 2048):
        assert precision_recall(a, b, block=block) == pytest.approx(expected)


def test_degenerate_sets():
    a = features(50, 6)
    assert precision_recall(a, a) == (1.0, 1.0)
    assert precision_recall(a, a + 1000) == (0.0, 0.0)
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
    mean, _ = kernel_distance(a, b)  # every subset is the whole set
    assert mean == pytest.approx(expected, rel=1e-4)


def test_the_error_of_a_share():
    """By hand, and as the spread of shares that are drawn."""
    assert distances.share_error(0.2, 400) == pytest.approx(0.02)
    assert distances.share_error(0.5, 100) == pytest.approx(0.05)
    assert distances.share_error(1.0, 7) == distances.share_error(0.0, 7) == 0
    shares = np.random.default_rng(0).binomial(360, 0.9, size=4000) / 360
    assert distances.share_error(0.9, 360) == pytest.approx(shares.std(), rel=0.05)


def test_too_few_images():
    with pytest.raises(UserError, match="needs at least 2 images, and there are 1"):
        distances.enough(1, 2, "a Fréchet distance")
