"""Making a reference in ADM's format."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from sit.metrics.distances import Moments, enough
from sit.metrics.extraction import WorkDirectory, extract
from sit.metrics.features import Extractor
from sit.metrics.image_sets import Images
from sit.utils.errors import UserError
from sit.utils.files import atomic_write


def make_reference(
    images: Images, extractor: Extractor, out: Path, *, keep: int, device: torch.device, batch_size: int
) -> None:
    """Write ``mu``, ``sigma``, with Inception also ``mu_s``, ``sigma_s``, and ``arr_0`` with ``keep`` of the images.

    Args:
        images: the images of the reference.
        extractor: what makes the features.
        out: the npz to write.
        keep: how many of the images; they are drawn at random, always the same ones.
        device: where features are made.
        batch_size: images at a time.

    Raises:
        UserError: ``out`` exists or is no npz, there are too few images, or one can't be read.
    """
    if out.suffix != ".npz":
        raise UserError(f"`out={out}` must end in .npz")
    if out.exists():
        raise UserError(f"`out={out}` exists already; it is not overwritten")
    enough(len(images), 2, "a reference")
    with WorkDirectory(None) as work:
        found = extract(images, extractor, work, device=device, batch_size=batch_size, description="reference")
    if found is None:
        return
    arrays = {}
    for name, suffix in (("features", ""), ("spatial", "_s")):
        if name in found:
            moments = Moments.of(found[name])
            arrays |= {f"mu{suffix}": moments.mu, f"sigma{suffix}": moments.sigma}
    chosen = np.sort(np.random.default_rng(0).permutation(len(images))[:keep])
    kept = [images.batch(chosen[i : i + batch_size]) for i in range(0, len(chosen), batch_size)]
    arrays["arr_0"] = torch.cat(kept).permute(0, 2, 3, 1).numpy()
    with atomic_write(out) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)
