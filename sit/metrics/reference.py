"""Making a reference: the statistics of images in ADM's format, with what they are of."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from sit.metrics.distances import enough
from sit.metrics.extraction import Found, Pixels, Wanted, extract
from sit.metrics.features import Extractor
from sit.metrics.image_sets import Images
from sit.metrics.packing import pack
from sit.metrics.statistics_files import Part, named_arrays
from sit.utils.targets import check_target


def make_reference(
    images: Images,
    extractors: Sequence[Extractor],
    out: Path,
    work: Path,
    *,
    keep: int,
    device: torch.device,
    batch_size: int,
) -> None:
    """Write ``mu``, ``sigma``, with Inception also ``mu_s``, ``sigma_s``, and ``arr_0`` with ``keep`` of the images.

    The images are read once, their features added up and let go: memory and disk hold sums, not features.

    Args:
        images: the images of the reference.
        extractors: what makes the features.
        out: the npz to write.
        work: the work folder, in which a reference that was cut off goes on.
        keep: how many of the images; they are drawn at random, always the same ones.
        device: where features are made.
        batch_size: images at a time.

    Raises:
        UserError: ``out`` exists or is no npz, there are too few images, or one can't be read.
    """
    check_target(out, "out", ".npz", new=True)
    enough(len(images), 2, "a reference")
    chosen = np.sort(np.random.default_rng(0).permutation(len(images))[:keep])
    nothing = np.array([], dtype=np.int64)
    wanted = [Wanted(extractor, keep=nothing) for extractor in extractors]
    wanted.append(Wanted(Pixels(), keep=chosen, summed=False))
    found = extract(images, wanted, work, device=device, batch_size=batch_size, description="reference")
    if found is not None:
        parts = [_part(extractor, found[extractor.name]) for extractor in extractors]
        pack(out, found[Pixels.name], len(chosen), named_arrays(parts))


def _part(extractor: Extractor, found: Found) -> Part:
    spatial = found.sums["spatial"].moments() if "spatial" in found.sums else None
    return Part(found.sums["features"].moments(), spatial, extractor.about)
