"""The points of :mod:`sit.compare.curves`: what finished evaluations in a work folder say of themselves.

What a file is of counts by its content, not by its path. Evaluations that are left out are counted, with the reason.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sit.compare.arguments import CurvesArguments
from sit.metrics.identity import Identity, short_hash
from sit.metrics.report import NUMBERS, Number, Report
from sit.metrics.work_folder import FORMAT, read_about, read_source
from sit.sampling.config import SamplerConfig
from sit.training.recipes import load_recipe
from sit.training.run_folder import read_metrics
from sit.utils.errors import UserError

EVALUATIONS = {"euler": 1, "midpoint": 2, "heun2": 2, "heun3": 3, "rk4": 4}
"""network evaluations of a step of the ODE; the others choose their steps, or keep some of earlier ones"""


UNREADABLE = "can't be read (their commands make them again)"
OLD = (
    "have numbers of another version, which may not tell what they were measured with (their commands with the same "
    "`work_dir` make them again of the features that are there)"
)
UNPLACED = "have no place on this axis"
"""why evaluations are left out, after how many they are"""


@dataclass(frozen=True)
class Evaluation:
    """Finished numbers of a set of samples.

    Attributes:
        about: what the samples are, as :class:`~sit.metrics.generated.GeneratedImages` has it.
        source: where they come from, likewise.
        report: the numbers.
        written: when they were finished, in nanoseconds.
    """

    about: dict[str, Any]
    source: dict[str, Any]
    report: Report
    written: int


@dataclass(frozen=True)
class Point:
    """One number of a finished evaluation.

    Attributes:
        fixed: everything that tells it from others but what the curve is against, the training seed and its samples.
        x: where it stands.
        bucket: points of several training seeds with the same are averaged; ``x``, or the step of ``seconds``.
        seed: the training seed; None if the checkpoint is of no run.
        number: the metric.
        samples_seed: the seed of its samples.
        made_by: a hash of all that decides the samples but their seed, the weights first.
        folder: of the run.
        written: when the number was finished, in nanoseconds.
    """

    fixed: dict[str, Any]
    x: float
    bucket: float
    seed: int | None
    number: Number
    samples_seed: int
    made_by: str
    folder: str
    written: int


def read_points(arguments: CurvesArguments) -> tuple[list[Point], list[str]]:
    """The points of all finished evaluations of checkpoints in a work folder, and what is left out, a line each.

    Raises:
        UserError: there is no such folder, or it has none with that metric that can be placed.
    """
    work = Path(arguments.work_dir)
    if not work.is_dir():
        raise UserError(f"`work_dir={work}`: no such folder")
    left_out: Counter[str] = Counter()
    points = []
    for evaluation in _evaluations(work, left_out):
        points += _points(arguments, evaluation, left_out)
    told = [f"of the evaluations in {work} {count} {why}" for why, count in left_out.items() if count]
    if not points:
        said = (
            f"`work_dir={work}` has no finished evaluation of a checkpoint with `metric={arguments.metric}` that can "
            f"be drawn against {arguments.against}"
        )
        raise UserError("; ".join([said, *told]))
    return points, told


def _evaluations(work: Path, left_out: Counter[str]) -> Iterator[Evaluation]:
    """The evaluations of checkpoints by numbers of the present version; others are counted, by why they are left out.

    Numbers that another version left are passed over where this version has made them again.
    """
    for place in sorted(work.glob("samples-*")):
        about, source = read_about(place), read_source(place)
        paths = sorted(place.glob("numbers-*.json"))
        reports = {path: report for path in paths if (report := _report(path)) is not None}
        if not about:
            left_out[UNREADABLE] += len(paths)
        elif "sampler" in about and source.get("checkpoint"):
            left_out[UNREADABLE] += len(paths) - len(reports)
            now = {
                path: report
                for path, report in reports.items()
                if (report.version, about.get("format")) == (NUMBERS, FORMAT)
            }
            again = {(report.reference, report.features) for report in now.values()}
            left_out[OLD] += sum((report.reference, report.features) not in again for report in reports.values())
            for path, report in now.items():
                yield Evaluation(about, source, report, path.stat().st_mtime_ns)


def _report(path: Path) -> Report | None:
    try:
        return Report.from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _points(arguments: CurvesArguments, evaluation: Evaluation, left_out: Counter[str]) -> list[Point]:
    about, source, report = evaluation.about, evaluation.source, evaluation.report
    chosen = [n for n in report.numbers if n.name == arguments.metric or n.name.startswith(f"{arguments.metric} (")]
    sampler, step, folder = dict(about["sampler"]), source["step"], Path(source["checkpoint"]).parent.parent
    is_run = (folder / "config.yaml").is_file()
    places: dict[str, float | None] = {
        "guidance": sampler["cfg_scale"],
        "evaluations": evaluations(sampler),
        "step": step,
        "seconds": seconds_of_training(folder, step) if is_run else None,
    }
    x = places[arguments.against]
    if x is None:
        left_out[UNPLACED] += bool(chosen)
        return []
    moving = {"guidance": "cfg_scale", "evaluations": "steps"}.get(arguments.against)
    fixed: dict[str, Any] = {
        "samples": report.sample_count,
        "labels": about["labels"],
        "weights": weights(source),
        "guide": guide(about, source, report.samples, folder),
        "latents": about.get("latents"),
        "VAE": about.get("VAE"),
        "precision": about.get("precision"),
    }
    fixed |= {f"sampler's {name}": value for name, value in sampler.items() if name != moving}
    fixed |= {} if arguments.against in ("step", "seconds") else {"step": step}
    trained, seed = _training(folder) if is_run else (_network(about, source), None)
    return [
        Point(
            fixed | trained | number.basis,
            x,
            bucket=step if arguments.against == "seconds" else x,
            seed=seed,
            number=number,
            samples_seed=about["seed"],
            made_by=short_hash({name: about[name] for name in about if name not in ("seed", "label list")}),
            folder=str(folder),
            written=evaluation.written,
        )
        for number in chosen
    ]


def _training(run: Path) -> tuple[dict[str, Any], int]:
    """What a run is called, how it was trained, and its seed."""
    config = load_recipe(str(run / "config.yaml"))
    apart = ("model", "mixer", "seed", "output_dir", "resume")  # in its name, averaged over, or no matter of training
    settings = {f"training's {name}": value for name, value in asdict(config).items() if name not in apart}
    return {"run": f"{config.model} {config.mixer}"} | settings, config.seed


def _network(about: dict[str, Any], source: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint of no run is called, and how its network is used."""
    parts = {kind: about.get(kind) or {} for kind in ("config", "transport")}
    settings = {f"{kind}'s {name}": value for kind, part in parts.items() for name, value in part.items()}
    return {"run": Identity(source["checkpoint"], about["network"])} | settings


def weights(source: dict[str, Any]) -> str:
    """Which of a checkpoint's weights were sampled with, in words that are the same at every step.

    Args:
        source: as :class:`~sit.metrics.generated.GeneratedImages` has it.
    """
    told = source.get("weights") or "not told"
    return re.sub(r" \(profile .* off\), step \d+$", "", told.removeprefix(f"{source['checkpoint']}, "))


def guide(about: dict[str, Any], source: dict[str, Any], samples: str, run: Path) -> str | Identity:
    """What guided the samples besides the network: a step of the run itself, or a checkpoint and its weights' hash.

    Args:
        about: as :class:`~sit.metrics.generated.GeneratedImages` has it.
        source: likewise; of earlier programs without the guide's path.
        samples: the images' name, which has it too.
        run: the folder of the checkpoint's run.
    """
    if "guide" not in about:
        return "none"
    named = re.search(r", guided by (.+?), seed \d+, ", samples)
    path = source.get("guide") or (named[1] if named else None)
    if path is not None and Path(path).parent.parent == run:
        return f"its own {Path(path).name}"  # the same words for all training seeds, each with weights of its own
    return Identity(path or "not told", about["guide"])


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
