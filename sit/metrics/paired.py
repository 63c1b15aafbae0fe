"""Differences of two runs, paired by what they share, and how many training seeds tell how much."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

from sit.metrics.estimate import Estimate

Unit = Literal["samples", "images", "training seeds"]
ROUNDING = 1e-9
"""Spread, in parts of the mean, below which differences are equal but for their last digits."""


@dataclass(frozen=True)
class Difference:
    """A mean of paired differences.

    Attributes:
        value: the second less the first.
        spread: the standard deviation of the single differences.
        count: how many differences.
        over: what was drawn again: ``samples`` (groups of them) and ``images`` hold for these weights only.
    """

    value: float
    spread: float
    count: int
    over: Unit

    @property
    def standard_error(self) -> float:
        return self.spread / math.sqrt(self.count)

    @property
    def error(self) -> float:
        """Half the width of the 95 % interval by Student's t with ``count`` − 1 degrees of freedom."""
        return float(stats.t.ppf(0.975, self.count - 1) * self.standard_error)

    @property
    def p_value(self) -> float:
        """Two-sided, of no difference.

        It is 1 without a spread: differences of shares of few samples are equal by chance, which proves nothing.
        """
        if self.spread <= ROUNDING * abs(self.value):
            return 1.0
        return float(2 * stats.t.sf(abs(self.value) / self.standard_error, self.count - 1))


def _paired(differences: np.ndarray, over: Unit) -> Difference:
    if len(differences) < 2:
        raise ValueError(f"a paired comparison needs at least two {over}, not {len(differences)}")
    return Difference(float(differences.mean()), float(differences.std(ddof=1)), len(differences), over)


def over_samples(first: Estimate, second: Estimate) -> Difference:
    """The second metric less the first, of samples that share their groups: labels, noise and reference.

    What both runs' groups have in common drops out of the error.

    Raises:
        ValueError: one has no replicates, or another number of them.
    """
    if len(first.replicates) != len(second.replicates):
        raise ValueError(f"{len(first.replicates)} groups can't be paired with {len(second.replicates)}")
    found = _paired(np.subtract(second.replicates, first.replicates), "samples")
    return Difference(second.value - first.value, found.spread, found.count, "samples")


def over_seeds(first: Mapping[int, float], second: Mapping[int, float]) -> Difference:
    """The second's numbers less the first's by the training seeds that both have: the paired t of any number of a run.

    The interval covers what another training seed brings only if the runs of a seed were evaluated with samples of
    their own: an evaluation seed that is the same for all seeds makes their differences alike.

    Args:
        first: one number a run, by training seed.
        second: the same of the other.

    Raises:
        ValueError: they share fewer than two seeds.
    """
    shared = sorted(first.keys() & second.keys())
    return _paired(np.array([second[seed] - first[seed] for seed in shared]), "training seeds")


def over_images(first: np.ndarray, second: np.ndarray) -> Difference:
    """The second's losses (N,) less the first's on the same held-out images, with the same t and noise.

    Raises:
        ValueError: they are of different numbers of images, or of fewer than two.
    """
    if len(first) != len(second):
        raise ValueError(f"losses of {len(first)} images can't be paired with those of {len(second)}")
    return _paired(np.asarray(second, dtype=np.float64) - np.asarray(first, dtype=np.float64), "images")


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted for being several (Holm 1979): below 0.05, and no more than 5 % of tables have a false one.

    One that is not a number tells nothing, and counts as 1.
    """
    p_values = [1.0 if math.isnan(p_value) else p_value for p_value in p_values]
    count, adjusted, largest = len(p_values), [0.0] * len(p_values), 0.0
    for rank, index in enumerate(np.argsort(p_values, kind="stable")):
        largest = max(largest, (count - rank) * p_values[index])
        adjusted[index] = min(1.0, largest)
    return adjusted


def power(count: int, spread: float, difference: float, *, level: float = 0.05, arms: int = 1) -> float:
    """How often a t-test of ``count`` training seeds tells a true difference.

    Args:
        count: seeds, of each arm.
        spread: standard deviation of the paired differences, or, of two unpaired arms, of the runs of one arm.
        difference: the true one.
        level: of the two-sided test.
        arms: 1 for paired differences, 2 for two unpaired arms.

    Raises:
        ValueError: it can't be computed, as of arguments that are not finite.
    """
    degrees = arms * (count - 1)
    away = abs(difference) / (spread * math.sqrt(arms / count))
    limit = stats.t.ppf(1 - level / 2, degrees)
    near, far = stats.nct.sf(limit, degrees, away), stats.nct.cdf(-limit, degrees, away)
    if not math.isfinite(near):
        raise ValueError(f"no power of {count} seeds, spread {spread} and difference {difference} at level {level}")
    return float(near + (far if math.isfinite(far) else 0.0))  # SciPy gives NaN for some tails of nearly nothing


def seeds_needed(
    spread: float, difference: float, *, wanted: float = 0.8, level: float = 0.05, arms: int = 1, most: int = 10_000
) -> int | None:
    """The fewest training seeds, at least two, whose :func:`power` is ``wanted``; None if they are more than ``most``.

    Arguments are those of :func:`power`.
    """
    if spread == 0:
        return 2
    low, high = 1, 2  # too few, enough
    while power(high, spread, difference, level=level, arms=arms) < wanted:
        low, high = high, 2 * high
        if low >= most:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        reached = power(middle, spread, difference, level=level, arms=arms) >= wanted
        low, high = (low, middle) if reached else (middle, high)
    return high if high <= most else None
