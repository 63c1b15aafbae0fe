"""Latents of noise, for whatever takes training data."""

from __future__ import annotations

import numpy as np
import torch

from sit.latents.datasets import LatentData

CONFIG = {"scaling_factor": 0.5, "shift_factor": 0.1}


def latent_data(count: int = 50, flip: bool = True) -> LatentData:
    """Posteriors of ``count`` images of seven classes, and of their mirror images."""
    source = torch.Generator().manual_seed(0)
    sides = [torch.randn(2, count, 2, 4, 4, generator=source).abs() for _ in range(2)]
    labels = np.arange(count) % 7
    return LatentData(*sides[0], labels, list("abcdefg"), CONFIG, flipped=tuple(sides[1]), flip=flip)
