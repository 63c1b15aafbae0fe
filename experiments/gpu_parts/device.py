"""The device of the parts, and what is told of it beside the figures."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from sit.utils.errors import UserError
from sit.utils.record import machine

LEAST = (8, 0)
"""the compute capability from which on a GPU has bfloat16"""


def gpu(tiny: bool) -> torch.device:
    """The GPU, or the CPU if ``tiny``.

    Raises:
        UserError: there is no GPU, or it has no bfloat16.
    """
    if tiny:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("there is no CUDA device here: give `tiny=True` for the tiny form on a CPU")
    device = torch.device("cuda", torch.cuda.current_device())
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST:
        raise UserError(
            f"{torch.cuda.get_device_name(device)} has compute capability {capability[0]}.{capability[1]} and so no "
            f"bfloat16: take a GPU of {LEAST[0]}.{LEAST[1]} or more"
        )
    return device


def triton_version() -> str | None:
    """The version of Triton, if it is installed."""
    try:
        return version("triton")
    except PackageNotFoundError:
        return None


def hardware(device: torch.device) -> dict[str, Any]:
    """What figures of different machines are told apart by."""
    found: dict[str, Any] = {"machine": machine(device), "cores": os.cpu_count(), "triton": triton_version()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"memory": properties.total_memory, "multiprocessors": properties.multi_processor_count,
                  "capability": [properties.major, properties.minor], "cuda": torch.version.cuda}  # fmt: skip
    return found


def release(device: torch.device) -> None:
    """Give back what a piece compiled and allocated."""
    import gc

    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def is_lost(device: torch.device) -> bool:
    """Whether the device answers no more in this process, as after an illegal access to its memory."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.zeros(1, device=device).item()
    except RuntimeError:
        return True
    return False
