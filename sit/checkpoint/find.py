"""Which checkpoint a path means: a run's newest complete one, a folder, or a file."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

from sit.checkpoint.integrity import INDEX, flaw
from sit.checkpoint.known import KNOWN, from_name, is_name
from sit.utils.errors import UserError
from sit.utils.weight_files import folder_weights, is_weights_name

_STEP = re.compile(r"step-(\d+)$")

FOR_SAMPLING = "training/"
"""what sampling does not read, and its checksums are not compared then"""

FOR_RESUMING = "vae/"
"""what resuming does not read: the run names its VAE"""


logger = logging.getLogger(__name__)


def find_checkpoints(run: str | Path) -> list[tuple[int, Path]]:
    """The checkpoints of a run folder, complete or not, as (step, folder), by step.

    Raises:
        UserError: ``checkpoints/`` is there and can't be read.
    """
    place = Path(run) / "checkpoints"
    try:
        names = os.listdir(place)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{place} can't be read ({error.strerror}), so the run's checkpoints can't be found") from error
    found = [(int(match[1]), place / name) for name in names if (match := _STEP.match(name))]
    return sorted((step, folder) for step, folder in found if folder.is_dir())


def newest_checkpoint(run: str | Path, resumable: bool = False) -> Path | None:
    """The newest complete checkpoint of a run folder; None if there is none at all yet.

    Damaged ones are skipped with a notice; with ``resumable``, so are those without ``training/``.

    Args:
        run: the run's folder.
        resumable: whether it is to be resumed, which does not read its VAE; sampling does not read ``training/``.

    Raises:
        UserError: there are checkpoints, but none can be used, or one must not be read.
    """
    checkpoints = find_checkpoints(run)
    for _, folder in reversed(checkpoints):
        reason = flaw(folder, unread=FOR_RESUMING if resumable else FOR_SAMPLING)
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


def resolve(path: str | Path, unread: str | None = FOR_SAMPLING) -> Path:
    """The checkpoint that a path means: a run's newest complete one, a checkpoint folder, or a single weights file.

    A name of :mod:`sit.checkpoint.known` means the file or folder that it stands for.

    Args:
        path: as above.
        unread: what will not be read of a checkpoint, as in :func:`sit.checkpoint.integrity.flaw`.

    Raises:
        UserError: nothing is there, nothing usable is there, or it is something else.
    """
    if is_name(path):
        path = from_name(str(path))
    path = Path(path)
    if path.is_file():
        if not is_weights_name(path.name) or not (path.parent / "config.json").is_file():
            return path
        read = folder_weights(path.parent)
        if path not in read and path.suffix != ".json":
            raise UserError(
                f"{path} stands beside {read[0].name}, which is what is read there; move one of the two away"
            )
        path = path.parent.parent if (path.parent.parent / "model_index.json").is_file() else path.parent
    if path.name == "checkpoints" and is_run(path.parent):
        path = path.parent
    if path.name == "transformer" and (path.parent / "model_index.json").is_file():
        path = path.parent
    if not path.exists():
        raise UserError(f"{path}: no such run, checkpoint folder or file, and no name among {', '.join(KNOWN)}")
    if is_run(path):
        newest = newest_checkpoint(path, resumable=unread == FOR_RESUMING)
        if newest is None:
            raise UserError(f"the run {path} has no checkpoint yet")
        return newest
    if (path / INDEX).exists():
        if reason := flaw(path, unread):
            raise UserError(f"the checkpoint {path} is not complete: {reason}; use another one")
        return path
    if (path / "model_index.json").is_file() or (path / "config.json").is_file():
        return path
    raise UserError(f"{path} is neither a run, nor a checkpoint folder, nor a weights file")
