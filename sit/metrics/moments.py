"""Means and covariances of features, and sums by group from which those without any one group follow."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


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


@dataclass(frozen=True, eq=False)
class GroupSums:
    """Sums over the samples of each of G groups, in float64, added up in one pass and over processes.

    Memory is (G + 1)·D² numbers of 8 bytes: 370 MB for ten groups of 2048 dimensions. One group is enough for a
    reference, which needs no error.

    Attributes:
        counts: (G,) how many samples.
        sums: (G, D) their sum, less ``origin`` each.
        products: (G, D, D) the sum of x xᵀ, x less ``origin``.
        origin: (D,) what is subtracted first, so that nothing cancels where means are large against deviations; any
            point near the samples does, and sums are added only where it is the same.
    """

    counts: np.ndarray
    sums: np.ndarray
    products: np.ndarray
    origin: np.ndarray

    @classmethod
    def empty(cls, groups: int, dimensions: int, origin: np.ndarray | None = None) -> GroupSums:
        """No samples yet; ``origin`` (D,) is zero where it is None."""
        at = np.zeros(dimensions) if origin is None else np.asarray(origin, dtype=np.float64)
        shapes = (groups, dimensions), (groups, dimensions, dimensions)
        return cls(np.zeros(groups, dtype=np.int64), *(np.zeros(shape) for shape in shapes), at)

    @classmethod
    def of(cls, features: np.ndarray, group: np.ndarray | None = None, block: int = 4096) -> GroupSums:
        """Sums of features (N, D) that are in memory, by ``group`` (N,); None puts all into one.

        ``block`` rows are held in float64 at a time. The origin is the mean of the first block.
        """
        groups = 1 if group is None else int(group.max()) + 1
        origin = features[:block].mean(axis=0, dtype=np.float64)
        found = cls.empty(groups, features.shape[1], origin)
        for start in range(0, len(features), block):
            rows = slice(start, start + block)
            found.add(features[rows], None if group is None else group[rows])
        return found

    def add(self, features: np.ndarray, group: np.ndarray | None = None) -> None:
        """Add features (n, D) to the group (n,) of each, in place; None adds all to the first."""
        centered = np.asarray(features, dtype=np.float64) - self.origin
        group = np.zeros(len(centered), dtype=np.int64) if group is None else np.asarray(group)
        for number in np.unique(group):
            part = centered[group == number]
            self.counts[number] += len(part)
            self.sums[number] += part.sum(axis=0)
            self.products[number] += part.T @ part

    def __add__(self, other: GroupSums) -> GroupSums:
        """Sums of both, group by group, as of two processes.

        Raises:
            ValueError: their origins differ.
        """
        if not np.array_equal(self.origin, other.origin):
            raise ValueError("sums about different origins can't be added")
        mine = (self.counts, self.sums, self.products)
        return GroupSums(
            *(a + b for a, b in zip(mine, (other.counts, other.sums, other.products), strict=True)), self.origin
        )

    def moments(self) -> Moments:
        """Moments of all samples, the covariance with N − 1."""
        return _moments(int(self.counts.sum()), self.sums.sum(axis=0), self.products.sum(axis=0), self.origin)

    def without(self, total: GroupSums, number: int) -> Moments:
        """Moments of all samples but those of one group; ``total`` is :meth:`pooled`, which many calls share."""
        products = total.products[0] - self.products[number]
        count = int(total.counts[0] - self.counts[number])
        return _moments(count, total.sums[0] - self.sums[number], products, self.origin)

    def pooled(self) -> GroupSums:
        """The same sums as one group."""
        parts = (array.sum(axis=0, keepdims=True) for array in (self.counts, self.sums, self.products))
        return GroupSums(*parts, self.origin)


def _moments(count: int, total: np.ndarray, products: np.ndarray, origin: np.ndarray) -> Moments:
    mean = total / count
    sigma = products - np.outer(total, mean)
    sigma /= count - 1
    return Moments(origin + mean, sigma)
