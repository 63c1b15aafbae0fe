"""From ``--data``, ``--vae``, ``--image-size`` and ``--flip`` to what the loader reads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from sit.data.factory import open_images
from sit.latents.cache import CachedLatents, is_cache
from sit.latents.datasets import PixelData, TrainingData, encode_in_memory
from sit.latents.vae import load_vae
from sit.training.config import TrainConfig
from sit.utils.errors import UserError
from sit.utils.files import atomic_folder

MEMORY_LIMIT = 20_000
"""Data sets of at most so many images are encoded once, at the start; larger ones as they are needed."""


@dataclass
class Opened:
    """The training data and the VAE that its latents belong to."""

    data: TrainingData
    vae: AutoencoderKL
    vae_name: str

    def save_vae(self, folder: Path) -> str | Path:
        """Keep a VAE that is not on the Hub in ``folder``; returns the folder, or the VAE's name on the Hub."""
        if self.vae_name == "digits" or Path(self.vae_name).exists():
            with atomic_folder(folder) as place:
                self.vae.save_pretrained(place)
            return folder
        return self.vae_name


def open_training_data(config: TrainConfig, device: torch.device, progress: bool = True) -> Opened:
    """Open what ``config`` names.

    Raises:
        UserError: the data or the VAE can't be had, or they don't fit each other.
    """
    vae = load_vae(config.vae, device)
    if is_cache(config.data):
        if config.repa is not None:
            raise UserError(f"--repa needs the images, which the latent cache {config.data} lacks; give their --data")
        data = CachedLatents(config.data, config.flip)
        data.check(vae, config.vae, config.image_size)
        return Opened(data, vae, config.vae)
    images = open_images(config.data, config.image_size)
    if config.repa is not None:
        data = PixelData(images, vae, config.flip, keep_images=True)
    elif len(images) <= MEMORY_LIMIT:
        data = encode_in_memory(images, vae, config.flip, progress=progress)
    else:
        data = PixelData(images, vae, config.flip)
    return Opened(data, vae, config.vae)
