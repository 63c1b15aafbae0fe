"""Sampling along the reverse SDE: Euler-Maruyama or Heun steps, and the last step without noise."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from sit.sampling.config import OnStep, SamplerConfig
from sit.sampling.diffusion import DIFFUSION_FORMS
from sit.sampling.guidance import GuidedModel, times
from sit.transport.interpolants import expand_t_like_x
from sit.transport.transport import Transport
from sit.utils.errors import UserError

SINGULAR_EPS = 1e-3
"""How far from a singular end the SDE stays where the published interval would touch it."""


def sde_times(transport: Transport, config: SamplerConfig) -> list[float]:
    """The times between which the SDE steps go; the last step, if any, starts at the last of them."""
    has_last = config.last_step != "none"
    start, end = transport.sde_interval(config.diffusion_form, config.last_step_size if has_last else 0.0)
    if start == 0 and config.diffusion_form == "sbdm" and transport.config.interpolant != "vp":
        start = SINGULAR_EPS
    if end == 1 and config.resolved_method == "heun":
        end = 1 - SINGULAR_EPS
    if end <= start:
        raise UserError(f"--last-step-size {config.last_step_size} leaves the other steps no time: make it less")
    count = config.steps - 1 if has_last else config.steps
    return torch.linspace(start, end, count + 1).tolist()


def sample_sde(
    prediction: GuidedModel | Callable,
    transport: Transport,
    x: torch.Tensor,
    config: SamplerConfig,
    step_noise: Callable[[int], torch.Tensor],
    on_step: OnStep | None = None,
) -> torch.Tensor:
    """Integrate the reverse SDE from noise x (B, C, h, w) by Euler–Maruyama or Heun, and take the last step.

    ``step_noise(k)`` gives the standard normal noise (B, C, h, w) of step k, and is called for k = 0, 1, … in order.
    """
    path = transport.interpolant

    def diffusion(t: torch.Tensor) -> torch.Tensor:
        return DIFFUSION_FORMS[config.diffusion_form](path, t, config.diffusion_norm)

    def drift(x: torch.Tensor, t: float) -> torch.Tensor:
        when, out = times(t, x), prediction(x, t)
        weight = diffusion(expand_t_like_x(when, x))
        return transport.to_velocity(out, x, when) + weight * transport.to_score(out, x, when)

    grid = sde_times(transport, config)
    dt = (torch.tensor(grid[1]) - torch.tensor(grid[0])).item()  # float32, as published
    for step, t in enumerate(grid[:-1]):
        noise = step_noise(step) * math.sqrt(dt)
        kick = torch.sqrt(2 * diffusion(expand_t_like_x(times(t, x), x))) * noise
        if config.resolved_method == "euler":
            x = x + drift(x, t) * dt + kick
        else:
            x = x + kick
            first = drift(x, t)
            x = x + 0.5 * dt * (first + drift(x + dt * first, t + dt))
        if on_step is not None:
            on_step(step + 1, config.steps, x, grid[step + 1])

    if config.last_step != "none":
        t, size = grid[-1], config.last_step_size
        when = times(t, x)
        if config.last_step == "mean":
            x = x + drift(x, t) * size
        elif config.last_step == "euler":
            x = x + transport.to_velocity(prediction(x, t), x, when) * size
        else:
            score = transport.to_score(prediction(x, t), x, when)
            alpha, sigma = path.alpha(expand_t_like_x(when, x)), path.sigma(expand_t_like_x(when, x))
            x = x / alpha + sigma**2 / alpha * score
        if on_step is not None:
            on_step(config.steps, config.steps, x, 1.0)
    return x
