"""Sampling: from noise to latents along the SDE or the ODE of a trained network, with guidance.

What ``steps`` counts, and how it compares with the published programs, is written in ``docs/sampling.md``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from sit.model import SiT
from sit.sampling.config import OnStep, SamplerConfig
from sit.sampling.guidance import GuidedModel
from sit.sampling.meanflow import sample_meanflow
from sit.sampling.ode import sample_ode
from sit.sampling.sde import sample_sde
from sit.transport.transport import Transport
from sit.utils.errors import UserError
from sit.utils.precision import at_least_float32
from sit.utils.random import generator, randn
from sit.utils.workers import Tell, computes_apart, one_thread, run_apart


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


SAMPLERS: dict[str | None, Callable[..., torch.Tensor]] = {
    "sde": sample_sde,
    "ode": sample_ode,
    "meanflow": sample_meanflow,
}


def sample(
    model: Callable[..., torch.Tensor],
    transport: Transport,
    noise: torch.Tensor,
    labels: torch.Tensor | None,
    config: SamplerConfig,
    *,
    step_noise: Callable[[int], torch.Tensor] | None = None,
    on_step: OnStep | None = None,
    reverse: bool = False,
    guide: Callable[..., torch.Tensor] | None = None,
) -> torch.Tensor:
    """Latents (B, C, h, w) from noise (B, C, h, w) and labels (B,), integrated in float32, or float64 if given it.

    Args:
        model: the network, called as ``model(x, t, y=labels)``, or without ``y`` if there are no labels.
        labels: (B,) int64, or None.
        step_noise: see :func:`sit.sampling.sde.sample_sde`; None draws from torch's global generator.
        reverse: take ``noise`` for latents and return the noise that the ODE makes them from.
        guide: see :class:`GuidedModel`.

    Raises:
        UserError: guidance of a network that has no null label, an SDE or MeanFlow in reverse, or MeanFlow of a
            network that has no average velocities.
    """
    config = config.resolve(transport.averages)
    noise = at_least_float32(noise)
    guided = guided_model(model, labels, config, noise, guide)
    sampler = SAMPLERS[config.sampler]
    return sampler(guided, transport, noise, config, step_noise=step_noise, on_step=on_step, reverse=reverse)


def guided_model(
    model: Callable[..., torch.Tensor],
    labels: torch.Tensor | None,
    config: SamplerConfig,
    noise: torch.Tensor,
    guide: Callable[..., torch.Tensor] | None = None,
) -> GuidedModel | GuidedInGroups:
    """The network as samplers call it on states like ``noise`` (B, C, h, w): a small one on a CPU in groups of rows.

    Raises:
        UserError: guidance of a network that has no null label.
    """
    if isinstance(model, SiT):
        tokens = tokens_of(model, noise.shape)
        if computes_apart(model, rows := group_of(tokens), tokens, noise.device):
            return GuidedInGroups(model, labels, config, guide, rows=rows)
    return GuidedModel(model, labels, config, guide)


class GuidedInGroups:
    """A :class:`GuidedModel`, whose arguments it has, that computes ``rows`` samples at a time, each group on a thread
    of its own."""

    def __init__(
        self,
        model: SiT,
        labels: torch.Tensor | None,
        config: SamplerConfig,
        guide: Callable[..., torch.Tensor] | None,
        *,
        rows: int,
    ) -> None:
        self.labels, self.rows = labels, rows
        self.whole = GuidedModel(model, labels, config, guide)

    def set_scale(self, scale: float) -> None:
        """As :meth:`GuidedModel.set_scale`."""
        self.whole.set_scale(scale)

    def __call__(self, x: torch.Tensor, *times: Any) -> torch.Tensor:
        parts = x.split(self.rows)
        given = [None] * len(parts) if self.labels is None else self.labels.split(self.rows)
        jobs = [partial(self._of_group, some, part, times) for some, part in zip(given, parts, strict=True)]
        return torch.cat(run_apart(jobs))

    def _of_group(
        self, labels: torch.Tensor | None, x: torch.Tensor, times: tuple[Any, ...], _tell: Tell
    ) -> torch.Tensor:
        whole = self.whole
        return GuidedModel(whole.model, labels, whole.config, whole.guide)(x, *times)


def tokens_of(model: SiT, latent_shape: Sequence[int]) -> int:
    """The tokens of a latent (…, h, w)."""
    return latent_shape[-2] * latent_shape[-1] // model.config["patch_size"] ** 2


def group_of(tokens: int) -> int:
    """How many samples of so many tokens a network computes at a time on a CPU."""
    return max(4, min(16, 1024 // tokens))


def computing_group(config: SamplerConfig, tokens: int) -> int:
    """How many samples the network computes at a time on a CPU, whatever the batch size.

    A matrix product rounds differently with another number of rows, so on the CPU, where it costs little, the number
    is fixed, and so is each sample's row. An adaptive solver's steps depend on all samples: there it is one.
    """
    return 1 if config.adaptive else group_of(tokens)


def grouped(indices: Sequence[int], group: int) -> Iterator[tuple[list[int], list[int]]]:
    """Cut samples into groups in which sample i stands in row i mod ``group``, keeping their order as far as it goes.

    Yields:
        (positions in ``indices``, their rows): as many as find their row free, at most ``group``.
    """
    positions: list[int] = []
    rows: list[int] = []
    for position, index in enumerate(indices):
        if index % group in rows:
            yield positions, rows
            positions, rows = [], []
        positions.append(position)
        rows.append(index % group)
    yield positions, rows


def fixed_rows(indices: Sequence[int], group: int) -> Iterator[tuple[list[int], list[int]]]:
    """The groups of :func:`grouped`, each filled up to ``group`` rows by its first sample.

    Yields:
        (the position in ``indices`` of each row's sample, the rows that count, in the order of ``indices``).
    """
    for positions, rows in grouped(indices, group):
        filled = [positions[0]] * group
        for position, row in zip(positions, rows, strict=True):
            filled[row] = position
        yield filled, rows


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
    on_first: OnStep | None = None,
    guide: SiT | None = None,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Sample the latents numbered ``indices`` under ``seed``, ``batch_size`` at a time.

    Sample i depends on the seed, i, its label and the config. On a CPU it is the same to the bit whatever the batch
    size and the samples beside it, and for a small network (:func:`sit.utils.workers.computes_apart`), whose groups of
    samples are shared among workers, whatever their number; for a large one with one number of threads. On an
    accelerator it is the same to rounding (adaptive ODE solvers: to their tolerance).

    Args:
        indices: (n,) int64 numbers of the samples.
        labels: (n,) int64.
        latent_shape: (C, h, w).
        on_step: called in each pass of the sampler, from its first step to its last; several passes may be under way
            at a time. It must not change the state.
        on_first: the same, but in the first pass only, in which the first sample is the row of its number.
        guide: see :class:`GuidedModel`.

    Yields:
        (indices (b,), latents (b, C, h, w) float32 on ``device``), in order.

    Raises:
        UserError: a batch size below 1, or guidance of a network that has no null label.
    """
    if batch_size < 1:
        raise UserError(f"`batch_size` must be at least 1, not {batch_size}")
    config = config.resolve(transport.averages)
    sampler, group, apart = SAMPLERS[config.sampler], None, False
    if torch.device(device).type == "cpu":
        tokens = tokens_of(model, latent_shape)
        group = computing_group(config, tokens)
        apart = computes_apart(model, group, tokens)
    for start in range(0, len(indices), batch_size):
        chosen, wanted = indices[start : start + batch_size].tolist(), labels[start : start + batch_size]
        passes: Iterable[tuple[list[int], Any]]
        if group is not None:
            passes = fixed_rows(chosen, group)
        else:
            short = batch_size - len(chosen) if start else 0  # filled up: a compiled network knows one batch size
            passes = [([*range(len(chosen)), *[0] * short], slice(len(chosen)))]
        jobs, kept, listeners = [], [], []
        for filled, rows in passes:
            noise = KeyedNoise(seed, [chosen[position] for position in filled], latent_shape, device)
            guided = GuidedModel(model, wanted[filled].to(device), config, guide)
            jobs.append(partial(sampler, guided, transport, noise(), config, step_noise=noise))
            kept.append(rows)
            listeners.append(_both(on_step, on_first if not start and len(jobs) == 1 else None))
        parts = []
        if apart and len(jobs) > 1 and torch.get_num_threads() > 1:
            parts = run_apart([partial(_on_a_worker, job) for job in jobs], _to(listeners), forks=True)
        else:
            with one_thread(apart):
                for job, listener in zip(jobs, listeners, strict=True):
                    parts.append(job(on_step=listener))
        yield (
            indices[start : start + batch_size],
            torch.cat([part[rows] for part, rows in zip(parts, kept, strict=True)]),
        )


def _both(one: OnStep | None, other: OnStep | None) -> OnStep | None:
    """What calls both, as far as they are there; None if neither is."""
    if one is None or other is None:
        return one or other

    def both(*step: Any) -> None:
        one(*step)
        other(*step)

    return both


def _on_a_worker(job: Callable[..., torch.Tensor], tell: Tell) -> torch.Tensor:
    """A pass whose listener is called where the workers' caller is."""
    return job(on_step=tell)


def _to(listeners: Sequence[OnStep | None]) -> Callable[..., None] | None:
    """What hands the steps of pass ``number`` to its listener; None if nobody listens."""
    if not any(listeners):
        return None

    def told(number: int, *step: Any) -> None:
        if (listener := listeners[number]) is not None:
            listener(*step)

    return told
