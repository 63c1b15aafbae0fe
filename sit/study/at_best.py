"""Each variant at its own best guidance, and at its own best length of the moving average: does the order change?"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from sit.study.analysis import compare, mean
from sit.study.config import Evaluation
from sit.study.values import Found

Values = dict[str, dict[int, float]]
"""a value of the kind → seed → FID"""


def at_best(found: list[Found], fid: str, settings: Evaluation) -> dict[str, Any]:
    """For guidance and for the average: FID by value, each variant's best, and differences to the first at their best.

    The first is the first variant that was evaluated with more than the usual value, and is named under ``against``.

    The best is the lowest mean over the variant's seeds, of the values that all of its seeds have. The intervals leave
    out that it was chosen by the same samples, which lowers the FID of every variant by about the same.

    Returns:
        Kind → numbers; a kind of which nothing but the usual value was evaluated is left out.
    """
    kinds = {}
    for kind, usual in settings.usual.items():
        by_variant = {group.name: _by_value(group, fid, kind, usual) for group in found}
        by_variant = {name: own for name, own in by_variant.items() if len(own) > 1}
        if not by_variant:
            continue
        best = {name: min(own, key=lambda value, own=own: _mean(own, value)) for name, own in by_variant.items()}
        there = {name: {fid: own[best[name]]} for name, own in by_variant.items()}
        usually = {name: _mean(own, usual) for name, own in by_variant.items()}
        kinds[kind] = {
            "usual": usual,
            "values": {name: {value: mean(seeds) for value, seeds in own.items()} for name, own in by_variant.items()},
            "best": best,
            "against": next(iter(there)),
            "differences": compare(there, [fid]),
            "order": {
                "usual": sorted(usually, key=lambda name: usually[name]),
                "best": sorted(best, key=lambda name: _mean(by_variant[name], best[name])),
            },
        }
    return kinds


def _by_value(group: Found, fid: str, kind: str, usual: str) -> Values:
    """FID at the last step by value and seed, of the values that each of the variant's evaluated seeds has."""
    seeds = group.metric(fid)
    values: Values = {usual: seeds}
    for seed in seeds:
        for way, numbers in group.records[seed]["evaluation"].get("others", {}).items():
            told, _, value = way.partition(" ")
            for number in numbers if told == kind else ():
                if number["name"] == fid:
                    values.setdefault(value, {})[seed] = number["value"]
    return {value: own for value, own in values.items() if own and own.keys() == seeds.keys()}


def _mean(values: Mapping[str, Mapping[int, float]], value: str) -> float:
    return statistics.fmean(values[value].values())
