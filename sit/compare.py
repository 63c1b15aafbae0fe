"""Runs side by side: ``python -m sit.compare RUN RUN … --out FOLDER`` writes one report of what they are and can do.

One Markdown file with its plots and grids, and all numbers in a JSON file: metrics at each checkpoint, loss curves,
parameters, multiply-accumulates, the speed of training and sampling on this machine, and samples of the same seeds.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import numpy as np
import torch
import tyro

from sit.checkpoint import Loaded, find_checkpoints, load_for_sampling, read_info
from sit.cli import one_line_errors
from sit.config import TrainConfig, load_recipe
from sit.device import pick_device
from sit.errors import UserError, door
from sit.files import atomic_folder
from sit.integrity import is_whole
from sit.metrics.evaluate import GeneratedImages, Report, evaluate
from sit.metrics.extractors import get_extractor
from sit.metrics.sources import open_reference
from sit.model import SiT
from sit.plan import multiply_accumulates
from sit.previews import labelled_grid, save_png
from sit.runs import read_metrics
from sit.sampler import SamplerConfig, generate
from sit.sampling import balanced_labels, latent_shape_for, sample_images

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


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
    inception_weights: str | None = None
    """the Inception weights file; None looks in torch-fidelity's usual place"""
    at_steps: tuple[int, ...] = ()
    """checkpoints to evaluate, by their step; none given means all"""
    num_samples: int = 1000
    """samples for each checkpoint's metrics"""
    seed: int = 0
    """of the samples; the same for all runs"""
    batch_size: int = 64
    """images made and judged at a time, also in the measurement of speed"""
    speed_repeats: int = 5
    """rounds of the measurement of speed; 0 leaves it out"""
    device: str | None = None
    """None takes the accelerator, if there is one"""
    sampler: Annotated[SamplerConfig, tyro.conf.OmitArgPrefixes] = field(default_factory=SamplerConfig)


@dataclass
class Run:
    """A run's folder, its config, and its whole checkpoints as (step, folder)."""

    folder: Path
    config: TrainConfig
    checkpoints: list[tuple[int, Path]]
    name: str = ""


def open_run(path: str, at_steps: tuple[int, ...]) -> Run:
    """Open a run's folder.

    Raises:
        UserError: it is none, or has no whole checkpoint at the steps that were asked for.
    """
    folder = Path(path)
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder} is not a run's folder: it has no config.yaml")
    whole = [(step, place) for step, place in find_checkpoints(folder) if is_whole(place)]
    chosen = [(step, place) for step, place in whole if not at_steps or step in at_steps]
    if not chosen:
        have = ", ".join(str(step) for step, _ in whole) or "none"
        raise UserError(f"{folder} has no whole checkpoint to compare; its steps are: {have}")
    return Run(folder, load_recipe(str(folder / "config.yaml")), chosen)


