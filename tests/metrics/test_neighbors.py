"""Numbers from nearest neighbors against loops over all pairs."""

from __future__ import annotations

import numpy as np
import pytest

from sit.metrics.estimate import jackknife_groups, of_mean
from sit.metrics.neighbors import MEANS, copies, memorization_scores, nearest, neighborhoods

rng = np.random.default_rng(0)
A, B = rng.normal(size=(60, 5)), rng.normal(size=(45, 5)) + 0.7


def radii(centers: np.ndarray, k: int) -> list[float]:
    return [np.sort([np.linalg.norm(c - d) for d in centers])[k] for c in centers]


def hits(points: np.ndarray, centers: np.ndarray, k: int) -> np.ndarray:
    """(points, centers) bool: which balls each point lies in."""
    reach = radii(centers, k)
    return np.array([[np.linalg.norm(p - c) <= r for c, r in zip(centers, reach, strict=True)] for p in points])


def by_hand(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    wide = hits(a, b, 5)
    return {
        "precision": hits(a, b, 3).any(axis=1).mean(),
        "recall": hits(b, a, 3).any(axis=1).mean(),
        "density": wide.sum() / (5 * len(a)),
        "coverage": wide.any(axis=0).mean(),
    }


def test_all_four_against_loops_in_any_block():
    expected = by_hand(A, B)
    assert all(0 < value < 1 for value in expected.values())
    for block in (7, 2048):
        found, within = neighborhoods(A, B, block=block)
        assert {name: one.value for name, one in found.items()} == pytest.approx(expected)
        np.testing.assert_array_equal(within, hits(A, B, 3).any(axis=1))


def test_means_over_samples_have_the_error_of_their_groups_and_the_others_none():
    """Unequal groups too: of 13 and 11 or 12 samples."""
    group = rng.permutation(np.repeat(np.arange(5), [13, 12, 12, 12, 11]))
    found, within = neighborhoods(A, B, group, block=8)
    assert {name: one.value for name, one in found.items()} == pytest.approx(by_hand(A, B))
    each = {"precision": hits(A, B, 3).any(axis=1), "density": hits(A, B, 5).sum(axis=1) / 5}
    np.testing.assert_array_equal(within, each["precision"])
    for name, one in found.items():
        assert one.replicates == (of_mean(each[name], group).replicates if name in MEANS else ())


def test_degenerate_sets():
    a = rng.normal(size=(50, 6)).astype(np.float32)
    values = {name: one.value for name, one in neighborhoods(a, a)[0].items()}
    assert values["precision"] == values["recall"] == values["coverage"] == 1
    far = {name: one.value for name, one in neighborhoods(a, a + 1000)[0].items()}
    assert set(far.values()) == {0}
    assert jackknife_groups(39) is None, "too few for an error"


def test_nearest_training_images_against_all_pairs():
    distances = np.linalg.norm(A[:, None] - B[None], axis=-1)
    for block in (7, 2048):
        numbers, found = nearest(A, B, 6, block=block)
        np.testing.assert_array_equal(numbers, distances.argsort(axis=1)[:, :6])
        np.testing.assert_allclose(found, np.sort(distances, axis=1)[:, :6], rtol=1e-10)
    assert nearest(A, B[:4])[0].shape == (60, 4), "all there are"


def test_copies_are_told_from_new_samples():
    training, new = (np.random.default_rng(count).normal(size=(count, 40)) for count in (500, 200))
    for samples, expected in ((training[:20] + 0.01, 1), (new, 0)):
        scores = memorization_scores(nearest(samples, training)[1])
        assert (scores < 1).mean() == expected
    hits, real = copies(np.concatenate([training[:20] + 0.01, new]), training)
    assert hits.tolist() == [True] * 20 + [False] * 200 and real == 0
    doubled = np.concatenate([training, training[:100] + 1e-6])  # a fifth of the first 500, and the hundred others
    assert copies(new, doubled)[1] == pytest.approx(200 / 600)
    row = np.array([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]])
    np.testing.assert_allclose(memorization_scores(row), [1.0, 0.0])
