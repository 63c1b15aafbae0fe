"""The text of a study's report."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from sit.study.analysis import NEARLY
from sit.study.config import Study
from sit.study.values import LOSS
from sit.utils.tables import markdown_table

CAUSES = {
    "seed": "everything",
    "weights": "initial weights",
    "order": "order of the images",
    "noise": "noise of the loss",
}
"""what the seeds vary, in words"""
BEST_WITH = {
    "guidance": "guidance",
    "ema": "length of the averaged weights",
    "autoguidance": "guidance by a checkpoint of its own",
}
"""what each variant may be at its best with"""


def markdown(study: Study, found: Mapping[str, Any], images: Mapping[str, str], against: str | None = None) -> str:
    """The report's README.md; ``against`` is the variant that it was asked to compare with."""
    variants = found.get("variants", {})
    first = next(iter(variants), None)
    what = f", compared with {against}" if against is not None else ""
    lines = [
        f"# {study.path.stem}",
        "",
        f"`python -m sit.study {study.path}`{what}; {found['runs']['done']} of {found['runs']['of']} runs are done. "
        f"Trained on {'; '.join(found['machines'])}. All numbers: [numbers.json](numbers.json), from the JSONs in "
        "`runs/`.",
        "",
    ]
    lines += _varied(study)
    lines += _selection(study, found["selection"])
    lines += _set_aside(found)
    if first is None:
        return "\n".join(lines)
    lines += _table(study, found, first)
    lines += _differences(found, first)
    lines += _at_best(found, first)
    lines += _images(found, first)
    lines += _pairing(found, first)
    lines += _seconds(found, first, images)
    lines += _agreement(found, images)
    lines += _causes(found)
    lines += _by_time(found, first, images)
    if "samples" in images:
        lines += ["## Samples of the same noise", "", f"![samples]({images['samples']})", ""]
    return "\n".join(lines)


def _varied(study: Study) -> list[str]:
    """What intervals and verdicts are over, where it is not everything."""
    first, *others = study.vary
    if first == "seed" and not others:
        return []
    others_told = " What each cause brings is told apart below." if others else ""
    if first == "seed":
        return [f"Means, differences and verdicts are over the seeds that vary everything.{others_told}", ""]
    base = (study.variants[0].seeds or study.seeds)[0]
    return [
        f"**The seeds of means, differences and verdicts vary the {CAUSES[first]} alone.** All other randomness is "
        f"seed {base}'s, the samples' too: intervals and verdicts hold for it, and don't say what another brings."
        + others_told,
        "",
    ]


def _selection(study: Study, found: Mapping[str, Any]) -> list[str]:
    if study.select is None or not found:
        return []
    labels = [study.select.label(choice) for choice in range(len(study.select.choices))]
    name = next(iter(study.select.choices[0]))
    rows = []
    for variant, one in found.items():
        cells = []
        for label in labels:
            loss = one["losses"].get(label)
            cell = ("failed" if label in one["losses"] else "") if loss is None else f"{loss:.4f}"
            cells.append(f"**{cell}**" if label == one["chosen"] else cell)
        none = len(one["losses"]) == len(labels) and one["chosen"] is None
        rows.append((variant, *cells, "none is chosen" if none else "yes" if one["at_edge"] else ""))
    return [
        f"## What was chosen: {name}",
        "",
        f"Held-out loss at the end, seed {study.select.seed}; each variant goes on with its lowest (bold). At the edge "
        "means that a value outside of those that were tried may be better.",
        "",
        markdown_table(["", *(f"{name} {label}" for label in labels), "at the edge"], rows),
        "",
    ]


def _set_aside(found: Mapping[str, Any]) -> list[str]:
    """What is not in the comparisons, and why."""
    lines: list[str] = []
    if found.get("failed"):
        lines += ["## Runs that diverged", "", "They are in no mean and in no difference.", ""]
        lines += [markdown_table(["run", "how it ended"], list(found["failed"].items())), ""]
    if found.get("other_measure"):
        named = ", ".join(found["other_measure"])
        lines += [f"The held-out loss of {named} is of another prediction or of other images, and is left out.", ""]
    if machines := (found.get("seconds") or {}).get("machines"):
        named = "; ".join(f"{name}: {machine}" for name, machine in machines.items())
        lines += [
            "Nothing is compared at equal seconds, as the variants' runs are of different machines, whose speeds are "
            f"not the variants' ({named}): time a step of each on one machine with `measure_speed`.",
            "",
        ]
    return lines


