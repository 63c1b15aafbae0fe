"""What a checkpoint holds for resuming only: raw weights, optimizer, count of EMA updates, and float16's loss scale.

State dicts are gathered on the main process, unsharded, and name each parameter (``torch.distributed.checkpoint``). So
a run may go on with another number of processes, sharded or not.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

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

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def _spread() -> StateDictOptions:
    """Options to load state that only the main process has read."""
    distributed = torch.distributed.is_initialized()
    return StateDictOptions(full_state_dict=True, broadcast_from_rank0=distributed)


@dataclass(frozen=True)
class TrainingState:
    """The parts of a run that change as it trains.

    Attributes:
        model: the network, without the wrapper that sums gradients.
        optimizer: the optimizer itself, not Accelerate's wrapper.
        ema: the moving average of the network's weights, without a projector's.
        scaler: of the loss; only float16 has one.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    ema: EMAModel
    scaler: torch.amp.GradScaler | None = None

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

    def save(self, folder: Path, raw: dict, optimizer: dict) -> None:
        """Write the raw weights and the optimizer state that :meth:`gather` gave into ``folder``."""
        folder.mkdir(exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in raw.items()}, folder / "model.safetensors")
        rest = {"optimizer": optimizer, "ema_updates": self.ema.optimization_step}
        if self.scaler is not None:
            rest["scaler"] = self.scaler.state_dict()
        torch.save(rest, folder / "optimizer.pt")

    def load(self, checkpoint: Path) -> None:
        """Take up the state in a checkpoint's folder; every process must call it, with the same folder."""
        training = checkpoint / "training"
        rest = torch.load(training / "optimizer.pt", map_location="cpu", weights_only=True)
        raw = load_file(training / "model.safetensors")
        averaged = load_file(checkpoint / "transformer" / "diffusion_pytorch_model.safetensors")
        projector = {name: tensor for name, tensor in raw.items() if name.startswith(SiT.PROJECTOR)}
        set_model_state_dict(self.model, averaged | projector, options=_spread())
        self.ema.shadow_params = [p.detach().clone() for p in averaged_parameters(self.model)]
        self.ema.optimization_step = rest["ema_updates"]
        set_model_state_dict(self.model, raw, options=_spread())
        set_optimizer_state_dict(self.model, self.optimizer, rest["optimizer"], options=_spread())
        if self.scaler is not None and "scaler" in rest:  # it is not in a checkpoint of another precision
            self.scaler.load_state_dict(rest["scaler"])
