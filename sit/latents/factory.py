"""From the name of a data set to the latents that training reads."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import AutoencoderKL

from sit.data.dataset import ImageData
from sit.data.factory import announce, open_images
from sit.latents.cache import CachedLatents, is_cache
from sit.latents.datasets import PixelData, TrainingData, encode_in_memory
from sit.latents.spread import evenly_spaced, note_spread, spread
from sit.latents.with_images import CacheWithImages
from sit.utils.errors import UserError

MEMORY_LIMIT = 20_000
"""Data sets of at most so many images are encoded once, at the start; larger ones as they are needed."""


def open_latents(
    spec: str | ImageData,
    vae: AutoencoderKL,
    vae_name: str,
    *,
    image_size: int | None = None,
    flip: bool = False,
    keep_images: bool = False,
    beside: str | None = None,
    progress: bool = True,
) -> TrainingData:
    """Open a latent cache, or the latents of images, encoded at the start or while training.

    Args:
        spec: the folder of a cache, what :func:`~sit.data.factory.open_images` takes, or images that are open.
        vae: encodes the images; the one that made the cache.
        vae_name: the VAE's name, for messages.
        image_size: side in pixels; None for the source's own.
        flip: flip each image left to right with probability 0.5 every time it is read.
        keep_images: batches hold the images beside their latents, so that all are encoded while training; with a cache,
            they are read from where they lie.
        beside: where the images of a cache lie now, for ``keep_images``; None for where they were encoded from.
        progress: show a bar while encoding.

    Raises:
        UserError: there is no such data, it and the VAE don't fit each other, or a cache's images can't be had.
    """
    if isinstance(spec, str) and is_cache(spec):
        cache = CacheWithImages(spec, flip, beside) if keep_images else CachedLatents(spec, flip)
        cache.check(vae, vae_name, image_size)
        announce(spec, len(cache), len(cache.classes))
        measured = cache.manifest.spread
        if not measured:  # encoded by version 0.1.0
            some = evenly_spaced(len(cache))
            measured = spread(torch.from_numpy(cache.moments(some, np.zeros(len(some), dtype=bool))), cache.scaling)
        note_spread(spec, measured)
        return cache
    if beside is not None:
        raise UserError(f"`repa_images={beside}` belongs to a latent cache, and `data` has images itself: leave it out")
    images = open_images(spec, image_size) if isinstance(spec, str) else spec
    if keep_images or len(images) > MEMORY_LIMIT:
        return PixelData(images, vae, flip, keep_images=keep_images)
    data = encode_in_memory(images, vae, flip, progress=progress)
    note_spread(data.name, spread(data.moments[evenly_spaced(len(data)), 0], data.scaling))
    return data
