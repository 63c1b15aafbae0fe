"""The parts that are asked for, in their order."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

import torch

from gpu_parts.pieces import Part


def _kernels(device: torch.device, tiny: bool, out: Path) -> Part:
    from gpu_parts import kernels

    return kernels.part(device, tiny)


def _sampling(device: torch.device, tiny: bool, out: Path) -> Part:
    from gpu_parts import sampling

    return sampling.part(device, tiny)


def _speed(device: torch.device, tiny: bool, out: Path) -> Part:
    from gpu_parts import speed

    return speed.part(device, tiny)


def _training(device: torch.device, tiny: bool, out: Path) -> Part:
    from gpu_parts import training

    return training.part(tiny)


def _study(device: torch.device, tiny: bool, out: Path) -> Part:
    from gpu_parts import study

    return study.part(out, tiny)


PARTS: dict[str, Callable[[torch.device, bool, Path], Part]] = {
    "kernels": _kernels,
    "sampling": _sampling,
    "speed": _speed,
    "training": _training,
    "study": _study,
}
"""each loads what it needs alone, as some of it takes seconds"""


def parts(names: Collection[str], device: torch.device, tiny: bool, out: Path) -> list[Part]:
    """The parts of these names for a device; ``tiny``: in their tiny form; the study's folder is in ``out``."""
    return [make(device, tiny, out) for name, make in PARTS.items() if name in names]
