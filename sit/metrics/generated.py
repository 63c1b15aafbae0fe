"""Images that a checkpoint samples when they are asked for, and what tells them from others."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from sit.checkpoint.hints import FileHints
from sit.checkpoint.load import Loaded
from sit.latents.vae import vae_fingerprint
from sit.metrics.identity import About, hash_numbers
from sit.metrics.image_sets import Images
from sit.sampling.config import LabelOrder, SamplerConfig
from sit.sampling.images import balanced_labels, latent_shape_for, sample_images, uniform_labels
from sit.utils.fingerprint import weights_fingerprint


class GeneratedImages(Images):
    """Images that a checkpoint samples when they are asked for: number i under the seed.

    Args:
        loaded: the checkpoint.
        count: how many there are.
        seed: the seed.
        labels: the classes.
        config: the sampler.
        image_size: (height, width); None as the network was trained.
        hints: how a published file was read.

    Raises:
        UserError: the network or its VAE can't make images of that size.
    """

    def __init__(
        self,
        loaded: Loaded,
        count: int,
        *,
        seed: int = 0,
        labels: LabelOrder = "balanced",
        config: SamplerConfig,
        image_size: tuple[int, int] | None = None,
        hints: FileHints | None = None,
    ) -> None:
        config = config.resolve(loaded.transport.averages).for_latents(loaded.model.config.in_channels)
        self.shape = latent_shape_for(loaded, image_size)  # a size that doesn't fit is told before anything is made
        self.classes, self.class_names = loaded.model.config.num_classes, loaded.info.label_names
        classes = range(self.classes)
        numbers = range(count)
        drawn = balanced_labels(numbers, classes) if labels == "balanced" else uniform_labels(numbers, classes, seed)
        self.loaded, self.count, self.seed, self.config = loaded, count, seed, config
        self.labels, self.image_size, self.label_order = drawn.numpy(), image_size, labels
        size = f", {image_size[0]} x {image_size[1]} pixels" if image_size else ""
        average = f", {loaded.average}" if loaded.average is not None else ""
        average += f", guided by {loaded.guide.path}" if loaded.guide else ""
        self.name = f"{loaded.path}{average}, seed {seed}, {labels} labels{size}, {config}"
        weights = (hints or FileHints()).weights if loaded.path.is_file() else loaded.weights_name
        # whole paths, as whoever reads a work folder may be in another one
        checkpoint, told = os.path.abspath(loaded.path), (weights or "").removeprefix(f"{loaded.path}, ")
        self.source = {"checkpoint": checkpoint, "step": loaded.info.step, "weights": told or None}
        if loaded.guide:
            self.source["guide"] = os.path.abspath(loaded.guide.path)
        if labels == "balanced" and 1 < count < self.classes:
            self.note = f"only the first {count} of {self.classes} classes: there are no more samples than that"

    @functools.cached_property
    def about(self) -> About:
        """What decides their pixels: the weights of network and VAE, sampler, guidance, seed, labels and precision.

        It reads every weight, and is asked for before the network's dtype or products' precision change.
        """
        network, transport, guide = self.loaded.model, self.loaded.transport, self.loaded.guide
        told = (
            {} if guide is None else {"guide": weights_fingerprint(guide.model), "guide's": _told(guide.model.config)}
        )
        return told | {
            "network": weights_fingerprint(network),
            "config": _told(network.config),
            "transport": _told(transport.config),
            "VAE": vae_fingerprint(self.loaded.vae),
            "sampler": asdict(self.config) | {"method": self.config.resolved_method},
            "seed": self.seed,
            "labels": self.label_order,
            "label list": hash_numbers(self.labels),
            "latents": self.shape,
            "precision": f"{network.dtype}, products in {torch.get_float32_matmul_precision()} precision",
        }

    @property
    def size(self) -> tuple[int, int] | None:
        return self.image_size or self.loaded.info.image_size

    def batch(self, numbers: np.ndarray) -> torch.Tensor:
        indices = torch.from_numpy(numbers)
        (made,) = sample_images(
            self.loaded,
            indices,
            torch.from_numpy(self.labels[numbers]),
            seed=self.seed,
            config=self.config,
            image_size=self.image_size,
            batch_size=len(numbers),
        )
        return made.images.permute(0, 3, 1, 2)


def _told(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without diffusers' own entries, nor what networks of before were without and are now."""
    later = {"average_velocity": False, "positional_grid": None}
    return {
        name: value
        for name, value in config.items()
        if not name.startswith("_") and (name not in later or value != later[name])
    }
