"""The report of a study: README.md, numbers.json and plots, written from the runs' JSONs alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sit.study import plots, text
from sit.study.alike import check_alike
from sit.study.analysis import analyze
from sit.study.at_best import at_best
from sit.study.config import Selection, Study
from sit.study.relations import agreement, causes, points
from sit.study.schedule import State
from sit.study.speed import measured
from sit.study.values import LOSS, groups, of_one_measure
from sit.utils.errors import UserError
from sit.utils.files import replaced_folder
from sit.utils.json_text import finite, json_text


def numbers(study: Study, state: State) -> dict[str, Any]:
    """All numbers of the report.

    Raises:
        UserError: no run is done that could be reported, or two were made with different data under one name.
    """
    done = {run.name: state.found[run.name] for run in state.runs if run.name in state.found}
    failed = {name: one["failed"] for name, one in done.items() if one.get("failed")}
    compared = {run.name: done[run.name] for run in state.runs if run.compared and run.name in done.keys() - failed}
    check_alike(study, compared)
    compared, other_measure = of_one_measure(study, compared)
    if not compared and not failed and not any(state.losses.values()):
        raise UserError(f"no run of {study.path} is done yet: there is nothing to report")
    found: dict[str, Any] = {
        "study": study.path.name,
        "runs": {"done": len(state.runs) - len(state.missing(study)), "of": len(state.runs) + state.unknown},
        "machines": sorted({one["machine"] for one in state.found.values()}),
        "selection": selection(study, state),
        "failed": failed,
        "other_measure": other_measure,
    }
    if compared:
        speeds = measured(study)
        paces = {} if speeds is None else speeds["seconds_per_step"]
        lacking = sorted({one["variant"] for one in compared.values()} - paces.keys())
        if speeds is not None and lacking:
            found["speeds_lack"] = lacking
        elif speeds is not None:
            found["speeds"] = speeds
        found |= analyze(study, compared, None if lacking else paces)
        if found["fid"]:
            found["points"] = points(compared, found["fid"])
            found["agreement"] = agreement(found["points"])
            if study.evaluate is not None:
                found["at_best"] = at_best(groups(study, compared, study.vary[0]), found["fid"], study.evaluate)
        if len(study.vary) > 1:
            found["causes"] = causes({cause: groups(study, compared, cause) for cause in study.vary}, found["fid"])
    return found


def selection(study: Study, state: State) -> dict[str, Any]:
    """Variant → the held-out loss of each choice, the choice, and whether it is at the edge of what was tried."""
    if study.select is None:
        return {}
    found = {}
    for name, losses in state.losses.items():
        if not losses:
            continue
        best = state.choices.get(name)
        found[name] = {
            "losses": {study.select.label(choice): finite(loss) for choice, loss in losses.items()},
            "chosen": None if best is None else study.select.label(best),
            "settings": None if best is None else study.select.choices[best],
            "at_edge": best is not None and at_edge(study.select, best),
        }
    return found


def at_edge(selection: Selection, choice: int) -> bool:
    """Whether the choice's first setting, a number, is the least or the greatest of those that were tried."""
    values = [next(iter(settings.values())) for settings in selection.choices]
    if len(values) < 2 or not all(isinstance(value, int | float) for value in values):
        return False
    return values[choice] in (min(values), max(values))


def check_folder(study: Study, folder: Path) -> None:
    """Raise UserError if the folder is the report of another study: it would be written over."""
    try:
        other = json.loads((folder / "numbers.json").read_text(encoding="utf-8"))["study"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    if other != study.path.name:
        raise UserError(
            f"{folder} is the report of {other}, not of {study.path.name}: give another `out`, or remove it"
        )


def write_report(study: Study, state: State, against: str | None = None) -> Path:
    """Write the report's folder anew, whole, and return it.

    Args:
        study: the study.
        state: its runs.
        against: the variant that the others are compared with, for a report of its own; None takes the first.

    Raises:
        UserError: nothing is done yet, or the folder can't be written.
    """
    folder = study.out / "report"
    if against is not None:
        study = study.against(against)
        against = study.variants[0].name
        folder = study.out / f"report-{study.variants[0].slug}"
        own = (state.found[run.name] for run in state.runs if run.variant == against and run.name in state.found)
        if all(one.get("failed") for one in own):
            raise UserError(f"`against={against}`: no run of it is done yet that did not diverge")
    check_folder(study, folder)
    found = numbers(study, state)
    with replaced_folder(folder) as place:
        images = draw(study, state, found, place)
        (place / "numbers.json").write_text(json_text(found, indent=1) + "\n", encoding="utf-8")
        (place / "README.md").write_text(text.markdown(study, found, images, against), encoding="utf-8")
    return folder


def draw(study: Study, state: State, found: Mapping[str, Any], place: Path) -> dict[str, str]:
    """Draw what there is to draw into the folder: what it shows → its file."""
    images: dict[str, str] = {}
    variants = found.get("variants", {})
    paces = (found.get("seconds") or {}).get("seconds_per_step", {})
    for metric in (LOSS, found.get("fid")):
        curves = {}
        for name, one in variants.items():
            by_step = one["heldout_by_step"] if metric == LOSS else one["metrics_by_step"]
            cells = {step: cell if metric == LOSS else cell.get(metric) for step, cell in by_step.items()}
            if paces.get(name):
                curves[name] = [
                    (int(step) * paces[name], cell["value"], cell["error"]) for step, cell in cells.items() if cell
                ]
        if any(curves.values()):
            images[metric] = "loss-seconds.png" if metric == LOSS else "fid-seconds.png"
            plots.plot_curves(curves, place / images[metric], x="seconds of training", y=text.short(metric))
    by_time = {
        name: {time: cell["value"] for time, cell in one["heldout_by_time"].items()}
        for name, one in variants.items()
        if one["heldout_by_time"]
    }
    if len(by_time) > 1:
        images["by time"] = "loss-by-time.png"
        plots.plot_by_time(by_time, place / images["by time"])
    if found.get("points"):
        images["points"] = "fid-against-loss.png"
        plots.plot_points(found["points"], list(variants), place / images["points"], text.short(found["fid"]))
    grids = {}
    for run in state.runs:
        if run.compared and run.variant not in grids and run.name in state.found and run.grid(study).is_file():
            grids[run.variant] = run.grid(study)
    if grids:
        images["samples"] = "samples.png"
        plots.join_grids(grids, place / images["samples"])
    return images
