"""Which checkpoint a path means: a run's newest complete one, a folder, or a file."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from sit.checkpoint.info import WEIGHTS
from sit.checkpoint.integrity import INDEX, flaw
from sit.utils.errors import UserError

_STEP = re.compile(r"step-(\d+)$")


logger = logging.getLogger(__name__)


def find_checkpoints(run: str | Path) -> list[tuple[int, Path]]:
    """The checkpoints of a run folder, complete or not, as (step, folder), by step."""
    folders = (Path(run) / "checkpoints").glob("step-*")
    found = [(int(match[1]), folder) for folder in folders if (match := _STEP.match(folder.name)) and folder.is_dir()]
    return sorted(found)


def newest_checkpoint(run: str | Path, resumable: bool = False) -> Path | None:
    """The newest complete checkpoint of a run folder; None if there is none at all yet.

    Damaged ones are skipped with a notice; with ``resumable``, so are those without ``training/``.

    Raises:
        UserError: there are checkpoints, but none can be used.
    """
    checkpoints = find_checkpoints(run)
    for _, folder in reversed(checkpoints):
        reason = flaw(folder)
        if reason is None and resumable and not (folder / "training").is_dir():
            reason = "it has no training/ to resume from"
        if reason is None:
            return folder
        logger.warning("note: skipping the checkpoint %s: %s", folder, reason)
    if checkpoints:
        raise UserError(f"none of the {len(checkpoints)} checkpoints in {run} can be used; the newest: {reason}")
    return None


def is_run(path: Path) -> bool:
    """Whether a folder is a run's."""
    return (path / "checkpoints").is_dir() or (path / "config.yaml").is_file()


def resolve(path: str | Path) -> Path:
    """The checkpoint that a path means: a run's newest complete one, a checkpoint folder, or a single weights file.

    Raises:
        UserError: nothing is there, nothing usable is there, or it is something else.
    """
    path = Path(path)
    if path.is_file():
        if path.name != WEIGHTS or not (path.parent / "config.json").is_file():
            return path
        path = path.parent.parent if (path.parent.parent / "model_index.json").is_file() else path.parent
    if path.name == "checkpoints" and is_run(path.parent):
        path = path.parent
    if path.name == "transformer" and (path.parent / "model_index.json").is_file():
        path = path.parent
    if not path.exists():
        raise UserError(f"{path}: no such run, checkpoint folder or file")
    if is_run(path):
        newest = newest_checkpoint(path)
        if newest is None:
            raise UserError(f"the run {path} has no checkpoint yet")
        return newest
    if (path / INDEX).exists():
        if reason := flaw(path):
            raise UserError(f"the checkpoint {path} is not complete: {reason}; use another one")
        return path
    if (path / "model_index.json").is_file() or (path / "config.json").is_file():
        return path
    raise UserError(f"{path} is neither a run, nor a checkpoint folder, nor a weights file")
