"""Numbers from features: Fréchet distances, inception score, kernel distance, improved precision and recall.

The definitions are those of the ADM evaluation suite (guided-diffusion). The inception score and the kernel distance
are torch-fidelity's own functions, called on our features.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy import linalg
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric

from sit.utils.errors import UserError

GROUPS = 10
"""groups of the delete-a-group jackknife, and splits of the inception score"""


@dataclass(frozen=True)
class Moments:
    """Mean (D,) and covariance (D, D) of features, float64."""

    mu: np.ndarray
    sigma: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray) -> Moments:
        """Moments of features (N, D), N ≥ 2; the covariance with N − 1, as ADM's."""
        features = np.asarray(features, dtype=np.float64)
        return cls(features.mean(axis=0), np.atleast_2d(np.cov(features, rowvar=False)))


def frechet_distance(a: Moments, b: Moments) -> float:
    """|μ_a − μ_b|² + tr(Σ_a + Σ_b − 2 (Σ_a Σ_b)^½), by symmetric eigenvalues in float64.

    (Σ_a Σ_b)^½ has the trace of (Σ_a^½ Σ_b Σ_a^½)^½, which is symmetric and positive semidefinite: no general matrix
    square root is needed, and singular covariances (fewer samples than dimensions) are right as they are.
    """
    values, vectors = linalg.eigh(a.sigma, driver="evd")
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    inner = root @ b.sigma @ root
    cross = np.sqrt(linalg.eigvalsh((inner + inner.T) / 2, driver="evd").clip(min=0)).sum()
    difference = a.mu - b.mu
    return float(difference @ difference + np.trace(a.sigma) + np.trace(b.sigma) - 2 * cross)


def frechet_with_error(features: np.ndarray, reference: Moments) -> tuple[float, float]:
    """The Fréchet distance of features (N, D) to a reference, and its standard error over samples.

    The error is the delete-a-group jackknife's with :data:`GROUPS` random groups.
    """
    whole = frechet_distance(Moments.of(features), reference)
    groups = np.random.default_rng(0).permutation(len(features)) % GROUPS
    left_out = [frechet_distance(Moments.of(features[groups != group]), reference) for group in range(GROUPS)]
    return whole, float(np.sqrt((GROUPS - 1) * np.var(left_out)))


def frechet_at_infinity(features: np.ndarray, reference: Moments, points: int = 8) -> tuple[float, float]:
    """FID∞ (Chong & Forsyth 2020): the distance of random subsets, extrapolated over 1/N to infinitely many samples.

    Returns:
        The value, and the standard error of the line's intercept.
    """
    rng = np.random.default_rng(1)
    sizes = np.linspace(len(features) / 4, len(features), points).astype(int)
    subsets = [rng.permutation(len(features))[:size] for size in sizes]
    distances = [frechet_distance(Moments.of(features[subset]), reference) for subset in subsets]
    line, covariance = np.polyfit(1 / sizes, distances, 1, cov=True)
    return float(line[1]), float(np.sqrt(covariance[1, 1]))


def inception_score(logits: np.ndarray, splits: int = GROUPS) -> tuple[float, float]:
    """The inception score of logits (N, classes): mean and standard deviation over consecutive splits."""
    found = isc_features_to_metric(torch.from_numpy(logits).double(), splits, False, 0)
    return found["inception_score_mean"], found["inception_score_std"]


def kernel_distance(features: np.ndarray, reference: np.ndarray) -> tuple[float, float]:
    """KID: mean and standard deviation over 100 random subsets of up to 1,000 features (N, D)."""
    size = min(1000, len(features), len(reference))
    found = kid_features_to_metric(
        torch.from_numpy(features).double(), torch.from_numpy(reference).double(), kid_subset_size=size, verbose=False
    )
    return found["kernel_inception_distance_mean"], found["kernel_inception_distance_std"]


def precision_recall(samples: np.ndarray, reference: np.ndarray, k: int = 3, block: int = 2048) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019) as ADM's suite defines them.

    Precision is the share of samples within the ball of any reference feature, whose radius is the distance to its
    k-th nearest neighbor among the reference; recall is the same with the parts exchanged.

    Args:
        samples: (N, D).
        reference: (M, D).
        block: rows of the distance matrix that are held at a time.
    """
    one, other = torch.from_numpy(samples).double(), torch.from_numpy(reference).double()
    return _within(one, other, k, block), _within(other, one, k, block)


def _within(points: torch.Tensor, centers: torch.Tensor, k: int, block: int) -> float:
    product = dict(compute_mode="use_mm_for_euclid_dist")  # in float64, where the expanded square is exact enough
    radii = torch.cat([torch.cdist(part, centers, **product).kthvalue(k + 1).values for part in centers.split(block)])
    inside = [(torch.cdist(part, centers, **product) <= radii).any(dim=1) for part in points.split(block)]
    return torch.cat(inside).double().mean().item()


def share_error(share: float, count: int) -> float:
    """Binomial standard error of a share of ``count`` independent draws."""
    return float(np.sqrt(share * (1 - share) / count))


def enough(count: int, needed: int, metric: str) -> None:
    """Refuse a metric of too few samples.

    Raises:
        UserError: there are fewer than ``needed``.
    """
    if count < needed:
        raise UserError(f"{metric} needs at least {needed} images, and there are {count}")
