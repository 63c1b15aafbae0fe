"""Peak memory of making a reference of many images: it must not grow with their number.

    python benchmarks/reference_memory.py --images 100000

Images are drawn at random, and features come of a small network with as many outputs as Inception's (2048, 2023 of the
spatial ones), so that what is measured is the evaluation and not the model. The peak is the process's, less what it has
when everything is loaded.
"""

from __future__ import annotations

import resource
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from checks import at_least_one
from torch import nn

from sit.metrics.features import Extractor
from sit.metrics.image_sets import Images
from sit.metrics.reference import make_reference
from sit.utils.cli import one_line_errors
from sit.utils.errors import entry_point
from sit.utils.files import LOCK
from sit.utils.record import machine, write_record

FEATURES, SPATIAL = 2048, 2023


@dataclass
class Arguments:
    """Measure the peak memory of a reference."""

    images: int = 100_000
    keep: int = 10_000
    """images that the reference keeps, of 256 × 256 pixels"""
    batch_size: int = 64
    json: Path | None = None
    """file for all numbers"""

    def __post_init__(self) -> None:
        at_least_one(self, "images", "keep", "batch_size")


class Drawn(Images):
    """Random images of 256 × 256 pixels: a few, over and over, each shifted by its number."""

    name = "drawn"

    def __init__(self, count: int) -> None:
        self.count = count
        self.pixels = torch.randint(
            0, 256, (3, 256, 256), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
        )

    def batch(self, numbers: np.ndarray) -> torch.Tensor:
        return torch.stack([self.pixels.roll((int(n) % 251, int(n) % 241), (1, 2)) for n in numbers])


class Small(nn.Module):
    """Features (B, 2048) and spatial features (B, 2023) of images."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3 * 8 * 8, FEATURES + SPATIAL)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = self.layer(images[:, :, ::32, ::32].flatten(1).float() / 255).relu()
        return found[:, :FEATURES], found[:, FEATURES:]


def peak() -> float:
    """The most memory that this process has held, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(arguments: Arguments) -> dict[str, float]:
    """MiB above what was there before, seconds, and MB on the disk."""
    torch.manual_seed(0)
    extractor = Extractor("inception", "stand-in", Small(), ("features", "spatial"))
    images = Drawn(arguments.images)
    extractor(images.batch(np.arange(arguments.batch_size)))
    before, begun = peak(), time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="reference-") as folder:
        work, out = Path(folder) / "work", Path(folder) / "stats.npz"
        making = dict(keep=arguments.keep, device=torch.device("cpu"), batch_size=arguments.batch_size)
        make_reference(images, [extractor], out, work, **making)
        seconds = time.perf_counter() - begun
        files = [path for path in work.rglob("*") if path.is_file() and path.name != LOCK]
        pixels = sum(path.stat().st_size for path in files if path.parent.name.startswith("images-"))
        left = sum(path.stat().st_size for path in files) - pixels
    return {
        "images": arguments.images,
        "kept": arguments.keep,
        "peak_mib_above_the_model": peak() - before,
        "mib_before": before,
        "seconds": seconds,
        "megabytes_of_sums_in_the_work_folder": left / 1e6,
        "megabytes_of_kept_images_in_the_work_folder": pixels / 1e6,
    }


@entry_point
def main() -> None:
    with one_line_errors():
        arguments = tyro.cli(Arguments, prog="benchmarks/reference_memory.py")
    found = measure(arguments)
    print(machine("cpu"))
    for name, value in found.items():
        print(f"{name.replace('_', ' ')}: {value:,.1f}")
    if arguments.json:
        write_record(arguments.json, "cpu", found)


if __name__ == "__main__":
    main()
