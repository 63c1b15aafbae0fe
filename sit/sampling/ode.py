"""Sampling along the probability-flow ODE: steps of our own on a fixed grid, or torchdiffeq's solvers.

torchdiffeq keeps its grid on the device, and waits for the device at each of its times. Here it is Python floats.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torchdiffeq import odeint

from sit.sampling.config import OnStep, SamplerConfig
from sit.sampling.guidance import GuidedModel, times
from sit.transport.transport import Transport
from sit.utils.errors import UserError, first_line

Field = Callable[[Any, Any], Any]
"""The right-hand side of an ODE, called as ``field(t, x)`` with a time as number or 0-dim tensor."""

State = torch.Tensor | tuple[torch.Tensor, ...]

MOST_EVALUATIONS = 20_000
"""evaluations of the right-hand side that an adaptive solver may take: dopri5 takes some hundred at its tolerances"""


# --- steps from time t to time end, equal to torchdiffeq's of the same name ------------------------------------------


def euler_step(field: Field, x: torch.Tensor, t: float, end: float) -> torch.Tensor:
    """Order 1."""
    return x + (end - t) * field(t, x)


def midpoint_step(field: Field, x: torch.Tensor, t: float, end: float) -> torch.Tensor:
    """Order 2."""
    dt = end - t
    return x + dt * field(t + dt / 2, x + dt / 2 * field(t, x))


def heun2_step(field: Field, x: torch.Tensor, t: float, end: float) -> torch.Tensor:
    """Order 2: the mean of the slopes at both ends."""
    dt, first = end - t, field(t, x)
    return x + dt / 2 * (first + field(end, x + dt * first))


def heun3_step(field: Field, x: torch.Tensor, t: float, end: float) -> torch.Tensor:
    """Order 3."""
    dt, first = end - t, field(t, x)
    second = field(t + dt / 3, x + dt / 3 * first)
    third = field(t + dt * 2 / 3, x + dt * 2 / 3 * second)
    return x + dt / 4 * (first + 3 * third)


def rk4_step(field: Field, x: torch.Tensor, t: float, end: float) -> torch.Tensor:
    """Order 4: Kutta's 3/8 rule."""
    dt, first = end - t, field(t, x)
    second = field(t + dt / 3, x + dt / 3 * first)
    third = field(t + dt * 2 / 3, x + dt * (second - first / 3))
    fourth = field(end, x + dt * (first - second + third))
    return x + dt / 8 * (first + 3 * (second + third) + fourth)


ODE_STEPS = {
    "euler": euler_step,
    "midpoint": midpoint_step,
    "heun2": heun2_step,
    "heun3": heun3_step,
    "rk4": rk4_step,
}


@torch.no_grad()
def sample_ode(
    model: GuidedModel | Callable,
    transport: Transport,
    x: torch.Tensor,
    config: SamplerConfig,
    *,
    step_noise: object = None,
    on_step: OnStep | None = None,
    reverse: bool = False,
) -> torch.Tensor:
    """Integrate the probability-flow ODE from noise to data, or with ``reverse`` from data to noise.

    Args:
        model: the network, called as ``model(x, t)`` with one time for all images.
        x: (B, C, h, w) noise, or latents.
        step_noise: not asked: an ODE has none.
        on_step: called after each step.

    Returns:
        (B, C, h, w).
    """

    def velocity(t: float | torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return transport.to_velocity(model(x, t), x, times(t, x))

    if config.resolved_method not in ODE_STEPS:
        if not len(x):  # the error of no numbers is none, and an adaptive solver finds no step
            return x
        return solve(velocity, x, transport, config, reverse=reverse, on_step=on_step)
    step = ODE_STEPS[config.resolved_method]
    start, stop = transport.ode_interval()[:: -1 if reverse else 1]
    grid = torch.linspace(start, stop, config.steps + 1, dtype=x.dtype).tolist()
    for number, (t, end) in enumerate(pairwise(grid)):
        x = step(velocity, x, t, end)
        if on_step is not None:
            on_step(number + 1, config.steps, x, end)
    return x


def solve(
    field: Field,
    state: State,
    transport: Transport,
    config: SamplerConfig,
    *,
    reverse: bool = False,
    on_step: OnStep | None = None,
) -> Any:
    """The state (a tensor or a tuple of them) at the ODE's end, or with ``reverse`` at its start, by torchdiffeq.

    Adaptive solvers go past the end and interpolate, as in the published programs; where the drift does not exist
    there, they are made to land on the end. ``on_step`` is for states that are a tensor.

    Raises:
        UserError: an adaptive solver finds no step that is small enough, or takes :data:`MOST_EVALUATIONS`.
    """
    like = state[0] if isinstance(state, tuple) else state
    start, stop = transport.ode_interval()[:: -1 if reverse else 1]
    ends = torch.tensor([start, stop], dtype=like.dtype, device=like.device)
    options: dict[str, Any] = {}
    if not config.adaptive:
        grid = torch.linspace(start, stop, config.steps + 1, dtype=like.dtype, device=like.device)
        options["grid_constructor"] = lambda field, state, t: grid
    elif config.resolved_method == "scipy_solver":
        options["solver"] = "RK45"
    elif transport.must_stop(reverse):
        options["step_t"] = ends[1:]
    total = None if config.adaptive else config.steps
    if config.adaptive:
        field = _bounded(field, config)
    if on_step is not None:
        field = watched = _Watched(field, total, on_step)
    tolerances = {"rtol": config.rtol, "atol": config.atol}
    try:
        end = odeint(field, state, ends, **tolerances, method=config.resolved_method, options=options)
    except AssertionError as error:  # torchdiffeq's, when a step has become zero or NaN
        raise _no_step(config, first_line(error)) from error
    if len(end[0] if isinstance(state, tuple) else end) < 2:  # SciPy's, which then gives the beginning alone
        raise _no_step(config, "it stops on the way")
    if isinstance(state, tuple):
        return tuple(part[-1] for part in end)
    if on_step is not None:
        on_step(watched.step, total, end[-1], stop)
    return end[-1]


def _bounded(field: Field, config: SamplerConfig) -> Field:
    """The right-hand side, which ends a solver that asks for it too often."""
    count = 0

    def counted(t: Any, state: State) -> Any:
        nonlocal count
        count += 1
        if count > MOST_EVALUATIONS:
            raise _no_step(config, f"{MOST_EVALUATIONS:,} network evaluations, and it is at t = {float(t):.4g}")
        return field(t, state)

    return counted


def _no_step(config: SamplerConfig, reason: str) -> UserError:
    return UserError(
        f"`method={config.resolved_method}` doesn't come to the end with `atol={config.atol:g}` and "
        f"`rtol={config.rtol:g}` ({reason}): allow larger errors, or take a method of fixed steps such as heun2"
    )


class _Watched:
    """A right-hand side as torchdiffeq calls it: at (t, state), and once before every step."""

    def __init__(self, field: Field, total: int | None, on_step: OnStep) -> None:
        self.field, self.total, self.on_step, self.step = field, total, on_step, 0

    def __call__(self, t: torch.Tensor, state: State) -> Any:
        return self.field(t, state)

    def callback_step(self, t: torch.Tensor, x: torch.Tensor, dt: torch.Tensor) -> None:
        if self.step:
            self.on_step(self.step, self.total, x, t)
        self.step += 1
