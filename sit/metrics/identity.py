"""What features and images are of, in a form that is written into files and compared when they are read."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np

About = dict[str, Any]
"""What something is of, as JSON has it; equal for equal things, wherever their files lie"""


@dataclass(frozen=True)
class Identity:
    """What something is called, and what it is; equal for equal content, whatever it is called.

    Attributes:
        name: in words, perhaps with the path of its file.
        content: a hash of what it is, the same wherever the file lies.
    """

    name: str = field(compare=False)
    content: str

    def __str__(self) -> str:
        return f"{self.name} ({self.content[:12]})"


def hash_arrays(*arrays: np.ndarray) -> str:
    """16 hexadecimal digits of arrays: their types, shapes and values, bit by bit."""
    digest = hashlib.blake2b(digest_size=8)
    for array in arrays:
        digest.update(f"{array.dtype} {array.shape} ".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def hash_numbers(numbers: np.ndarray) -> str:
    """16 hexadecimal digits of whole numbers (n,)."""
    return hashlib.blake2b(np.ascontiguousarray(numbers, dtype="<i8").tobytes(), digest_size=8).hexdigest()


def canonical(about: About) -> str:
    """The one text of it: keys in order, tuples as lists."""
    return json.dumps(about, sort_keys=True, ensure_ascii=False, default=str)


def short_hash(about: About) -> str:
    """16 hexadecimal digits that tell it from others, for names of folders and files."""
    return hashlib.blake2b(canonical(about).encode(), digest_size=8).hexdigest()


def same(one: About, other: About) -> bool:
    """Whether both are of the same thing, one of them perhaps read from JSON."""
    return canonical(one) == canonical(other)


def difference(one: About, other: About) -> str:
    """The first entry in which they differ, for messages: its name and both values."""
    for name in sorted({*one, *other}):
        ours, theirs = one.get(name), other.get(name)
        if canonical({"": ours}) != canonical({"": theirs}):
            if isinstance(ours, dict) and isinstance(theirs, dict):
                return f"{name}.{difference(ours, theirs)}"
            return f"{name}: {ours} and {theirs}"
    return "nothing"
