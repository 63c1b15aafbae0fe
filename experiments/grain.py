"""How much a Fréchet distance minds grain, and how much layout: real images with either spoiled, against others.

python experiments/grain.py --json docs/fashion-pixels/grain.json

Grain is normal noise on every pixel, of so many gray levels. Layout is spoiled by exchanging so many of the 16 tiles of
8x8 pixels with others of the same image. The images are real ones of the training set: with neither, the distance is
that of as many perfect samples. data/ and the classifier are those of docs/results.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from sit.metrics.evaluate import evaluate
from sit.metrics.features import get_extractor
from sit.metrics.image_sets import DataImages, Images, drawn
from sit.utils.cli import one_line_errors
from sit.utils.errors import UserError, entry_point
from sit.utils.random import generator, randn
from sit.utils.record import write_record
from sit.utils.tables import markdown_table

CPU = torch.device("cpu")
TILE = 8


@dataclass(frozen=True)
class Arguments:
    """Measure FID of images with grain, and of others with tiles exchanged."""

    data: str = "fashion-mnist:data"
    """the images that are spoiled"""
    reference: str = "fashion-mnist-test:data"
    """what FID is against"""
    features: str = "classifier:classifiers/fashion-mnist-convnext"
    """what FID is on"""
    image_size: int = 32
    """side of the images"""
    num_samples: int = 1000
    """images of each row"""
    grain: tuple[float, ...] = (4, 8, 16, 32)
    """standard deviations of the noise, in gray levels of 255"""
    tiles: tuple[int, ...] = (2, 4, 8, 16)
    """how many tiles are exchanged"""
    json: Path | None = None
    """file for all numbers"""

    def __post_init__(self) -> None:
        if self.image_size < TILE or self.image_size % TILE:
            raise UserError(f"`image_size={self.image_size}`: the side must be a multiple of {TILE}")
        there = (self.image_size // TILE) ** 2
        for count in self.tiles:
            if not 2 <= count <= there:
                raise UserError(f"`tiles={count}`: from 2 to {there} can be exchanged")


class Spoiled(Images):
    """Other images with noise of ``grain`` gray levels, and ``tiles`` tiles of each exchanged in a ring."""

    def __init__(self, images: Images, grain: float, tiles: int) -> None:
        self.images, self.grain, self.tiles = images, grain, tiles
        self.name, self.count = f"{images.name} with grain of {grain:g} and {tiles} tiles exchanged", len(images)

    def batch(self, numbers: np.ndarray) -> torch.Tensor:
        images = self.images.batch(numbers).float()
        if self.grain:
            noise = randn(images.shape[2:], [generator(0, "grain", int(number)) for number in numbers])
            images += self.grain * noise[:, None]  # gray, as the images are
        if self.tiles:
            images = torch.stack([self._exchanged(image, int(n)) for image, n in zip(images, numbers, strict=True)])
        return images.round().clamp(0, 255).to(torch.uint8)

    def _exchanged(self, image: torch.Tensor, number: int) -> torch.Tensor:
        tiles = image.unfold(1, TILE, TILE).unfold(2, TILE, TILE)
        rows, columns = tiles.shape[1:3]
        tiles = tiles.reshape(len(image), rows * columns, TILE, TILE).clone()
        chosen = torch.randperm(rows * columns, generator=generator(0, "tiles", number))[: self.tiles]
        tiles[:, chosen] = tiles[:, chosen.roll(1)]
        tiles = tiles.reshape(len(image), rows, columns, TILE, TILE)
        return tiles.permute(0, 1, 3, 2, 4).reshape_as(image)


def run(arguments: Arguments) -> None:
    """Measure, print the table, and keep all numbers as JSON."""
    reference, extractor = (
        DataImages(arguments.reference, arguments.image_size),
        get_extractor(arguments.features, CPU),
    )
    images = drawn(DataImages(arguments.data, arguments.image_size), arguments.num_samples)
    rows: list[dict[str, Any]] = []
    ways = [(0.0, 0), *((grain, 0) for grain in arguments.grain), *((0.0, tiles) for tiles in arguments.tiles)]
    for grain, tiles in ways:
        report = evaluate(Spoiled(images, grain, tiles), reference, extractor, device=CPU)
        if report is None:
            raise RuntimeError("this is not the main process")
        fid = next(number for number in report.numbers if number.name.startswith("FID ("))
        rows.append({"grain": grain, "tiles": tiles, "fid": fid.value, "error": fid.error})
    cells = [
        (
            f"{row['grain']:g}",
            str(row["tiles"]),
            f"{row['fid']:.2f}" + (f" ± {row['error']:.2f}" if row["error"] else ""),
        )
        for row in rows
    ]
    print(markdown_table(["grain, gray levels", "tiles exchanged", "FID"], cells, align="rrr"))
    if arguments.json is not None:
        write_record(arguments.json, CPU, {"settings": vars(arguments) | {"json": str(arguments.json)}, "rows": rows})


@entry_point
def main() -> None:
    with one_line_errors():
        arguments = tyro.cli(Arguments, prog="experiments/grain.py")
    run(arguments)


if __name__ == "__main__":
    main()
