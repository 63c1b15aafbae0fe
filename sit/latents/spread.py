"""The spread of scaled latents, which should be about one, as the noise has it; a note where it is far from that."""

from __future__ import annotations

import functools
import logging
import os

import numpy as np
import torch

from sit.latents.vae import PerChannel, broadcast

logger = logging.getLogger(__name__)

NEAR_ONE = (0.5, 2.0)
"""standard deviations of which nothing is said"""

FEW = 512
"""entries, evenly spaced, of which the spread of a whole data set is measured"""


def spread(moments: torch.Tensor, shift_scale: tuple[PerChannel, PerChannel]) -> float:
    """Standard deviation of the scaled posterior samples, over images, channels and places together.

    Args:
        moments: (b, 2, c, h, w), mean and standard deviation, unscaled.
        shift_scale: of :func:`sit.latents.vae.scaling`.
    """
    shift, scale = (broadcast(value, moments) for value in shift_scale)
    mean, std = ((moments[:, 0].double() - shift) * scale, moments[:, 1].double() * scale)
    variance = (mean.square() + std.square()).mean() - mean.mean().square()
    return max(float(variance), 0.0) ** 0.5


def evenly_spaced(count: int) -> np.ndarray:
    """At most :data:`FEW` indices of ``count`` entries, (n,) int64."""
    return np.unique(np.linspace(0, count - 1, min(count, FEW)).round().astype(np.int64))


@functools.cache
def note_spread(name: str, measured: float) -> None:
    """Say, once a program, in the first process of a launch, if latents have a spread far from the noise's."""
    if not NEAR_ONE[0] <= measured <= NEAR_ONE[1] and os.environ.get("RANK", "0") == "0":
        logger.warning(
            "note: the latents of %s have standard deviation %.3g, far from the noise's, which is one; "
            "`python -m sit.latents measure` tells the scaling that the VAE's config should have",
            name,
            measured,
        )
