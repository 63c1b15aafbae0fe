"""Sizes in bytes, as messages and tables say them."""

from __future__ import annotations


def size_text(size: float) -> str:
    """A number of bytes to three digits, in the unit that leaves fewest: ``512 B``, ``3.9 KB``, ``10.8 GB``."""
    for unit, in_bytes in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if size >= in_bytes:
            return f"{float(f'{size / in_bytes:.3g}'):g} {unit}"
    return f"{size:.0f} B"
