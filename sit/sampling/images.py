"""From a checkpoint to images: what sample.py and the evaluation share."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from sit.checkpoint.load import Loaded
from sit.latents.vae import decode, downsampling
from sit.sampling.config import SamplerConfig
from sit.sampling.sampler import generate
from sit.utils.errors import UserError
from sit.utils.random import generator


def balanced_labels(indices: Sequence[int], classes: Sequence[int]) -> torch.Tensor:
    """Sample i gets class i modulo the number of classes: (len(indices),) int64."""
    return torch.tensor([classes[i % len(classes)] for i in indices], dtype=torch.int64)


def uniform_labels(indices: Sequence[int], classes: Sequence[int], seed: int) -> torch.Tensor:
    """Sample i gets a class drawn uniformly, keyed by (seed, i), as the published systems draw them."""
    draws = [int(torch.randint(len(classes), (), generator=generator(seed, "label", i))) for i in indices]
    return torch.tensor([classes[draw] for draw in draws], dtype=torch.int64)


def check_labels(labels: Sequence[int], classes: int) -> list[int]:
    """The labels, if the network has them all.

    Raises:
        UserError: one is out of range.
    """
    for label in labels:
        if not 0 <= label < classes:
            raise UserError(f"--labels {label} is out of range: this network has the classes 0 to {classes - 1}")
    return list(labels)


def height_and_width(size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    """What ``--image-size`` means: one number is the side of a square."""
    return (size, size) if isinstance(size, int) else size


def latent_shape_for(loaded: Loaded, image_size: tuple[int, int] | None) -> tuple[int, int, int]:
    """Shape (c, h, w) of the latents for images of ``image_size`` (height, width); None means as it was trained.

    Raises:
        UserError: the VAE or the patches don't divide that size.
    """
    config = loaded.model.config
    if image_size is None:
        return config.in_channels, *config.input_size
    factor = downsampling(loaded.vae)
    side = factor * config.patch_size
    if any(length < side or length % side for length in image_size):
        height, width = image_size
        raise UserError(f"--image-size {height} {width}: both must be multiples of {side} for this network and VAE")
    return config.in_channels, image_size[0] // factor, image_size[1] // factor


@dataclass
class ImageBatch:
    """Some samples: ``indices`` (b,), ``labels`` (b,) int64 and ``images`` (b, H, W, 3) uint8, on the CPU."""

    indices: torch.Tensor
    labels: torch.Tensor
    images: torch.Tensor


def sample_images(
    loaded: Loaded,
    indices: torch.Tensor,
    labels: torch.Tensor,
    *,
    seed: int,
    config: SamplerConfig,
    image_size: tuple[int, int] | None = None,
    batch_size: int = 64,
    on_step=None,
) -> Iterator[ImageBatch]:
    """Sample the images numbered ``indices`` under ``seed``; an image depends on its number, label and seed alone.

    Args:
        loaded: the checkpoint.
        indices: (n,) numbers of the samples.
        labels: (n,) int64.
        config: the sampler and its guidance.
        image_size: (height, width); None as trained.
        batch_size: samples held at a time.
        on_step: passed on to :func:`sit.sampling.sampler.generate`.
    """
    place = {int(index): position for position, index in enumerate(indices.tolist())}
    for done, latents in generate(
        loaded.model,
        loaded.transport,
        indices,
        labels,
        seed=seed,
        config=config,
        latent_shape=latent_shape_for(loaded, image_size),
        device=loaded.device,
        batch_size=batch_size,
        on_step=on_step,
    ):
        chosen = labels[[place[int(index)] for index in done]]
        yield ImageBatch(done, chosen, decode(loaded.vae, latents).cpu())


class SampleWriter:
    """Collects samples on disk rather than in memory, and keeps them as single PNGs and an ADM-style ``samples.npz``.

    Args:
        folder: an empty folder.
        count: how many samples there will be.
        keep: False leaves nothing behind, for those who only want to look at ``images`` before :meth:`finish`.
    """

    def __init__(self, folder: Path, count: int, keep: bool = True) -> None:
        self.folder, self.count, self.keep = folder, count, keep
        self.labels = np.zeros(count, dtype=np.int64)
        self.images: np.memmap | None = None
        self.done = 0

    def add(self, batch: ImageBatch) -> None:
        """Take up the next samples."""
        images = batch.images.numpy()
        if self.images is None:
            shape = (self.count, *images.shape[1:])
            self.images = np.lib.format.open_memmap(self.folder / "arr_0.npy", mode="w+", dtype=np.uint8, shape=shape)
        for image, label in zip(images, batch.labels.tolist(), strict=True):
            if self.keep:
                Image.fromarray(image).save(self.folder / f"{self.done:06d}.png")
            self.images[self.done], self.labels[self.done] = image, label
            self.done += 1

    def finish(self) -> None:
        """Pack ``samples.npz``: ``arr_0`` (N, H, W, 3) uint8 images, ``arr_1`` (N,) int64 labels."""
        self.images.flush()
        if self.keep:
            np.save(self.folder / "arr_1.npy", self.labels)
            with zipfile.ZipFile(self.folder / "samples.npz", "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
                for name in ("arr_0.npy", "arr_1.npy"):
                    archive.write(self.folder / name, name)
        for name in ("arr_0.npy", "arr_1.npy"):
            (self.folder / name).unlink(missing_ok=True)
