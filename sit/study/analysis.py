"""What a study found, as numbers: from the runs' JSONs alone, nothing is measured here."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from sit.metrics.estimate import half_width
from sit.metrics.paired import Difference, holm, over_images, over_seeds
from sit.metrics.verdict import verdicts
from sit.study.config import Study
from sit.study.values import LOSS, Found, at_the_end, fid_name, groups, metrics_at, sample_errors

NEARLY = 0.1
"""A run that ends within this part of a number of seconds counts with what it ended with."""


def analyze(
    study: Study, records: Mapping[str, Mapping[str, Any]], paces: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """All numbers of the report but those of the selection, from the JSONs of the runs that are compared.

    ``paces`` are seconds of a step by variant; None takes the runs' own.
    """
    found = [group for group in groups(study, records, study.vary[0]) if group.records]
    fid = fid_name(records.values())
    primary = [LOSS, *([fid] if fid else [])]
    metrics = list(dict.fromkeys(name for one in records.values() for name in metrics_at(one)))
    differences = compare({group.name: by_metric(group, [LOSS, *metrics]) for group in found}, primary)
    return {
        "fid": fid,
        "variants": {group.name: describe(group, [LOSS, *metrics]) for group in found},
        "differences": differences,
        "differences_by_time": compare({group.name: group.loss_by_time() for group in found}, []),
        "per_image": {group.name: per_image(found[0], group) for group in found[1:]},
        "pairing": {
            "over seeds": {name: pairing(found, name) for name in primary},
            "over images": {LOSS: pairing_of_images(found)},
        },
        "seconds": at_equal_seconds(found, fid, paces),
    }


def by_metric(group: Found, metrics: Iterable[str]) -> dict[str, dict[int, float]]:
    """Metric → seed → value at the last step."""
    return {name: group.loss() if name == LOSS else group.metric(name) for name in metrics}


def describe(group: Found, metrics: Iterable[str]) -> dict[str, Any]:
    """What one variant is and has: its runs, and each metric's mean over seeds with its interval."""
    records = list(group.records.values())
    steps = sorted({step for one in records for step in (one["heldout"] or {"steps": []})["steps"]})
    evaluated = sorted({int(step) for one in records for step in (one["evaluation"] or {"steps": {}})["steps"]})
    return {
        "mixer": records[0]["config"]["mixer"],
        "model": records[0]["config"]["model"],
        "choice": records[0]["choice"],
        "parameters": next((one["evaluation"]["parameters"] for one in records if one["evaluation"]), None),
        "seeds": list(group.records),
        "metrics": {
            name: mean(values) | _over_samples(group, name)
            for name, values in by_metric(group, metrics).items()
            if values
        },
        "heldout_by_time": {time: mean(values) for time, values in group.loss_by_time().items()},
        "heldout_by_step": {step: mean(values) for step in steps if (values := group.loss(step))},
        "metrics_by_step": {
            step: {name: mean(values) for name in metrics if name != LOSS and (values := group.metric(name, step))}
            for step in evaluated
        },
    }


def mean(values: Mapping[int, float]) -> dict[str, Any]:
    """Mean over seeds, with half the width of its 95 % interval by Student's t; None with one seed."""
    error = half_width(list(values.values())) if len(values) > 1 else None
    return {"value": statistics.fmean(values.values()), "error": error, "by_seed": dict(values)}


def _over_samples(group: Found, metric: str) -> dict[str, float]:
    """Of a group of one run, half the width of the metric's interval over samples of its weights, if it has one."""
    if len(group.records) > 1:
        return {}
    (record,) = group.records.values()
    errors = sample_errors(record)
    return {"error_over_samples": errors[metric]} if metric in errors else {}


def compare(values: Mapping[str, Mapping[str, Mapping[int, float]]], primary: list[str]) -> dict[str, Any]:
    """Each later variant's metrics less the first's, paired by the seeds that both have: metric → variant → numbers.

    The metrics in ``primary`` get a verdict, by p-values that Holm's method adjusts over all of their comparisons.
    """
    (_, first), *others = values.items()
    differences: dict[tuple[str, str], Difference] = {}
    for metric in first:
        for name, own in others:
            if len(first[metric].keys() & own.get(metric, {}).keys()) > 1:
                differences[metric, name] = over_seeds(first[metric], own[metric])
    tested = {place: difference for place, difference in differences.items() if place[0] in primary}
    adjusted = dict(zip(tested, holm([difference.p_value for difference in tested.values()]), strict=True))
    said = verdicts(tested, {place: place[0] for place in tested})
    found: dict[str, Any] = {}
    for place, difference in differences.items():
        metric, name = place
        numbers: dict[str, Any] = {"value": difference.value, "error": difference.error, "seeds": difference.count}
        if place in tested:
            p_values = {"p_value": difference.p_value, "p_value_holm": adjusted[place]}
            numbers |= {**p_values, "verdict": said[place]}
        found.setdefault(metric, {})[name] = numbers
    return found


def per_image(first: Found, second: Found) -> dict[int, Any]:
    """Held-out loss image by image, the second's less the first's, at each seed that both have.

    Returns:
        Seed → mean difference, t over images, and the t at each time. It holds for the weights of these runs alone.
    """
    found = {}
    for seed in sorted(first.records.keys() & second.records.keys()):
        ours, theirs = (at_the_end(one.records[seed]) for one in (second, first))
        if not ours or not theirs or ours["images"] != theirs["images"] or len(ours["per_image"]) < 2:
            continue
        ours, theirs = np.asarray(ours["per_image"]), np.asarray(theirs["per_image"])
        whole = over_images(theirs.mean(axis=1), ours.mean(axis=1))
        times = [over_images(theirs[:, part], ours[:, part]) for part in range(ours.shape[1])]
        found[seed] = {
            "difference": whole.value,
            "t": _t(whole),
            "t_by_time": [_t(one) for one in times],
            "images": whole.count,
        }
    return found


