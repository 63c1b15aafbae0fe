"""Snapshots of a run's post-hoc EMA: folders beside its checkpoints, written whole and kept for good.

    posthoc-ema/step-0001000/
      0.05.safetensors, 0.1.safetensors     the average of that relative length, in float16
      sit.json                              the step, the averages, and the size and checksum of each file

EDM2's program stores float16 too. A tensor with values beyond its range stays float32.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from sit.checkpoint.integrity import INDEX, flaw, read_index, write_index
from sit.utils.errors import UserError
from sit.utils.files import atomic_folder
from sit.version import __version__

SNAPSHOTS = "posthoc-ema"
"""The folder of a run that has them."""

logger = logging.getLogger(__name__)


def save_snapshot(run: Path, step: int, averages: Mapping[float, Mapping[str, torch.Tensor]]) -> Path:
    """Write the snapshot of a step; it appears under its name only when it is complete.

    Args:
        run: the run's folder.
        step: optimizer steps taken.
        averages: by relative length, the weights by parameter.

    Returns:
        The snapshot's folder.

    Raises:
        UserError: the folder exists, can't be written, or the disk is full.
    """
    folder = run / SNAPSHOTS / f"step-{step:07d}"
    with atomic_folder(folder) as place:
        names = {}
        for sigma, weights in averages.items():
            names[str(sigma)] = f"{sigma}.safetensors"
            save_file({name: _stored(tensor) for name, tensor in weights.items()}, place / names[str(sigma)])
        write_index(place, {"written_by": f"sit-atconv {__version__}", "step": step, "averages": names})
    return folder


def _stored(tensor: torch.Tensor) -> torch.Tensor:
    half = tensor.detach().cpu().half().contiguous()
    return half if bool(half.isfinite().all()) else tensor.detach().cpu().contiguous()


def find_snapshots(run: str | Path) -> list[tuple[int, Path]]:
    """The snapshots of a run folder, complete or not, as (step, folder), by step."""
    found = [(re.fullmatch(r"step-(\d+)", place.name), place) for place in (Path(run) / SNAPSHOTS).glob("step-*")]
    return sorted((int(match[1]), place) for match, place in found if match and place.is_dir())


def whole_snapshots(run: str | Path) -> list[tuple[int, dict[float, Path]]]:
    """The complete snapshots of a run folder as (step, file of each average by its relative length), by step.

    Damaged ones are skipped with a notice.
    """
    whole = []
    for step, folder in find_snapshots(run):
        reason = flaw(folder)
        if reason is None:
            whole.append((step, _averages(folder)))
        else:
            logger.warning("note: skipping the snapshot %s: %s", folder, reason)
    return whole


def _averages(folder: Path) -> dict[float, Path]:
    index = read_index(folder)
    try:
        return {float(sigma): folder / name for sigma, name in index["averages"].items() if name in index["files"]}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{folder / INDEX} does not say which averages the snapshot has") from error
