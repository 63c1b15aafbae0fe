"""What the text that names a data set says of files: which it means, and what follows an ``@``."""

from __future__ import annotations

import glob
from pathlib import Path


def files_of(text: str) -> list[str]:
    """The file or folder of this name, or else those that it matches as a pattern, sorted; none if it is elsewhere."""
    return [text] if Path(text).exists() else sorted(glob.glob(text, recursive=True))


def split_at(text: str) -> tuple[str, str]:
    """What stands before the last ``@`` and what follows it, such as a split: ``a.parquet@train`` has two parts.

    An ``@`` in the name of a file that exists, or of a folder on the way to one, belongs to the name: what follows is
    then empty.
    """
    where, at, after = text.rpartition("@")
    return (text, "") if not at or "/" in after or files_of(text) else (where, after)
