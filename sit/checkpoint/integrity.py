"""Whether a checkpoint folder is as it was written: an index of its files with sizes and checksums, written last."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sit.utils.checksums import crc32_of_file, sealed, unsealed
from sit.utils.errors import UserError

INDEX = "sit.json"

FORMAT = 2
"""1, of version 0.1.0: checksums of blocks of each file, and none of the index itself"""

_BLOCK = 1 << 16  # bytes; in format 1 a checksum was of at most _BLOCKS of them, spread evenly over the file
_BLOCKS = 64


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write an object as JSON whose closing brace is the last byte, so that no beginning of it is valid."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")


def write_index(folder: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint's ``sit.json``: ``content``, the format, every file's size and checksum, and its own."""
    index = {"format": FORMAT, **content, "files": fingerprints(folder)}
    (folder / INDEX).write_text(sealed(index), encoding="utf-8")


def fingerprints(folder: Path) -> dict[str, dict[str, int]]:
    """Size in bytes and CRC-32, over every byte, of every file below ``folder``, by its path in it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): fingerprint(path) for path in files}


def fingerprint(path: Path) -> dict[str, int]:
    """A file's size in bytes and the CRC-32 of all of it."""
    return {"size": path.stat().st_size, "crc32": crc32_of_file(path)}


def earlier_fingerprint(path: Path) -> dict[str, int]:
    """That of format 1: the CRC-32 of at most 64 blocks of 64 KiB spread evenly over the file, ends included."""
    size = path.stat().st_size
    if size <= _BLOCK * _BLOCKS:
        return fingerprint(path)
    starts = [(size - _BLOCK) * index // (_BLOCKS - 1) for index in range(_BLOCKS)]
    return {"size": size, "crc32": crc32_of_file(path, [(start, _BLOCK) for start in starts])}


def read_index(folder: Path) -> dict[str, Any]:
    """The object in a checkpoint's ``sit.json``.

    Raises:
        FileNotFoundError: it is missing.
        UserError: it must not be read, or it is damaged or of a newer version.
    """
    try:
        text = (folder / INDEX).read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise _refused(folder / INDEX, error) from error
    try:
        index, has_checksum = unsealed(text)
        earlier = index["format"] == 1
        files = index["files"]
        numbers = [entry[name] for entry in files.values() for name in ("size", "crc32")]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / INDEX} is cut off or damaged") from error
    if not isinstance(index["format"], int) or index["format"] > FORMAT:
        raise UserError(f"{folder} is of format {index['format']}, newer than this program")
    if has_checksum == earlier or not all(isinstance(number, int) for number in numbers):
        raise UserError(f"{folder / INDEX} is damaged")
    return index


def flaw(folder: str | Path, unread: str | None = None, contents: bool = True) -> str | None:
    """Why a checkpoint folder of ours is not complete, as one phrase; None if it is.

    One whose ``training/`` was removed, to make it small, is complete: it samples, and does not resume.

    Args:
        folder: which.
        unread: the beginning of the paths of files that are not to be read; their sizes are looked at.
        contents: False looks at the sizes of all files and reads only the index.

    Raises:
        UserError: a file must not be read, so that nothing can be said.
    """
    folder = Path(folder)
    slim = not os.path.lexists(folder / "training")
    try:
        index = read_index(folder)
    except FileNotFoundError:
        return f"{INDEX} is missing"
    except UserError as error:
        if isinstance(error.__cause__, PermissionError):
            raise
        return str(error).removeprefix(f"{folder}/").removeprefix(f"{folder} ")
    compute = earlier_fingerprint if index["format"] == 1 else fingerprint
    for name, expected in index["files"].items():
        if slim and name.startswith("training/"):
            continue
        read = contents and not (unread and name.startswith(unread))
        if reason := _flaw_of_file(folder / name, name, expected, compute if read else None):
            return reason
    return None


def _flaw_of_file(
    path: Path, name: str, expected: dict[str, int], compute: Callable[[Path], dict[str, int]] | None
) -> str | None:
    try:
        size = path.stat().st_size
        if size != expected["size"]:
            return f"{name} has {size} bytes instead of {expected['size']}"
        if compute is not None and compute(path)["crc32"] != expected["crc32"]:
            return f"{name} has been changed or damaged"
    except FileNotFoundError:
        return f"{name} is missing"
    except PermissionError as error:
        raise _refused(path, error) from error
    except OSError as error:
        return f"{name} can't be read ({error.strerror})"
    return None


def _refused(path: Path, error: OSError) -> UserError:
    return UserError(f"{path} can't be read ({error.strerror})")


def is_complete(folder: str | Path) -> bool:
    """Whether every file of a checkpoint is there with its size, and the index is whole."""
    return flaw(folder, contents=False) is None
