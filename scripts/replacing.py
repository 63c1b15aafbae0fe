"""Which folders the scripts that make the assets may replace."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from sit.utils.errors import UserError


def refuse_others(folder: Path, title: str, files: Collection[str]) -> None:
    """Whether ``folder`` is free, or an asset made before: with ``files`` alone and a README that begins by ``title``.

    Raises:
        UserError: something else is there, which would be lost.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    readme = folder / "README.md"
    is_asset = readme.is_file() and readme.read_text(errors="replace").splitlines()[:1] == [title]
    if not is_asset or not {entry.name for entry in folder.iterdir()} <= set(files):
        raise UserError(f"`output_dir={folder}` holds something else than what this makes; choose a new folder")