def open_runs(paths: tuple[str, ...], at_steps: tuple[int, ...]) -> list[Run]:
    """Open all runs, and name them by what tells them apart.

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
    if len({run.name for run in runs}) < len(runs):
        for run in runs:
            run.name += f" ({run.folder.name})"
    return runs


# ---------------------------------------------------------------------- what is measured


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


def measure_speed(loaded: dict[str, Loaded], sampler: SamplerConfig, batch_size: int, repeats: int) -> dict[str, dict]:
    """Images a second of a training step and of sampling's network steps, interleaved, medians.

    Sampling is timed over a few SDE or ODE steps and scaled to the sampler's number of steps.
    """
    seconds: dict[str, dict[str, list[float]]] = {name: {"training": [], "sampling": []} for name in loaded}
    few = SamplerConfig(sampler="ode", method="euler", steps=4, cfg_scale=sampler.cfg_scale)

    def timed(device: torch.device, run) -> float:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        start = time.perf_counter()
        run()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return time.perf_counter() - start

    for round_number in range(repeats + 1):  # the first warms up
        for name, one in loaded.items():
            shape, device = latent_shape_for(one, None), one.device
            labels = balanced_labels(range(batch_size), range(one.model.config.num_classes))
            network = SiT.from_config(one.model.config).to(device)
            x1 = torch.randn(batch_size, *shape, device=device)
            t, x0 = torch.rand(batch_size, device=device), torch.randn_like(x1)

            def train(network=network, one=one, x1=x1, t=t, x0=x0, labels=labels) -> None:
                one.transport.loss(network, x1, t, x0, y=labels.to(x1.device)).mean().backward()

            def sample(one=one, shape=shape, labels=labels, device=device) -> None:
                indices = torch.arange(batch_size)
                options = dict(seed=0, config=few, latent_shape=shape, device=device, batch_size=batch_size)
                for _ in generate(one.model, one.transport, indices, labels, **options):
                    pass

            times = timed(device, train), timed(device, sample) * sampler.steps / few.steps
            if round_number:
                seconds[name]["training"].append(times[0])
                seconds[name]["sampling"].append(times[1])
    return {
        name: {kind: batch_size / statistics.median(values) for kind, values in kinds.items()}
        for name, kinds in seconds.items()
    }


# ---------------------------------------------------------------------- pictures


def plot_losses(runs: list[Run], path: Path) -> None:
    """Loss curves, each smoothed by an exponential average over its rows."""
    figure, axes = plt.subplots(figsize=(7, 4))
    for run in runs:
        rows = [row for row in read_metrics(run.folder / "metrics.jsonl") if "loss" in row]
        if not rows:
            continue
        steps, losses = [row["step"] for row in rows], np.array([row["loss"] for row in rows])
        smooth, average = [], losses[0]
        for loss in losses:
            average = 0.9 * average + 0.1 * loss
            smooth.append(average)
        (line,) = axes.plot(steps, smooth, label=run.name)
        axes.plot(steps, losses, color=line.get_color(), alpha=0.2, linewidth=0.8)
    axes.set(xlabel="step", ylabel="training loss")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_metric(name: str, curves: dict[str, list[tuple[int, float, float | None]]], path: Path) -> None:
    """One metric against steps with its errors, a curve a run."""
    figure, axes = plt.subplots(figsize=(7, 4))
    for run, points in curves.items():
        steps, values, errors = zip(*points, strict=True)
        axes.errorbar(steps, values, yerr=[error or 0 for error in errors], label=run, marker="o", capsize=3)
    axes.set(xlabel="step", ylabel=name)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def sample_grid(run: Run, loaded: Loaded, arguments: Arguments, path: Path) -> None:
    """Two samples of each of up to ten classes; the same numbers and seed for every run."""
    classes = min(10, loaded.model.config.num_classes)
    indices = torch.arange(2 * classes)
    labels = balanced_labels(indices.tolist(), range(classes))
    options = dict(seed=arguments.seed, config=arguments.sampler, batch_size=arguments.batch_size)
    made = list(sample_images(loaded, indices, labels, **options))
    names = loaded.info.label_names or [str(label) for label in range(classes)]
    images = torch.cat([batch.images for batch in made]).numpy()
    save_png(labelled_grid(images, [names[label] for label in labels.tolist()], classes), path)


# ---------------------------------------------------------------------- the report


def compare(arguments: Arguments) -> Path:
    """Measure everything and write the report's folder.

    Raises:
        UserError: runs that can't be compared, a reference or features that can't be had, or a folder that is taken.
    """
    runs = open_runs(arguments.runs, arguments.at_steps)
    device = pick_device(arguments.device)
    on_digits = runs[0].config.data.split(":")[0] == "digits"
    if arguments.reference is None and not on_digits:
        raise UserError("give --reference: only runs on the digits have one by themselves")
    features = arguments.features or ("digits" if on_digits else "inception")
    extractor = get_extractor(features, device, arguments.inception_weights)
    reference = open_reference(arguments.reference or "digits", runs[0].config.image_size)

    with atomic_folder(arguments.out) as place:
        found: dict[str, Any] = {"machine": machine(device), "sampler": asdict(arguments.sampler), "runs": {}}
        newest: dict[str, Loaded] = {}
        for run in runs:
            reports: dict[int, Report] = {}
            for step, checkpoint in run.checkpoints:
                loaded = load_for_sampling(checkpoint, device=device)
                options = (arguments.num_samples, arguments.seed, "balanced", arguments.sampler)
                samples = GeneratedImages(loaded, *options)
                reports[step] = evaluate(
                    samples, reference, extractor, device=device, batch_size=arguments.batch_size
                )
            newest[run.name] = loaded
            sample_grid(run, loaded, arguments, place / f"samples-{len(newest)}.png")
            metrics = {step: [asdict(number) for number in report.numbers] for step, report in reports.items()}
            found["runs"][run.name] = {**describe(run, loaded), "metrics": metrics}
        if arguments.speed_repeats:
            speeds = measure_speed(newest, arguments.sampler, arguments.batch_size, arguments.speed_repeats)
            for name, speed in speeds.items():
                found["runs"][name]["images_per_second"] = speed
        plot_losses(runs, place / "loss.png")
        plots = plot_metrics(found["runs"], place)
        (place / "numbers.json").write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n")
        text = markdown(found, plots, arguments, extractor.label, reference.name)
        (place / "README.md").write_text(text)
    return Path(arguments.out)


def machine(device: torch.device) -> str:
    """What the speeds were measured on."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads, torch {torch.__version__}"


