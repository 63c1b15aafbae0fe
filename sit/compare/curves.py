"""Curves over what a work folder has: ``python -m sit.compare curves``.

Nothing is sampled or measured: every evaluation that was finished in the work folder, by eval_fid.py or sit.compare, is
a point. Points that differ in what the curve is against alone are one curve, and so are several training seeds'. Of
evaluations that differ by the seed of their samples alone one counts.
"""

from __future__ import annotations

import json
import re
import time
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from sit.compare.arguments import CurvesArguments
from sit.compare.plots import style
from sit.metrics.estimate import half_width
from sit.metrics.report import Number, Report
from sit.metrics.work_folder import read_about, read_source
from sit.sampling.config import SamplerConfig
from sit.training.recipes import load_recipe
from sit.training.run_folder import read_metrics
from sit.utils.errors import UserError
from sit.utils.files import atomic_folder
from sit.utils.json_text import json_text
from sit.utils.tables import markdown_table

AXES = {
    "guidance": "guidance scale",
    "evaluations": "network evaluations a sample, guidance's second pass not counted",
    "step": "training step",
    "seconds": "seconds of training",
}

EVALUATIONS = {"euler": 1, "midpoint": 2, "heun2": 2, "heun3": 3, "rk4": 4}
"""network evaluations of a step of the ODE; the others choose their steps, or keep some of earlier ones"""


@dataclass(frozen=True)
class Point:
    """One finished evaluation.

    Attributes:
        fixed: everything that tells it from others but what the curve is against, the training seed and its samples.
        x: where it stands.
        bucket: points of several training seeds with the same are averaged; ``x``, or the step of ``seconds``.
        seed: the training seed; None if the checkpoint is of no run.
        number: the metric.
        samples_seed: the seed of its samples.
        otherwise: what tells it from another evaluation of the same training seed at the same place, if there is one.
    """

    fixed: dict[str, Any]
    x: float
    bucket: float
    seed: int | None
    number: Number
    samples_seed: int
    otherwise: dict[str, str]


def read_points(arguments: CurvesArguments) -> list[Point]:
    """The points of all finished evaluations of checkpoints in a work folder.

    Raises:
        UserError: there is no such folder, or it has none with that metric that can be placed.
    """
    work = Path(arguments.work_dir)
    if not work.is_dir():
        raise UserError(f"`work_dir={work}`: no such folder")
    points = []
    for place in sorted(work.glob("samples-*")):
        about, source = read_about(place), read_source(place)
        for path in sorted(place.glob("numbers-*.json")):
            try:
                report = Report.from_json(path.read_text(encoding="utf-8"))
            except (OSError, ValueError, TypeError, KeyError):
                continue  # it is made again by its command
            if "sampler" in about and source.get("checkpoint"):
                points += _points(arguments, about, source, report)
    if not points:
        raise UserError(
            f"`work_dir={work}` has no finished evaluation of a checkpoint with `metric={arguments.metric}` that can "
            f"be drawn against {arguments.against}"
        )
    return points


def _points(arguments: CurvesArguments, about: dict[str, Any], source: dict[str, Any], report: Report) -> list[Point]:
    sampler, checkpoint = dict(about["sampler"]), Path(source["checkpoint"])
    folder = checkpoint.parent.parent
    is_run = (folder / "config.yaml").is_file()
    fixed: dict[str, Any] = {
        "samples": report.sample_count,
        "labels": about["labels"],
        "reference": report.reference,
        "features": report.features,
        "weights": weights(source),
        "guide": guide(about, report.samples, folder),
        "latents": about.get("latents"),
        "VAE": about.get("VAE"),
        "precision": about.get("precision"),
    }
    seed = None
    if is_run:
        config = load_recipe(str(folder / "config.yaml"))
        seed = config.seed
        alike = replace(config, seed=0, output_dir=None, resume=None)
        fixed |= {"run": f"{config.model} {config.mixer}", "settings": alike.to_yaml()}
    else:
        fixed |= {"run": str(checkpoint), "settings": {name: about.get(name) for name in ("config", "transport")}}
    step = source["step"]
    places: dict[str, float | None] = {
        "guidance": sampler["cfg_scale"],
        "evaluations": evaluations(sampler),
        "step": step,
        "seconds": seconds_of_training(folder, step) if is_run else None,
    }
    x = places[arguments.against]
    if x is None:
        return []
    moving = {"guidance": "cfg_scale", "evaluations": "steps"}.get(arguments.against)
    fixed["sampler"] = {name: value for name, value in sampler.items() if name != moving}
    if arguments.against not in ("step", "seconds"):
        fixed["step"] = step
    bucket = step if arguments.against == "seconds" else x
    chosen = [n for n in report.numbers if n.name == arguments.metric or n.name.startswith(f"{arguments.metric} (")]
    return [
        Point(
            fixed | {"metric": number.name},
            x,
            bucket,
            seed,
            number,
            samples_seed=about["seed"],
            otherwise={"folder": str(folder), "measured by": number.how or "nothing told"},
        )
        for number in chosen
    ]


def weights(source: dict[str, Any]) -> str:
    """Which of a checkpoint's weights were sampled with, in words that are the same at every step.

    Args:
        source: as :class:`~sit.metrics.generated.GeneratedImages` has it.
    """
    told = source.get("weights") or "not told"
    return re.sub(r" \(profile .* off\), step \d+$", "", told.removeprefix(f"{source['checkpoint']}, "))


