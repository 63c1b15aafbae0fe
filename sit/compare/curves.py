"""Curves over what a work folder has: ``python -m sit.compare curves``.

Nothing is sampled or measured: every evaluation that was finished in the work folder, by eval_fid.py or sit.compare, is
a point. Points that differ in what the curve is against alone are one curve, and so are several training seeds'. Of
evaluations that differ by the seed of their samples alone one counts. What a file is of counts by its content, not by
its path, and what is left out is told.
"""

from __future__ import annotations

import itertools
import json
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from sit.compare.arguments import CurvesArguments
from sit.compare.points import Point, read_points
from sit.metrics.estimate import half_width
from sit.metrics.identity import Identity
from sit.utils.files import atomic_folder
from sit.utils.json_text import json_text
from sit.utils.plot_style import style
from sit.utils.tables import markdown_table

AXES = {
    "guidance": "guidance scale",
    "evaluations": "network evaluations a sample, guidance's second pass not counted",
    "step": "training step",
    "seconds": "seconds of training",
}


def curves(points: list[Point]) -> dict[str, list[dict[str, Any]]]:
    """Points to curves by name: at each place the mean over training seeds, its interval, and the single runs."""
    groups = _grouped(_runs_apart(points))
    named = _names([members[0].fixed for members in groups.values()])
    return {name: _line(members) for name, members in zip(named, groups.values(), strict=True)}


def _line(members: list[Point]) -> list[dict[str, Any]]:
    at: dict[float, dict[int | None, list[Point]]] = defaultdict(lambda: defaultdict(list))
    for point in members:
        at[point.bucket][point.seed].append(point)
    line = []
    for bucket in sorted(at):
        seeds = sorted(at[bucket], key=lambda seed: seed or 0)
        runs = [_counted(at[bucket][seed]) for seed in seeds]
        values = [run.number.value for run in runs]
        line.append(
            {
                "x": float(np.mean([run.x for run in runs])),
                "value": float(np.mean(values)),
                "error over training seeds": half_width(values) if len(values) > 1 else None,
                "seeds": seeds,
                "samples' seeds": [run.samples_seed for run in runs],
                "values": values,
                "errors over samples": [run.number.error for run in runs],
                "samples' spread left out": len({run.samples_seed for run in runs}) < len(runs),
                "other weights before": any(len({one.made_by for one in every}) > 1 for every in at[bucket].values()),
            }
        )
    return line


def _counted(evaluations: list[Point]) -> Point:
    """The one that counts of a run's at one place: of its newest weights, that with the training seed or the lowest."""
    newest = max(evaluations, key=lambda point: point.written)
    alike = [point for point in evaluations if point.made_by == newest.made_by]
    return min(alike, key=lambda point: (point.samples_seed != point.seed, point.samples_seed, -point.written))


def notes(line: list[dict[str, Any]], axis: str) -> list[str]:
    """What else must be known of a curve, a line each.

    Args:
        line: the curve, as :func:`curves` gives it.
        axis: what its ``x`` is.
    """
    said = {
        "samples' spread left out": "different trainings share their samples' seed, so the interval over training "
        "seeds leaves the samples' spread out and is too narrow",
        "other weights before": "the checkpoint was evaluated before with other weights, and the newest evaluation "
        "counts; if the run was trained again, the other places may still be of the earlier training",
    }
    told = []
    for flag, words in said.items():
        if places := [f"{point['x']:g}" for point in line if point[flag]]:
            told.append(f"At {axis} {', '.join(places)}: {words}.")
    return told


def _grouped(points: list[Point]) -> dict[str, list[Point]]:
    """The points of each curve, by what they have in common; what has an identity counts by its content."""
    groups: dict[str, list[Point]] = defaultdict(list)
    for point in points:
        plain = {name: one.content if isinstance(one, Identity) else one for name, one in point.fixed.items()}
        groups[json.dumps(plain, sort_keys=True, default=str)].append(point)
    return groups


