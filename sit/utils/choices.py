"""Words that a setting may be, and other spellings of them."""

from __future__ import annotations

import types
from collections.abc import Collection
from typing import Any, Literal, Union, get_args, get_origin

Precision = Literal["float32", "tf32", "bfloat16"]
"""``float32``; ``tf32``: its matrix products rounded to TF32, on NVIDIA GPUs; ``bfloat16``: the network's weights."""


SAME = (
    ("bfloat16", "bf16"),
    ("float16", "fp16", "half"),
    ("float32", "fp32", "no"),
    ("increasing-decreasing", "inccreasing-decreasing"),  # as the published script spells it
)
"""words for one thing, of which a setting knows one"""


def understood(value: str, choices: Collection[str]) -> str:
    """The choice that ``value`` means: itself, in other capitals, or by another of its names; else ``value``."""
    if value in choices:
        return value
    word = value.lower()
    names = {choice.lower(): choice for choice in choices}
    others = next((group for group in SAME if word in group), (word,))
    return next((names[name] for name in (word, *others) if name in names), value)


def choices(hint: Any) -> list[str]:
    """The words that a value of this type may be; none if others are possible."""
    if get_origin(hint) is Literal:
        return [str(value) for value in get_args(hint)]
    if hint is bool:
        return ["True", "False"]
    if hint is type(None):
        return ["None"]
    if get_origin(hint) in (Union, types.UnionType):
        members = get_args(hint)
        return [] if str in members else [choice for member in members for choice in choices(member)]
    return []
