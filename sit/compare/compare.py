"""Runs side by side: ``python -m sit.compare RUN RUN … --out FOLDER`` writes one report of what they are and can do.

One Markdown file with its plots and grids, and all numbers in a JSON file: metrics at each checkpoint, loss curves,
parameters, multiply-accumulates, the speed of training and sampling on this machine, and samples of the same seeds.
Runs that differ by their seed alone are one group, with intervals over the seeds and differences paired by seed.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import shlex
import statistics
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from scipy import stats

from sit.checkpoint.find import find_checkpoints
from sit.checkpoint.info import read_info
from sit.checkpoint.integrity import is_complete
from sit.checkpoint.load import Loaded, load_for_sampling
from sit.compare.report import markdown, plot_losses, plot_metrics
from sit.compare.speed import measure_speed
from sit.metrics.classifier import LabelClassifier
from sit.metrics.evaluate import evaluate
from sit.metrics.extraction import WorkDirectory, extract
from sit.metrics.features import Extractor, FeatureWeights, default_features, get_extractor
from sit.metrics.image_sets import GeneratedImages, Images, Statistics, open_reference
from sit.metrics.report import Number, Report
from sit.model import SiT
from sit.sampling.config import SamplerConfig
from sit.sampling.images import balanced_labels, latent_shape_for, sample_images
from sit.training.config import TrainConfig
from sit.training.plan import multiply_accumulates
from sit.training.recipes import load_recipe
from sit.training.run_folder import read_metrics
from sit.utils.cli import one_line_errors
from sit.utils.device import pick_device
from sit.utils.errors import UserError, entry_point
from sit.utils.files import atomic_folder, atomic_write
from sit.utils.image_grid import labeled_grid, save_png
from sit.utils.precision import allow_tf32
from sit.utils.record import machine


@dataclass
class Arguments:
    """Compare runs on the same data."""

    runs: tyro.conf.Positional[tuple[str, ...]]
    """runs' folders"""
    out: str
    """new folder for the report"""
    reference: str | None = None
    """as eval_fid.py takes it; None takes digits for runs on digits"""
    features: str | None = None
    """as eval_fid.py takes it; None takes digits for runs on digits, else inception"""
    classifier: str | None = None
    """a folder of sit.train_classifier, which predicts the samples' classes: class accuracy"""
    at_steps: tuple[int, ...] = ()
    """checkpoints to evaluate, by their step; none given means all"""
    num_samples: int = 1000
    """samples for each checkpoint's metrics"""
    seed: int = 0
    """of the samples; the same for all runs"""
    batch_size: int = 64
    """images made and evaluated at a time, also in the measurement of speed"""
    speed_repeats: int = 5
    """rounds of the measurement of speed; 0 leaves it out"""
    work_dir: str | None = None
    """keeps finished evaluations, so that the same command goes on after a crash"""
    device: str | None = None
    """None takes the accelerator, if there is one"""
    weights_files: Annotated[FeatureWeights, tyro.conf.OmitArgPrefixes] = field(default_factory=FeatureWeights)
    sampler: Annotated[SamplerConfig, tyro.conf.OmitArgPrefixes] = field(default_factory=SamplerConfig)


@dataclass(frozen=True, eq=False)
class Tools:
    """What samples are evaluated with."""

    extractor: Extractor
    reference: Images | Statistics
    classifier: LabelClassifier | None
    device: torch.device
    batch_size: int

    @property
    def identity(self) -> tuple[str, str, str]:
        """What tells their numbers from those of other tools."""
        classifier = self.classifier.identity if self.classifier else ""
        return self.reference.identity or self.reference.name, self.extractor.identity, classifier

    @functools.cache  # noqa: B019  (there is one, for the whole program)
    def reference_features(self) -> dict[str, np.ndarray] | None:
        """The features of the reference's images, made once for all evaluations; None if it has none."""
        images = self.reference if isinstance(self.reference, Images) else self.reference.images
        if images is None:
            return None
        with WorkDirectory(None) as work:
            making = dict(device=self.device, batch_size=self.batch_size, description="reference")
            return extract(images, self.extractor, work, **making)


@dataclass
class Run:
    """A run's folder, its config, and its complete checkpoints as (step, folder)."""

    folder: Path
    config: TrainConfig
    checkpoints: list[tuple[int, Path]]
    name: str = ""


def open_run(path: str, at_steps: tuple[int, ...]) -> Run:
    """Open a run's folder.

    Raises:
        UserError: it is none, or has no complete checkpoint at the steps that were asked for.
    """
    folder = Path(path)
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder} is not a run's folder: it has no config.yaml")
    complete = [(step, place) for step, place in find_checkpoints(folder) if is_complete(place)]
    chosen = [(step, place) for step, place in complete if not at_steps or step in at_steps]
    if not chosen:
        have = ", ".join(str(step) for step, _ in complete) or "none"
        raise UserError(f"{folder} has no complete checkpoint to compare; its steps are: {have}")
    return Run(folder, load_recipe(str(folder / "config.yaml")), chosen)


