"""The training data of a configuration, and the VAE that its latents belong to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from sit.latents.datasets import TrainingData
from sit.latents.factory import open_latents
from sit.latents.vae import load_vae
from sit.training.config import TrainConfig
from sit.utils.files import atomic_folder


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
    """Load the VAE to ``device`` and open the data that ``config`` names.

    Raises:
        UserError: the data or the VAE can't be had, or they don't fit each other.
    """
    vae = load_vae(config.vae, device)
    data = open_latents(
        config.data,
        vae,
        config.vae,
        image_size=config.image_size,
        flip=config.flip,
        keep_images=config.repa is not None,
        progress=progress,
    )
    return Opened(data, vae, config.vae)
