"""What a checkpoint holds for resuming only: raw weights, optimizer, averages with their updates, float16's loss scale.

State dicts are gathered on the main process, unsharded, and name each parameter (``torch.distributed.checkpoint``). So
a run may go on with another number of processes, sharded or not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from sit.model import SiT
from sit.training.ema import averaged_parameters, ema_weights
from sit.utils.errors import UserError, first_line
from sit.utils.files import save_torch

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def _spread() -> StateDictOptions:
    """Options to load state that only the main process has read."""
    distributed = torch.distributed.is_initialized()
    return StateDictOptions(full_state_dict=True, broadcast_from_rank0=distributed)


def _read(path: Path, load: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    try:
        return load(path)
    except OSError as error:
        raise UserError(f"{path} can't be read ({error.strerror or first_line(error)})") from error
    except Exception as error:  # torch and safetensors raise many kinds on a file that is not theirs
        raise UserError(f"{path} is damaged ({first_line(error)}); resume from another checkpoint") from error


def _average_file(folder: Path, sigma: float) -> Path:
    return folder / f"posthoc-ema-{sigma}.safetensors"


@dataclass(frozen=True)
class TrainingState:
    """The parts of a run that change as it trains.

    Attributes:
        model: the network, without the wrapper that sums gradients.
        optimizer: the optimizer itself, not Accelerate's wrapper.
        ema: the moving average of the network's weights, without a projector's.
        scaler: of the loss; only float16 has one.
        averages: those kept for post-hoc EMA, by relative length.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    ema: EMAModel
    scaler: torch.amp.GradScaler | None = None
    averages: Mapping[float, EMAModel] = field(default_factory=dict)

    def gather(self) -> tuple[dict, dict, dict]:
        """(EMA weights, raw weights, optimizer state), unsharded and on the CPU; every process must call it.

        Where weights are sharded, processes other than the main one get empty dicts.
        """
        with ema_weights(self.model, self.ema):
            whole = get_model_state_dict(self.model, options=WHOLE)
            averaged = {name: part.clone() for name, part in whole.items() if not name.startswith(SiT.PROJECTOR)}
        raw = get_model_state_dict(self.model, options=WHOLE)
        optimizer = get_optimizer_state_dict(self.model, self.optimizer, options=WHOLE)
        return averaged, raw, optimizer

    def gather_averages(self) -> dict[float, dict[str, torch.Tensor]]:
        """The parameters of each of ``averages``, as :meth:`gather` gives weights; every process must call it."""
        gathered = {}
        for sigma, average in self.averages.items():
            names = {name for name, _ in self.model.named_parameters() if not name.startswith(SiT.PROJECTOR)}
            with ema_weights(self.model, average):
                whole = get_model_state_dict(self.model, options=WHOLE)
                gathered[sigma] = {name: part.clone() for name, part in whole.items() if name in names}
        return gathered

    def save(self, folder: Path, raw: dict, optimizer: dict, averages: dict[float, dict]) -> None:
        """Write into ``folder`` what :meth:`gather` and :meth:`gather_averages` gave: weights, optimizer, averages."""
        folder.mkdir(exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in raw.items()}, folder / "model.safetensors")
        rest = {"optimizer": optimizer, "ema_updates": self.ema.optimization_step}
        if self.scaler is not None:
            rest["scaler"] = self.scaler.state_dict()
        for sigma, weights in averages.items():
            save_file({name: tensor.contiguous() for name, tensor in weights.items()}, _average_file(folder, sigma))
            rest["posthoc_ema_updates"] = self.averages[sigma].optimization_step
        save_torch(rest, folder / "optimizer.pt")

    def load(self, checkpoint: Path) -> None:
        """Take up the state in a checkpoint's folder; every process must call it, with the same folder.

        Raises:
            UserError: a file of it can't be read.
        """
        training = checkpoint / "training"
        rest = _read(training / "optimizer.pt", lambda path: torch.load(path, map_location="cpu", weights_only=True))
        raw = _read(training / "model.safetensors", load_file)
        averaged = _read(checkpoint / "transformer" / "diffusion_pytorch_model.safetensors", load_file)
        projector = {name: tensor for name, tensor in raw.items() if name.startswith(SiT.PROJECTOR)}
        set_model_state_dict(self.model, averaged | projector, options=_spread())
        self.ema.shadow_params = [p.detach().clone() for p in averaged_parameters(self.model)]
        self.ema.optimization_step = rest["ema_updates"]
        for sigma, average in self.averages.items():
            set_model_state_dict(self.model, raw | load_file(_average_file(training, sigma)), options=_spread())
            average.shadow_params = [p.detach().clone() for p in averaged_parameters(self.model)]
            average.optimization_step = rest["posthoc_ema_updates"]
        set_model_state_dict(self.model, raw, options=_spread())
        set_optimizer_state_dict(self.model, self.optimizer, rest["optimizer"], options=_spread())
        if self.scaler is not None and "scaler" in rest:  # it is not in a checkpoint of another precision
            self.scaler.load_state_dict(rest["scaler"])
