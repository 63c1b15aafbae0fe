"""A part of a data set, to train on."""

from __future__ import annotations

import numpy as np
import torch

from sit.latents.datasets import Batch, TrainingData


class Subset:
    """Some of the images of a data set, itself a :class:`~sit.latents.datasets.TrainingData`.

    Args:
        data: the whole.
        kept: (count,) int64, the indices of the images into ``data``.
    """

    def __init__(self, data: TrainingData, kept: np.ndarray) -> None:
        self.data, self.kept = data, kept
        self.name, self.classes, self.flip = data.name, data.classes, data.flip
        self.latent_shape = data.latent_shape
        self.labels = data.labels[kept]

    def __len__(self) -> int:
        return len(self.kept)

    def contents(self) -> str:
        """Of the whole, whose part this is by the settings of the run."""
        return self.data.contents()

    def fetch(
        self, indices: np.ndarray, flipped: np.ndarray, noise: torch.Tensor, out: torch.Tensor | None = None
    ) -> Batch:
        return self.data.fetch(self.kept[indices], flipped, noise, out)

    def finish(self, batch: Batch) -> Batch:
        """As of the whole; ``indices``, if there, become those into the whole, by which messages name images."""
        batch = self.data.finish(batch)
        if "indices" in batch:
            batch = batch | {"indices": torch.from_numpy(self.kept[batch["indices"].numpy()])}
        return batch
