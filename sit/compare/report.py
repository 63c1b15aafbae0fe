"""The text and the images of :mod:`sit.compare`: everything is given, nothing is measured here."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np

matplotlib.use("Agg")


def plot_losses(curves: dict[str, list[list[dict[str, float]]]], path: Path) -> None:
    """Loss curves, a color a group and a line a run, each smoothed by an exponential average over its rows."""
    figure, axes = plt.subplots(figsize=(7, 4))
    for index, (name, runs) in enumerate(curves.items()):
        color = f"C{index}"
        for number, rows in enumerate(runs):
            steps, losses = [row["step"] for row in rows], np.array([row["loss"] for row in rows])
            smooth, average = [], losses[0]
            for loss in losses:
                average = 0.9 * average + 0.1 * loss
                smooth.append(average)
            axes.plot(steps, smooth, color=color, label=name if number == 0 else None, linewidth=1)
            if len(curves) * len(runs) <= 3:  # more would hide each other
                axes.plot(steps, losses, color=color, alpha=0.2, linewidth=0.8)
    axes.set(xlabel="step", ylabel="training loss")
    axes.legend()
    _save(figure, path)


def plot_metric(name: str, curves: dict[str, list[tuple[int, float, float | None]]], path: Path) -> None:
    """One metric against steps with its errors, a curve a group."""
    figure, axes = plt.subplots(figsize=(7, 4))
    for group, points in curves.items():
        steps, values, errors = zip(*points, strict=True)
        axes.errorbar(steps, values, yerr=[error or 0 for error in errors], label=group, marker="o", capsize=3)
    axes.set(xlabel="step", ylabel=name)
    axes.legend()
    _save(figure, path)


def _save(figure: plt.Figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_metrics(groups: dict[str, Any], place: Path) -> list[tuple[str, str]]:
    """A plot for each metric that all groups have: (metric, file name)."""
    names = list(next(iter(next(iter(groups.values()))["metrics"].values())))
    plots = []
    for index, name in enumerate(names):
        curves = {
            group: [
                (step, numbers[name]["value"], numbers[name]["error"])
                for step, numbers in found["metrics"].items()
                if name in numbers
            ]
            for group, found in groups.items()
        }
        if all(curves.values()):
            file = f"metric-{index}.png"
            plot_metric(name, curves, place / file)
            plots.append((name, file))
    return plots


def markdown(found: dict[str, Any], plots: list[tuple[str, str]], command: str, setting: str) -> str:
    """The report's text.

    Args:
        found: what ``numbers.json`` has.
        plots: (metric, file name).
        command: what made it.
        setting: how the samples were made and judged.
    """
    groups = found["groups"]
    lines = [
        f"# {' against '.join(groups)}",
        "",
        f"Made on {time.strftime('%Y-%m-%d')} on {found['machine']} by",
        "",
        f"    {command}",
        "",
        f"{setting} All numbers: [numbers.json](numbers.json).",
        "",
        "| | " + " | ".join(groups) + " |",
        "|---" * (len(groups) + 1) + "|",
        _row("parameters", [f"{group['parameters']:,}" for group in groups.values()]),
        _row("multiply-accumulates an image", [f"{g['multiply_accumulates'] / 1e9:.4g} G" for g in groups.values()]),
        _row("steps; images seen", [f"{group['steps']:,}; {group['images_seen']:,}" for group in groups.values()]),
    ]
    seeded = any(len(group["seeds"]) > 1 for group in groups.values())
    if seeded:
        lines.append(_row("seeds", [", ".join(map(str, group["seeds"])) for group in groups.values()]))
    if all("images_per_second" in group for group in groups.values()):
        for kind in ("training", "sampling"):
            speeds = [group["images_per_second"][kind] for group in groups.values()]
            cells = [f"{speed:.4g} ({speed / speeds[0]:.2f}x)" for speed in speeds]
            lines.append(_row(f"images/s, {kind}", cells))
    last = {name: group["metrics"][max(group["metrics"])] for name, group in groups.items()}
    for name in next(iter(last.values())):
        lines.append(_row(name, [_cell(numbers.get(name)) for numbers in last.values()]))
    if seeded:
        lines += [
            "",
            "± after several seeds is the half-width of the 95 % interval of the mean over seeds (Student's t); after "
            "one it is the metric's own error over samples.",
        ]
    lines += [
        "",
        "Multiply-accumulates are those of matrix products, convolutions and attention; element-wise work is not "
        "counted. Speeds are medians of interleaved rounds in one process: a forward and backward pass for training, "
        "and the sampler above without the VAE, all its network evaluations counted.",
        "",
    ]
    lines += _differences(found)
    lines += _by_step(groups)
    lines += ["## Loss", "", "![training loss](loss.png)", "", "## Metrics against steps", ""]
    for name, file in plots:
        lines += [f"![{name}]({file})", ""]
    lines += ["## Samples of the same seeds", ""]
    for index, name in enumerate(groups, start=1):
        lines += [f"{name}:", "", f"![samples of {name}](samples-{index}.png)", ""]
    return "\n".join(lines)


def _differences(found: dict[str, Any]) -> list[str]:
    """What each group has more than the first, paired by seed."""
    if not found["differences"]:
        return []
    first, names = next(iter(found["groups"])), list(found["differences"])
    lines = [
        f"## Difference to {first}, paired by seed, at the last step",
        "",
        "Mean and 95 % interval over seeds; runs of one seed saw the same data in the same order with the same noise.",
        "",
        "| | " + " | ".join(names) + " |",
        "|---" * (len(names) + 1) + "|",
    ]
    for metric in next(iter(found["differences"].values())):
        cells = [found["differences"][name].get(metric) for name in names]
        lines.append(_row(metric, [f"{cell['value']:+.4g} ± {cell['error']:.2g}" if cell else "" for cell in cells]))
    return [*lines, ""]


def _by_step(groups: dict[str, Any]) -> list[str]:
    """The first metric (FID) and the last (class accuracy, where there is a judge) at every step."""
    steps = sorted({step for group in groups.values() for step in group["metrics"]})
    if len(steps) < 2:
        return []
    names = list(next(iter(next(iter(groups.values()))["metrics"].values())))
    lines = ["## At several step counts", ""]
    for metric in dict.fromkeys((names[0], names[-1])):
        lines += [f"{metric}:", "", "| step | " + " | ".join(groups) + " |", "|---" * (len(groups) + 1) + "|"]
        for step in steps:
            cells = [_cell(group["metrics"].get(step, {}).get(metric)) for group in groups.values()]
            lines.append(_row(f"{step:,}", cells))
        lines.append("")
    return lines


def _cell(number: dict[str, Any] | None) -> str:
    if number is None:
        return ""
    return f"{number['value']:.4g}" + (f" ± {number['error']:.2g}" if number["error"] is not None else "")


def _row(name: str, cells: list[str]) -> str:
    return f"| {name} | " + " | ".join(cells) + " |"
