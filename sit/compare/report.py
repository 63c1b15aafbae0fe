"""The text of :mod:`sit.compare`: everything is given, nothing is measured here."""

from __future__ import annotations

import time
from typing import Any

from sit.utils.tables import markdown_table


def markdown(found: dict[str, Any], plots: list[tuple[str, str]], command: str, setting: str) -> str:
    """The report's text.

    Args:
        found: what ``numbers.json`` has.
        plots: (metric, file name).
        command: what made it.
        setting: how the samples were made and evaluated.
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
        _last_step(groups),
        "",
        "Metrics are those at the step in the table, the last that all seeds of a group have; the samples below are of "
        "its first seed, at that step. " + _intervals(groups),
    ]
    if found["steps_left_out"]:
        told = "; ".join(f"{folder}: {', '.join(map(str, steps))}" for folder, steps in found["steps_left_out"].items())
        lines += ["", f"Left out are steps that not every seed of a group has: {told}."]
    lines += [
        "",
        "Multiply-accumulates are those of matrix products, convolutions and attention; element-wise work is not "
        "counted." + _what_was_timed(groups),
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


def _intervals(groups: dict[str, Any]) -> str:
    """What ± is, in groups of several seeds and in those of one."""
    over_seeds = "the half-width of the 95 % interval of the mean over training seeds (Student's t)"
    over_samples = "the half-width of the 95 % interval over samples, for these weights only, not for another training"
    alone = [group for group in groups.values() if len(group["seeds"]) == 1]
    numbers = [number for group in alone for table in group["metrics"].values() for number in table.values()]
    if not alone:
        return f"± is {over_seeds}."
    if all(number["error"] is None for number in numbers):
        few = "too few samples for an interval over them"
        return f"± is {over_seeds}; with one seed there are {few}." if _seeded(groups) else f"No ± is told: {few}."
    said = f"± is {over_samples}"
    if _seeded(groups):
        said = f"With several seeds ± is {over_seeds}, with one it is {over_samples}"
    return f"{said}; a number without ± has no such interval."


def _what_was_timed(groups: dict[str, Any]) -> str:
    """What the speeds are of, with what differs by the objective; nothing if there are none."""
    if not any("images_per_second" in group for group in groups.values()):
        return ""
    said = (
        " Speeds are medians of interleaved rounds in one process: a forward and backward pass for training, and the "
        "sampler above without the VAE, all its network evaluations counted."
    )
    averages = [name for name, group in groups.items() if group["objective"] == "MeanFlow"]
    if averages:
        said += f" The training of {', '.join(averages)} is timed with MeanFlow's objective, its derivative included."
    for name, group in groups.items():
        if group["images_per_second"]["training"] is None:
            said += f" The training speed of {name} is left out: {group['objective']} needs more than its network."
    return said


def _seeded(groups: dict[str, Any]) -> bool:
    return any(len(group["seeds"]) > 1 for group in groups.values())


def _last_step(groups: dict[str, Any]) -> str:
    """The table of what the groups are, their speed, and their metrics at the last step."""
    every = groups.values()
    rows = [
        ("parameters", *(f"{group['parameters']:,}" for group in every)),
        ("multiply-accumulates an image", *(f"{group['multiply_accumulates'] / 1e9:.4g} G" for group in every)),
        ("step of the metrics; images seen", *(f"{group['steps']:,}; {group['images_seen']:,}" for group in every)),
    ]
    if _seeded(groups):
        rows.append(("seeds", *(", ".join(map(str, group["seeds"])) for group in every)))
    if all("images_per_second" in group for group in every):
        for kind in ("training", "sampling"):
            speeds = [group["images_per_second"][kind] for group in every]
            rows.append((f"images/s, {kind}", *(_speed(speed, speeds[0]) for speed in speeds)))
    last = [group["metrics"][max(group["metrics"])] for group in every]
    rows += [(name, *(_cell(numbers.get(name)) for numbers in last)) for name in last[0]]
    return markdown_table(["", *groups], rows)


def _speed(speed: float | None, first: float | None) -> str:
    """Images a second, and how many times the first group's that is, as far as they are known."""
    if speed is None:
        return "left out"
    return f"{speed:.4g}" + (f" ({speed / first:.2f}x)" if first is not None else "")


def _differences(found: dict[str, Any]) -> list[str]:
    """What each group has more than the first, paired, with its verdict."""
    (first, *others), names = found["groups"], list(found["differences"])
    unpaired = [name for name in others if name not in names]
    lines = []
    if unpaired:
        told = f"No difference to {first} is told for {', '.join(unpaired)}"
        needs = "a pair needs runs of one training seed, with checkpoints of one step, and numbers that have an error"
        lines += [f"{told}: {needs}.", ""]
    if not names:
        return lines
    lines += [
        f"## Difference to {first}, paired, at the last step that both have",
        "",
        "With its 95 % interval: over training seeds where there are several, else over samples of these weights. Runs "
        "of one training seed saw the same data in the same order with the same noise, and their samples share labels "
        "and noise. The verdicts allow for the number of comparisons in this table (Holm).",
        "",
    ]
    tables = found["differences"].values()
    rows = [("step", *(f"{next(iter(table.values()))['step']:,}" for table in tables))]
    for metric in dict.fromkeys(metric for table in tables for metric in table):
        cells = [found["differences"][name].get(metric) for name in names]
        rows.append((metric, *(_difference(cell) if cell else "" for cell in cells)))
    return [*lines, markdown_table(["", *names], rows), ""]


def _difference(cell: dict[str, Any]) -> str:
    return f"{cell['value']:+.4g} ± {cell['error']:.2g}: {cell['verdict']}"


def _by_step(groups: dict[str, Any]) -> list[str]:
    """The first metric (FID) and the last (class accuracy, where a classifier was given) at every step."""
    steps = sorted({step for group in groups.values() for step in group["metrics"]})
    if len(steps) < 2:
        return []
    names = list(next(iter(next(iter(groups.values()))["metrics"].values())))
    lines = ["## At several step counts", ""]
    for metric in dict.fromkeys((names[0], names[-1])):
        rows = [
            (f"{step:,}", *(_cell(group["metrics"].get(step, {}).get(metric)) for group in groups.values()))
            for step in steps
        ]
        lines += [f"{metric}:", "", markdown_table(["step", *groups], rows), ""]
    return lines


def _cell(number: dict[str, Any] | None) -> str:
    if number is None:
        return ""
    return f"{number['value']:.4g}" + (f" ± {number['error']:.2g}" if number["error"] is not None else "")
