"""What experiments share: training a run into a folder unless it is there."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState

from sit.checkpoint.find import find_checkpoints
from sit.checkpoint.integrity import is_complete
from sit.training.config import TrainConfig
from sit.training.recipes import load_run_settings
from sit.training.run_folder import read_metrics
from sit.training.trainer import train
from sit.utils.errors import UserError


def ensure_trained(config: TrainConfig, folder: Path) -> list[dict[str, Any]]:
    """Train a run to its last step, or go on with it; what is finished is left as it is.

    Returns:
        The rows of the run's ``metrics.jsonl``.

    Raises:
        UserError: the folder has a run of other settings.
    """
    if (folder / "config.yaml").is_file():
        begun = dataclasses.replace(load_run_settings(folder), output_dir=None, resume=None)
        for name, then in dataclasses.asdict(begun).items():
            if (now := getattr(config, name)) != then:
                raise UserError(f"{folder} was made with {name} {then}, not {now}; choose another `out`")
    if not _is_finished(config, folder):
        AcceleratorState._reset_state(reset_partial_state=True)  # each run of this process begins without the last's
        try:
            train(dataclasses.replace(config, output_dir=str(folder), resume="auto"))
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
    return read_metrics(folder / "metrics.jsonl")


def _is_finished(config: TrainConfig, folder: Path) -> bool:
    return any(step == config.steps and is_complete(place) for step, place in find_checkpoints(folder))
