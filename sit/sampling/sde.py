"""Sampling along the reverse SDE: its diffusion coefficients, its steps, and the last step, which adds no noise.

dx = (v + w·score) dt + √(2w) dW has the marginals of the probability flow for any w(t) ≥ 0 (SiT, arXiv 2401.08740).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch

from sit.sampling.config import OnStep, SamplerConfig
from sit.sampling.guidance import GuidedModel, times
from sit.transport.interpolants import Interpolant, expand_t_like_x
from sit.transport.transport import Transport
from sit.utils.errors import UserError

SINGULAR_EPS = 1e-3
"""How far from a singular end the SDE stays where the published interval would touch it."""

DIFFUSION_FORMS: dict[str, Callable[[Interpolant, torch.Tensor, float], torch.Tensor]] = {
    "constant": lambda path, t, norm: torch.full_like(t, norm),
    "sbdm": lambda path, t, norm: norm * path.noise_rate(t),
    "sigma": lambda path, t, norm: norm * path.sigma(t),
    "linear": lambda path, t, norm: norm * (1 - t),
    "decreasing": lambda path, t, norm: 0.25 * (norm * torch.cos(math.pi * t) + 1) ** 2,
    "increasing-decreasing": lambda path, t, norm: norm * torch.sin(math.pi * t) ** 2,
}
"""The diffusion coefficients w(t) by name, from the interpolant, times t of any shape and the norm; w has t's shape."""


@dataclass(frozen=True)
class ReverseSDE:
    """The SDE's terms at a state x (B, C, h, w) and one time t for all of it."""

    model: GuidedModel | Callable
    transport: Transport
    config: SamplerConfig

    def diffusion(self, x: torch.Tensor, t: float) -> torch.Tensor:
        """w(t), shaped to multiply x."""
        form = DIFFUSION_FORMS[self.config.diffusion_form]
        return form(self.transport.interpolant, expand_t_like_x(times(t, x), x), self.config.diffusion_norm)

    def drift(self, x: torch.Tensor, t: float) -> torch.Tensor:
        """v + w·score."""
        when, out = times(t, x), self.model(x, t)
        weight = self.diffusion(x, t)
        return self.transport.to_velocity(out, x, when) + weight * self.transport.to_score(out, x, when)

    def kick(self, x: torch.Tensor, t: float, dt: float, noise: torch.Tensor) -> torch.Tensor:
        """√(2w·dt)·noise."""
        return torch.sqrt(2 * self.diffusion(x, t)) * (noise * math.sqrt(dt))


# --- steps over dt from time t, with standard normal noise ---------------------------------------------------------


def euler_maruyama_step(sde: ReverseSDE, x: torch.Tensor, t: float, dt: float, noise: torch.Tensor) -> torch.Tensor:
    """Euler's step of the drift, and the noise."""
    return x + sde.drift(x, t) * dt + sde.kick(x, t, dt, noise)


def heun_step(sde: ReverseSDE, x: torch.Tensor, t: float, dt: float, noise: torch.Tensor) -> torch.Tensor:
    """The published one: the noise first, then Heun's step of the drift."""
    x = x + sde.kick(x, t, dt, noise)
    first = sde.drift(x, t)
    return x + 0.5 * dt * (first + sde.drift(x + dt * first, t + dt))


# --- last steps over dt, from time t to the data -------------------------------------------------------------------


def mean_last_step(sde: ReverseSDE, x: torch.Tensor, t: float, dt: float) -> torch.Tensor:
    """Euler's step of the SDE's drift: the mean of an Euler–Maruyama step."""
    return x + sde.drift(x, t) * dt


def euler_last_step(sde: ReverseSDE, x: torch.Tensor, t: float, dt: float) -> torch.Tensor:
    """Euler's step of the ODE."""
    return x + sde.transport.to_velocity(sde.model(x, t), x, times(t, x)) * dt


def tweedie_last_step(sde: ReverseSDE, x: torch.Tensor, t: float, dt: float) -> torch.Tensor:
    """Tweedie's formula for the mean of the data given x: (x + σ²·score)/α."""
    when = times(t, x)
    score, path = sde.transport.to_score(sde.model(x, t), x, when), sde.transport.interpolant
    alpha, sigma = path.alpha(expand_t_like_x(when, x)), path.sigma(expand_t_like_x(when, x))
    return x / alpha + sigma**2 / alpha * score


SDE_STEPS = {"euler": euler_maruyama_step, "heun": heun_step}
LAST_STEPS = {"mean": mean_last_step, "tweedie": tweedie_last_step, "euler": euler_last_step, "none": None}


def sde_times(transport: Transport, config: SamplerConfig) -> list[float]:
    """The times between which the SDE steps go; the last step, if any, starts at the last of them.

    Raises:
        UserError: the last step leaves the others no time.
    """
    has_last = config.last_step != "none"
    start, end = transport.sde_interval(config.diffusion_form, config.last_step_size if has_last else 0.0)
    if start == 0 and config.diffusion_form == "sbdm" and not transport.is_vp:
        start = SINGULAR_EPS
    if end == 1 and config.resolved_method == "heun":
        end = 1 - SINGULAR_EPS
    if end <= start:
        raise UserError(f"`last_step_size={config.last_step_size}` leaves the other steps no time: make it less")
    count = config.steps - 1 if has_last else config.steps
    return torch.linspace(start, end, count + 1).tolist()


@torch.no_grad()
def sample_sde(
    model: GuidedModel | Callable,
    transport: Transport,
    x: torch.Tensor,
    config: SamplerConfig,
    *,
    step_noise: Callable[[int], torch.Tensor] | None = None,
    on_step: OnStep | None = None,
    reverse: bool = False,
) -> torch.Tensor:
    """Integrate the reverse SDE from noise to data by the method of ``config``, and take its last step.

    Args:
        model: the network, called as ``model(x, t)`` with one time for all images.
        x: (B, C, h, w) noise.
        step_noise: ``step_noise(k)`` gives the standard normal noise (B, C, h, w) of step k, and is called for k = 0,
            1, … in order; None draws from torch's global generator.
        on_step: called after each step.

    Returns:
        (B, C, h, w).

    Raises:
        UserError: ``reverse``, or the last step leaves the others no time.
    """
    if reverse:
        raise UserError("only the ODE runs from an image back to its noise: use `sampler=ode`")
    step_noise = step_noise or (lambda number: torch.randn_like(x))
    sde, step = ReverseSDE(model, transport, config), SDE_STEPS[config.resolved_method]
    grid = sde_times(transport, config)
    dt = (torch.tensor(grid[1]) - torch.tensor(grid[0])).item()  # float32, as published
    for number, (t, end) in enumerate(pairwise(grid)):
        x = step(sde, x, t, dt, step_noise(number))
        if on_step is not None:
            on_step(number + 1, config.steps, x, end)
    if (last_step := LAST_STEPS[config.last_step]) is not None:
        x = last_step(sde, x, grid[-1], config.last_step_size)
        if on_step is not None:
            on_step(config.steps, config.steps, x, 1.0)
    return x
