"""The held-out images of a run: which they are, their latents, and the rest, which is trained on."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import AutoencoderKL

from sit.data.dataset import ImageData
from sit.data.factory import open_images
from sit.data.heldout import SEED, in_both, keyed_order
from sit.latents.cache import CachedLatents, is_cache
from sit.latents.datasets import PixelData, TrainingData
from sit.latents.subset import Subset
from sit.latents.vae import vae_fingerprint
from sit.training.config import TrainConfig
from sit.utils.errors import UserError
from sit.utils.random import generator, randn

AUTO_SHARE = 0.05
"""Part of the data that ``heldout=auto`` holds out where there is no test set."""

CHUNK = 64
"""images encoded at once"""


@dataclass(frozen=True)
class HeldOutImages:
    """Images that are not trained on.

    Attributes:
        data: where they lie, among others.
        numbers: (n,) int64, their indices into ``data``; they name the images' noise.
        labels: (n,) int64, in the classes of training.
        fingerprint: of the images, the VAE and the key of all noise: equal where losses may be compared image by image.
    """

    data: TrainingData
    numbers: np.ndarray
    labels: np.ndarray
    fingerprint: str

    def latents(self, rows: np.ndarray) -> torch.Tensor:
        """The scaled latents of the images ``rows`` (m,) of these, not flipped: (m, c, h, w) float32 on the CPU.

        Each is one posterior sample, as in training: a network that has learned the samples' distribution is out of
        its data at the posterior's mean. The sample is keyed by the image's number, so it is the same in all runs.
        """
        parts = [torch.empty(0, *self.data.latent_shape)]
        for chosen in np.split(self.numbers[rows], range(CHUNK, len(rows), CHUNK)):
            sources = [generator(SEED, "heldout", "posterior", number) for number in chosen.tolist()]
            noise = randn(self.data.latent_shape, sources)
            batch = self.data.finish(self.data.fetch(chosen, np.zeros(len(chosen), dtype=bool), noise))
            parts.append(batch["latents"].cpu())
        return torch.cat(parts)


def hold_out(
    config: TrainConfig, data: TrainingData, images: ImageData | None, vae: AutoencoderKL
) -> tuple[TrainingData, HeldOutImages | None]:
    """The data to train on, and the images that ``config`` holds out of it.

    Args:
        config: its ``heldout`` says which images, and ``heldout_images`` how many at most.
        data: all that ``config.data`` has.
        images: what ``data`` was encoded from; None for a cache.
        vae: the VAE of the latents.

    Raises:
        UserError: no such images, images of other classes, some that are trained on, or nothing left to train on.
    """
    if config.heldout == "none":
        return data, None
    share, spec = config.heldout_share, config.heldout
    if spec == "auto":
        spec = None if images is None else images.source.test_set
        share = AUTO_SHARE if spec is None else None
    if share is None:
        try:
            return data, _of_other_data(config, spec, data, images, vae)
        except UserError as error:
            raise UserError(f"`heldout={config.heldout}`: {error}") from error
    count = max(1, round(share * len(data.labels)))
    if count >= len(data.labels):
        raise UserError(f"`heldout={config.heldout}` leaves none of the {len(data.labels)} images to train on")
    held = keyed_order(data.labels)[:count]
    kept = np.setdiff1d(np.arange(len(data.labels)), held)
    numbers = held[: config.heldout_images]
    return Subset(data, kept), HeldOutImages(
        data, numbers, data.labels[numbers], _fingerprint(_source(data, images)[1], vae, data.latent_shape, numbers)
    )


def _of_other_data(
    config: TrainConfig, spec: str, data: TrainingData, images: ImageData | None, vae: AutoencoderKL
) -> HeldOutImages:
    """The first images of the keyed order of another data set."""
    other: TrainingData
    other_images = None
    if is_cache(spec):
        other = cache = CachedLatents(spec)
        cache.check(vae, config.vae, config.image_size)
    else:
        other_images = open_images(spec, config.image_size)
        other = PixelData(other_images, vae)
    numbers = keyed_order(other.labels)[: config.heldout_images]
    if _source(other, other_images) == _source(data, images):
        raise UserError(f"these are the images of `data={config.data}`; take a share of them, such as 0.05")
    if images is not None and other_images is not None and (met := in_both(images, other_images, numbers)):
        raise UserError(
            f"{other_images.source.describe(met[0])} and {len(met) - 1} others are in `data={config.data}` too; "
            "take other images, or a share such as 0.05"
        )
    unknown = set(other.classes) - set(data.classes)
    if unknown:
        raise UserError(f"`data={config.data}` has no class {min(unknown)}; take images of its classes")
    label_of = np.array([data.classes.index(name) for name in other.classes])
    fingerprint = _fingerprint(_source(other, other_images)[1], vae, other.latent_shape, numbers)
    return HeldOutImages(other, numbers, label_of[other.labels[numbers]], fingerprint)


def _source(data: TrainingData, images: ImageData | None) -> tuple[str, str]:
    """Specification of the images behind ``data``, and the fingerprint of the list of them and their labels."""
    if isinstance(data, CachedLatents):
        return data.manifest.data, data.manifest.files
    assert images is not None  # data that is no cache is made from images
    return images.name, images.fingerprint()


def _fingerprint(files: str, vae: AutoencoderKL, latent_shape: tuple[int, int, int], numbers: np.ndarray) -> str:
    parts = ["keyed posterior, x0 by image and eighth", SEED, files, vae_fingerprint(vae), list(latent_shape)]
    return hashlib.blake2b(json.dumps([*parts, numbers.tolist()]).encode(), digest_size=16).hexdigest()