def open_runs(paths: tuple[str, ...], at_steps: tuple[int, ...]) -> list[Run]:
    """Open all runs, and name them by what tells them apart; runs that differ by their seed alone share a name.

    Raises:
        UserError: there is none, or they were trained on different data.
    """
    if not paths:
        raise UserError("give at least one run's folder")
    runs = [open_run(path, at_steps) for path in paths]
    for run in runs[1:]:
        for setting in ("data", "image_size"):
            ours, first = getattr(run.config, setting), getattr(runs[0].config, setting)
            if ours != first:
                raise UserError(f"{run.folder} was trained with {setting} {ours} and {runs[0].folder} with {first}")
    for run in runs:
        run.name = f"{run.config.model} {run.config.mixer}"
    different = {run.name: replace(run.config, seed=0, output_dir=None, resume=None) for run in runs}
    if any(replace(run.config, seed=0, output_dir=None, resume=None) != different[run.name] for run in runs) or (
        len({(run.name, run.config.seed) for run in runs}) < len(runs)
    ):  # they are not repetitions of each other with other seeds
        for run in runs:
            run.name += f" ({run.folder.name})"
    return runs


def describe(run: Run, loaded: Loaded) -> dict[str, Any]:
    """Parameters and multiply-accumulates of one forward pass."""
    with torch.device("meta"):
        network = SiT.from_config(loaded.model.config)
    return {
        "model": run.config.model,
        "mixer": run.config.mixer,
        "parameters": sum(p.numel() for p in network.parameters()),
        "multiply_accumulates": multiply_accumulates(network, latent_shape_for(loaded, None)),
        "steps": run.checkpoints[-1][0],
        "images_seen": read_info(run.checkpoints[-1][1]).images_seen,
    }


def sample_grid(run: Run, loaded: Loaded, arguments: Arguments, path: Path) -> None:
    """Two samples of each of up to ten classes; the same numbers and seed for every run."""
    classes = min(10, loaded.model.config.num_classes)
    indices = torch.arange(2 * classes)
    labels = balanced_labels(indices.tolist(), range(classes))
    options = dict(seed=arguments.seed, config=arguments.sampler, batch_size=arguments.batch_size)
    made = list(sample_images(loaded, indices, labels, **options))
    names = loaded.info.label_names or [str(label) for label in range(classes)]
    images = torch.cat([batch.images for batch in made]).numpy()
    save_png(labeled_grid(images, [names[label] for label in labels.tolist()], classes), path)


def evaluate_checkpoint(loaded: Loaded, tools: Tools, arguments: Arguments) -> Report:
    """The evaluation of one checkpoint: kept in the work folder, and read from there if it has been made."""
    samples = GeneratedImages(loaded, arguments.num_samples, seed=arguments.seed, config=arguments.sampler)
    kept = None
    if arguments.work_dir is not None:
        what = (samples.identity, arguments.num_samples, *tools.identity)
        kept = Path(arguments.work_dir) / f"{hashlib.blake2b(repr(what).encode(), digest_size=12).hexdigest()}.json"
        if kept.is_file():
            report = json.loads(kept.read_text())
            return Report(**report | {"numbers": [Number(**number) for number in report["numbers"]]})
    options = dict(batch_size=arguments.batch_size, classifier=tools.classifier, real=tools.reference_features())
    report = evaluate(samples, tools.reference, tools.extractor, device=loaded.device, **options)
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(kept) as temporary:
            temporary.write_text(report.to_json())
    return report


def mean_over_seeds(values: list[float], error: float | None) -> dict[str, Any]:
    """The mean with the half-width of its 95 % interval by Student's t; a single value keeps its own error."""
    if len(values) == 1:
        return {"value": values[0], "error": error, "values": values}
    half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return {"value": statistics.fmean(values), "error": float(half), "values": values}


def summarize(runs: dict[int, dict[int, Report]]) -> dict[int, dict[str, dict[str, Any]]]:
    """Reports by seed and step to each metric's mean over seeds, by step, where every seed has it."""
    steps = sorted(set.intersection(*(set(reports) for reports in runs.values())))
    summary: dict[int, dict[str, dict[str, Any]]] = {}
    for step in steps:
        by_seed = [{number.name: number for number in reports[step].numbers} for reports in runs.values()]
        summary[step] = {
            name: mean_over_seeds([numbers[name].value for numbers in by_seed], number.error)
            for name, number in by_seed[0].items()
            if all(name in numbers for numbers in by_seed)
        }
    return summary


