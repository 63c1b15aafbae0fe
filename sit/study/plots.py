"""The images of a study's report: everything is given, nothing is measured here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from sit.utils.image_grid import save_png
from sit.utils.plot_style import style

MARGIN = 1.1
"""the factor by which an axis of quality goes beyond the means"""
ENLARGED = 2
"""the factor by which small samples are enlarged in the grid"""


def plot_curves(
    curves: Mapping[str, Sequence[tuple[float, float, float | None]]], path: Path, *, x: str, y: str
) -> None:
    """Quality against seconds or steps, a curve a variant; the axis of quality is logarithmic.

    Args:
        curves: variant → (place on the x axis, mean over seeds, half the width of its interval or None).
        path: the PNG.
        x: name of the x axis.
        y: of the y axis.
    """
    figure = Figure(figsize=(8, 5))  # not pyplot's, which would choose a backend for the whole program
    axes = figure.subplots()
    for index, (name, points) in enumerate(curves.items()):
        if points:
            places, values, errors = zip(*points, strict=True)
            bars = [error or 0 for error in errors]
            axes.errorbar(places, values, yerr=bars, label=name, capsize=3, markersize=5, linewidth=1, **style(index))
    axes.set(xlabel=x, ylabel=y, yscale="log", ylim=limits(curves.values()))
    axes.yaxis.set_minor_formatter(lambda value, _: f"{value:.3g}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    _save(figure, path)


def limits(curves: Iterable[Sequence[tuple[float, float, float | None]]]) -> tuple[float, float]:
    """What the axis of quality spans: all means, and the ends of intervals that are no more than a factor of two away.

    Another interval leaves the picture: of two or three seeds it can be many times what all curves span.
    """
    points = [(value, error or 0.0) for curve in curves for _, value, error in curve if np.isfinite(value)]
    means = [value for value, _ in points] or [1.0]
    ends = [end for value, error in points for end in (value - error, value + error)]
    shown = [*means, *(end for end in ends if min(means) / 2 <= end <= max(means) * 2)]
    return min(shown) / MARGIN, max(shown) * MARGIN


def plot_points(points: Sequence[Mapping[str, Any]], order: Sequence[str], path: Path, fid: str) -> None:
    """FID against held-out loss, a point for each variant, seed and step; both axes logarithmic."""
    figure = Figure(figsize=(8, 5))
    axes = figure.subplots()
    for index, name in enumerate(order):
        own = [point for point in points if point["variant"] == name]
        losses, distances = [point["loss"] for point in own], [point["fid"] for point in own]
        axes.plot(losses, distances, markersize=5, label=name, **style(index) | {"linestyle": ""})
    axes.set(xlabel="held-out loss", ylabel=fid, xscale="log", yscale="log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_formatter(lambda value, _: f"{value:.3g}")
        axis.set_major_formatter(lambda value, _: f"{value:.3g}")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    _save(figure, path)


def plot_by_time(curves: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """Held-out loss by t, less the first variant's."""
    figure = Figure(figsize=(8, 5))
    axes = figure.subplots()
    first = next(iter(curves.values()))
    for index, (name, losses) in enumerate(curves.items()):
        times = [time for time in losses if time in first]
        rest = [losses[time] - first[time] for time in times]
        axes.plot([float(time) for time in times], rest, label=name, markersize=5, linewidth=1, **style(index))
    axes.set(xlabel="t (0: noise, 1: data)", ylabel=f"held-out loss less that of {next(iter(curves))}")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=110, bbox_inches="tight")


def join_grids(grids: Mapping[str, Path], path: Path) -> None:
    """One image of the runs' grids below each other, each under its name."""
    opened = {}
    for name, place in grids.items():
        with Image.open(place) as image:
            opened[name] = image.convert("RGB").resize((image.width * ENLARGED, image.height * ENLARGED), 0)
    font = ImageFont.load_default(size=13)
    line = 18
    width = max(max(image.width, int(font.getlength(name)) + 4) for name, image in opened.items())
    height = sum(image.height + line + 4 for image in opened.values())
    sheet = Image.fromarray(np.full((height, width, 3), 255, dtype=np.uint8))
    draw, top = ImageDraw.Draw(sheet), 0
    for name, image in opened.items():
        draw.text((2, top + 1), name, fill="black", font=font)
        sheet.paste(image, (0, top + line))
        top += image.height + line + 4
    save_png(sheet, path)
