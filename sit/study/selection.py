"""Each variant at its best: the choice with the lowest held-out loss of the runs that decide."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from sit.study.config import Study
from sit.study.runs import Run
from sit.study.values import loss_at, measure_of
from sit.utils.errors import UserError


def heldout_loss(found: Mapping[str, Any]) -> float:
    """The held-out loss at a run's end; infinite where it could not be measured, because it was not finite."""
    loss = loss_at(found)
    return math.inf if loss is None or found.get("failed") else loss


def tried(study: Study, runs: list[Run], found: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[int, float]]:
    """Variant → choice → held-out loss, of the runs that decide and are done.

    Args:
        study: the study.
        runs: those that are known.
        found: run's name → its JSON.

    Raises:
        UserError: runs that decide about a variant have losses of different images.
    """
    losses: dict[str, dict[int, float]] = {variant.name: {} for variant in study.variants}
    measures: dict[str, tuple[Run, Any]] = {}
    if study.select is not None:
        for run in runs:
            if run.choice is not None and (run.cause, run.seed) == ("seed", study.select.seed) and run.name in found:
                _check_measure(run, study, found, measures)
                losses[run.variant][run.choice] = heldout_loss(found[run.name])
    return losses


def _check_measure(
    run: Run, study: Study, found: Mapping[str, Mapping[str, Any]], measures: dict[str, tuple[Run, Any]]
) -> None:
    """Raise UserError unless the run's held-out loss is of what the variant's first is of."""
    if found[run.name]["heldout"] is None:
        return
    measure = measure_of(found[run.name])
    first, its_own = measures.setdefault(run.variant, (run, measure))
    if measure != its_own:
        raise UserError(
            f"{run.json(study)} has a held-out loss of other images than {first.json(study)}: nothing can be chosen by "
            "them; remove one, and its run is made again"
        )


def chosen(study: Study, losses: Mapping[str, Mapping[int, float]]) -> dict[str, int]:
    """Variant → the choice with the lowest loss, where all are tried; the first of equals.

    A variant of which every run failed has none.
    """
    if study.select is None:
        return {}
    count, best = len(study.select.choices), {}
    for name, by in losses.items():
        if len(by) == count and math.isfinite(min(by.values())):
            best[name] = min(range(count), key=by.__getitem__)
    return best
