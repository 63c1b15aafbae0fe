"""What training reads from: latents in memory, latents encoded on the fly, and the protocol that the cache follows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch
from diffusers import AutoencoderKL
from tqdm import tqdm

from sit.data.dataset import ImageData, hash_names
from sit.latents.spread import note_spread, spread
from sit.latents.vae import PerChannel, broadcast, encode_images, latent_shape, sample_posterior, scaling
from sit.utils.errors import UserError

Batch = dict[str, torch.Tensor]


class TrainingData(Protocol):
    """What :func:`sit.training.loader.training_batches` reads from.

    Attributes:
        name: what the argument ``data`` said.
        classes: label names, in the order of the labels.
        labels: (count,) int64.
        latent_shape: (c, h, w).
        flip: whether images are flipped left to right, each with probability 0.5 every time it is read.
    """

    name: str
    classes: list[str]
    labels: np.ndarray
    latent_shape: tuple[int, int, int]
    flip: bool

    def contents(self) -> str:
        """Hash of the images that the latents are of: their list, sizes, labels, and the bytes of some."""
        ...

    def fetch(
        self, indices: np.ndarray, flipped: np.ndarray, noise: torch.Tensor, out: torch.Tensor | None = None
    ) -> Batch:
        """One posterior sample of each image, or what :meth:`finish` makes them of. Called in the loader's workers.

        Args:
            indices: (b,) int64.
            flipped: (b,) bool, which of them are flipped.
            noise: (b, c, h, w) float32, the posterior's, standard normal.
            out: (b, c, h, w) float32 to write the latents into, to save memory; it may be ``noise`` itself.

        Returns:
            ``latents`` (b, c, h, w) float32, scaled; or ``posterior_noise``, which is ``noise``, and what else
            :meth:`finish` needs.
        """
        ...

    def finish(self, batch: Batch) -> Batch:
        """What :meth:`fetch` returned, with the loader's draws, as a batch with ``latents``. Called in the main
        process, which has the device."""
        ...


class LatentData:
    """Posterior moments in memory, encoded once at the start: for data sets of a few thousand images.

    Args:
        mean, std: (count, c, h, w), unscaled. They are kept in float16 as the cache's, so that both give bitwise the
            same batches.
        labels: (count,) int64.
        classes: label names.
        config: the VAE's, for its scaling and shift.
        flipped: (mean, std) of the flipped images, or None.
        flip: flip at random.
        name: as in :class:`TrainingData`.
        images: what the latents are of, for :meth:`contents`; None knows them by name and labels alone.

    Raises:
        ValueError: ``flip`` without ``flipped``.
        UserError: a moment is not finite in float16.
    """

    def __init__(
        self,
        mean: torch.Tensor,
        std: torch.Tensor,
        labels: np.ndarray,
        classes: list[str],
        config: Mapping[str, Any],
        *,
        flipped: tuple[torch.Tensor, torch.Tensor] | None = None,
        flip: bool = False,
        name: str = "latents",
        images: ImageData | None = None,
    ) -> None:
        if flip and flipped is None:
            raise ValueError("`flip` needs the moments of the flipped images")
        sides = [(mean, std)] if flipped is None else [(mean, std), flipped]
        self.moments = torch.stack([torch.stack(side, dim=1) for side in sides], dim=1).to(torch.float16)
        finite = self.moments.isfinite().flatten(1).all(1)
        if not finite.all():
            first = int(finite.long().argmin())
            raise UserError(f"`data={name}`: of image {first} the VAE makes values that are not finite in float16")
        self.labels = np.asarray(labels, dtype=np.int64)
        self.classes, self.name, self.flip = list(classes), name, flip
        self.latent_shape = tuple(mean.shape[1:])
        self.scaling = scaling(config)
        self._contents = images.contents if images else lambda: hash_names([name.encode()], self.labels)

    def __len__(self) -> int:
        return len(self.labels)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_contents": None}  # the workers ask for moments alone

    def contents(self) -> str:
        return self._contents()

    def fetch(
        self, indices: np.ndarray, flipped: np.ndarray, noise: torch.Tensor, out: torch.Tensor | None = None
    ) -> Batch:
        chosen = self.moments[torch.from_numpy(indices), torch.from_numpy(flipped.astype(np.int64))]
        return {"latents": scaled_sample(chosen, noise, self.scaling, out)}

    def finish(self, batch: Batch) -> Batch:
        return batch


class PixelData:
    """Images encoded while training: read, cropped and flipped in the workers, encoded on the VAE's device.

    Args:
        images: where they come from.
        vae: encodes them.
        flip: flip at random.
        batch_size: images given to the VAE at once.
        keep_images: leave the images in the batch as ``images`` (b, 3, H, W) uint8 beside their latents, for losses
            that need them (REPA).

    Raises:
        UserError: the image size doesn't suit the VAE.
    """

    def __init__(
        self,
        images: ImageData,
        vae: AutoencoderKL,
        flip: bool = False,
        batch_size: int = 64,
        keep_images: bool = False,
    ) -> None:
        self.images, self.flip, self.batch_size, self.keep_images = images, flip, batch_size, keep_images
        self.name, self.classes, self.labels = images.name, images.classes, images.labels
        self.latent_shape = latent_shape(vae, images.image_size)
        self.vae: AutoencoderKL | None = vae
        self._measured = False

    def __len__(self) -> int:
        return len(self.labels)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"vae": None}  # the workers need no network

    def contents(self) -> str:
        return self.images.contents()

    def fetch(
        self, indices: np.ndarray, flipped: np.ndarray, noise: torch.Tensor, out: torch.Tensor | None = None
    ) -> Batch:
        return {"images": self.images.batch(indices, flipped), "posterior_noise": noise}

    def finish(self, batch: Batch) -> Batch:
        images, noise = batch["images"], batch.pop("posterior_noise").to(self.vae.device)
        mean, std = encode_images(self.vae, images, self.batch_size)
        if not self._measured:
            self._measured = True
            note_spread(self.name, spread(torch.stack([mean, std], dim=1), scaling(self.vae.config)))
        if not self.keep_images:
            del batch["images"]
        return batch | {"latents": sample_posterior(mean, std, noise, self.vae.config)}


def scaled_sample(
    moments: torch.Tensor,
    noise: torch.Tensor,
    shift_scale: tuple[PerChannel, PerChannel],
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """(mean + std · noise − shift) · scale, as :func:`sit.latents.vae.sample_posterior` with one memory for all steps.

    Args:
        moments: (b, 2, c, h, w) float16, mean and standard deviation, unscaled.
        noise: (b, c, h, w) float32.
        shift_scale: of :func:`sit.latents.vae.scaling`.
        out: (b, c, h, w) float32 to write the latents into, which may be ``noise``; None makes a new tensor.
    """
    shift, scale = (broadcast(value, noise) for value in shift_scale)
    return torch.mul(noise, moments[:, 1], out=out).add_(moments[:, 0]).sub_(shift).mul_(scale)


def encode_in_memory(
    images: ImageData, vae: AutoencoderKL, flip: bool = False, batch_size: int = 64, progress: bool = True
) -> LatentData:
    """Encode every image once, and flipped as well for ``flip``.

    Raises:
        UserError: an image can't be read, or the image size doesn't suit the VAE.
    """
    latent_shape(vae, images.image_size)
    sides: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[], []]
    starts = range(0, len(images), batch_size)
    for start in tqdm(starts, desc=f"encoding {images.name}", disable=not progress, leave=False):
        pixels = torch.stack([images[index][0] for index in range(start, min(start + batch_size, len(images)))])
        for side, version in zip(sides, [pixels, pixels.flip(-1)] if flip else [pixels], strict=False):
            side.append(tuple(part.cpu() for part in encode_images(vae, version, batch_size)))
    moments = [tuple(torch.cat(part) for part in zip(*side, strict=True)) for side in sides if side]
    return LatentData(
        *moments[0],
        images.labels,
        images.classes,
        vae.config,
        flipped=moments[1] if flip else None,
        flip=flip,
        name=images.name,
        images=images,
    )
