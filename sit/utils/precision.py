"""Autocast, in what precision float32 networks compute on GPUs, and in what precision a network samples."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from sit.utils.choices import Precision
from sit.utils.errors import UserError


def is_autocast(device_type: str) -> bool:
    """Whether autocast is on for a kind of device, such as ``cuda``."""
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def allow_tf32(device: torch.device, allowed: bool = True) -> None:
    """Let GPUs round matrix products of float32 tensors to TF32 (10 bits of mantissa), or forbid it.

    The published SiT allows it, for training and sampling; PyTorch by default does not. Other devices have no TF32.
    """
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if allowed else "highest")


def for_sampling(precision: Precision | None, device: torch.device) -> torch.dtype | None:
    """Set up the precision, by default ``tf32`` on GPUs, and give the network's dtype; None is its file's own.

    The sampler integrates in float32, whatever the network computes in.

    Raises:
        UserError: TF32 on a device that has none.
    """
    if precision == "tf32" and device.type != "cuda":
        raise UserError(f"`precision=tf32` is for GPUs, and this is {device.type}: use float32 or bfloat16")
    allow_tf32(device, precision in (None, "tf32"))
    if precision is None:
        return None
    return torch.bfloat16 if precision == "bfloat16" else torch.float32


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """The state of a sampler as it is integrated: float64 stays, everything else becomes float32."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


@contextmanager
def full_float32() -> Iterator[None]:
    """No TF32 within, neither in matrix products nor in convolutions: for figures that are compared across machines."""
    products, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn
    kept = {"enabled": cudnn.enabled, "benchmark": cudnn.benchmark, "deterministic": cudnn.deterministic}
    torch.set_float32_matmul_precision("highest")
    try:
        with cudnn.flags(**kept, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(products)
