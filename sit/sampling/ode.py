"""Sampling along the probability-flow ODE, by torchdiffeq's solvers."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torchdiffeq import odeint

from sit.sampling.config import _SOLVERS, OnStep, SamplerConfig
from sit.sampling.guidance import GuidedModel, times
from sit.transport.transport import Transport


def solve(
    right: Callable,
    state: torch.Tensor | tuple[torch.Tensor, ...],
    transport: Transport,
    config: SamplerConfig,
    reverse: bool = False,
    on_step: OnStep | None = None,
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """The state (a tensor or a tuple of them) at the ODE's end, or with ``reverse`` at its start, by torchdiffeq.

    ``right(t, state)`` is the right-hand side, ``on_step`` is for states that are a tensor.
    """
    interval = transport.ode_interval()[:: -1 if reverse else 1]
    if config.adaptive:
        return _adaptive_steps(right, state, interval, config, transport.must_stop(reverse), on_step)
    if isinstance(state, torch.Tensor):
        return _fixed_steps(right, state, interval, config, on_step)
    shapes = [part.shape for part in state]

    def parts(whole: torch.Tensor) -> tuple[torch.Tensor, ...]:
        pieces = whole.split([shape.numel() for shape in shapes])
        return tuple(piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True))

    def joined(parts: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return torch.cat([part.flatten() for part in parts])

    return parts(_fixed_steps(lambda t, whole: joined(right(t, parts(whole))), joined(state), interval, config, None))


def _fixed_steps(
    right: Callable, x: torch.Tensor, interval: tuple[float, float], config: SamplerConfig, on_step: OnStep | None
) -> torch.Tensor:
    """Equal steps between times that are numbers: torchdiffeq's own loop compares them on the device and waits."""
    solver = _SOLVERS[config.resolved_method](right, x, rtol=config.rtol, atol=config.atol)
    grid = torch.linspace(*interval, config.steps + 1, dtype=x.dtype).tolist()

    def ask(t: float, x: torch.Tensor, perturb: object = None) -> torch.Tensor:
        return right(t, x)

    for step, (start, end) in enumerate(pairwise(grid)):
        change, _ = solver._step_func(ask, start, end - start, end, x)
        x = x + change
        if on_step is not None:
            on_step(step + 1, config.steps, x, end)
    return x


def _adaptive_steps(
    right: Callable,
    state: torch.Tensor | tuple[torch.Tensor, ...],
    interval: tuple[float, float],
    config: SamplerConfig,
    must_stop: bool,
    on_step: OnStep | None,
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """Steps of the solver's choice.

    They go past the end and are interpolated, as in the published programs; where the drift does not exist there, they
    are made to land on the end.
    """
    like = state[0] if isinstance(state, tuple) else state
    ends = torch.tensor(interval, dtype=like.dtype, device=like.device)
    options = {}
    if config.resolved_method == "scipy_solver":
        options["solver"] = "RK45"
    elif must_stop:
        options["step_t"] = ends[1:]
    watched = _Watched(right, on_step)
    end = odeint(
        watched, state, ends, rtol=config.rtol, atol=config.atol, method=config.resolved_method, options=options
    )
    if isinstance(state, tuple):
        return tuple(part[-1] for part in end)
    if on_step is not None:
        on_step(watched.step, None, end[-1], interval[1])
    return end[-1]


class _Watched:
    """A right-hand side as torchdiffeq calls it: at (t, state), and once before every step."""

    def __init__(self, right: Callable, on_step: OnStep | None) -> None:
        self.right, self.on_step, self.step = right, on_step, 0

    def __call__(self, t: torch.Tensor, state: torch.Tensor | tuple[torch.Tensor, ...]) -> Any:
        return self.right(t, state)

    def callback_step(self, t: torch.Tensor, x: torch.Tensor, dt: torch.Tensor) -> None:
        if self.on_step is not None and self.step:
            self.on_step(self.step, None, x, t)
        self.step += 1


def sample_ode(
    prediction: GuidedModel | Callable,
    transport: Transport,
    x: torch.Tensor,
    config: SamplerConfig,
    reverse: bool = False,
    on_step: OnStep | None = None,
) -> torch.Tensor:
    """Integrate the probability-flow ODE from noise to data, or with ``reverse`` from data to noise.

    Args:
        x: (B, C, h, w) noise, or latents.

    Returns:
        (B, C, h, w).
    """

    def velocity(t: float | torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return transport.to_velocity(prediction(x, t), x, times(t, x))

    return solve(velocity, x, transport, config, reverse, on_step)
