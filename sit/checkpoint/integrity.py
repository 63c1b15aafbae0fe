"""Whether a checkpoint folder is as it was written: an index of its files with sizes and checksums, written last."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

INDEX = "sit.json"


FORMAT = 1


_BLOCK = 1 << 16  # bytes; a checksum reads at most _BLOCKS of them, spread evenly over the file


_BLOCKS = 64


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write an object as JSON whose closing brace is the last byte, so that no beginning of it is valid."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")


def fingerprint(path: Path) -> dict[str, int]:
    """A file's size in bytes and a CRC-32 of at most 64 blocks of 64 KiB spread evenly over it, ends included.

    Files up to 4 MiB are read in full. Reading a multi-gigabyte file costs milliseconds; what it can miss is a change
    of a few bytes between the blocks, which neither a crash nor a full disk makes.
    """
    size = path.stat().st_size
    crc = 0
    with path.open("rb") as file:
        if size <= _BLOCK * _BLOCKS:
            crc = zlib.crc32(file.read())
        else:
            for index in range(_BLOCKS):
                file.seek((size - _BLOCK) * index // (_BLOCKS - 1))
                crc = zlib.crc32(file.read(_BLOCK), crc)
    return {"size": size, "crc32": crc}


def fingerprints(folder: Path) -> dict[str, dict[str, int]]:
    """The :func:`fingerprint` of every file below ``folder``, by its path in it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): fingerprint(path) for path in files}


def flaw(folder: str | Path) -> str | None:
    """Why a checkpoint folder of ours is not complete, as one phrase; None if it is.

    One whose ``training/`` was removed, to make it small, is complete: it samples, and does not resume.
    """
    folder = Path(folder)
    slim = not (folder / "training").exists()
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        files = index["files"]
    except FileNotFoundError:
        return f"{INDEX} is missing"
    except (OSError, ValueError, KeyError, TypeError):
        return f"{INDEX} is cut off or unreadable"
    if index.get("format", 0) > FORMAT:
        return f"it is of format {index['format']}, newer than this program"
    for name, expected in files.items():
        path = folder / name
        if slim and name.startswith("training/"):
            continue
        if not path.is_file():
            return f"{name} is missing"
        size = path.stat().st_size
        if size != expected["size"]:
            return f"{name} has {size} bytes instead of {expected['size']}"
        if fingerprint(path) != expected:
            return f"{name} has been changed or damaged"
    return None


def is_complete(folder: str | Path) -> bool:
    """Whether every file of a checkpoint is there as it was written."""
    return flaw(folder) is None
