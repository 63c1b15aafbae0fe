"""The README's table: digits FID and class accuracy of samples, of the VAE's reconstructions, of untrained networks.

accelerate launch train.py --mixer attention --output-dir runs/attention
accelerate launch train.py --mixer atconv --output-dir runs/atconv
python experiments/digits_table.py runs/attention runs/atconv --json docs/digits-table.json
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro

from sit.checkpoint.load import load_for_sampling
from sit.latents.vae import decode, encode_images, load_vae, sample_posterior
from sit.metrics.evaluate import evaluate
from sit.metrics.features import get_extractor
from sit.metrics.generated import GeneratedImages
from sit.metrics.image_sets import DataImages, Images
from sit.metrics.report import Report
from sit.model import SiT
from sit.sampling.config import SamplerConfig
from sit.utils.cli import one_line_errors
from sit.utils.device import pick_device
from sit.utils.errors import entry_point
from sit.utils.random import generator, randn
from sit.utils.record import write_record
from sit.utils.tables import markdown_table


@dataclass
class Arguments:
    """Evaluate runs on the digits, and what bounds them from below and above."""

    runs: tyro.conf.Positional[tuple[str, ...]]
    """run folders or checkpoints"""
    num_samples: int = 1000
    """generated images of a row"""
    json: Path | None = None
    """file for all numbers"""
    sampler: Annotated[SamplerConfig, tyro.conf.OmitArgPrefixes] = field(default_factory=SamplerConfig)


class Reconstructions(Images):
    """The digits, encoded by the VAE to one posterior sample, and decoded."""

    def __init__(self, count: int) -> None:
        self.data, self.vae = DataImages("digits", None), load_vae("digits")
        self.name, self.count = "the VAE's reconstructions of the digits", count
        self.labels = self.data.labels[:count]

    def batch(self, numbers: np.ndarray) -> torch.Tensor:
        mean, std = encode_images(self.vae, self.data.batch(numbers))
        noise = randn(mean.shape[1:], [generator(0, "reconstruction", int(number)) for number in numbers])
        return decode(self.vae, sample_posterior(mean, std, noise, self.vae.config)).permute(0, 3, 1, 2)


def row(name: str, report: Report) -> list[str]:
    """The cells of a set of images."""
    numbers = {number.name.split(" (")[0]: number for number in report.numbers}
    fid, accuracy = numbers["FID"], numbers["Class accuracy"]
    precision, recall = numbers["Precision"], numbers["Recall"]
    return [
        name,
        f"{fid.value:.2f}" + (f" ± {fid.error:.2f}" if fid.error is not None else ""),
        f"{precision.value:.2f}",
        f"{recall.value:.2f}",
        f"{accuracy.value:.1%}",
    ]


@entry_point
def main() -> None:
    with one_line_errors():
        arguments = tyro.cli(Arguments, prog="experiments/digits_table.py")
    run(arguments)


def run(arguments: Arguments) -> None:
    """Evaluate, print the table, and keep all numbers as JSON."""
    device = pick_device()
    extractor, reference = get_extractor("digits", device), DataImages("digits", None)
    rows, found = [], {}

    def add(name: str, images: Images) -> None:
        report = evaluate(images, reference, extractor, device=device)
        rows.append(row(name, report))
        found[name] = dataclasses.asdict(report)

    for place in arguments.runs:
        loaded = load_for_sampling(place, device=device)
        mixer = loaded.info.mixer
        trained = GeneratedImages(loaded, arguments.num_samples, config=arguments.sampler)
        add(f"{mixer}, trained for {loaded.info.step} steps", trained)
        torch.manual_seed(0)
        loaded.model = SiT.from_config(loaded.model.config).to(device).eval().requires_grad_(False)
        # a fresh network's prediction is zero, so more steps would change nothing
        few = dataclasses.replace(arguments.sampler, steps=min(25, arguments.sampler.steps))
        add(f"{mixer}, untrained, {few.steps} steps", GeneratedImages(loaded, arguments.num_samples, config=few))
    add("the VAE's reconstructions", Reconstructions(arguments.num_samples))
    print(markdown_table(["samples", "FID (digits features)", "precision", "recall", "class accuracy (SVM)"], rows))
    if arguments.json:
        write_record(arguments.json, device, {"reports": found})


if __name__ == "__main__":
    main()
