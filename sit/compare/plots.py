"""The plots of :mod:`sit.compare`: everything is given, nothing is measured here."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sit.utils.plot_style import style

SMOOTHED = 20
"""a smoothed loss is a mean over one row in so many of the curve, half before and half behind"""


def smooth(values: np.ndarray, reach: int) -> np.ndarray:
    """The mean of each value (N,) with ``reach`` others on either side; fewer at the ends, as many on both sides.

    Being centered it neither lags nor leads: what falls steadily is left as it is.
    """
    sums = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    at = np.arange(len(values))
    within = np.minimum(np.minimum(at, len(values) - 1 - at), reach)
    return (sums[at + within + 1] - sums[at - within]) / (2 * within + 1)


def beside(groups: int, index: int, steps: list[int]) -> np.ndarray:
    """Steps moved a little to the side, so that the error bars of several groups don't cover each other."""
    gap = min(np.diff(sorted(set(steps))), default=max(steps[0], 1))
    return np.asarray(steps) + (index - (groups - 1) / 2) * 0.4 * gap / max(groups, 4)


def plot_losses(curves: dict[str, list[list[dict[str, float]]]], path: Path) -> None:
    """Loss curves, a color a group and a line a run, each smoothed by a centered mean, which the label tells."""
    figure, axes = _figure("training loss")
    reach = 0
    for index, (name, runs) in enumerate(curves.items()):
        look = {key: value for key, value in style(index).items() if key != "marker"}
        for number, rows in enumerate(runs):
            steps, losses = [row["step"] for row in rows], np.array([row["loss"] for row in rows])
            own = len(rows) // SMOOTHED // 2
            reach = max(reach, own)
            shown = slice(own // 2, len(rows) - own // 2)  # the last few would hardly be smoothed
            line = smooth(losses, own)[shown]
            axes.plot(steps[shown], line, label=name if number == 0 else None, linewidth=1.2, **look)
            if len(curves) * len(runs) <= 3 and own:  # more would hide each other
                axes.plot(steps, losses, color=look["color"], alpha=0.2, linewidth=0.8)
    if reach:
        axes.set_title(f"mean of up to {2 * reach + 1} logged losses around each step", fontsize="medium")
    _save(figure, axes, path)


def plot_metric(name: str, curves: dict[str, list[tuple[int, float, float | None]]], path: Path) -> None:
    """One metric against steps with its errors, a curve a group; the bars stand beside one another."""
    figure, axes = _figure(name)
    for index, (group, points) in enumerate(curves.items()):
        steps, values, errors = (list(column) for column in zip(*points, strict=True))
        bars = [np.nan if error is None else error for error in errors]
        at = beside(len(curves), index, steps)
        axes.errorbar(at, values, yerr=bars, label=group, capsize=3, markersize=5, linewidth=1.2, **style(index))
    _save(figure, axes, path)


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


def _figure(label: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7, 4), layout="constrained")  # not pyplot's, which would choose a backend for all
    axes = figure.subplots()
    axes.set(xlabel="step", ylabel=textwrap.fill(label, 36))  # longer lines would be cut off
    axes.grid(alpha=0.25)
    return figure, axes


def _save(figure: Figure, axes: Axes, path: Path) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > 4:
        figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize="small")
    else:
        axes.legend()
    figure.savefig(path, dpi=110)
