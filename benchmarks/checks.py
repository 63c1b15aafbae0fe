"""What the benchmarks check of their arguments."""

from __future__ import annotations

from sit.utils.errors import UserError


def at_least_one(arguments: object, *names: str) -> None:
    """Raise UserError unless the named arguments are 1 or more."""
    for name in names:
        if getattr(arguments, name) < 1:
            raise UserError(f"`{name}` must be at least 1, not {getattr(arguments, name)}")
