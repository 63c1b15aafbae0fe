"""Writing images and arrays into ADM-style npz files, images a chunk at a time."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import IO

import numpy as np

from sit.metrics.extraction import Found
from sit.utils.errors import UserError
from sit.utils.files import atomic_write


def pack_samples(found: Found, count: int, labels: np.ndarray | None, out: Path) -> None:
    """Write ``count`` images that were kept to ``arr_0`` of an npz, and their labels, if known, to ``arr_1``.

    Raises:
        UserError: ``out`` can't be written.
    """
    arrays = {} if labels is None else {"arr_1": np.asarray(labels, dtype=np.int64)}
    pack(out, found, count, arrays)


def pack(out: Path, found: Found, count: int, arrays: dict[str, np.ndarray]) -> None:
    """Write an npz of ``count`` images that were kept, as ``arr_0`` (count, H, W, 3) uint8, and other arrays.

    Raises:
        UserError: the images are of different sizes, or ``out`` can't be written; then there is no file.
    """
    with atomic_write(out) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            _write_images(file, found, count, out)
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, array, allow_pickle=False)


def _write_images(file: IO[bytes], found: Found, count: int, out: Path) -> None:
    """Write the header, which has the shape of the first chunk's images, and all images, which must have it too."""
    shape: tuple[int, ...] = ()
    written = 0
    for chunk in found.chunks():
        pixels = np.ascontiguousarray(chunk["images"])
        if not shape:
            shape = (count, *pixels.shape[1:])
            np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        if pixels.shape[1:] != shape[1:]:
            sizes = [f"{width} x {height}" for _, height, width, _ in (shape, pixels.shape)]
            differ = f"images of different sizes, {sizes[0]} and {sizes[1]} pixels"
            raise UserError(f"{out} can't be made of {differ}: crop them by `image_size`")
        file.write(pixels.tobytes())
        written += len(pixels)
    if written != count:
        raise ValueError(f"{written} images were kept for {out}, not {count}")
