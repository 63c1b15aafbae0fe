"""Sampling by average velocities: one step, or a few, from noise to data."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch

from sit.sampling.config import OnStep, SamplerConfig
from sit.transport.transport import Transport
from sit.utils.errors import UserError


@torch.no_grad()
def sample_meanflow(
    model: Callable[..., torch.Tensor],
    transport: Transport,
    x: torch.Tensor,
    config: SamplerConfig,
    *,
    step_noise: object = None,
    on_step: OnStep | None = None,
    reverse: bool = False,
) -> torch.Tensor:
    """x_r = x_t + (r − t)·u(x_t, t, r) in equal steps (MeanFlow, arXiv 2505.13447, section 4: sampling).

    Exact with any number of steps if u is.

    Args:
        model: the network, called as ``model(x, t, end)`` with one pair of times for all images.
        transport: what it was trained on.
        x: (B, C, h, w) noise.
        config: its ``steps``.
        step_noise: not asked: there is none.
        on_step: called after each step.
        reverse: refused: the average velocities that are trained all lead to data.

    Returns:
        (B, C, h, w).

    Raises:
        UserError: ``reverse``.
    """
    if reverse:
        raise UserError("`sampler=meanflow` leads from noise to data alone: give `sampler=ode` to go back")
    grid = torch.linspace(*transport.ode_interval(), config.steps + 1, dtype=torch.float64).tolist()
    for number, (t, end) in enumerate(pairwise(grid), start=1):
        x = x + (end - t) * model(x, t, end)
        if on_step is not None:
            on_step(number, config.steps, x, end)
    return x
