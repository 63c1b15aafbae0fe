"""Images per second of runs side by side, in training and in sampling."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from sit.checkpoint.load import Loaded
from sit.model import SiT
from sit.sampling.config import SamplerConfig
from sit.sampling.images import balanced_labels, latent_shape_for
from sit.sampling.sampler import generate
from sit.training.config import TrainConfig
from sit.transport.meanflow import MeanFlow
from sit.utils.timing import once


@contextlib.contextmanager
def rows_given(network: SiT) -> Iterator[list[int]]:
    """Within the block, the list gets the number of rows of each call of the network; guidance takes two an image."""
    rows: list[int] = []
    hook = network.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    try:
        yield rows
    finally:
        hook.remove()


def objective(config: TrainConfig) -> str:
    """What a run minimizes, by its name; ``plain`` is the transport's loss alone."""
    if config.averages:
        return "MeanFlow"
    added = {"REPA": config.repa, "distillation": config.distill_from}
    return " and ".join(name for name, given in added.items() if given is not None) or "plain"


def measure_speed(
    loaded: dict[str, Loaded], configs: dict[str, TrainConfig], sampler: SamplerConfig, batch_size: int, repeats: int
) -> dict[str, dict[str, float | None]]:
    """Images a second of a training step and of sampling without the VAE, interleaved, medians, by name.

    That of training is None where :func:`gradient_pass` has none.

    Sampling is timed over a few steps of the sampler, and scaled by the rows of latents that the network is given: they
    are counted there, and in one complete run, which warms up. Adaptive solvers are timed over complete runs.
    """
    seconds: dict[str, dict[str, list[float]]] = {name: {"training": [], "sampling": []} for name in loaded}
    few = sampler if sampler.adaptive else replace(sampler, steps=min(sampler.steps, 4))
    rows_of_a_run: dict[str, int] = {}
    for round_number in range(repeats + 1):  # the first warms up
        for name, one in loaded.items():
            step = gradient_pass(one, configs[name], batch_size)
            training = None if step is None else once(step, one.device)
            with rows_given(one.model) as rows:
                sampling = once(sampling_run(one, few if round_number else sampler, batch_size), one.device)
            if round_number:
                if training is not None:
                    seconds[name]["training"].append(training)
                seconds[name]["sampling"].append(sampling * rows_of_a_run[name] / sum(rows))
            else:
                rows_of_a_run[name] = sum(rows)
    return {
        name: {kind: batch_size / statistics.median(values) if values else None for kind, values in kinds.items()}
        for name, kinds in seconds.items()
    }


def gradient_pass(loaded: Loaded, config: TrainConfig, batch_size: int) -> Callable[[], None] | None:
    """A forward and backward pass of a fresh network of the same kind, for a batch that lies ready.

    Of the transport's loss, or of MeanFlow's with its derivative and its guidance. None where an encoder or a teacher
    runs too, which neither the checkpoint nor its config holds.
    """
    if objective(config) not in ("plain", "MeanFlow"):
        return None
    shape, device = latent_shape_for(loaded, None), loaded.device
    labels = balanced_labels(range(batch_size), range(loaded.model.config.num_classes)).to(device)
    network = SiT.from_config(loaded.model.config).to(device)
    x1 = torch.randn(batch_size, *shape, device=device)
    t, x0 = torch.rand(batch_size, device=device), torch.randn_like(x1)
    if loaded.transport.averages:
        meanflow = MeanFlow(loaded.transport, **config.meanflow_options())
        two_times, drop = torch.rand(batch_size, 2, device=device), torch.rand(batch_size, device=device)
        options = dict(u=two_times, x0=x0, drop=drop, class_dropout=config.class_dropout)
        return lambda: meanflow.training_loss(network, x1, labels, **options).mean().backward()
    return lambda: loaded.transport.loss(network, x1, t, x0, y=labels).mean().backward()


def sampling_run(loaded: Loaded, config: SamplerConfig, batch_size: int) -> Callable[[], None]:
    """One batch of latents, sampled."""
    shape, device = latent_shape_for(loaded, None), loaded.device
    indices = torch.arange(batch_size)
    labels = balanced_labels(range(batch_size), range(loaded.model.config.num_classes))

    def run() -> None:
        options = dict(seed=0, config=config, latent_shape=shape, device=device, batch_size=batch_size)
        for _ in generate(loaded.model, loaded.transport, indices, labels, **options):
            pass

    return run
