"""A latent cache with the images beside it that its latents were made of, for losses that need them (REPA)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from sit.data.factory import open_images
from sit.latents.cache import CachedLatents
from sit.latents.datasets import Batch
from sit.utils.errors import UserError


class CacheWithImages(CachedLatents):
    """A latent cache whose batches have ``images`` (b, 3, H, W) uint8 too, read, cropped and flipped in the workers.

    They are those that the latents were made of, by the list of their names and the bytes of some, and may have been
    moved since.

    Args:
        folder, flip: as for :class:`~sit.latents.cache.CachedLatents`.
        images: the data set that was encoded, where it is now; None for where it was then.

    Raises:
        UserError: as of a cache, or these images can't be had, or are others.
    """

    def __init__(self, folder: str | Path, flip: bool = False, images: str | None = None) -> None:
        super().__init__(folder, flip)
        made = self.manifest
        spec = images or made.data
        try:
            self.images = open_images(spec, made.image_size)
            same = self.images.fingerprint() == made.files
            same = same and (not made.contents or self.images.contents() == made.contents)
        except UserError as error:
            raise UserError(
                f"`repa` needs the images that the latent cache {folder} was made of, and {spec} can't be read "
                f"({error}); say by `repa_images` where they are now"
            ) from error
        if not same:
            raise UserError(f"`repa_images={spec}` are not the images that the latent cache {folder} was made of")

    def fetch(
        self, indices: np.ndarray, flipped: np.ndarray, noise: torch.Tensor, out: torch.Tensor | None = None
    ) -> Batch:
        return super().fetch(indices, flipped, noise, out) | {"images": self.images.batch(indices, flipped)}
