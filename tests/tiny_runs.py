"""Training runs of seconds: a few steps of a recipe with a tiny network, one thread and no trackers."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from sit.training.config import TrainConfig
from sit.training.recipes import load_recipe


def tiny_run(folder: Path, recipe: str = "digits", **changes) -> TrainConfig:
    """The settings of a run in ``folder``: six steps of SiT-XS/4 with attention, a checkpoint of every third."""
    settings = dict(
        model="SiT-XS/4", mixer="attention", steps=6, batch_size=8, log_every=1, preview_every=0, checkpoint_every=3,
        trackers=(), cpu_threads=1, output_dir=str(folder),
    )  # fmt: skip
    return dataclasses.replace(load_recipe(recipe), **settings | changes)
