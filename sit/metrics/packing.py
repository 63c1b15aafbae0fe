"""Writing images and arrays into ADM-style npz files, images a chunk at a time."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

from sit.metrics.extraction import Found
from sit.utils.files import atomic_write


def pack_samples(found: Found, count: int, labels: np.ndarray | None, out: Path) -> None:
    """Write ``count`` images that were kept to ``arr_0`` of an npz, and their labels, if known, to ``arr_1``.

    Raises:
        UserError: ``out`` can't be written.
    """
    arrays = {} if labels is None else {"arr_1": np.asarray(labels, dtype=np.int64)}
    pack(out, found, count, arrays)


def pack(out: Path, found: Found, count: int, arrays: dict[str, np.ndarray]) -> None:
    """Write an npz of ``count`` images that were kept, as ``arr_0`` (count, H, W, 3) uint8, and other arrays."""
    with atomic_write(out) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        header_written = False
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            for chunk in found.chunks():
                pixels = np.ascontiguousarray(chunk["images"])
                if not header_written:
                    shape = (count, *pixels.shape[1:])
                    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
                    header_written = True
                file.write(pixels.tobytes())
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, array, allow_pickle=False)
