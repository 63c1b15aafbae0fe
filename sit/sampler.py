"""Sampling: from noise to latents along the SDE or the ODE of a trained network, with guidance.

What ``steps`` counts, and how it compares with the published programs, is written in ``docs/sampling.md``.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torchdiffeq import odeint

from sit.diffusion import DIFFUSION_FORMS
from sit.errors import UserError
from sit.interpolant import per_image
from sit.model import SiT
from sit.randomness import generator, randn
from sit.transport import Transport

OnStep = Callable[[int, int | None, torch.Tensor, "float | torch.Tensor"], None]
"""Called after step number ``step`` of ``total`` (None if the solver chooses its steps) with the state (B, C, h, w) and
the time t that it stands at, a number or 0-dim tensor."""

_SOLVERS = importlib.import_module("torchdiffeq._impl.odeint").SOLVERS
_FIXED_GRID = importlib.import_module("torchdiffeq._impl.solvers").FixedGridODESolver
ODE_METHODS = tuple(_SOLVERS)
SDE_METHODS = ("euler", "heun")
LAST_STEPS = ("mean", "tweedie", "euler", "none")
SINGULAR_EPS = 1e-3
"""How far from a singular end the SDE stays where the published interval would touch it."""


@dataclass(frozen=True)
class SamplerConfig:
    """How to sample; the defaults are those of the published SiT.

    Raises:
        UserError: a value that can't be.
    """

    sampler: Literal["sde", "ode"] = "sde"
    """the reverse SDE, or the probability-flow ODE"""
    steps: int = 250
    """network steps: SDE steps with the last step included, or steps of a fixed-step ODE solver"""
    method: str | None = None
    """SDE: euler (Euler-Maruyama, the default) or heun. ODE: a solver of torchdiffeq, by default dopri5"""
    diffusion_form: Literal["constant", "sbdm", "sigma", "linear", "decreasing", "increasing-decreasing"] = "sigma"
    """how much noise the SDE adds over time"""
    diffusion_norm: float = 1.0
    """factor of the diffusion coefficient"""
    last_step: Literal["mean", "tweedie", "euler", "none"] = "mean"
    """how the SDE ends, without adding noise"""
    last_step_size: float = 0.04
    """time that the SDE's last step covers"""
    atol: float = 1e-6
    """absolute tolerance of adaptive ODE solvers"""
    rtol: float = 1e-3
    """relative tolerance of adaptive ODE solvers"""
    cfg_scale: float = 1.0
    """classifier-free guidance; 1 is none, and then the network runs once a step instead of twice"""
    cfg_channels: int = 3
    """latent channels that guidance acts on: 3 as published, 0 for all"""
    cfg_interval: tuple[float, float] = (0.0, 1.0)
    """guide only where the noise level 1 - t is within these bounds (as REPA counts it); outside, no second pass"""

    def __post_init__(self) -> None:
        if self.sampler not in ("sde", "ode"):
            raise UserError(f"unknown sampler {self.sampler!r}; known samplers: sde, ode")
        known = SDE_METHODS if self.sampler == "sde" else ODE_METHODS
        if self.method is not None and self.method not in known:
            raise UserError(f"--method {self.method}: the methods of --sampler {self.sampler} are {', '.join(known)}")
        if self.diffusion_form not in DIFFUSION_FORMS:
            raise UserError(f"unknown diffusion form {self.diffusion_form!r}; known: {', '.join(DIFFUSION_FORMS)}")
        if self.last_step not in LAST_STEPS:
            raise UserError(f"unknown last step {self.last_step!r}; known: {', '.join(LAST_STEPS)}")
        if self.steps < 1:
            raise UserError(f"--steps must be at least 1, not {self.steps}")
        if self.sampler == "sde" and self.last_step != "none" and self.steps < 2:
            raise UserError("--steps 1 leaves the SDE no step before its last one: use at least 2, or --last-step none")
        if not 0 <= self.diffusion_norm < math.inf:
            raise UserError(f"--diffusion-norm must be a number of at least 0, not {self.diffusion_norm}")
        if not 0 < self.last_step_size < 1:
            raise UserError(f"--last-step-size must be between 0 and 1, not {self.last_step_size}")
        if not (self.atol > 0 and self.rtol > 0):
            raise UserError("--atol and --rtol must be positive")
        if self.cfg_scale < 0 or not math.isfinite(self.cfg_scale):
            raise UserError(f"--cfg-scale must be a number of at least 0, not {self.cfg_scale}")
        if self.cfg_channels < 0:
            raise UserError(f"--cfg-channels must be 0 (all) or more, not {self.cfg_channels}")
        low, high = self.cfg_interval
        if not 0 <= low <= high <= 1:
            raise UserError(f"--cfg-interval {low} {high}: needs 0 <= LOW <= HIGH <= 1")

    @property
    def resolved_method(self) -> str:
        """The method, with the default filled in."""
        return self.method or ("euler" if self.sampler == "sde" else "dopri5")

    @property
    def adaptive(self) -> bool:
        """Whether the solver chooses its own steps, and so doesn't heed ``steps``."""
        return self.sampler == "ode" and not issubclass(_SOLVERS[self.resolved_method], _FIXED_GRID)


