"""Beyond the comparisons: whether the held-out loss ranks runs as FID does, and what spreads them over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy import stats

from sit.metrics.estimate import half_width
from sit.study.values import LOSS, Found, loss_at, metrics_at

RESAMPLES = 2000
"""of the bootstrap"""
FEWEST = 4
"""points that a rank correlation is told from"""


def points(records: Mapping[str, Mapping[str, Any]], fid: str) -> list[dict[str, Any]]:
    """All (variant, seed, step) with a held-out loss, mean and by time, and an FID."""
    found = []
    for name, one in records.items():
        for step in map(int, (one["evaluation"] or {"steps": {}})["steps"]):
            loss, distance = loss_at(one, step), metrics_at(one, step).get(fid)
            if loss is not None and distance is not None and min(loss, distance) > 0:  # for their logarithms
                point = {"run": name, "variant": one["variant"], "step": step, "loss": loss, "fid": distance}
                heldout = one["heldout"]
                by_time = zip(heldout["times"], heldout["by_time"][heldout["steps"].index(step)], strict=True)
                found.append(point | {"by_time": {f"{time:.2f}": value for time, value in by_time}})
    return sorted(found, key=lambda point: (point["run"], point["step"]))


def correlation(found: list[dict[str, Any]], time: str | None = None) -> dict[str, Any] | None:
    """Spearman's rank correlation of held-out loss and FID, with a 95 % bootstrap interval over runs.

    Runs are drawn again, not points: the steps of a run depend on each other.

    Args:
        found: :func:`points`.
        time: at which the loss is, a key of their ``by_time``; None for the mean over times.

    Returns:
        None with fewer than :data:`FEWEST` points.
    """
    if len(found) < FEWEST:
        return None
    by_run: dict[str, list[tuple[float, float]]] = {}
    for point in found:
        loss = point["loss"] if time is None else point["by_time"][time]
        by_run.setdefault(point["run"], []).append((loss, point["fid"]))
    parts = [np.asarray(part) for part in by_run.values()]
    values = np.concatenate(parts)
    times = np.random.default_rng(0).multinomial(len(parts), [1 / len(parts)] * len(parts), size=RESAMPLES)
    drawn = spearman(values, np.repeat(times, [len(part) for part in parts], axis=1))
    drawn = drawn[np.isfinite(drawn)]  # a run that is drawn alone, with a single point, has no correlation
    interval = np.quantile(drawn, (0.025, 0.975)).tolist() if len(parts) > 2 and len(drawn) else None
    whole = float(spearman(values, np.ones((1, len(values)), dtype=int))[0])
    return {"value": whole, "interval": interval, "points": len(found), "runs": len(parts)}


def spearman(values: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Spearman's rank correlation, ties at their mean rank, of samples that hold some points several times.

    Args:
        values: (n, 2) the points.
        times: (R, n) how often each sample has each of them.

    Returns:
        (R,); NaN where all of a sample's values are equal.
    """
    ranks = []
    for column in values.T:
        distinct, place = np.unique(column, return_inverse=True)
        weight = times @ (place[:, None] == np.arange(len(distinct)))
        ranks.append((weight.cumsum(axis=1) - weight + (weight + 1) / 2)[:, place])
    count = times.sum(axis=1, keepdims=True)
    x, y = (rank - (rank * times).sum(axis=1, keepdims=True) / count for rank in ranks)
    with np.errstate(invalid="ignore"):
        return (x * y * times).sum(axis=1) / np.sqrt((x * x * times).sum(axis=1) * (y * y * times).sum(axis=1))


def agreement(found: list[dict[str, Any]]) -> dict[str, Any]:
    """How far the held-out loss stands for FID: over all, at each run's last step, at each time, within each variant.

    ``off_the_line`` says by which factor a variant's FID is off the common straight line of log FID over log loss: if
    the intervals of two variants are apart, they follow different curves and the loss alone does not rank them.
    """
    last = {point["run"]: point for point in found}  # the steps rise
    variants = sorted({point["variant"] for point in found})
    return {
        "all": correlation(found),
        "last step": correlation(list(last.values())),
        "by_time": {time: correlation(found, time) for time in (found[0]["by_time"] if found else ())},
        "within": {name: correlation([point for point in found if point["variant"] == name]) for name in variants},
        "off_the_line": _off_the_line(found) if len(found) >= FEWEST else {},
    }


def _off_the_line(found: list[dict[str, Any]]) -> dict[str, Any]:
    logs = np.log([[point["loss"], point["fid"]] for point in found])
    if len(np.unique(logs[:, 0])) < 2:
        return {}
    line = stats.linregress(logs[:, 0], logs[:, 1])
    by_variant: dict[str, dict[str, list[float]]] = {}
    for point, (loss, fid) in zip(found, logs, strict=True):
        rest = float(fid - line.intercept - line.slope * loss)
        by_variant.setdefault(point["variant"], {}).setdefault(point["run"], []).append(rest)
    result = {}
    for name, runs in by_variant.items():
        means = [statistics.fmean(rest) for rest in runs.values()]
        error = half_width(means) if len(means) > 1 else None
        center = statistics.fmean(means)
        interval = None if error is None else [math.exp(center - error), math.exp(center + error)]
        result[name] = {"factor": math.exp(center), "interval": interval}
    return result


def causes(by_cause: Mapping[str, list[Found]], fid: str | None) -> dict[str, Any]:
    """The spread over seeds by what they vary: metric → variant → cause → standard deviation with its 95 % interval.

    Of FID its logarithm is taken. A variance's interval is that of normal values, by χ². The share is of the sum of
    the causes' variances, without ``seed``, which varies all of them.
    """
    found: dict[str, Any] = {}
    for metric in (LOSS, fid):
        if metric is None:
            continue
        take = math.log if metric == fid else float
        spreads: dict[str, dict[str, Any]] = {}
        for cause, groups in by_cause.items():
            for group in groups:
                values = group.loss() if metric == LOSS else group.metric(metric)
                kept = [take(value) for value in values.values() if metric == LOSS or value > 0]
                if len(kept) > 1:
                    spread = _spread(kept)
                    spreads.setdefault(group.name, {})[cause] = spread
        for own in spreads.values():
            single = {cause: one for cause, one in own.items() if cause != "seed"}
            total = sum(one["deviation"] ** 2 for one in single.values())
            for one in single.values():
                one["share"] = one["deviation"] ** 2 / total if total and len(single) > 1 else None
        found[metric] = spreads
    return found


def _spread(values: list[float]) -> dict[str, Any]:
    degrees, deviation = len(values) - 1, statistics.stdev(values)
    interval = [deviation * math.sqrt(degrees / stats.chi2.ppf(level, degrees)) for level in (0.975, 0.025)]
    return {"deviation": deviation, "interval": interval, "seeds": len(values)}
