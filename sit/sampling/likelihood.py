"""Likelihood of images by the instantaneous change of variables along the ODE (Song et al. 2021, SiT section 2)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from sit.sampling.config import SamplerConfig
from sit.sampling.guidance import GuidedModel, savable, times
from sit.sampling.ode import solve
from sit.transport.transport import Transport
from sit.utils.errors import UserError
from sit.utils.precision import at_least_float32


def log_likelihood(
    model: GuidedModel | Callable,
    transport: Transport,
    x: torch.Tensor,
    config: SamplerConfig,
    probes: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-density of data under the model, with Hutchinson's estimate of the divergence.

    Integrated in float32, or float64 if given it, as :func:`sit.sampling.sampler.sample` does.

    Args:
        model: the network, called as ``model(x, t)``: a :class:`sit.sampling.guidance.GuidedModel`.
        x: data (B, C, h, w).
        config: an ODE solver and its tolerances or steps.
        probes: (K, B, C, h, w) random vectors of unit covariance, e.g. random signs; the estimate is their mean.

    Returns:
        (log-density (B,) in nats, the noise (B, C, h, w) that the data flows back to).

    Raises:
        UserError: the config is one of the SDE.
    """
    if config.sampler != "ode":
        raise UserError("the likelihood is computed along the ODE: use `sampler=ode`")

    def velocity_and_divergence(t: float | torch.Tensor, state: tuple[torch.Tensor, torch.Tensor]):
        with torch.enable_grad():
            at = state[0].detach().requires_grad_()
            velocity = transport.to_velocity(model(at, t), at, times(t, at))
            divergence = torch.zeros_like(state[1])
            for probe in probes:
                (product,) = torch.autograd.grad((velocity * probe).sum(), at, retain_graph=True)
                divergence = divergence + (product * probe).flatten(1).sum(1) / len(probes)
        return velocity.detach(), divergence.detach()

    with torch.inference_mode(False), torch.no_grad():  # the divergence is a derivative, whatever the caller's mode
        x = at_least_float32(x)
        probes = savable(probes.to(x.dtype))
        state = (x, torch.zeros(len(x), dtype=x.dtype, device=x.device))
        noise, change = solve(velocity_and_divergence, state, transport, config, reverse=True)
        normal = -0.5 * (noise.flatten(1).square() + math.log(2 * math.pi)).sum(1)
        # d log p / dt = −div v along the path: from the data back to noise, `change` has gathered the integral of div v
        return normal + change, noise


def bits_per_dimension(log_density: torch.Tensor, dimensions: int) -> torch.Tensor:
    """Nats (B,) to bits per dimension of the space that the density is over (latents: not comparable with pixels)."""
    return -log_density / (dimensions * math.log(2))


def random_signs(count: int, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Hutchinson probes (count, *x.shape) of independent ±1, drawn on the CPU."""
    signs = torch.randint(0, 2, (count, *x.shape), generator=generator)
    return (2 * signs - 1).to(x.device, x.dtype)