def short(metric: str) -> str:
    """A metric's name without the features that it is on, which the report tells once."""
    return metric.partition(" (")[0]


def _cell(number: Mapping[str, Any] | None, digits: str = ".4g", *, seeds: int | None = None) -> str:
    """A mean with its interval; and over how many seeds it is, where they are not the ``seeds`` of the row."""
    if number is None:
        return ""
    error = f" ± {number['error']:.2g}" if number["error"] is not None else ""
    if "error_over_samples" in number:
        error = f" ± {number['error_over_samples']:.2g} (samples)"
    fewer = seeds is not None and len(number["by_seed"]) < seeds
    return f"{number['value']:{digits}}{error}" + (f" ({len(number['by_seed'])} of {seeds} seeds)" if fewer else "")


def _table(study: Study, found: Mapping[str, Any], first: str) -> list[str]:
    variants = found["variants"]
    metrics = list(dict.fromkeys(name for one in variants.values() for name in one["metrics"]))
    paces = (found["seconds"] or {}).get("seconds_per_step", {})
    on = sorted({metric.partition(" (")[2].removesuffix(")") for metric in metrics if " (" in metric})
    told = f" FID and the like are on these features: {'; '.join(on)}." if on else ""
    rows = []
    for name, one in variants.items():
        pace = paces.get(name)
        cells = [_cell(one["metrics"].get(metric), seeds=len(one["seeds"])) for metric in metrics]
        speed = f"{pace:.3g}" if pace else ""
        parameters = f"{one['parameters']:,}" if one["parameters"] else ""
        rows.append((name, f"`{one['mixer']}`", parameters, len(one["seeds"]), *cells, speed))
    return [
        "## At the last step",
        "",
        "Mean over training seeds ± half the width of its 95 % interval (Student's t); none with one seed, but "
        "for what says (samples): there it is the interval over samples of these weights, and tells nothing of other "
        "seeds." + told,
        "",
        markdown_table(["", "mixer", "parameters", "seeds", *map(short, metrics), "seconds a step"], rows),
        "",
    ]


def _difference_table(found: Mapping[str, Any], names: list[str]) -> str:
    metrics = list(found)
    rows = []
    for name in names:
        cells = []
        for metric in metrics:
            one = found[metric].get(name)
            said = "" if one is None else f"{one['value']:+.4g} ± {one['error']:.2g}"
            cells.append(f"{said}: {one['verdict']}" if one and "verdict" in one else said)
        rows.append((name, *cells))
    return markdown_table(["", *map(short, metrics)], rows)


def _differences(found: Mapping[str, Any], first: str) -> list[str]:
    if not found["differences"]:
        return []
    return [
        f"## Difference to {first}, paired by seed",
        "",
        "Mean ± half the width of the 95 % interval over the training seeds that both have (Student's t). Runs of a "
        "seed share initial weights outside the mixer, order, noise and the samples' noise. Verdicts: p below 0.05 "
        "after Holm's adjustment over all verdicts of the table.",
        "",
        _difference_table(found["differences"], [name for name in found["variants"] if name != first]),
        "",
    ]


def _at_best(found: Mapping[str, Any], first: str) -> list[str]:
    lines: list[str] = []
    for kind, one in found.get("at_best", {}).items():
        fid = short(found["fid"])
        title, usual = BEST_WITH[kind], one["usual"]
        values = list(dict.fromkeys(value for own in one["values"].values() for value in own))
        rows = []
        for name, own in one["values"].items():
            cells = [_cell(own.get(value)) for value in values]
            best = one["best"][name]
            cells[values.index(best)] = f"**{cells[values.index(best)]}**"
            difference = one["differences"].get(found["fid"], {}).get(name)
            told = (
                f"{difference['value']:+.4g} ± {difference['error']:.2g}: {difference['verdict']}" if difference else ""
            )
            rows.append((name, *cells, told))
        order = one["order"]
        same = order["usual"] == order["best"]
        lines += [
            f"## Each variant at its best {title}",
            "",
            f"{fid} at the last step, mean over training seeds ± half the width of its 95 % interval; the best by the "
            "mean (bold), a choice that the intervals leave out. Everything else in this report is "
            f"with {usual}. The order by mean {fid} is "
            + ("the same" if same else f"{', '.join(order['usual'])} there, and {', '.join(order['best'])} at the best")
            + ".",
            "",
            markdown_table(["", *values, f"at the best, less {one['against']}'s, paired"], rows),
            "",
        ]
    return lines