# ---------------------------------------------------------------------- the network in the sampler


class Prediction:
    """A network's guided prediction as a function of the state and one time for all images.

    Args:
        model: called as ``model(x, t, y=labels)``; its ``null_class`` is needed for guidance.
        labels: (B,) int64, or None for a network without labels (called without ``y``, never guided).
        config: the guidance.
    """

    def __init__(self, model: SiT | Callable, labels: torch.Tensor | None, config: SamplerConfig) -> None:
        self.model, self.labels, self.config = model, labels, config
        self.evaluations = 0
        self.guided = config.cfg_scale != 1 and labels is not None
        if self.guided:
            self.both = torch.cat([labels, torch.full_like(labels, model.null_class)])

    def __call__(self, x: torch.Tensor, t: float | torch.Tensor) -> torch.Tensor:
        """State (B, C, h, w), and a time as number or 0-dim tensor, to the prediction (B, C, h, w) in x's dtype."""
        self.evaluations += 1
        low, high = self.config.cfg_interval
        if not self.guided or ((low, high) != (0.0, 1.0) and not low <= 1 - float(t) <= high):
            return self._run(x, t, self.labels)
        with_label, without = self._run(torch.cat([x, x]), t, self.both).chunk(2)
        guided = without + self.config.cfg_scale * (with_label - without)
        channels = self.config.cfg_channels or x.shape[1]
        return torch.cat([guided[:, :channels], with_label[:, channels:]], dim=1)

    def _run(self, x: torch.Tensor, t: float | torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        conditions = {} if labels is None else {"y": labels}
        return self.model(x.to(getattr(self.model, "dtype", x.dtype)), times(t, x), **conditions).to(x.dtype)


def times(t: float | torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """One time for every image of x: (B,) in x's dtype, made without a transfer to the device."""
    if isinstance(t, torch.Tensor):
        return t.to(x.dtype).expand(len(x))
    return torch.full((len(x),), t, dtype=x.dtype, device=x.device)


# ---------------------------------------------------------------------- the SDE


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
    prediction: Prediction | Callable,
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
        weight = diffusion(per_image(when, x))
        return transport.velocity_of(out, x, when) + weight * transport.score_of(out, x, when)

    grid = sde_times(transport, config)
    dt = (torch.tensor(grid[1]) - torch.tensor(grid[0])).item()  # float32, as published
    for step, t in enumerate(grid[:-1]):
        noise = step_noise(step) * math.sqrt(dt)
        kick = torch.sqrt(2 * diffusion(per_image(times(t, x), x))) * noise
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
            x = x + transport.velocity_of(prediction(x, t), x, when) * size
        else:
            score = transport.score_of(prediction(x, t), x, when)
            alpha, sigma = path.alpha(per_image(when, x)), path.sigma(per_image(when, x))
            x = x / alpha + sigma**2 / alpha * score
        if on_step is not None:
            on_step(config.steps, config.steps, x, 1.0)
    return x


# ---------------------------------------------------------------------- the ODE


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
    prediction: Prediction | Callable,
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
        return transport.velocity_of(prediction(x, t), x, times(t, x))

    return solve(velocity, x, transport, config, reverse, on_step)


# ---------------------------------------------------------------------- samples by number


class KeyedNoise:
    """The noise of samples number ``indices`` under a seed: first x_0, then that of each SDE step.

    Sample i draws from a stream of its own, so its noise does not depend on which samples are made with it.
    """

    def __init__(self, seed: int, indices: Sequence[int], shape: Sequence[int], device: torch.device | str) -> None:
        self.sources = [generator(seed, "sample", int(index)) for index in indices]
        self.shape, self.device = tuple(shape), device

    def __call__(self, step: int = 0) -> torch.Tensor:
        """The next noise (B, *shape) of every sample."""
        noise = randn(self.shape, self.sources)
        if torch.device(self.device).type == "cuda":
            noise = noise.pin_memory()  # else the copy would wait for the steps before it
        return noise.to(self.device, non_blocking=True)


def sample(
    model: SiT | Callable,
    transport: Transport,
    noise: torch.Tensor,
    labels: torch.Tensor | None,
    config: SamplerConfig,
    step_noise: Callable[[int], torch.Tensor] | None = None,
    on_step: OnStep | None = None,
    reverse: bool = False,
) -> torch.Tensor:
    """Latents (B, C, h, w) from noise (B, C, h, w) and labels (B,), integrated in float32, or float64 if given it.

    Args:
        step_noise: see :func:`sample_sde`; None draws from torch's global generator.
        reverse: take ``noise`` for latents and return the noise that the ODE makes them from.

    Raises:
        UserError: guidance of a network that has no null class, or an SDE in reverse.
    """
    if reverse and config.sampler != "ode":
        raise UserError("only the ODE runs from an image back to its noise: use --sampler ode")
    if noise.dtype not in (torch.float32, torch.float64):
        noise = noise.float()
    with torch.no_grad():
        prediction = Prediction(model, labels, config)
        if config.sampler == "ode":
            return sample_ode(prediction, transport, noise, config, reverse, on_step)
        step_noise = step_noise or (lambda step: torch.randn_like(noise))
        return sample_sde(prediction, transport, noise, config, step_noise, on_step)


def computing_group(config: SamplerConfig, tokens: int) -> int:
    """How many samples the network is shown at a time on a CPU, whatever the batch size.

    A matrix product rounds differently with another number of rows, so on the CPU, where it costs little, the number
    is fixed, and so is each sample's row. An adaptive solver's steps depend on all it is shown: there it is one.
    """
    return 1 if config.adaptive else max(4, min(16, 1024 // tokens))


def grouped(indices: Sequence[int], group: int) -> Iterator[tuple[list[int], list[int]]]:
    """Cut samples into groups in which sample i stands in row i mod ``group``, keeping their order as far as it goes.

    Yields:
        (positions in ``indices``, their rows): as many as find their row free, at most ``group``.
    """
    positions, rows = [], []
    for position, index in enumerate(indices):
        if index % group in rows:
            yield positions, rows
            positions, rows = [], []
        positions.append(position)
        rows.append(index % group)
    yield positions, rows


def generate(
    model: SiT,
    transport: Transport,
    indices: torch.Tensor,
    labels: torch.Tensor,
    *,
    seed: int,
    config: SamplerConfig,
    latent_shape: Sequence[int],
    device: torch.device | str,
    batch_size: int,
    on_step: OnStep | None = None,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Sample the latents numbered ``indices`` under ``seed``, ``batch_size`` at a time.

    Sample i depends on the seed, i, its label and the config. On a CPU it is the same to the bit whatever the batch
    size and the company; on an accelerator it is so to rounding (adaptive ODE solvers: to their tolerance).

    Raises:
        UserError: a batch size below 1.

    Args:
        indices: (n,) int64 numbers of the samples.
        labels: (n,) int64.
        latent_shape: (C, h, w).
        on_step: called in each pass of the sampler; with several passes, from the start again.

    Yields:
        (indices (b,), latents (b, C, h, w) float32 on ``device``), in order.
    """
    if batch_size < 1:
        raise UserError(f"--batch-size must be at least 1, not {batch_size}")
    patch = model.config.patch_size
    tokens = latent_shape[1] * latent_shape[2] // patch**2
    on_cpu = torch.device(device).type == "cpu"
    for start in range(0, len(indices), batch_size):
        chosen, wanted = indices[start : start + batch_size], labels[start : start + batch_size]
        if not on_cpu:
            short = batch_size - len(chosen) if start else 0  # filled up: a compiled network knows one batch size
            filled = torch.cat([torch.arange(len(chosen)), torch.zeros(short, dtype=torch.int64)])
            noise = KeyedNoise(seed, chosen[filled].tolist(), latent_shape, device)
            x = sample(model, transport, noise(), wanted[filled].to(device), config, noise, on_step)
            yield chosen, x[: len(chosen)]
            continue
        group, parts = computing_group(config, tokens), []
        for positions, rows in grouped(chosen.tolist(), group):
            filled = [positions[0]] * group  # rows that no sample stands in
            for position, row in zip(positions, rows, strict=True):
                filled[row] = position
            noise = KeyedNoise(seed, chosen[filled].tolist(), latent_shape, device)
            x = sample(model, transport, noise(), wanted[filled].to(device), config, noise, on_step)
            parts.append(x[rows])
        yield chosen, torch.cat(parts)
