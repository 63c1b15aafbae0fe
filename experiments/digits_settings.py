"""What moves FID by how much, on the digits: one setting of sampling changed at a time, on the weights of one run.

accelerate launch train.py --mixer atconv --output-dir runs/atconv
python experiments/digits_settings.py runs/atconv --json docs/evaluation/settings.json

Labels and noise are the same wherever the setting leaves them so, and the difference to the row's own base is paired
over groups of samples. It holds for these weights and this data: to others carries over at best the order of size.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import tyro

from sit.checkpoint.load import Loaded, load_for_sampling
from sit.metrics.estimate import Estimate
from sit.metrics.evaluate import evaluate
from sit.metrics.features import get_extractor
from sit.metrics.generated import GeneratedImages
from sit.metrics.image_sets import DataImages
from sit.metrics.paired import over_samples
from sit.metrics.report import Number
from sit.sampling.config import LabelOrder, SamplerConfig
from sit.utils.cli import one_line_errors
from sit.utils.device import pick_device
from sit.utils.errors import UserError, entry_point
from sit.utils.record import write_record
from sit.utils.tables import markdown_table


@dataclass(frozen=True)
class Setting:
    """One way to sample.

    Attributes:
        sampler: fields of :class:`SamplerConfig`, ``steps`` as a share.
        base: the setting that it is compared with; None for one that others are compared with.
        labels: the order of the labels.
        cut: cut what the VAE gives to whole gray levels instead of rounding it, as REPA's program does.
    """

    sampler: dict[str, Any] = field(default_factory=dict)
    base: str | None = None
    labels: LabelOrder = "balanced"
    cut: bool = False


PLAIN, GUIDED = "SDE, labels in turn, no guidance", "guidance of 1.5, three channels"
SETTINGS = {
    PLAIN: Setting(),
    "a fifth of the steps": Setting({"steps": 1 / 5}, PLAIN),
    "no last step": Setting({"last_step": "none"}, PLAIN),
    "ODE, Heun, a tenth of the steps": Setting({"sampler": "ode", "method": "heun2", "steps": 1 / 10}, PLAIN),
    "labels at random": Setting({}, PLAIN, labels="uniform"),
    "gray levels cut off instead of rounded": Setting({}, PLAIN, cut=True),
    GUIDED: Setting({"cfg_scale": 1.5}, PLAIN),
    "guidance of 1.5, all channels": Setting({"cfg_scale": 1.5, "cfg_channels": 0}, GUIDED),
    "guidance of 1.5, three channels, noise levels up to 0.7": Setting(
        {"cfg_scale": 1.5, "cfg_interval": (0.0, 0.7)}, GUIDED
    ),
}


@dataclass
class Arguments:
    """Evaluate a run on the digits under several settings."""

    run: tyro.conf.Positional[str]
    """a run's folder or a checkpoint"""
    num_samples: int = 1000
    """generated images of a setting"""
    steps: int = 100
    """of the SDE where the setting says nothing else"""
    json: Path | None = None
    """file for all numbers"""

    def __post_init__(self) -> None:
        if self.num_samples < 40:
            raise UserError(f"`num_samples={self.num_samples}`: fewer than 40 have no errors to pair")
        if self.steps < 5:
            raise UserError(f"`steps` must be at least 5, not {self.steps}")


def config_of(setting: Setting, steps: int) -> SamplerConfig:
    """A setting's sampler, with so many ``steps`` or its share of them."""
    told = {"steps": 1} | setting.sampler
    return SamplerConfig(**told | {"steps": max(2, round(told["steps"] * steps))})


def difference(base: Number, other: Number) -> dict[str, Any]:
    """The other less the base, paired over groups of samples: value, and half the width of its 95 % interval."""
    first, second = (Estimate(number.value, number.replicates) for number in (base, other))
    found = over_samples(first, second)
    return {"value": found.value, "error": found.error}


@contextlib.contextmanager
def cutting(loaded: Loaded) -> Iterator[None]:
    """Within the block, gray levels are cut off: half of one, 1/255, is taken from what is then rounded."""
    hook = loaded.vae.decoder.register_forward_hook(lambda decoder, inputs, pixels: pixels - 1 / 255)
    try:
        yield
    finally:
        hook.remove()


def fid_of(
    loaded: Loaded, setting: Setting, arguments: Arguments, device: torch.device
) -> tuple[Number, Number | None]:
    """FID and, where there is a classifier, class accuracy of the samples."""
    config = config_of(setting, arguments.steps)
    samples = GeneratedImages(loaded, arguments.num_samples, labels=setting.labels, config=config)
    with cutting(loaded) if setting.cut else contextlib.nullcontext():
        report = evaluate(samples, DataImages("digits", None), get_extractor("digits", device), device=device)
    by_name = {number.name.partition(" (")[0]: number for number in report.numbers}
    return by_name["FID"], by_name.get("Class accuracy")


def run(arguments: Arguments) -> None:
    """Evaluate each setting, print the table, and keep all numbers as JSON."""
    device = pick_device()
    loaded = load_for_sampling(arguments.run, device=device)
    found: dict[str, dict[str, Any]] = {}
    numbers: dict[str, Number] = {}
    rows = []
    for name, setting in SETTINGS.items():
        fid, accuracy = fid_of(loaded, setting, arguments, device)
        numbers[name] = fid
        change = None if setting.base is None else difference(numbers[setting.base], fid)
        found[name] = {
            "setting": dataclasses.asdict(setting),
            "fid": dataclasses.asdict(fid),
            "class_accuracy": None if accuracy is None else dataclasses.asdict(accuracy),
            "difference": change,
        }
        told = "" if change is None else f"{change['value']:+.2f} ± {change['error']:.2f}"
        against = "" if setting.base in (None, PLAIN) else f" (to {setting.base})"
        shown = "" if accuracy is None else f"{accuracy.value:.1%}"
        rows.append((name, f"{fid.value:.2f} ± {fid.error:.2f}", told + against, shown))
        print(f"{name}: {rows[-1][1]}", flush=True)
    print(markdown_table(["setting", "FID (digits features)", "difference, paired", "class accuracy"], rows))
    if arguments.json:
        settings = {"run": arguments.run, "num_samples": arguments.num_samples, "steps": arguments.steps}
        write_record(arguments.json, device, {**settings, "found": found})


@entry_point
def main() -> None:
    with one_line_errors():
        arguments = tyro.cli(Arguments, prog="experiments/digits_settings.py")
    run(arguments)


if __name__ == "__main__":
    main()
