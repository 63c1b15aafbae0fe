"""A metric's value with its error over samples: one *replicate* a group of them, the same groups for every metric.

The samples are dealt into a few groups. A replicate is a jackknife's pseudo-value (Quenouille 1956, Tukey 1958), from
what the metric is without the group, or the group's mean of an influence function. The replicates' spread is the error,
and those of two runs that share labels, noise and reference may be subtracted group by group.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

GROUPS = 10
"""groups of the jackknife"""

FEWEST_GROUPS = 4
"""with fewer there is no error: Student's t of two degrees of freedom is too wide to say anything"""

PER_GROUP = 10
"""samples a group needs at least"""


def half_width(values: Sequence[float] | np.ndarray, level: float = 0.95) -> float:
    """Half the width of the interval of the mean of independent ``values`` (n,), n ≥ 2, by Student's t with n − 1."""
    count = len(values)
    return float(stats.t.ppf((1 + level) / 2, count - 1) * np.std(values, ddof=1) / math.sqrt(count))


@dataclass(frozen=True)
class Estimate:
    """A metric of some samples, with what its error is made of.

    Attributes:
        value: the metric.
        replicates: one a group, as if they were independent draws of the metric; empty where there is no error.
    """

    value: float
    replicates: tuple[float, ...] = ()

    @property
    def error(self) -> float | None:
        """Half the width of the 95 % interval over samples, the reference held as it is; None if there is none."""
        return half_width(self.replicates) if self.replicates else None

    @property
    def standard_error(self) -> float | None:
        """The standard error over samples; None if there is none."""
        return float(np.std(self.replicates, ddof=1) / math.sqrt(len(self.replicates))) if self.replicates else None

    @property
    def bias(self) -> float:
        """How far a jackknife's value is from the mean of its pseudo-values: its bias, if that is in proportion to 1/N.

        Raises:
            ValueError: there are no replicates.
        """
        if not self.replicates:
            raise ValueError("there were too few samples for a bias")
        return self.value - float(np.mean(self.replicates))


def jackknife(whole: float, without: np.ndarray, sizes: np.ndarray) -> Estimate:
    """The estimate from a metric's values without each group.

    Groups may differ in size: the pseudo-values are weighted as Busing, Meijer & van der Leeden (1999, eq. 5 and 8)
    do, then scaled so that the plain mean and standard error of the replicates are theirs.

    Args:
        whole: the metric of all samples.
        without: (G,) the metric without each group.
        sizes: (G,) samples of each group.
    """
    without, sizes = np.asarray(without, dtype=np.float64), np.asarray(sizes, dtype=np.float64)
    groups, share = len(sizes), sizes.sum() / sizes
    center = groups * whole - ((1 - 1 / share) * without).sum()
    away = (share * whole - (share - 1) * without - center) * np.sqrt((groups - 1) / (share - 1))
    return Estimate(float(whole), tuple((center + away - away.mean()).tolist()))


def of_mean(values: np.ndarray, group: np.ndarray | None) -> Estimate:
    """The estimate of a mean over samples.

    Args:
        values: (N,) one number a sample.
        group: (N,) the group of each sample; None gives no error.
    """
    values = np.asarray(values, dtype=np.float64)
    whole = float(values.mean())
    if group is None:
        return Estimate(whole)
    sizes, sums = np.bincount(group), np.bincount(group, values)
    return jackknife(whole, (sums.sum() - sums) / (sizes.sum() - sizes), sizes)


def jackknife_groups(count: int, labels: np.ndarray | None = None, seed: int = 0) -> np.ndarray | None:
    """The group of each sample: (count,) int64 from 0 on, or None if there are too few samples for an error.

    Where every class has as many samples as every other, up to one, as labels in turn give, each class is dealt evenly
    to the groups: a group is whole rounds of the classes, and what differs between classes is no error. Otherwise, as
    for labels drawn at random, and where a class has too few samples, the groups are random ones of equal size.
    Either way two runs of the same labels have the same groups.

    Args:
        count: how many samples there are.
        labels: (count,) their classes, if known.
        seed: of the random groups.
    """
    if count < FEWEST_GROUPS * PER_GROUP:
        return None
    groups = min(GROUPS, count // PER_GROUP)
    if labels is not None:
        _, of_class, sizes = np.unique(np.asarray(labels)[:count], return_inverse=True, return_counts=True)
        rounds = int(sizes.min())
        if sizes.max() - rounds <= 1 and rounds >= FEWEST_GROUPS:
            order = np.argsort(of_class, kind="stable")  # class by class, within a class as they come
            first = np.repeat(np.cumsum(sizes) - sizes, sizes)
            place = np.empty(count, dtype=np.int64)
            place[order] = np.arange(count) - first
            return place % min(groups, rounds)
    return np.random.default_rng(seed).permutation(count) % groups
