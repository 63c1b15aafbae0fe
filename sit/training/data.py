"""The training data of a configuration, and the VAE that its latents belong to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from sit.data.factory import open_images
from sit.latents.cache import is_cache
from sit.latents.datasets import TrainingData
from sit.latents.factory import open_latents
from sit.latents.vae import is_on_hub, load_vae
from sit.training.config import TrainConfig
from sit.training.heldout_images import HeldOutImages, hold_out
from sit.utils.files import atomic_folder


@dataclass
class Opened:
    """The training data and the VAE that its latents belong to; and the images held out of it, if any."""

    data: TrainingData
    vae: AutoencoderKL
    vae_name: str
    heldout: HeldOutImages | None = None

    def save_vae(self, folder: Path) -> str | Path:
        """Keep a VAE that is not on the Hub in ``folder``; returns the folder, or the VAE's name on the Hub."""
        if is_on_hub(self.vae_name):
            return self.vae_name
        with atomic_folder(folder) as place:
            self.vae.save_pretrained(place)
        return folder


def open_training_data(config: TrainConfig, device: torch.device, progress: bool = True) -> Opened:
    """Load the VAE to ``device`` and open the data that ``config`` names.

    Raises:
        UserError: the data or the VAE can't be had, or they don't fit each other, or no images can be held out.
    """
    vae = load_vae(config.vae, device)
    images = None if is_cache(config.data) else open_images(config.data, config.image_size)
    data = open_latents(
        config.data if images is None else images,
        vae,
        config.vae,
        image_size=config.image_size,
        flip=config.flip,
        keep_images=config.repa is not None,
        beside=config.repa_images,
        progress=progress,
    )
    data, heldout = hold_out(config, data, images, vae)
    return Opened(data, vae, config.vae, heldout)
