"""Runs side by side: ``python -m sit.compare RUN RUN … --out FOLDER`` writes one report of what they are and can do.

One Markdown file with its plots and grids, and all numbers in a JSON file: metrics at each checkpoint, loss curves,
parameters, multiply-accumulates, the speed of training and sampling on this machine, and samples of the same seeds.
Runs that differ by their seed alone are one group, with intervals over the seeds and differences paired by seed.

``python -m sit.compare curves …`` draws what such evaluations left (:mod:`sit.compare.curves`).
"""

from __future__ import annotations

import math
import shlex
import statistics
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from scipy import stats

from sit.checkpoint.hints import FileHints
from sit.checkpoint.info import read_info
from sit.checkpoint.load import Loaded, load_for_sampling
from sit.checkpoint.posthoc_ema import find_reconstruction
from sit.compare.arguments import Arguments
from sit.compare.plots import plot_losses, plot_metrics
from sit.compare.report import markdown
from sit.compare.runs import Run, grouped, keep_common_steps, listed, open_runs
from sit.compare.speed import measure_speed, objective
from sit.metrics.arguments import check_weights_heeded, default_features
from sit.metrics.classifier import LabelClassifier
from sit.metrics.estimate import Estimate
from sit.metrics.evaluate import Against, Measured, measure
from sit.metrics.features import get_extractors
from sit.metrics.generated import GeneratedImages
from sit.metrics.paired import ROUNDING, Difference, over_samples, over_seeds
from sit.metrics.report import Number, Report
from sit.metrics.statistics_files import open_reference
from sit.metrics.verdict import verdicts
from sit.metrics.work_folder import WorkDirectory
from sit.model import SiT
from sit.sampling.config import SamplerConfig
from sit.sampling.images import balanced_labels, latent_shape_for, sample_images
from sit.training.plan import multiply_accumulates
from sit.training.run_folder import read_metrics
from sit.utils.device import pick_device, process_state
from sit.utils.errors import UserError
from sit.utils.files import atomic_folder
from sit.utils.image_grid import labeled_grid, save_png
from sit.utils.json_text import json_text
from sit.utils.precision import for_sampling
from sit.utils.record import machine


def describe(run: Run, loaded: Loaded) -> dict[str, Any]:
    """Parameters, multiply-accumulates of one forward pass, and the last step that is evaluated."""
    with torch.device("meta"):
        network = SiT.from_config(loaded.model.config)
    return {
        "model": run.config.model,
        "mixer": run.config.mixer,
        "objective": objective(run.config),
        "parameters": sum(p.numel() for p in network.parameters()),
        "multiply_accumulates": multiply_accumulates(network, latent_shape_for(loaded, None)),
        "steps": run.checkpoints[-1][0],
        "images_seen": read_info(run.checkpoints[-1][1]).images_seen,
    }


def sample_grid(run: Run, loaded: Loaded, arguments: Arguments, path: Path) -> None:
    """Two samples of each of up to ten classes; the same numbers for every run."""
    classes = min(10, loaded.model.config.num_classes)
    indices = torch.arange(2 * classes)
    labels = balanced_labels(indices.tolist(), range(classes))
    seed = run.evaluation_seed(arguments.evaluation_seed)
    options = dict(seed=seed, config=arguments.sampler, batch_size=arguments.batch_size)
    made = list(sample_images(loaded, indices, labels, **options))
    names = loaded.info.label_names or [str(label) for label in range(classes)]
    images = torch.cat([batch.images for batch in made]).numpy()
    save_png(labeled_grid(images, [names[label] for label in labels.tolist()], classes), path)


def mean_over_seeds(values: list[float], error: float | None) -> dict[str, Any]:
    """The mean with half the width of its 95 % interval by Student's t, if values differ; one keeps its own error."""
    if len(values) == 1:
        return {"value": values[0], "error": error, "values": values}
    mean = statistics.fmean(values)
    half = float(stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values)))
    told = half if half > ROUNDING * abs(mean) else None  # a share that is the same in all: nothing tells how it varies
    return {"value": mean, "error": told, "values": values}


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


