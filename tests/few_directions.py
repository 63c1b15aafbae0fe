"""Fréchet distances of few images without solving for all directions of their features, which takes seconds."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import linalg

from sit.metrics import distances
from sit.metrics.distances import RootedMoments


class FewDirections:
    """scipy's solvers, for covariances of few images: a matrix of low rank has few eigenvectors, found in no time."""

    RANK = 16

    @classmethod
    def basis(cls, matrix: np.ndarray) -> np.ndarray:
        """Orthonormal columns (D, RANK) that a symmetric matrix (D, D) maps into."""
        return np.linalg.qr(matrix @ np.random.default_rng(0).standard_normal((len(matrix), cls.RANK)))[0]

    @classmethod
    def eigh(cls, matrix: np.ndarray, **_options: object) -> tuple[np.ndarray, np.ndarray]:
        basis = cls.basis(matrix)
        values, vectors = linalg.eigh(basis.T @ matrix @ basis)
        found = basis @ vectors
        assert np.abs((found * values) @ found.T - matrix).max() <= 1e-6 * np.abs(matrix).max(), "of a higher rank"
        return values, found

    @classmethod
    def eigvalsh(cls, matrix: np.ndarray, **_options: object) -> np.ndarray:
        return cls.eigh(matrix)[0]

    @classmethod
    def product(cls, reference: RootedMoments, sigma: np.ndarray) -> np.ndarray:
        """:meth:`RootedMoments.product`."""
        basis = cls.basis(reference.root)
        root = basis.T @ reference.root @ basis
        inner = root @ (basis.T @ sigma @ basis) @ root
        return basis @ (inner + inner.T) @ (basis.T / 2)


def use_few_directions(patch: pytest.MonkeyPatch) -> None:
    """Have Fréchet distances computed so; ``tests/test_reproduce.py`` compares them with scipy's own."""
    patch.setattr(distances, "linalg", FewDirections)
    patch.setattr(RootedMoments, "product", lambda self, sigma: FewDirections.product(self, sigma))
