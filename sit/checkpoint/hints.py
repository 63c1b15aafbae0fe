"""What a published weights file may leave open, as commands take it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


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
