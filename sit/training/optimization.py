"""The optimizer and the gradient that it gets."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from sit.training.config import TrainConfig
from sit.training.ema import trained_parameters


def make_optimizer(network: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW on all parameters that are not frozen, as published, with the config's settings."""
    return torch.optim.AdamW(
        trained_parameters(network),
        lr=config.learning_rate,
        betas=config.betas,
        weight_decay=config.weight_decay,
        fused=True,
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