def _images(found: Mapping[str, Any], first: str) -> list[str]:
    rows = []
    for name, by_seed in found["per_image"].items():
        if by_seed:
            values = list(by_seed.values())
            ts = [one["t"] for one in values]
            times = [statistics.fmean(column) for column in zip(*(one["t_by_time"] for one in values), strict=True)]
            rows.append((name, f"{min(map(abs, ts)):.3g} … {max(map(abs, ts)):.3g}", *(f"{t:+.3g}" for t in times)))
    if not rows:
        return []
    times = next(one["heldout_by_time"] for one in found["variants"].values() if one["heldout_by_time"])
    count = next(one["images"] for by_seed in found["per_image"].values() for one in by_seed.values())
    return [
        f"## Image by image against {first}",
        "",
        f"t of the paired difference of held-out loss over {count} images: least and greatest |t| over the seeds, and "
        "the mean t at each time; below zero is less loss. It tells the weights at hand apart; what another seed "
        "brings is in the table above.",
        "",
        markdown_table(["", "|t|", *(f"t = {time}" for time in times)], rows),
        "",
    ]


def _by_time(found: Mapping[str, Any], first: str, images: Mapping[str, str]) -> list[str]:
    measured = {name: one["heldout_by_time"] for name, one in found["variants"].items() if one["heldout_by_time"]}
    if not measured:
        return []
    times = list(dict.fromkeys(time for own in measured.values() for time in own))
    rows = [(name, *(_cell(own.get(time)) for time in times)) for name, own in measured.items()]
    lines = [
        "## Held-out loss by time",
        "",
        "After the last step, mean over training seeds ± half the width of its 95 % interval; at t = 0 all is noise.",
        "",
        markdown_table(["", *(f"t = {time}" for time in times)], rows),
        "",
    ]
    if found["differences_by_time"]:
        paired = found["differences_by_time"].values()
        names = [name for name in measured if any(name in own for own in paired)]
        table = _difference_table({f"t = {time}": own for time, own in found["differences_by_time"].items()}, names)
        lines += [f"Less that of {first}, paired by seed, without verdicts:", "", table, ""]
    if "by time" in images:
        lines += [f"![held-out loss by time]({images['by time']})", ""]
    return lines


def _pairing(found: Mapping[str, Any], first: str) -> list[str]:
    rows = []
    for over, metrics in found["pairing"].items():
        for metric, one in metrics.items():
            if one["all"] is not None:
                name = metric if metric == LOSS else f"log {short(metric)}"
                singles = ", ".join(f"{variant} {ratio:.2f}" for variant, ratio in one["by_variant"].items())
                rows.append((f"{name}, {over}", f"{one['all']:.3g}", singles))
    if not rows:
        return []
    return [
        "## What pairing is worth",
        "",
        f"Variance of the paired difference to {first} over the variance of an unpaired one. Ratios over few seeds are "
        "rough.",
        "",
        markdown_table(["", "all", "each"], rows),
        "",
    ]


def _speeds(found: Mapping[str, Any]) -> str:
    apart = found.get("speeds")
    if apart is None:
        lack = found.get("speeds_lack")
        why = f" (`speed.json` lacks {', '.join(lack)}: measure them with `measure_speed`)" if lack else ""
        return f"Speeds are medians over the rows of the runs' metrics: work beside a run is in them{why}."
    return (
        f"Speeds were measured apart, steps of all variants in turn in one process: `{apart['command']}`, on "
        f"{apart['machine']}, {apart['date']}; medians of {apart['repeats']}."
    )


