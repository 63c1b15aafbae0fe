"""Diffusion coefficients of the reverse SDE, all of which lead to the same marginals (SiT, arXiv 2401.08740)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from sit.transport.interpolants import Interpolant

DIFFUSION_FORMS: dict[str, Callable[[Interpolant, torch.Tensor, float], torch.Tensor]] = {
    "constant": lambda path, t, norm: torch.full_like(t, norm),
    "sbdm": lambda path, t, norm: norm * path.noise_rate(t),
    "sigma": lambda path, t, norm: norm * path.sigma(t),
    "linear": lambda path, t, norm: norm * (1 - t),
    "decreasing": lambda path, t, norm: 0.25 * (norm * torch.cos(math.pi * t) + 1) ** 2,
    "increasing-decreasing": lambda path, t, norm: norm * torch.sin(math.pi * t) ** 2,
}
"""w(t) ≥ 0 of SiT by name: the SDE adds w·score to the drift and √(2w)·dW.

Each is called with the interpolant, times t of any shape and the norm, and answers with w of t's shape.
"""
