"""Evaluations while a run trains: what makes the numbers is handed in, as it stands beside training and not below."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel

from sit.checkpoint.info import CheckpointInfo
from sit.checkpoint.load import Loaded
from sit.latents.vae import NotFinite
from sit.model import SiT
from sit.training.config import TrainConfig
from sit.training.data import Opened
from sit.training.ema import averaged_parameters, ema_weights
from sit.transport.transport import Transport
from sit.utils.errors import UserError

Evaluation = Callable[[Loaded, Path], dict[str, float]]
"""Called by every process with the network and a work folder, it gives the metrics by name, on the main process.

It raises NotFinite in every process where samples are not finite."""

MakeEvaluation = Callable[[TrainConfig, torch.device], Evaluation]
"""Makes it of a run's settings, and raises UserError where that can't be."""

WORK = "evaluation"
"""the run's folder that keeps the reference's features"""


def evaluation_of(config: TrainConfig, make: MakeEvaluation | None, accelerator: Accelerator) -> Evaluation | None:
    """The evaluation of a run; None if it has none.

    Raises:
        UserError: it can't be had, or not with weights that are sharded over processes.
    """
    if not config.eval_every:
        return None
    if make is None:
        raise UserError(f"`eval_every={config.eval_every}`: give `train` what evaluates, as sit.train does")
    if getattr(accelerator, "is_fsdp2", False):
        raise UserError(
            f"`eval_every={config.eval_every}`: sharded weights are evaluated from a checkpoint, by eval_fid.py"
        )
    return make(config, accelerator.device)


def evaluation_is_due(config: TrainConfig, step: int) -> bool:
    """Whether a run is evaluated after ``step``: every so many steps, and after the last."""
    return bool(config.eval_every) and (step % config.eval_every == 0 or step == config.steps)


def log_evaluation(
    evaluation: Evaluation,
    step: int,
    *,
    folder: Path,
    config: TrainConfig,
    opened: Opened,
    network: SiT,
    ema: EMAModel,
    transport: Transport,
    accelerator: Accelerator,
) -> None:
    """Evaluate the averaged weights, and log the metrics as ``eval_…``; every process must call it.

    Weights or samples that are not finite cost a line, not the run.

    Args:
        evaluation: what makes the metrics.
        step: the number of the step, from 1.
        folder: the run's.
        config: the run's.
        opened: the data, for its classes, and the VAE.
        network: without the wrapper that sums gradients; in training mode before and after.
        ema: the moving average of its weights.
        transport: what it was trained on.
        accelerator: for its device and trackers.
    """
    network.eval()
    with ema_weights(network, ema), torch.no_grad():
        if all(bool(parameter.isfinite().all()) for parameter in averaged_parameters(network)):
            names = list(opened.data.classes)
            info = CheckpointInfo(step=step, classes=len(names), label_names=names, mixer=config.mixer)
            loaded = Loaded(network, transport, info, opened.vae_name, accelerator.device, folder)
            loaded.vae = opened.vae
            try:
                metrics = evaluation(loaded, folder / WORK)
                accelerator.log({f"eval_{name}": value for name, value in metrics.items()}, step=step)
            except NotFinite as error:
                accelerator.print(f"warning: no evaluation of step {step}: {error}")
        else:
            accelerator.print(f"warning: no evaluation of step {step}: weights are not finite")
    network.train()