def plot_metrics(runs: dict[str, Any], place: Path) -> list[tuple[str, str]]:
    """A plot for each metric that all runs have: (metric, file name)."""
    names = [number["name"] for number in next(iter(next(iter(runs.values()))["metrics"].values()))]
    plots = []
    for index, name in enumerate(names):
        curves = {
            run: [
                (step, number["value"], number["error"])
                for step, numbers in found["metrics"].items()
                for number in numbers
                if number["name"] == name
            ]
            for run, found in runs.items()
        }
        if all(curves.values()):
            file = f"metric-{index}.png"
            plot_metric(name, curves, place / file)
            plots.append((name, file))
    return plots


def markdown(
    found: dict[str, Any], plots: list[tuple[str, str]], arguments: Arguments, label: str, reference: str
) -> str:
    """The report's text."""
    runs = found["runs"]
    sampler = arguments.sampler
    command = (
        f"python -m sit.compare {' '.join(arguments.runs)} --out {arguments.out} "
        f"--num-samples {arguments.num_samples} --steps {sampler.steps}"
    )
    today = time.strftime("%Y-%m-%d")
    guidance = f"guidance {sampler.cfg_scale:g}" if sampler.cfg_scale != 1 else "no guidance"
    lines = [
        f"# {' against '.join(runs)}",
        "",
        f"Made by `{command}` with {arguments.num_samples} samples a checkpoint, seed {arguments.seed}, "
        f"{sampler.sampler.upper()} {sampler.resolved_method}, {sampler.steps} steps, {guidance}; on {today}, "
        f"{found['machine']}. Reference: {reference}; {label}. All numbers: [numbers.json](numbers.json).",
        "",
        "| | " + " | ".join(runs) + " |",
        "|---" * (len(runs) + 1) + "|",
        row("parameters", [f"{run['parameters']:,}" for run in runs.values()]),
        row("multiply-accumulates an image", [f"{run['multiply_accumulates'] / 1e9:.4g} G" for run in runs.values()]),
        row("steps; images seen", [f"{run['steps']:,}; {run['images_seen']:,}" for run in runs.values()]),
    ]
    if arguments.speed_repeats:
        for kind, text in (("training", "training"), ("sampling", f"sampling, {sampler.steps} steps")):
            speeds = [run["images_per_second"][kind] for run in runs.values()]
            cells = [f"{speed:.4g} ({speed / speeds[0]:.2f}x)" for speed in speeds]
            lines.append(row(f"images/s, {text}", cells))
    last = {name: run["metrics"][max(run["metrics"])] for name, run in runs.items()}
    for index, number in enumerate(next(iter(last.values()))):
        cells = []
        for numbers in last.values():
            one = numbers[index]
            cells.append(f"{one['value']:.4g}" + (f" ± {one['error']:.2g}" if one["error"] is not None else ""))
        lines.append(row(number["name"], cells))
    lines += [
        "",
        "Multiply-accumulates are those of matrix products, convolutions and attention; element-wise work is not "
        "counted. Speeds are medians of interleaved rounds in one process: a forward and backward pass for training, "
        "and the network's part of sampling, without the VAE.",
        "",
        "## Loss",
        "",
        "![training loss](loss.png)",
        "",
        "## Metrics against steps",
        "",
    ]
    for name, file in plots:
        lines += [f"![{name}]({file})", ""]
    lines += ["## Samples of the same seeds", ""]
    for index, name in enumerate(runs, start=1):
        lines += [f"{name}:", "", f"![samples of {name}](samples-{index}.png)", ""]
    return "\n".join(lines)


def row(name: str, cells: list[str]) -> str:
    return f"| {name} | " + " | ".join(cells) + " |"


@door
def main() -> None:
    with one_line_errors():
        arguments = tyro.cli(Arguments, prog="python -m sit.compare")
    folder = compare(arguments)
    print(f"report: {folder / 'README.md'}")


if __name__ == "__main__":
    main()
