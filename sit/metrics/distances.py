"""Numbers from features: Fréchet distances, inception score and kernel distance, each with its error over samples.

The definitions are those of the ADM evaluation suite (guided-diffusion) and, of the kernel distance, torch-fidelity's.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy import linalg

from sit.metrics.estimate import FEWEST_GROUPS, PER_GROUP, Estimate, jackknife
from sit.metrics.moments import GroupSums, Moments
from sit.utils.errors import UserError

SPLIT = 5000
"""samples of one split of the inception score (ADM's suite)"""

PER_DIMENSION = 3
"""samples for each dimension of the features, from which on an extrapolated distance has an error"""

FEWEST_IN_SUBSET = FEWEST_GROUPS * PER_GROUP
"""features in a subset of KID that its error needs, as many as samples"""


@dataclass(frozen=True, eq=False)
class RootedMoments:
    """Moments of a reference with the symmetric root of their covariance, which all distances to it share.

    Attributes:
        moments: mean (D,) and covariance (D, D).
        root: (D, D) symmetric, root @ root = covariance.
    """

    moments: Moments
    root: np.ndarray

    @classmethod
    def of(cls, moments: Moments) -> RootedMoments:
        """By one eigendecomposition; eigenvalues that rounding made negative count as zero."""
        values, vectors = linalg.eigh(moments.sigma, driver="evd")
        return cls(moments, (vectors * np.sqrt(values.clip(min=0))) @ vectors.T)

    def product(self, sigma: np.ndarray) -> np.ndarray:
        """root @ sigma @ root, symmetric to the bit."""
        inner = self.root @ sigma @ self.root
        return (inner + inner.T) / 2


def frechet_distance(a: Moments, b: Moments | RootedMoments) -> float:
    """|μ_a − μ_b|² + tr(Σ_a + Σ_b − 2 (Σ_a Σ_b)^½), by symmetric eigenvalues in float64.

    (Σ_a Σ_b)^½ has the trace of (Σ_b^½ Σ_a Σ_b^½)^½, which is symmetric and positive semidefinite: no general matrix
    square root is needed, and singular covariances (fewer samples than dimensions) are right as they are. Where many
    distances are to one reference, give it as :class:`RootedMoments`.
    """
    reference = b if isinstance(b, RootedMoments) else RootedMoments.of(b)
    return _from_spectrum(a, reference, linalg.eigvalsh(reference.product(a.sigma), driver="evd", overwrite_a=True))


def frechet_gradient(a: Moments, reference: RootedMoments) -> tuple[np.ndarray, np.ndarray]:
    """The derivative of the Fréchet distance by the mean (D,) and by the covariance (D, D) of ``a``.

    They are 2 (μ_a − μ_b) and I − Σ_b^½ (Σ_b^½ Σ_a Σ_b^½)^(−½) Σ_b^½, the identity less the optimal transport map from
    ``a`` to the reference (Takatsu 2011; Bhatia, Jain & Lim 2019). Directions without variance are left out of the
    inverse.
    """
    return _with_gradient(a, reference)[1:]


def _with_gradient(a: Moments, reference: RootedMoments) -> tuple[float, np.ndarray, np.ndarray]:
    """The distance and its derivatives, from one eigendecomposition."""
    values, vectors = linalg.eigh(reference.product(a.sigma), driver="evd", overwrite_a=True)
    kept = values > values.max() * len(values) * np.finfo(np.float64).eps
    half = reference.root @ (vectors[:, kept] * values[kept] ** -0.25)
    by_mean, by_covariance = 2 * (a.mu - reference.moments.mu), np.eye(len(a.mu)) - half @ half.T
    return _from_spectrum(a, reference, values), by_mean, by_covariance


def _from_spectrum(a: Moments, reference: RootedMoments, values: np.ndarray) -> float:
    """The distance from the eigenvalues (D,) of the product of both covariances."""
    difference = a.mu - reference.moments.mu
    trace = np.trace(a.sigma) + np.trace(reference.moments.sigma) - 2 * np.sqrt(values.clip(min=0)).sum()
    return float(difference @ difference + trace)


def frechet(sums: GroupSums, reference: RootedMoments) -> Estimate:
    """The Fréchet distance of the samples to a reference, with the error of its influence function.

    A group's replicate is the distance plus the mean over the group of
    d_mu·(x − μ) + (x − μ)ᵀ d_sigma (x − μ) − tr(d_sigma Σ). What is left out is of second order, which a jackknife
    counts twice: with few samples for the dimensions its error is the wider one. One group gives no error.
    """
    moments = sums.moments()
    if len(sums.counts) == 1:
        return Estimate(frechet_distance(moments, reference))
    value, by_mean, by_covariance = _with_gradient(moments, reference)
    center = moments.mu - sums.origin
    expected = float((by_covariance * moments.sigma).sum())
    influences = []
    for count, total, products in zip(sums.counts, sums.sums, sums.products, strict=True):
        mean = total / count
        spread = (by_covariance * products).sum() / count + (center - 2 * mean) @ by_covariance @ center
        influences.append(by_mean @ (mean - center) + spread - expected)
    found = np.array(influences)
    shares = sums.counts / sums.counts.mean()  # a larger group's mean spreads less
    return Estimate(value, tuple((value + (found - (found * shares).mean()) * np.sqrt(shares)).tolist()))


def frechet_at_infinity(sums: GroupSums, reference: RootedMoments, finite: Estimate) -> Estimate:
    """The Fréchet distance of infinitely many samples, as FID∞ (Chong & Forsyth 2020), whose bias is of order 1/N.

    The line over 1/N goes through the distance of all samples and the distances without each group: it is the
    jackknife's estimate without bias. Its error is that of the distance, and there is none below
    :data:`PER_DIMENSION` samples for each dimension: where features spread evenly over their dimensions, what is left
    of the bias is then more than the error.

    Args:
        sums: of at least two groups.
        reference: of the distance.
        finite: :func:`frechet` of the same.
    """
    total = sums.pooled()
    without = np.array([frechet_distance(sums.without(total, number), reference) for number in range(len(sums.counts))])
    bias = jackknife(finite.value, without, sums.counts).bias
    enough = sums.counts.sum() >= PER_DIMENSION * sums.sums.shape[1]
    return Estimate(finite.value - bias, tuple(one - bias for one in finite.replicates) if enough else ())


def inception_score(logits: np.ndarray, group: np.ndarray | None = None) -> Estimate:
    """The inception score of logits (N, classes): the mean over consecutive splits of :data:`SPLIT` samples.

    These are ADM's splits wherever 5,000 divides N; elsewhere there are N / 5,000 of them, rounded and at least one, of
    equal size. Samples that lie sorted by class are shuffled first, always alike, as a split must have all classes.

    Args:
        logits: (N, classes).
        group: (N,) groups of the jackknife; None gives no error.
    """
    count = len(logits)
    if sorted_by_class(logits.argmax(axis=1)):
        order = np.random.default_rng(0).permutation(count)
        logits, group = logits[order], None if group is None else group[order]
    groups = 1 if group is None else int(group.max()) + 1
    splits = max(1, round(count / SPLIT))
    # sums by split and group of p and of Σ p log p, from which every score without a group follows
    counts, negentropy = np.zeros((splits, groups)), np.zeros((splits, groups))
    shares = np.zeros((splits, groups, logits.shape[1]))
    for split in range(splits):
        rows = slice(split * count // splits, (split + 1) * count // splits)
        log_p = torch.from_numpy(logits[rows]).double().log_softmax(dim=1).numpy()
        p = np.exp(log_p)
        which = np.zeros(len(p), dtype=np.int64) if group is None else group[rows]
        for number in range(groups):
            part = which == number
            counts[split, number] = part.sum()
            negentropy[split, number] = (p[part] * log_p[part]).sum()
            shares[split, number] = p[part].sum(axis=0)

    def score(left: np.ndarray) -> float:
        number = counts[:, left].sum(axis=1)
        marginal = shares[:, left].sum(axis=1) / number[:, None]
        entropy = -(marginal * np.log(marginal.clip(min=np.finfo(np.float64).tiny))).sum(axis=1)
        return float(np.exp(negentropy[:, left].sum(axis=1) / number + entropy).mean())

    everything = np.ones(groups, dtype=bool)
    if group is None:
        return Estimate(score(everything))
    without = np.array([score(np.arange(groups) != number) for number in range(groups)])
    return jackknife(score(everything), without, counts.sum(axis=0))


def sorted_by_class(classes: np.ndarray) -> bool:
    """Whether neighbors in classes (N,) are alike more often than in a random order, by five standard errors."""
    shares = np.unique(classes, return_counts=True)[1] / len(classes)
    chance = float((shares**2).sum())
    alike = float((classes[1:] == classes[:-1]).mean()) if len(classes) > 1 else 0.0
    return alike > chance + 5 * np.sqrt(chance * (1 - chance) / len(classes))


def kernel_distance(
    features: np.ndarray,
    reference: np.ndarray,
    group: np.ndarray | None = None,
    *,
    subsets: int = 100,
    size: int = 1000,
    device: torch.device | str = "cpu",
) -> Estimate:
    """KID (Bińkowski et al. 2018): the mean of the unbiased estimate over random subsets, as torch-fidelity draws them.

    Args:
        features: (N, D).
        reference: (M, D).
        group: (N,) groups of the jackknife, which leaves a group out of every subset; None gives no error, and neither
            do subsets of fewer than :data:`FEWEST_IN_SUBSET`, of which a group may be nearly all.
        subsets: how many.
        size: features in each; fewer where there are fewer.
        device: where products are made, in float64.

    Raises:
        UserError: there are fewer than two of either.
    """
    size = min(size, len(features), len(reference))
    enough(size, 2, "KID")
    if size < FEWEST_IN_SUBSET:
        group = None
    if size == len(features) == len(reference):
        subsets = 1  # they would all be the same
    groups = 1 if group is None else int(group.max()) + 1
    rng = np.random.RandomState(2020)  # torch-fidelity's seed, and its order of draws
    values, without = [], []
    for _ in range(subsets):
        chosen, other = (rng.choice(len(array), size, replace=False) for array in (features, reference))
        x, y = (
            torch.from_numpy(array[rows]).to(device).double()
            for array, rows in ((features, chosen), (reference, other))
        )
        of = torch.zeros(size, groups, dtype=torch.float64, device=x.device)
        of[torch.arange(size), 0 if group is None else torch.from_numpy(group[chosen])] = 1
        among, between = _cubic(x, x), _cubic(x, y)
        own = of.T @ among.diagonal()
        pairs, cross, counts = of.T @ among @ of, of.T @ between.sum(dim=1), of.sum(dim=0)
        y_pairs = _cubic(y, y)
        real = (y_pairs.sum() - y_pairs.diagonal().sum()) / (size * (size - 1))

        def estimate(pairs, own, cross, count, real=real):
            return (pairs - own) / (count * (count - 1)) + real - 2 * cross / (count * size)

        values.append(estimate(pairs.sum(), own.sum(), cross.sum(), counts.sum()))
        less = pairs.sum() - pairs.sum(dim=0) - pairs.sum(dim=1) + pairs.diagonal()
        without.append(estimate(less, own.sum() - own, cross.sum() - cross, counts.sum() - counts))
    whole = float(torch.stack(values).mean())
    if group is None:
        return Estimate(whole)
    return jackknife(whole, torch.stack(without).mean(dim=0).cpu().numpy(), np.bincount(group))


def _cubic(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    base = x @ y.T / x.shape[1] + 1
    return base * base * base


def enough(count: int, needed: int, metric: str) -> None:
    """Refuse a metric of too few samples.

    Raises:
        UserError: there are fewer than ``needed``.
    """
    if count < needed:
        raise UserError(f"{metric} needs at least {needed} images, and there are {count}")