def _t(difference: Difference) -> float:
    error = difference.standard_error
    if not error:
        return 0.0 if not difference.value else math.copysign(math.inf, difference.value)
    return difference.value / error


def pairing(found: list[Found], metric: str) -> dict[str, Any]:
    """Variance over seeds of the paired difference to the first variant, over that of an unpaired one.

    Of FID its logarithm is taken, whose variance does not depend on its size.

    Returns:
        The ratio of each variant, and of all together (of the sums), where there are at least two seeds.
    """
    take = float if metric == LOSS else math.log
    paired, unpaired = {}, {}
    first, *others = [by_metric(group, [metric])[metric] for group in found]
    for group, own in zip(found[1:], others, strict=True):
        seeds = [
            seed for seed in sorted(first.keys() & own.keys()) if metric == LOSS or min(first[seed], own[seed]) > 0
        ]
        if len(seeds) > 1:
            a, b = ([take(values[seed]) for seed in seeds] for values in (first, own))
            paired[group.name] = statistics.variance([y - x for x, y in zip(a, b, strict=True)])
            unpaired[group.name] = statistics.variance(a) + statistics.variance(b)
    return _ratios(paired, unpaired)


def pairing_of_images(found: list[Found]) -> dict[str, Any]:
    """The same of the held-out loss over images: one run of each against the other, the means over seeds."""
    paired, unpaired = {}, {}
    for group in found[1:]:
        for seed in sorted(found[0].records.keys() & group.records.keys()):
            a, b = (at_the_end(one.records[seed]) for one in (found[0], group))
            if a and b and a["images"] == b["images"] and len(a["per_image"]) > 1:
                a, b = (np.asarray(one["per_image"]).mean(axis=1) for one in (a, b))
                paired[group.name] = paired.get(group.name, 0.0) + float((b - a).var(ddof=1))
                unpaired[group.name] = unpaired.get(group.name, 0.0) + float(a.var(ddof=1) + b.var(ddof=1))
    return _ratios(paired, unpaired)


def _ratios(paired: Mapping[str, float], unpaired: Mapping[str, float]) -> dict[str, Any]:
    ratios = {name: paired[name] / unpaired[name] for name in paired if unpaired[name] > 0}
    total = sum(unpaired.values())
    return {"by_variant": ratios, "all": sum(paired.values()) / total if total else None}


def at_equal_seconds(found: list[Found], fid: str | None, paces: Mapping[str, float] | None = None) -> dict[str, Any]:
    """Differences to the first variant after as many seconds as the training takes that ends first.

    A run counts at the seconds a step of its variant, ``paces``'s or the runs' own. One that ends within
    :data:`NEARLY` of the time counts with what it ended with: its schedule of learning rates is done. Of a longer one
    the held-out loss and the logarithm of FID are interpolated linearly in time between measurements.

    Returns:
        Empty where no speed is known. Where the runs' own are of different machines, these by variant under
        ``machines``, and nothing else.
    """
    machines = {group.name: group.usual_machine for group in found
                if group.name not in (paces or {}) and group.seconds_per_step}  # fmt: skip
    if len(set(machines.values())) > 1:
        return {"machines": machines}
    paces = {group.name: (paces or {}).get(group.name, group.seconds_per_step) for group in found}
    ends = [paces[group.name] * one["config"]["steps"] for group in found for one in group.records.values()
            if paces[group.name]]  # fmt: skip
    if not ends:
        return {}
    budget = min(ends)
    values: dict[str, dict[str, dict[int, float]]] = {}
    for group in found:
        pace = paces[group.name]
        values[group.name] = {metric: {} for metric in (LOSS, fid) if metric}
        for seed, one in group.records.items():
            for metric in values[group.name] if pace else ():
                end = one["config"]["steps"]
                value = _after(one, metric, end if pace * end <= budget * (1 + NEARLY) else budget / pace)
                if value is not None:
                    values[group.name][metric][seed] = value
    return {
        "seconds": budget,
        "seconds_per_step": paces,
        "metrics": {name: {m: mean(v) for m, v in own.items() if v} for name, own in values.items()},
        "differences": compare(values, list(next(iter(values.values())))),
    }


def _after(record: Mapping[str, Any], metric: str, steps: float) -> float | None:
    """A metric of a run after a number of steps that need not be whole; None outside of those that were measured."""
    if metric == LOSS:
        heldout = record["heldout"] or {"steps": [], "loss": []}
        points = list(zip(heldout["steps"], heldout["loss"], strict=True))
    else:
        measured = (record["evaluation"] or {"steps": {}})["steps"]
        values = {int(step): metrics_at(record, int(step)).get(metric) for step in measured}
        points = sorted((step, math.log(value)) for step, value in values.items() if value is not None and value > 0)
    if not points or not points[0][0] <= steps * (1 + 1e-9) or steps > points[-1][0] * (1 + 1e-9):
        return None
    value = float(np.interp(steps, *zip(*points, strict=True)))
    return value if metric == LOSS else math.exp(value)
