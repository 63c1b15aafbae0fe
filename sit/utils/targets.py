"""Trying outputs before the work for them is done: can they be written, and is there room?"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from sit.utils.errors import UserError
from sit.utils.files import explain_os_errors
from sit.utils.sizes import size_text


def check_target(path: str | Path, argument: str, suffix: str = "", new: bool = False) -> None:
    """Raise UserError unless the file that ``argument`` names can be written; nothing is left at its place.

    Args:
        path: the file to be.
        argument: what names it, for messages.
        suffix: how its name must end.
        new: whether it must not exist yet.
    """
    path = Path(path)
    if suffix and path.suffix != suffix:
        raise UserError(f"`{argument}={path}` must end in {suffix}")
    if path.is_dir():
        raise UserError(f"`{argument}={path}` is a folder: name a file")
    if new and path.exists():
        raise UserError(f"`{argument}={path}` exists already; it is not overwritten")
    probe = path.with_name(f".{path.name}.{os.getpid()}.probe")
    with explain_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            probe.touch()
        finally:
            probe.unlink(missing_ok=True)


def check_room(folder: str | Path, needed: int, argument: str, what: str) -> None:
    """Raise UserError unless the disk of ``folder`` has ``needed`` bytes left for ``what``.

    Args:
        folder: a folder, there or to be made.
        needed: bytes.
        argument: what chooses another folder, for messages.
        what: what the bytes are, for messages.
    """
    folder = Path(folder).absolute()
    there = next((place for place in [folder, *folder.parents] if place.is_dir()), Path("/"))
    free = shutil.disk_usage(there).free
    if free < needed:
        raise UserError(
            f"{folder} has {size_text(free)} left, and {what} take {size_text(needed)}: make room, or choose "
            f"another disk by `{argument}`"
        )
