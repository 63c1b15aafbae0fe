"""Checksums over every byte: of files, and of JSON files that carry their own.

CRC-32 (zlib's) finds every change within 32 bits in a row and misses others by chance once in 4·10⁹. It is against
disks, copies and crashes, not against an adversary.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_BLOCK = 1 << 20
_SEAL = re.compile(rb'([0-9a-f]{8})"\n}\Z')
_KEY = ',\n  "checksum": "'


def crc32_of_file(path: Path, parts: Iterable[tuple[int, int]] | None = None, crc: int = 0) -> int:
    """The CRC-32 of a file, or of ``parts`` of it, (offset, length) each, after bytes whose own is ``crc``.

    Raises:
        OSError: it can't be read.
    """
    with path.open("rb") as file:
        for offset, left in [(0, path.stat().st_size)] if parts is None else parts:
            file.seek(offset)
            while left and (block := file.read(min(_BLOCK, left))):
                crc, left = zlib.crc32(block, crc), left - len(block)
    return crc


def sealed(content: dict[str, Any]) -> str:
    """An object that is not empty as JSON, with the CRC-32 of the text before it as its last value."""
    body = json.dumps(content, indent=2, ensure_ascii=False).removesuffix("\n}") + _KEY
    return f'{body}{zlib.crc32(body.encode()):08x}"\n}}'


def unsealed(text: bytes) -> tuple[dict[str, Any], bool]:
    """The object in a JSON text, without its checksum, and whether it had one.

    Raises:
        ValueError: it is not an object in JSON, or not as :func:`sealed` wrote it.
    """
    content = json.loads(text)
    if not isinstance(content, dict):
        raise ValueError("not an object")
    if "checksum" not in content:
        return content, False
    seal = _SEAL.search(text)
    if seal is None or zlib.crc32(text[: seal.start()]) != int(seal[1], 16):
        raise ValueError("not as it was written")
    del content["checksum"]
    return content, True
