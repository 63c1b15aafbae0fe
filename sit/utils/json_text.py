"""JSON of numbers, some of which may be none that JSON knows."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any


def finite(found: Any) -> Any:
    """The same with None for numbers that are not finite, which JSON does not know."""
    if isinstance(found, Mapping):
        return {name: finite(value) for name, value in found.items()}
    if isinstance(found, list | tuple):
        return [finite(value) for value in found]
    return None if isinstance(found, float) and not math.isfinite(found) else found


def json_text(found: Any, indent: int | None = None) -> str:
    """It as JSON that every reader takes: ``null`` where a number is not finite."""
    return json.dumps(finite(found), indent=indent, ensure_ascii=False, allow_nan=False)
