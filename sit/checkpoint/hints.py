"""What a published weights file may leave open, as commands take it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from sit.utils.errors import UserError


@dataclass(frozen=True)
class FileHints:
    """For published weights files: what they may leave open. None means "as the file says"."""

    weights: Literal["ema", "model"] = "ema"
    """which weights of a training checkpoint"""
    num_heads: int | None = None
    """attention heads, where the width is not that of a published size"""
    num_classes: int | None = None
    """classes, not counting the null class; without it the last row of the label table is taken for the null class"""
    time_reversed: bool | None = None
    """whether the network's time runs from data to noise (REPA)"""
    interpolant: Literal["linear", "gvp", "vp"] | None = None
    """path of the training"""
    prediction: Literal["velocity", "score", "noise"] | None = None
    """what the network predicts"""


@dataclass(frozen=True)
class Hints(FileHints):
    """:class:`FileHints` and the image size, for commands that have no other use for it."""

    image_size: int | tuple[int, int] | None = None
    """image size of the training in pixels, for networks without a positional table"""

    def refuse_for(self, folder: Path, but: tuple[str, ...] = ()) -> None:
        """Raise UserError if anything is told, of ``but`` apart: a ``folder`` of ours leaves nothing open."""
        told = [one.name for one in fields(self) if getattr(self, one.name) != one.default and one.name not in but]
        if told:
            names = ", ".join(f"`{name}`" for name in sorted(told))
            raise UserError(f"{folder} says itself what it is; {names} only serve for published weights files")