def guide(about: dict[str, Any], samples: str, run: Path) -> str:
    """What guided the samples besides the network: a step of the run itself, or a checkpoint and its weights' hash.

    Args:
        about: as :class:`~sit.metrics.generated.GeneratedImages` has it.
        samples: its name, which alone has the guide's path.
        run: the folder of the checkpoint's run.
    """
    if "guide" not in about:
        return "none"
    named = re.search(r", guided by (.+?), seed \d+, ", samples)
    if named and Path(named[1]).parent.parent == run:
        return f"its own {Path(named[1]).name}"  # the same words for all training seeds, each with weights of its own
    return f"{named[1] if named else 'not told'} ({about['guide'][:12]})"


def evaluations(sampler: dict[str, Any]) -> int | None:
    """How often a sampler evaluates the network for a sample without guidance; None if it decides that by itself.

    Args:
        sampler: a :class:`SamplerConfig` as a dict.
    """
    names = SamplerConfig.__dataclass_fields__
    config = SamplerConfig(**{name: value for name, value in sampler.items() if name in names})
    if config.sampler is None:
        return None
    if config.sampler == "meanflow":
        return config.steps
    if config.sampler == "ode":
        each = EVALUATIONS.get(config.resolved_method)
        return None if each is None else each * config.steps
    last = config.last_step != "none"
    each = 2 if config.resolved_method == "heun" else 1
    return each * (config.steps - last) + last


def seconds_of_training(run: Path, step: int) -> float | None:
    """How long a run had trained at ``step``, by the pace of each logged row; None if they don't tell."""
    rows = [row for row in read_metrics(run / "metrics.jsonl") if row.get("steps_per_second")]
    seconds, before = 0.0, 0
    for row in rows:
        here = min(row["step"], step)
        if here > before:
            seconds += (here - before) / row["steps_per_second"]
            before = here
    return seconds if before >= step else None


def curves(points: list[Point]) -> dict[str, list[dict[str, Any]]]:
    """Points to curves by name: at each place the mean over training seeds, its interval, and the single runs.

    An evaluation that was made twice, with other samples, counts once: with the training seed, or with the lowest.
    """
    groups = _grouped(_told_apart(points))
    named = _names([members[0].fixed for members in groups.values()])
    found: dict[str, list[dict[str, Any]]] = {}
    for name, members in zip(named, groups.values(), strict=True):
        at: dict[float, dict[int | None, Point]] = defaultdict(dict)
        for point in sorted(members, key=lambda point: (point.samples_seed != point.seed, point.samples_seed)):
            at[point.bucket].setdefault(point.seed, point)
        line = []
        for bucket in sorted(at):
            runs = sorted(at[bucket].values(), key=lambda run: run.seed or 0)
            values = [run.number.value for run in runs]
            over_samples = [run.number.error for run in runs]
            line.append(
                {
                    "x": float(np.mean([run.x for run in runs])),
                    "value": float(np.mean(values)),
                    "error over training seeds": half_width(values) if len(values) > 1 else None,
                    "seeds": [run.seed for run in runs],
                    "values": values,
                    "errors over samples": over_samples,
                }
            )
        found[name] = line
    return found


def _grouped(points: list[Point]) -> dict[str, list[Point]]:
    """The points of each curve, by what they have in common."""
    groups: dict[str, list[Point]] = defaultdict(list)
    for point in points:
        groups[json.dumps(point.fixed, sort_keys=True, default=str)].append(point)
    return groups


def _told_apart(points: list[Point]) -> list[Point]:
    """The points, those of a curve with what tells them apart ``otherwise`` where two are at one place of one seed."""
    told: list[Point] = []
    for members in _grouped(points).values():
        first: dict[tuple[float, int | None], dict[str, str]] = {}
        differ = set()
        for point in members:
            other = first.setdefault((point.bucket, point.seed), point.otherwise)
            differ |= {name for name, value in point.otherwise.items() if value != other[name]}
        for point in members:
            told.append(replace(point, fixed=point.fixed | {name: point.otherwise[name] for name in sorted(differ)}))
    return told


def _names(fixed: list[dict[str, Any]]) -> list[str]:
    """What each curve is called: its run, and whatever else tells it from the others."""
    flat = []
    for one in fixed:
        sampler = {f"sampler's {name}": value for name, value in one["sampler"].items()}
        flat.append({name: value for name, value in one.items() if name != "sampler"} | sampler)
    named: list[str] = []
    for one in flat:
        differ = [
            f"{name} {value}"
            for name, value in one.items()
            if name not in ("run", "settings") and any(other.get(name) != value for other in flat)
        ]
        name = ", ".join([one["run"], *differ])
        named.append(name if name not in named else f"{name} ({named.count(name) + 1})")
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
    found = curves(read_points(arguments))
    with atomic_folder(arguments.out) as place:
        draw(found, arguments, place / "curves.png")
        told = {"against": AXES[arguments.against], "metric": arguments.metric, "curves": found}
        (place / "curves.json").write_text(json_text(told, indent=1) + "\n")
        (place / "README.md").write_text(_page(found, arguments, command))
    return Path(arguments.out)


def _page(found: dict[str, list[dict[str, Any]]], arguments: CurvesArguments, command: str) -> str:
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
    for name, line in found.items():
        rows = []
        for point in line:
            error, samples = point["error over training seeds"], [e for e in point["errors over samples"] if e]
            said = f"{point['value']:.4g}" + (f" ± {error:.2g}" if error is not None else "")
            rows.append((f"{point['x']:g}", said, len(point["values"]), f"{np.mean(samples):.2g}" if samples else ""))
        header = [AXES[arguments.against], arguments.metric, "runs", "half-width over samples"]
        lines += [f"{name}:", "", markdown_table(header, rows), ""]
    return "\n".join(lines)