def _runs_apart(points: list[Point]) -> list[Point]:
    """The points, those of a curve with the ``folder`` of their run where two runs of one seed are at one place."""
    told: list[Point] = []
    for members in _grouped(points).values():
        places: dict[tuple[float, int | None], list[Point]] = defaultdict(list)
        for point in members:
            places[point.bucket, point.seed].append(point)
        apart = any(
            one.folder != other.folder and one.made_by != other.made_by  # one run may be known by two paths
            for here in places.values()
            for one, other in itertools.combinations(here, 2)
        )
        told += (
            [replace(point, fixed=point.fixed | {"folder": point.folder}) for point in members] if apart else members
        )
    return told


def _names(fixed: list[dict[str, Any]]) -> list[str]:
    """What each curve is called: its run, and whatever else tells it from others that have that too; all different."""
    named: list[str] = []
    for one in fixed:
        differ = [
            f"{name} {value}"
            for name, value in one.items()
            if name != "run" and any(name in other and other[name] != value for other in fixed)
        ]
        name = ", ".join([str(one["run"]), *differ])
        numbered = itertools.chain([name], (f"{name} ({count})" for count in itertools.count(2)))
        named.append(next(free for free in numbered if free not in named))
    return named


def draw(found: dict[str, list[dict[str, Any]]], arguments: CurvesArguments, path: Path) -> None:
    """The curves: wide bars over training seeds, where there are several; thin ones, of each run, over samples."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for index, (name, line) in enumerate(found.items()):
        look, x = style(index), [point["x"] for point in line]
        seeds = [point["error over training seeds"] or 0 for point in line]
        axes.errorbar(x, [point["value"] for point in line], yerr=seeds, label=name, capsize=5, markersize=4, **look)
        for point in line:
            errors = [error or 0 for error in point["errors over samples"]]
            at = [point["x"]] * len(errors)
            axes.errorbar(at, point["values"], yerr=errors, fmt="none", ecolor=look["color"], elinewidth=0.8, alpha=0.6)
    axes.set(xlabel=AXES[arguments.against], ylabel=arguments.metric)
    axes.grid(alpha=0.25)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=110)


def write_curves(arguments: CurvesArguments, command: str) -> Path:
    """Read, draw and write a folder of the plot, a table and ``curves.json``.

    Raises:
        UserError: the folder is taken, or there is nothing to draw.
    """
    points, left_out = read_points(arguments)
    found = curves(points)
    with atomic_folder(arguments.out) as place:
        draw(found, arguments, place / "curves.png")
        told = {"against": AXES[arguments.against], "metric": arguments.metric, "curves": found}
        told |= {"notes": {name: notes(line, told["against"]) for name, line in found.items()}, "left out": left_out}
        (place / "curves.json").write_text(json_text(told, indent=1) + "\n")
        (place / "README.md").write_text(_page(told, arguments, command))
    return Path(arguments.out)


def _page(told: dict[str, Any], arguments: CurvesArguments, command: str) -> str:
    """The text of what ``curves.json`` has."""
    lines = [
        f"# {arguments.metric} against {AXES[arguments.against]}",
        "",
        f"Made on {time.strftime('%Y-%m-%d')} of finished evaluations by",
        "",
        f"    {command}",
        "",
        f"![{arguments.metric}](curves.png)",
        "",
        "Wide bars, and ± in the table, are 95 % intervals of the mean over training seeds, where there are several; "
        "thin bars are those over samples of each run, for its weights only. Of evaluations that differ by the seed of "
        "their samples alone one counts: that with the training seed, or else with the lowest.",
        "",
    ]
    if told["left out"]:
        lines += [f"Left out: {'; '.join(told['left out'])}.", ""]
    for name, line in told["curves"].items():
        rows = []
        for point in line:
            error, samples = point["error over training seeds"], [e for e in point["errors over samples"] if e]
            said = f"{point['value']:.4g}" + (f" ± {error:.2g}" if error is not None else "")
            rows.append((f"{point['x']:g}", said, len(point["values"]), f"{np.mean(samples):.2g}" if samples else ""))
        header = [AXES[arguments.against], arguments.metric, "runs", "half-width over samples"]
        lines += [f"{name}:", "", markdown_table(header, rows), ""]
        for note in told["notes"][name]:
            lines += [note, ""]
    return "\n".join(lines)
