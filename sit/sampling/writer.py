"""Samples on disk: single PNGs, one npz, and a labeled grid."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from sit.sampling.images import ImageBatch
from sit.utils.errors import UserError
from sit.utils.files import atomic_folder, explain_os_errors
from sit.utils.image_grid import labeled_grid, save_png
from sit.utils.targets import check_room

GRID_LIMIT = 100
"""images in the grid at most"""
PACKED = "samples.npz"


class SampleWriter:
    """Puts samples on disk one by one, as single PNGs and into an ADM-style ``samples.npz``; keeps some for a grid.

    The npz is written from its beginning to its end: its room is taken at first, so that a disk that is too small is
    known before anything is sampled.

    Args:
        folder: an empty folder.
        count: how many samples there will be.
        size: height and width of the images in pixels.
        keep: False leaves nothing behind, for those who only want the grid.

    Raises:
        UserError: the disk has no room for the npz.
    """

    def __init__(self, folder: Path, count: int, size: tuple[int, int], keep: bool = True) -> None:
        self.folder, self.count, self.keep = folder, count, keep
        self.shape = (count, *size, 3)
        self.shown: list[np.ndarray] = []
        self.done = 0
        if keep:
            self._open()
        self.labels = np.zeros(count, dtype=np.int64)

    def _open(self) -> None:
        path, need = self.folder / PACKED, math.prod(self.shape) + 8 * self.count + 4096
        check_room(self.folder.parent, need, "out", f"{self.count:,} samples")
        self.file = path.open("w+b")
        _take_room(self.file.fileno(), need)
        self.archive = zipfile.ZipFile(self.file, "w", zipfile.ZIP_STORED)
        self.array = self.archive.open("arr_0.npy", "w", force_zip64=True)
        header = {"descr": "|u1", "fortran_order": False, "shape": self.shape}
        np.lib.format.write_array_header_1_0(self.array, header)

    def add(self, batch: ImageBatch) -> None:
        """Take up the next samples.

        Raises:
            OSError: the disk is full.
        """
        for image, label in zip(batch.images.numpy(), batch.labels.tolist(), strict=True):
            if self.done < GRID_LIMIT:
                self.shown.append(image)
            if self.keep:
                self.array.write(image.tobytes())
                Image.fromarray(image).save(self.folder / f"{self.done:06d}.png")
            self.labels[self.done] = label
            self.done += 1

    def save_grid(self, names: Sequence[str], columns: int, weights: str) -> None:
        """Write ``grid.png`` of the first samples, each with its class's name, or its label if it has none.

        The file's text ``weights`` says what made them.
        """
        labels = self.labels[:GRID_LIMIT].tolist()
        captions = [names[label] if label < len(names) else str(label) for label in labels]
        save_png(labeled_grid(np.stack(self.shown), captions, columns), self.folder / "grid.png", weights=weights)

    def finish(self) -> None:
        """Complete ``samples.npz``: ``arr_0`` (N, H, W, 3) uint8 images, ``arr_1`` (N,) int64 labels."""
        if not self.keep:
            return
        self.array.close()
        with self.archive.open("arr_1.npy", "w") as file:
            np.lib.format.write_array(file, self.labels)
        self.archive.close()
        self.file.truncate()  # the rest of the room that was taken
        self.file.close()

    def abandon(self) -> None:
        """Remove what is not whole: the npz, and the PNG that was being written."""
        if self.keep:
            for part in (self.array, self.archive, self.file):
                with contextlib.suppress(OSError, ValueError):
                    part.close()
        for path in (self.folder / PACKED, self.folder / f"{self.done:06d}.png", self.folder / "grid.png"):
            path.unlink(missing_ok=True)


def _take_room(descriptor: int, size: int) -> None:
    """Have the disk keep ``size`` bytes for a file, where the system can."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, size)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise


@contextlib.contextmanager
def writing_samples(folder: Path, count: int, size: tuple[int, int], keep: bool = True) -> Iterator[SampleWriter]:
    """A :class:`SampleWriter` into a new ``folder``, which takes its place when it is complete.

    Where the disk is full, the PNGs that were made are kept in ``FOLDER-unfinished``, and nothing else.

    Raises:
        UserError: the folder exists, can't be written, or the disk is full; the message says what was kept.
    """
    writer, rescued = None, folder.with_name(f"{folder.name}-unfinished")
    try:
        with explain_os_errors(folder), atomic_folder(folder) as place:
            writer = SampleWriter(place, count, size, keep)
            try:
                yield writer
                writer.finish()
            except (OSError, UserError) as error:
                if isinstance(error, OSError) or isinstance(error.__cause__, OSError):
                    writer.abandon()
                    if keep and writer.done and not rescued.exists():
                        os.rename(place, rescued)
                raise
    except UserError as error:
        if writer is not None and rescued.is_dir() and isinstance(error.__cause__, OSError):
            raise UserError(
                f"the disk was full after {writer.done} of {count} samples, which are kept as PNGs in {rescued}; "
                f"{folder} was not written"
            ) from error
        raise