def differences(groups: dict[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """Each later group's metrics at its last step less the first group's, paired by the seeds that both have."""
    (_, first), *others = groups.items()
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for name, group in others:
        seeds = [seed for seed in first["seeds"] if seed in group["seeds"]]
        step = max(group["metrics"])
        if len(seeds) < 2 or step != max(first["metrics"]):
            continue
        found[name] = {}
        for metric in [metric for metric in group["metrics"][step] if metric in first["metrics"][step]]:
            ours, theirs = (
                dict(zip(one["seeds"], one["metrics"][step][metric]["values"], strict=True)) for one in (group, first)
            )
            found[name][metric] = mean_over_seeds([ours[seed] - theirs[seed] for seed in seeds], None)
    return found


def compare(arguments: Arguments) -> Path:
    """Measure everything and write the report's folder.

    Raises:
        UserError: runs that can't be compared, a reference or features that can't be had, or a folder that is taken.
    """
    runs = open_runs(arguments.runs, arguments.at_steps)
    device = pick_device(arguments.device)
    allow_tf32(device)
    usual = default_features(runs[0].config.data)
    if arguments.reference is None and usual != "digits":
        raise UserError("give `reference`: only runs on the digits have one by themselves")
    features = arguments.features or usual
    info = read_info(runs[0].checkpoints[-1][1])  # its classes are all runs': their data are the same
    tools = Tools(
        get_extractor(features, device, arguments.weights_files.of(features)),
        open_reference(arguments.reference or "digits", runs[0].config.image_size, device=device),
        None
        if arguments.classifier is None
        else LabelClassifier.load(arguments.classifier, device, info.classes or None, info.label_names),
        device,
        arguments.batch_size,
    )
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.name, []).append(run)

    with atomic_folder(arguments.out) as place:
        found: dict[str, Any] = {"machine": machine(device), "sampler": asdict(arguments.sampler), "groups": {}}
        newest: dict[str, Loaded] = {}
        for name, members in groups.items():
            reports: dict[int, dict[int, Report]] = {}
            for run in members:
                reports[run.config.seed] = {}
                for step, checkpoint in run.checkpoints:
                    loaded = load_for_sampling(checkpoint, device=device)
                    reports[run.config.seed][step] = evaluate_checkpoint(loaded, tools, arguments)
                if run is members[0]:
                    newest[name] = loaded
                    sample_grid(run, loaded, arguments, place / f"samples-{len(newest)}.png")
            metrics = summarize(reports)
            found["groups"][name] = {**describe(members[0], newest[name]), "seeds": list(reports), "metrics": metrics}
        if arguments.speed_repeats:
            speeds = measure_speed(newest, arguments.sampler, arguments.batch_size, arguments.speed_repeats)
            for name, speed in speeds.items():
                found["groups"][name]["images_per_second"] = speed
        found["differences"] = differences(found["groups"])
        curves = {name: [losses(run) for run in members] for name, members in groups.items()}
        plot_losses({name: lines for name, lines in curves.items() if all(lines)}, place / "loss.png")
        plots = plot_metrics(found["groups"], place)
        (place / "numbers.json").write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n")
        (place / "README.md").write_text(markdown(found, plots, command(arguments), setting(arguments, tools)))
    return Path(arguments.out)


def losses(run: Run) -> list[dict[str, float]]:
    """The rows of a run's metrics that have a loss."""
    return [row for row in read_metrics(run.folder / "metrics.jsonl") if "loss" in row]


def command(arguments: Arguments) -> str:
    """The command line that these arguments stand for: the runs and whatever is not a default."""
    parts = list(arguments.runs)
    for holder in (arguments, arguments.weights_files, arguments.sampler):
        for entry in fields(holder):
            value = getattr(holder, entry.name)
            default = entry.default_factory() if entry.default_factory is not MISSING else entry.default
            if entry.name == "runs" or is_dataclass(value) or value == default:
                continue
            flag = "--" + entry.name.replace("_", "-")
            if isinstance(value, bool):
                parts.append(flag if value else flag.replace("--", "--no-", 1))
            else:
                parts += [flag, *map(str, value if isinstance(value, tuple) else (value,))]
    return "python -m sit.compare " + shlex.join(parts)


def setting(arguments: Arguments, tools: Tools) -> str:
    """How the samples were made and evaluated, in a sentence or two."""
    sampler = arguments.sampler
    guidance = f"guidance {sampler.cfg_scale:g}" if sampler.cfg_scale != 1 else "no guidance"
    accuracy = f" Class accuracy by {tools.classifier.description}." if tools.classifier else ""
    return (
        f"{arguments.num_samples} samples a checkpoint, seed {arguments.seed}, {sampler.sampler.upper()} "
        f"{sampler.resolved_method}, {sampler.steps} steps, {guidance}. Reference: {tools.reference.name}; "
        f"{tools.extractor.label}.{accuracy}"
    )


@entry_point
def main() -> None:
    with one_line_errors():
        arguments = tyro.cli(Arguments, prog="python -m sit.compare")
    folder = compare(arguments)
    print(f"report: {folder / 'README.md'}")
