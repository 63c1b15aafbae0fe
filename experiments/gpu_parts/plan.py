"""All parts in their order."""

from __future__ import annotations

from pathlib import Path

import torch

from gpu_parts import kernels, sampling, speed, study, training
from gpu_parts.pieces import Part


def parts(device: torch.device, tiny: bool, out: Path) -> list[Part]:
    """The parts for a device; ``tiny``: in their tiny form; the study's folder is in ``out``."""
    return [
        kernels.part(device, tiny), sampling.part(device, tiny), speed.part(device, tiny),
        training.part(tiny), study.part(out, tiny),
    ]  # fmt: skip
