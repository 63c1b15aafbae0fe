"""Shares of samples by their class: which classes are worst."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest


@dataclass(frozen=True)
class ClassShare:
    """A share of the samples of one class, with Wilson's 95 % interval (Wilson 1927)."""

    label: int
    count: int
    share: float
    low: float
    high: float


def shares_by_class(hits: np.ndarray, labels: np.ndarray) -> list[ClassShare]:
    """The share of hits in each class, the worst class first; equal ones by their label.

    Args:
        hits: (N,) bool: whether a sample was recognized (accuracy) or lies within the reference's balls (precision).
        labels: (N,) the classes that were asked for.
    """
    found = []
    for label in np.unique(labels):
        of_class = hits[labels == label]
        interval = binomtest(int(of_class.sum()), len(of_class)).proportion_ci(0.95, method="wilson")
        found.append(
            ClassShare(int(label), len(of_class), float(of_class.mean()), float(interval.low), float(interval.high))
        )
    return sorted(found, key=lambda one: (one.share, one.label))