def _seconds(found: Mapping[str, Any], first: str, images: Mapping[str, str]) -> list[str]:
    seconds = found["seconds"]
    if "seconds" not in seconds:
        return []
    names = [name for name in found["variants"] if name != first]
    lines = [
        "## At equal seconds",
        "",
        f"After {seconds['seconds']:.4g} seconds of training, when the training that ends first is done. "
        f"{_speeds(found)} Those that take at most {NEARLY:.0%} longer count with what they ended with; "
        "those that take longer are then in the middle of their schedule of learning rates, and variants with `steps` "
        "of their own compare finished trainings.",
        "",
    ]
    metrics = list(dict.fromkeys(name for one in seconds["metrics"].values() for name in one))
    rows = [(name, *(_cell(one.get(metric)) for metric in metrics)) for name, one in seconds["metrics"].items()]
    lines += [markdown_table(["", *map(short, metrics)], rows), ""]
    if seconds["differences"]:
        lines += [f"Less that of {first}, paired by seed:", "", _difference_table(seconds["differences"], names), ""]
    for metric in (LOSS, found["fid"]):
        if metric in images:
            lines += [f"![{short(metric)} against seconds]({images[metric]})", ""]
    return lines


def _correlation(one: Mapping[str, Any] | None) -> str:
    if one is None:
        return "too few points"
    interval = f" [{one['interval'][0]:.2f}, {one['interval'][1]:.2f}]" if one["interval"] else ""
    return f"{one['value']:.3f}{interval}, {one['points']} points of {one['runs']} runs"


def _agreement(found: Mapping[str, Any], images: Mapping[str, str]) -> list[str]:
    if "agreement" not in found:
        return []
    agreement = found["agreement"]
    rows = [("all variants, seeds and steps", _correlation(agreement["all"]))]
    rows.append(("the last step of each run", _correlation(agreement["last step"])))
    rows += [(f"all, by the loss at t = {time} alone", _correlation(one)) for time, one in agreement["by_time"].items()]
    rows += [(f"{name} alone", _correlation(one)) for name, one in agreement["within"].items()]
    lines = [
        "## Does the held-out loss rank as FID does?",
        "",
        "Spearman's rank correlation, with a 95 % bootstrap interval over runs. The loss is the mean over its times "
        "where none is named; at t = 0 all is noise.",
        "",
        markdown_table(["", "rank correlation"], rows),
        "",
    ]
    if agreement["off_the_line"]:
        rows = [
            (name, f"{one['factor']:.3f}", "{:.3f} … {:.3f}".format(*one["interval"]) if one["interval"] else "")
            for name, one in agreement["off_the_line"].items()
        ]
        lines += [
            "FID over what the common line of log FID over log loss gives for the loss, by variant, with the 95 % "
            "interval over runs. Intervals that are apart: these variants follow different curves.",
            "",
            markdown_table(["", "factor", "interval"], rows),
            "",
        ]
    if "points" in images:
        lines += [f"![FID against held-out loss]({images['points']})", ""]
    return lines


def _causes(found: Mapping[str, Any]) -> list[str]:
    if "causes" not in found:
        return []
    lines = [
        "## Where the spread over seeds comes from",
        "",
        "Standard deviation over seeds that vary one cause alone, with its 95 % interval (of normal values, by χ²), "
        "and its share of the sum of the causes' variances. Of FID it is that of the logarithm. Where everything "
        "varies, so do the samples that FID is of; where one cause varies, they share labels and noise.",
        "",
    ]
    for metric, variants in found["causes"].items():
        rows = []
        for name, own in variants.items():
            for cause, one in own.items():
                low, high = one["interval"]
                share = f"{one['share']:.0%}" if one.get("share") is not None else ""
                rows.append(
                    (name, CAUSES[cause], one["seeds"], f"{one['deviation']:.3g}", f"{low:.2g} … {high:.2g}", share)
                )
        lines += [
            f"{short(metric)}:",
            "",
            markdown_table(["", "varied", "seeds", "deviation", "interval", "share"], rows),
            "",
        ]
    return lines
