"""The held-out loss: what the network's prediction costs at eight fixed times on images that it never trains on.

Images, posterior samples and noise are the same in all runs on the same data, whatever their seeds, so that two runs
are compared image by image; a difference of means then has a small part of the variance that either mean has.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from tqdm import tqdm

from sit.data.heldout import SEED
from sit.model import SiT
from sit.training.config import TrainConfig
from sit.training.ema import ema_weights
from sit.training.heldout_images import HeldOutImages
from sit.transport.transport import Field, Transport
from sit.utils.files import atomic_write
from sit.utils.random import generator, randn

EIGHTHS = tuple((2 * part + 1) / 16 for part in range(8))
"""The midpoints of the eighths of the training interval, as parts of it: 0.0625, 0.1875, … 0.9375."""

BATCH = 64
"""images given to the network at once, at most"""


def heldout_times(transport: Transport) -> list[float]:
    """The eight times t, in the training interval of ``transport``."""
    start, end = transport.train_interval()
    return [start + (end - start) * part for part in EIGHTHS]


@torch.no_grad()
def losses_at_times(
    model: Field,
    transport: Transport,
    x1: torch.Tensor,
    *,
    labels: torch.Tensor,
    numbers: Sequence[int],
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """The loss of each image at each of the eight times, with labels and with noise keyed by image and time.

    Args:
        model: the network, in evaluation mode; called with equal batches only.
        transport: what is predicted, and the weight of its loss. The distribution of training times plays no part.
        x1: (n, …) float32 latents.
        labels: (n,) int64.
        numbers: of the images; they name the noise.
        device: the network's.

    Returns:
        (n, 8) float32 on the CPU.
    """
    times, size = heldout_times(transport), max(1, min(BATCH, len(x1)))
    parts = [torch.empty(0, len(times))]
    for start in range(0, len(x1), size):
        count = min(size, len(x1) - start)
        rows = [start + min(row, count - 1) for row in range(size)]  # filled up: a compiled network knows one size
        data, y = x1[rows].to(device), labels[rows].to(device)
        columns = []
        for part, time in enumerate(times):
            x0 = randn(x1.shape[1:], [generator(SEED, "heldout", "noise", int(numbers[row]), part) for row in rows])
            t = torch.full((size,), time, device=device)
            columns.append(transport.loss(model, data, t, x0.to(device), y=y)[:count].float().cpu())
        parts.append(torch.stack(columns, dim=1))
    return torch.cat(parts)


@dataclass(frozen=True)
class HeldOutLoss:
    """Measures a run's held-out loss, each process on its part of the images.

    Attributes:
        images: all of them.
        x1: (m, c, h, w) the latents of this process's part, on the CPU.
        rows: (m,) int64, which of ``images`` these are; every process has as many, so some may come twice.
        transport: what the network is trained on.
        accelerator: for its device, precision, processes and trackers.
    """

    images: HeldOutImages
    x1: torch.Tensor
    rows: np.ndarray
    transport: Transport
    accelerator: Accelerator

    @staticmethod
    def path(folder: Path, step: int) -> Path:
        """The file of the losses after ``step`` in the run's ``folder``."""
        return folder / "heldout" / f"step-{step:07d}.json"

    def measure(self, step: int, folder: Path, network: SiT, ema: EMAModel) -> None:
        """Measure with the averaged weights; log the means, and write the losses of the images.

        Every process must call it; the main one writes ``heldout/step-….json`` in the run's ``folder``. Losses that
        are not finite cost a line, not the run.

        Args:
            step: the number of the step, from 1.
            folder: the run's.
            network: without the wrapper that sums gradients; in training mode before and after.
            ema: the moving average of its weights.
        """
        labels, numbers = (torch.from_numpy(part[self.rows]) for part in (self.images.labels, self.images.numbers))
        network.eval()
        with ema_weights(network, ema), self.accelerator.autocast():
            losses = losses_at_times(
                network,
                self.transport,
                self.x1,
                labels=labels,
                numbers=numbers.tolist(),
                device=self.accelerator.device,
            )
        network.train()
        losses = self._of_all_processes(losses)
        if bad := int((~losses.isfinite()).any(1).sum()):
            if self.accelerator.is_main_process:
                tqdm.write(
                    f"warning: no held-out loss of step {step}: it is not finite for {bad} of {len(losses)} images"
                )
            return
        means = losses.double().mean(0).tolist()
        named = {f"heldout_loss_t{part:g}": mean for part, mean in zip(EIGHTHS, means, strict=True)}
        self.accelerator.log({"heldout_loss": sum(means) / len(means)} | named, step=step)
        if self.accelerator.is_main_process:
            self._write(self.path(folder, step), step, losses)

    def _of_all_processes(self, losses: torch.Tensor) -> torch.Tensor:
        """(m, 8) of this process → (n, 8) of all images, in their order, on the CPU."""
        world = self.accelerator.num_processes
        gathered = self.accelerator.gather(losses.to(self.accelerator.device)).cpu()
        return gathered.unflatten(0, (world, -1)).transpose(0, 1).flatten(0, 1)[: len(self.images.numbers)]

    def _write(self, path: Path, step: int, losses: torch.Tensor) -> None:
        content = {
            "step": step,
            "times": heldout_times(self.transport),
            "images": self.images.fingerprint,
            "loss": [[float(f"{value:.6g}") for value in row] for row in losses.tolist()],
        }
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(content) + "\n")


def make_heldout_loss(
    images: HeldOutImages | None, transport: Transport, accelerator: Accelerator
) -> HeldOutLoss | None:
    """Read this process's part of the held-out images; None if there are none.

    Raises:
        UserError: an image can't be read.
    """
    if images is None:
        return None
    count, world = len(images.numbers), accelerator.num_processes
    # process r has the images r, r + world, …; the last ones are repeated until all have as many, as FSDP2 asks for
    rows = np.minimum(np.arange(accelerator.process_index, -(-count // world) * world, world), count - 1)
    return HeldOutLoss(images, images.latents(rows), rows, transport, accelerator)


def heldout_is_due(config: TrainConfig, step: int) -> bool:
    """Whether a run measures after ``step``: every so many steps, with each evaluation, and after the last."""
    return step == config.steps or any(
        every and step % every == 0 for every in (config.heldout_every, config.eval_every)
    )
