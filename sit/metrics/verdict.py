"""What a table of paired differences says, in words."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from typing import TypeVar

from sit.metrics.paired import Difference, holm, seeds_needed

LEVEL = 0.05
"""of the tests, after Holm"""

LOWER_IS_BETTER = {
    "FID": True,
    "sFID": True,
    "FD-DINOv2": True,
    "KID": True,
    "Loss": True,
    "Copies": True,
    "Inception score": False,
    "Precision": False,
    "Recall": False,
    "Density": False,
    "Coverage": False,
    "Class accuracy": False,
}
"""by the beginning of a metric's name"""

RULERS = ("FID", "FD-", "Loss")
"""Beginnings of the metrics that runs are compared by."""

Key = TypeVar("Key", bound=Hashable)


def lower_is_better(metric: str) -> bool:
    """Whether less of the metric is better.

    Raises:
        ValueError: it is not known.
    """
    for beginning, lower in LOWER_IS_BETTER.items():
        if metric.startswith(beginning):
            return lower
    raise ValueError(f"whether less of `{metric}` is better is not known; known are {', '.join(LOWER_IS_BETTER)}")


def verdict(
    difference: Difference, *, lower: bool, p_value: float | None = None, level: float = LEVEL, further: bool = True
) -> str:
    """*better*, *worse* or *not told apart*, of the second run against the first.

    A difference over samples or images holds *for these weights only*, and the verdict says so. Of training seeds that
    don't tell the runs apart it says how many more would tell a difference of this size at 80 % power, if differences
    spread as they do in those at hand.

    Args:
        difference: the second less the first.
        lower: whether less is better.
        p_value: adjusted for the table's other comparisons; None takes the difference's own.
        level: of the test that the further seeds are for; a table divides it by the number of its comparisons.
        further: whether to say how many more seeds.
    """
    scope = "" if difference.over == "training seeds" else ", for these weights only"
    if (difference.p_value if p_value is None else p_value) < LEVEL:
        return ("better" if (difference.value < 0) == lower else "worse") + scope
    if scope or not further or not difference.value or not math.isfinite(difference.value * difference.spread):
        return f"not told apart{scope}"
    needed = seeds_needed(difference.spread, abs(difference.value), level=level)
    if needed is None:
        return "not told apart: more training seeds than can be had would tell it"
    more = max(1, needed - difference.count)
    plural = "" if more == 1 else "s"
    return f"not told apart: {more} more training seed{plural} would tell it at 80 % power"


def verdicts(differences: Mapping[Key, Difference], metric_of: Mapping[Key, str]) -> dict[Key, str]:
    """The verdict of each comparison of one table, with Holm's adjustment over all of them.

    The number of further training seeds is told for FID and the held-out loss, at the level that a table of as many
    comparisons leaves to one (Bonferroni's, the hardest that Holm's method asks for).

    Args:
        differences: by whatever tells the comparisons apart.
        metric_of: the metric of each.

    Raises:
        ValueError: it is not known whether less of a metric is better.
    """
    adjusted = holm([difference.p_value for difference in differences.values()])
    level = LEVEL / max(1, len(differences))
    said = {}
    for (key, difference), p_value in zip(differences.items(), adjusted, strict=True):
        metric = metric_of[key]
        further, lower = metric.startswith(RULERS), lower_is_better(metric)
        said[key] = verdict(difference, lower=lower, p_value=p_value, level=level, further=further)
    return said
