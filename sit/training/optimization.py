"""The optimizer and the gradient that it gets."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from sit.training.config import TrainConfig
from sit.training.ema import trained_parameters
from sit.training.muon import MuonWithAdamW, hidden_matrices
from sit.utils.errors import UserError


def make_optimizer(network: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """The config's optimizer, with its settings, of all parameters that are not frozen: AdamW, as published, or Muon.

    Raises:
        UserError: Muon, where all that it is for is frozen.
    """
    trained = trained_parameters(network)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(
            trained, lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay, fused=True
        )
    matrices = list(hidden_matrices(network))
    if not matrices:
        raise UserError("`optimizer=muon`: all matrices that Muon is for, those in the blocks, are frozen; use adamw")
    ours = set(matrices)
    return MuonWithAdamW(
        matrices,
        [parameter for parameter in trained if parameter not in ours],
        lr=config.learning_rate,
        betas=config.betas,
        weight_decay=config.weight_decay,
    )


def gradient_norm(parameters: Sequence[nn.Parameter], limit: float | None) -> torch.Tensor:
    """The Euclidean norm () of the whole gradient, which is then scaled down to ``limit``; None and 0 leave it.

    Of sharded parameters too; every process must call it then. It does not wait for the device.
    """
    if not limit:
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    else:
        norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
    if hasattr(norm, "full_tensor"):
        norm = norm.full_tensor()
    return norm
