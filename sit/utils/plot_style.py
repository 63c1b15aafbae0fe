"""How lines and points of one plot are told apart."""

from __future__ import annotations

from typing import Any

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
"""told apart with any color vision (Okabe & Ito 2008); its yellow is left out, which white paper swallows"""

MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", ":", "-.")


def style(index: int) -> dict[str, Any]:
    """Color, marker and line of the line or points of number ``index``, as Matplotlib's keyword arguments.

    The first 7 differ in color and marker, the first 28 in color or line, and the first 49 in color or marker, which is
    what points without a line have.
    """
    turn = index // len(COLORS)
    return {
        "color": COLORS[index % len(COLORS)],
        "marker": MARKERS[(index + turn) % len(MARKERS)],
        "linestyle": LINES[turn % len(LINES)],
    }