def differences(reports: dict[str, dict[int, dict[int, Report]]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Each later group's metrics at the last step that it shares with the first group, less the first's.

    Paired by the training seeds that both have. Where that is one alone, by groups of its samples, which share labels
    and noise; that holds for these weights only. The verdicts are Holm's over the whole table.
    """
    (_, first), *others = reports.items()
    found: dict[tuple[str, str], Difference] = {}
    steps: dict[str, int] = {}
    for name, group in others:
        seeds = [seed for seed in first if seed in group]
        shared = [set(first[seed]) & set(group[seed]) for seed in seeds]
        if not shared or not set.intersection(*shared):
            continue
        steps[name] = step = max(set.intersection(*shared))
        ours, theirs = (
            {seed: {number.name: number for number in one[seed][step].numbers} for seed in seeds}
            for one in (group, first)
        )
        for metric in ours[seeds[0]]:
            if all(metric in numbers[seed] for numbers in (ours, theirs) for seed in seeds):
                paired = _paired(*({seed: one[seed][metric] for seed in seeds} for one in (theirs, ours)))
                if paired is not None:
                    found[name, metric] = paired
    said = verdicts(found, {key: key[1] for key in found})
    table: dict[str, dict[str, dict[str, Any]]] = {}
    for (name, metric), one in found.items():
        cell = {"value": one.value, "error": one.error, "over": one.over, "count": one.count}
        table.setdefault(name, {})[metric] = cell | {"step": steps[name], "verdict": said[name, metric]}
    return table


def _paired(first: dict[int, Number], second: dict[int, Number]) -> Difference | None:
    """The second's numbers less the first's, by training seed; None if nothing tells its spread."""
    if len(first) > 1:
        return over_seeds(*({seed: number.value for seed, number in one.items()} for one in (first, second)))
    (one,), (other,) = first.values(), second.values()
    if len(one.replicates) < 2 or len(one.replicates) != len(other.replicates):
        return None
    return over_samples(*(Estimate(number.value, number.replicates) for number in (one, other)))


def compare(arguments: Arguments) -> Path | None:
    """Measure everything and write the report's folder.

    Every process of a launch calls it with the same arguments. They make features together; the numbers, the speed and
    the report are the main process's.

    Returns:
        The folder, on the main process; None on the others.

    Raises:
        UserError: runs that can't be compared, a reference or features that can't be had, or a folder that is taken.
    """
    state = process_state()
    device = pick_device(arguments.device) if arguments.device else state.device
    dtype = for_sampling(None, device)
    if Path(arguments.out).exists():
        raise UserError(f"{arguments.out} exists already; it is not overwritten")
    groups = grouped(open_runs(arguments.runs, arguments.at_steps))
    left_out = keep_common_steps(groups)
    for folder, steps in left_out.items():
        state.print(f"{folder}: left out are steps that not every seed has: {listed(steps)}")
    ema = _average(arguments, groups)
    against = _against(arguments, groups, device)

    with WorkDirectory(arguments.work_dir) as work:
        measured: dict[str, dict[int, dict[int, Measured]]] = {}
        newest: dict[str, Loaded] = {}
        for name, members in groups.items():
            for run in members:
                of_run = measured.setdefault(name, {})[run.config.seed] = {}
                for step, checkpoint in run.checkpoints:
                    state.print(f"{run.folder}, step {step}")
                    loaded = load_for_sampling(checkpoint, ema=arguments.ema, device=device, dtype=dtype)
                    done = measure(_samples(run, loaded, arguments), against, work)
                    if done is not None:
                        of_run[step] = done
                if run is members[0] and state.is_main_process:
                    newest[name] = loaded
        if not state.is_main_process:
            return None
        return _write(arguments, groups, measured, newest, against, ema=ema, left_out=left_out)


def _average(arguments: Arguments, groups: dict[str, list[Run]]) -> dict[str, float] | None:
    """The average of the weights that is asked for, and how near it comes; None for the checkpoints' own.

    Raises:
        UserError: a checkpoint can't have it.
    """
    if arguments.ema is None:
        return None
    every = [place for members in groups.values() for run in members for _, place in run.checkpoints]
    errors = [find_reconstruction(place, arguments.ema).error for place in every]
    return {"sigma_rel": arguments.ema, "largest_profile_error": max(errors)}


def _against(arguments: Arguments, groups: dict[str, list[Run]], device: torch.device) -> Against:
    """What all samples are evaluated with."""
    first = next(iter(groups.values()))[0]
    usual = default_features(first.config.data)
    if arguments.reference is None and usual != "digits":
        raise UserError("give `reference`: only runs on the digits have one by themselves")
    info = read_info(first.checkpoints[-1][1])  # its classes are all runs': their data are the same
    classifier = None
    if arguments.classifier is not None:
        classifier = LabelClassifier.load(arguments.classifier, device, info.classes or None, info.label_names)
    features = arguments.features or (usual,)
    check_weights_heeded(arguments.weights_files, features)
    extractors = get_extractors(features, device, arguments.weights_files)
    reference = open_reference(arguments.reference or "digits", first.config.image_size, device=device)
    return Against(reference, extractors, classifier, device, arguments.batch_size)


def _samples(run: Run, loaded: Loaded, arguments: Arguments) -> GeneratedImages:
    return GeneratedImages(
        loaded,
        arguments.num_samples,
        seed=run.evaluation_seed(arguments.evaluation_seed),
        labels=arguments.label_order,
        config=arguments.sampler,
        hints=FileHints(),
    )


def _write(
    arguments: Arguments,
    groups: dict[str, list[Run]],
    measured: dict[str, dict[int, dict[int, Measured]]],
    newest: dict[str, Loaded],
    against: Against,
    *,
    ema: dict[str, float] | None,
    left_out: dict[str, list[int]],
) -> Path:
    """Make all numbers, time the networks, and write the report's folder; the main process's work."""
    reports = {
        name: {seed: {step: one.report() for step, one in steps.items()} for seed, steps in seeds.items()}
        for name, seeds in measured.items()
    }
    with atomic_folder(arguments.out) as place:
        sampler = resolved(arguments.sampler, newest)
        found: dict[str, Any] = {"machine": machine(against.device), "sampler": asdict(sampler), "ema": ema}
        found["steps_left_out"] = left_out
        found["groups"] = {}
        for number, (name, members) in enumerate(groups.items(), start=1):
            sample_grid(members[0], newest[name], arguments, place / f"samples-{number}.png")
            about = describe(members[0], newest[name])
            seeds = {"seeds": list(reports[name]), "metrics": summarize(reports[name])}
            found["groups"][name] = about | seeds
        if arguments.speed_repeats:
            configs = {name: members[0].config for name, members in groups.items()}
            repeats = arguments.speed_repeats
            speeds = measure_speed(newest, configs, arguments.sampler, arguments.batch_size, repeats)
            for name, speed in speeds.items():
                found["groups"][name]["images_per_second"] = speed
        found["differences"] = differences(reports)
        lines = {name: [losses(run) for run in members] for name, members in groups.items()}
        plot_losses({name: rows for name, rows in lines.items() if all(rows)}, place / "loss.png")
        plots = plot_metrics(found["groups"], place)
        (place / "numbers.json").write_text(json_text(found, indent=2) + "\n")
        (place / "README.md").write_text(
            markdown(found, plots, command(arguments), setting(arguments, sampler, against))
        )
    return Path(arguments.out)


def resolved(sampler: SamplerConfig, newest: dict[str, Loaded]) -> SamplerConfig:
    """The sampler of all groups; undecided where it is left to the networks, and they differ."""
    averages = {loaded.transport.averages for loaded in newest.values()}
    channels = {loaded.model.config.in_channels for loaded in newest.values()}
    sampler = sampler.for_latents(channels.pop()) if len(channels) == 1 else sampler
    return sampler.resolve(averages.pop()) if len(averages) == 1 else sampler


def losses(run: Run) -> list[dict[str, float]]:
    """The rows of a run's metrics that have a loss."""
    return [row for row in read_metrics(run.folder / "metrics.jsonl") if row.get("loss") is not None]


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


def setting(arguments: Arguments, sampler: SamplerConfig, against: Against) -> str:
    """How the samples were made and evaluated, in a sentence or two."""
    guidance = f"guidance {sampler.cfg_scale:g}" if sampler.cfg_scale != 1 else "no guidance"
    given = arguments.evaluation_seed
    weights = "" if arguments.ema is None else f"EMA of relative length {arguments.ema:g}, "
    seed = "each run's own training seed for its samples"
    if given is not None:
        seed = f"evaluation seed {given} for all (intervals over training seeds leave the spread of samples out)"
    accuracy = f" Class accuracy by {against.classifier.description}." if against.classifier else ""
    labels = "; ".join(extractor.label for extractor in against.extractors)
    return (
        f"{arguments.num_samples} samples a checkpoint, {weights}{arguments.label_order} labels, {seed}, "
        f"{in_words(sampler)}, {sampler.steps} steps, {guidance}. "
        f"Reference: {against.reference.name}; {labels}.{accuracy}"
    )


def in_words(sampler: SamplerConfig) -> str:
    """The sampler and its method."""
    if sampler.sampler is None:
        return "MeanFlow for the networks of average velocities, the SDE for the others"
    return "MeanFlow" if sampler.sampler == "meanflow" else f"{sampler.sampler.upper()} {sampler.resolved_method}"
