"""Previews: a grid of images that the averaged weights make, while the run trains."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from tqdm import tqdm

from sit.latents.vae import NotFinite, decode
from sit.model import SiT
from sit.sampling.config import SamplerConfig
from sit.sampling.sampler import generate
from sit.training.config import TrainConfig
from sit.training.data import Opened
from sit.training.ema import ema_weights
from sit.training.stop_signal import StopSignal
from sit.training.trackers import log_image
from sit.transport.transport import Transport
from sit.utils.image_grid import labeled_grid, save_png

ROWS = 4
COLUMNS = 10


class Stopped(Exception):
    """A signal came while a preview was being sampled."""


def save_preview(
    folder: Path,
    config: TrainConfig,
    opened: Opened,
    *,
    step: int,
    stop: StopSignal,
    network: SiT,
    ema: EMAModel,
    transport: Transport,
    accelerator: Accelerator,
) -> None:
    """Sample a grid with the averaged weights, a column a class, from the same noise each time.

    Every process must call it; the main one writes ``samples/step-….png`` and gives it to the trackers. Weights that
    give no finite images cost a line, not the run. A signal ends it without an image.

    Args:
        folder: the run's.
        config: the run's, for guidance, steps and seed.
        opened: the data, for its classes and the shape of its latents, and the VAE.
        step: the number of the step, from 1.
        stop: asked after every step of the sampler.
        network: without the wrapper that sums gradients; in training mode before and after.
        ema: the moving average of its weights.
        transport: what it was trained on.
        accelerator: for its device, precision and trackers.
    """
    classes = opened.data.classes
    columns = min(len(classes), COLUMNS)
    shown = [round(i * (len(classes) - 1) / max(1, columns - 1)) for i in range(columns)]
    labels = torch.tensor(shown * ROWS)

    def end_if_stopped(*_step: object) -> None:
        if stop.received_anywhere(accelerator):
            raise Stopped

    network.eval()
    with ema_weights(network, ema), torch.no_grad(), accelerator.autocast(), contextlib.suppress(Stopped):
        latents = None
        parts = generate(
            network,
            transport,
            torch.arange(len(labels)),
            labels,
            seed=config.seed,
            config=SamplerConfig(steps=config.preview_steps, cfg_scale=config.preview_guidance),
            latent_shape=opened.data.latent_shape,
            device=accelerator.device,
            batch_size=len(labels),
            on_step=end_if_stopped,
        )
        latents = torch.cat([part for _, part in parts])
    network.train()
    if accelerator.is_main_process and latents is not None:
        path = folder / "samples" / f"step-{step:07d}.png"
        try:
            images = decode(opened.vae, latents).cpu().numpy()
        except NotFinite as error:
            tqdm.write(f"warning: no preview {path.name}: {error}")
            return
        grid = labeled_grid(images, [classes[label] for label in labels.tolist()], columns)
        save_png(grid, path)
        log_image(accelerator, "preview", grid, step)
