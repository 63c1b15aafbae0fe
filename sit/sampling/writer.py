"""Samples on disk: single PNGs, one npz, and a labeled grid."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from sit.sampling.images import ImageBatch
from sit.utils.image_grid import labeled_grid, save_png

GRID_LIMIT = 100
"""images in the grid at most"""


class SampleWriter:
    """Collects samples on disk rather than in memory, and keeps them as single PNGs and an ADM-style ``samples.npz``.

    Args:
        folder: an empty folder.
        count: how many samples there will be.
        keep: False leaves nothing behind, for those who only want the grid.
    """

    def __init__(self, folder: Path, count: int, keep: bool = True) -> None:
        self.folder, self.count, self.keep = folder, count, keep
        self.labels = np.zeros(count, dtype=np.int64)
        self.images = np.zeros((0, 0, 0, 3), dtype=np.uint8)  # until the first of them tells their size
        self.done = 0

    def add(self, batch: ImageBatch) -> None:
        """Take up the next samples."""
        images = batch.images.numpy()
        if not self.done:
            shape = (self.count, *images.shape[1:])
            self.images = np.lib.format.open_memmap(self.folder / "arr_0.npy", mode="w+", dtype=np.uint8, shape=shape)
        for image, label in zip(images, batch.labels.tolist(), strict=True):
            if self.keep:
                Image.fromarray(image).save(self.folder / f"{self.done:06d}.png")
            self.images[self.done], self.labels[self.done] = image, label
            self.done += 1

    def save_grid(self, names: Sequence[str], columns: int) -> None:
        """Write ``grid.png`` of the first samples, each with its class's name, or its label if it has none."""
        labels = self.labels[:GRID_LIMIT].tolist()
        captions = [names[label] if label < len(names) else str(label) for label in labels]
        save_png(labeled_grid(self.images[:GRID_LIMIT], captions, columns), self.folder / "grid.png")

    def finish(self) -> None:
        """Pack ``samples.npz``: ``arr_0`` (N, H, W, 3) uint8 images, ``arr_1`` (N,) int64 labels."""
        if isinstance(self.images, np.memmap):
            self.images.flush()
        if self.keep:
            np.save(self.folder / "arr_1.npy", self.labels)
            with zipfile.ZipFile(self.folder / "samples.npz", "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
                for name in ("arr_0.npy", "arr_1.npy"):
                    archive.write(self.folder / name, name)
        for name in ("arr_0.npy", "arr_1.npy"):
            (self.folder / name).unlink(missing_ok=True)
