"""What training reads from: latents in memory, latents encoded on the fly, and the protocol that the cache follows."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from diffusers import AutoencoderKL
from tqdm import tqdm

from sit.data.dataset import ImageData
from sit.latents.vae import encode_images, latent_shape, sample_posterior, scaling

Batch = dict[str, torch.Tensor]


class TrainingData(Protocol):
    """What :func:`training_batches` reads from.

    Attributes:
        name: as given by ``--data``.
        classes: label names.
        labels: (count,) int64.
        latent_shape: (c, h, w).
        flips: whether images are mirrored at random.
    """

    name: str
    classes: list[str]
    labels: np.ndarray
    latent_shape: tuple[int, int, int]
    flips: bool

    def fetch(self, indices: np.ndarray, mirrored: np.ndarray, noise: torch.Tensor) -> Batch:
        """In a worker, for ``indices`` (b,) and ``mirrored`` (b,) bool: turn the posterior's noise (b, c, h, w) in
        place into scaled latents; or answer with what :meth:`finish` needs to do so."""
        ...

    def finish(self, batch: Batch) -> Batch:
        """In the main process: whatever is left to do; ``latents`` comes in as :meth:`fetch` left it."""
        ...


class LatentData:
    """Posterior moments in memory, encoded once at the start: for data sets of a few thousand images.

    Args:
        mean, std: (count, c, h, w), unscaled; kept as float16 like the cache's, so both train alike bit by bit.
        labels: (count,) int64.
        classes: label names.
        config: the VAE's config (its scaling and shift).
        mirror: (mean, std) of the mirrored images, or None.
        flips: mirror at random; needs ``mirror``.
    """

    def __init__(
        self,
        mean: torch.Tensor,
        std: torch.Tensor,
        labels: np.ndarray,
        classes: list[str],
        config: Any,
        mirror: tuple[torch.Tensor, torch.Tensor] | None = None,
        flips: bool = False,
        name: str = "latents",
    ) -> None:
        if flips and mirror is None:
            raise ValueError("flips need the mirrored images' moments")
        sides = [(mean, std)] if mirror is None else [(mean, std), mirror]
        self.moments = torch.stack([torch.stack(side, dim=1) for side in sides], dim=1).to(torch.float16)
        self.labels = np.asarray(labels, dtype=np.int64)
        self.classes, self.name, self.flips = list(classes), name, flips
        self.latent_shape = tuple(mean.shape[1:])
        self.scaling = scaling(config)

    def __len__(self) -> int:
        return len(self.labels)

    def fetch(self, indices: np.ndarray, mirrored: np.ndarray, noise: torch.Tensor) -> Batch:
        chosen = self.moments[torch.from_numpy(indices), torch.from_numpy(mirrored.astype(np.int64))]
        scale_posterior(chosen, noise, self.scaling)
        return {}

    def finish(self, batch: Batch) -> Batch:
        return batch


class PixelData:
    """Images encoded while training: read, cropped and mirrored in the workers, encoded on the VAE's device.

    Args:
        images: where they come from.
        vae: encodes them.
        flips: mirror at random.
        batch_size: images given to the VAE at once.
        keep_images: leave the images in the batch as ``images`` (b, 3, H, W) uint8 beside their latents, for losses
            that look at them (REPA).
    """

    def __init__(
        self,
        images: ImageData,
        vae: AutoencoderKL,
        flips: bool = False,
        batch_size: int = 64,
        keep_images: bool = False,
    ) -> None:
        self.images, self.flips, self.batch_size, self.keep_images = images, flips, batch_size, keep_images
        self.name, self.classes, self.labels = images.name, images.classes, images.labels
        self.latent_shape = latent_shape(vae, images.image_size)
        self.vae: AutoencoderKL | None = vae

    def __len__(self) -> int:
        return len(self.labels)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"vae": None}  # the workers need no network

    def fetch(self, indices: np.ndarray, mirrored: np.ndarray, noise: torch.Tensor) -> Batch:
        images = torch.stack([self.images[index][0] for index in indices])
        mirror = torch.from_numpy(mirrored)
        images[mirror] = images[mirror].flip(-1)
        return {"images": images}

    def finish(self, batch: Batch) -> Batch:
        images, noise = batch["images"], batch["latents"].to(self.vae.device)
        mean, std = encode_images(self.vae, images, self.batch_size)
        if not self.keep_images:
            del batch["images"]
        return batch | {"latents": sample_posterior(mean, std, noise, self.vae.config)}


def scale_posterior(moments: torch.Tensor, noise: torch.Tensor, shift_scale: tuple[float, float]) -> None:
    """Make ``noise`` (b, c, h, w) float32 in place into scaled latents, by (b, 2, c, h, w) float16 mean and std."""
    shift, scale = shift_scale
    noise.mul_(moments[:, 1]).add_(moments[:, 0]).sub_(shift).mul_(scale)


def encode_in_memory(
    images: ImageData, vae: AutoencoderKL, flips: bool = False, batch_size: int = 64, progress: bool = True
) -> LatentData:
    """Encode every image (and its mirror image, for ``flips``) once.

    Raises:
        UserError: an image can't be read, or the image size doesn't suit the VAE.
    """
    latent_shape(vae, images.image_size)
    sides: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[], []]
    starts = range(0, len(images), batch_size)
    for start in tqdm(starts, desc=f"encoding {images.name}", disable=not progress, leave=False):
        pixels = torch.stack([images[index][0] for index in range(start, min(start + batch_size, len(images)))])
        for side, shown in zip(sides, [pixels, pixels.flip(-1)] if flips else [pixels], strict=False):
            side.append(tuple(part.cpu() for part in encode_images(vae, shown, batch_size)))
    moments = [tuple(torch.cat(part) for part in zip(*side, strict=True)) for side in sides if side]
    return LatentData(
        *moments[0], images.labels, images.classes, vae.config, moments[1] if flips else None, flips, images.name
    )
