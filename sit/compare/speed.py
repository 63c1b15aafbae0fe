"""Images per second of runs side by side, in training and in sampling."""

from __future__ import annotations

import contextlib
import platform
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace

import torch

from sit.checkpoint.load import Loaded
from sit.model import SiT
from sit.sampling.config import SamplerConfig
from sit.sampling.images import balanced_labels, latent_shape_for
from sit.sampling.sampler import generate


@contextlib.contextmanager
def rows_shown(network: SiT) -> Iterator[list[int]]:
    """Within the block, the list gets the number of rows of each call of the network; guidance takes two an image."""
    rows: list[int] = []
    hook = network.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    try:
        yield rows
    finally:
        hook.remove()


def measure_speed(loaded: dict[str, Loaded], sampler: SamplerConfig, batch_size: int, repeats: int) -> dict[str, dict]:
    """Images a second of a training step and of sampling without the VAE, interleaved, medians.

    Sampling is timed over a few steps of the sampler, and scaled by the rows of latents that the network is shown: they
    are counted there, and in one whole run, which warms up. Adaptive solvers are timed over whole runs.
    """
    seconds: dict[str, dict[str, list[float]]] = {name: {"training": [], "sampling": []} for name in loaded}
    few = sampler if sampler.adaptive else replace(sampler, steps=min(sampler.steps, 4))
    whole: dict[str, int] = {}

    def timed(device: torch.device, run) -> float:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        start = time.perf_counter()
        run()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return time.perf_counter() - start

    for round_number in range(repeats + 1):  # the first warms up
        for name, one in loaded.items():
            shape, device = latent_shape_for(one, None), one.device
            labels = balanced_labels(range(batch_size), range(one.model.config.num_classes))
            network = SiT.from_config(one.model.config).to(device)
            x1 = torch.randn(batch_size, *shape, device=device)
            t, x0 = torch.rand(batch_size, device=device), torch.randn_like(x1)

            def train(network=network, one=one, x1=x1, t=t, x0=x0, labels=labels) -> None:
                one.transport.loss(network, x1, t, x0, y=labels.to(x1.device)).mean().backward()

            config = few if round_number else sampler

            def sample(one=one, shape=shape, labels=labels, device=device, config=config) -> None:
                indices = torch.arange(batch_size)
                options = dict(seed=0, config=config, latent_shape=shape, device=device, batch_size=batch_size)
                for _ in generate(one.model, one.transport, indices, labels, **options):
                    pass

            training = timed(device, train)
            with rows_shown(one.model) as rows:
                sampling = timed(device, sample)
            if round_number:
                seconds[name]["training"].append(training)
                seconds[name]["sampling"].append(sampling * whole[name] / sum(rows))
            else:
                whole[name] = sum(rows)
    return {
        name: {kind: batch_size / statistics.median(values) for kind, values in kinds.items()}
        for name, kinds in seconds.items()
    }


def machine(device: torch.device) -> str:
    """What the speeds were measured on."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads, torch {torch.__version__}"
