"""The constants that give latents unit spread: ``python -m sit.latents measure``."""

from __future__ import annotations

import numpy as np
import torch
from tqdm import tqdm

from sit.data.factory import open_images
from sit.latents.arguments import Measure
from sit.latents.pixels import is_pixels, pixel_codec
from sit.latents.vae import encode_images, load_vae
from sit.utils.errors import UserError


def measure(config: Measure) -> tuple[float, float]:
    """Mean and standard deviation over the posterior samples of all entries of the latents, unscaled.

    The variance is that of the posteriors' means and the mean of their variances, in float64.

    Raises:
        UserError: the data or the VAE can't be had, or they don't fit each other.
    """
    if config.images < 1:
        raise UserError(f"`images={config.images}` must be positive")
    if config.seed < 0:
        raise UserError(f"`seed={config.seed}` must not be negative")
    data, vae = open_images(config.data, config.image_size), load_vae(config.vae)
    count = min(config.images, len(data))
    chosen = np.sort(np.random.default_rng(config.seed).choice(len(data), count, replace=False))
    sums = torch.zeros(3, dtype=torch.float64)
    for start in tqdm(range(0, count, 64), desc="measuring", leave=False):
        pixels = torch.stack([data[int(index)][0] for index in chosen[start : start + 64]])
        mean, std = (part.double() for part in encode_images(vae, pixels))
        sums += torch.stack([mean.sum(), mean.square().sum() + std.square().sum(), torch.tensor(mean.numel()).double()])
    total, squares, entries = sums.tolist()
    return total / entries, (squares / entries - (total / entries) ** 2) ** 0.5


def constants(name: str, mean: float, deviation: float) -> str:
    """Where the measured numbers belong, as text: a pixel codec's name with them, or the fields of a VAE's config.

    Raises:
        UserError: the images are all of one value.
    """
    if not deviation > 0:
        raise UserError("all these latents are of one value, so no scale gives them unit spread")
    if is_pixels(name):
        channels = pixel_codec(name).config.latent_channels
        return f"none:channels={channels}:shift={mean:.4f}:scale={1 / deviation:.4f}"
    return f"shift_factor {mean:.4f} and scaling_factor {1 / deviation:.4f} in its config"
