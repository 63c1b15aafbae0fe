"""Keeping what a post-hoc EMA needs while a run trains: its averages, and their snapshots.

The mathematics, and how an average of another length is reconstructed, is in :mod:`sit.checkpoint.posthoc_ema`.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from pathlib import Path

from accelerate import Accelerator
from torch import nn

from sit.checkpoint.info import read_json
from sit.checkpoint.integrity import INDEX, fingerprint
from sit.checkpoint.posthoc_ema import decay_at, gamma_of
from sit.checkpoint.snapshots import SNAPSHOTS, find_snapshots, save_snapshot
from sit.training.config import TrainConfig
from sit.training.ema import MovingAverage
from sit.training.state import TrainingState
from sit.utils.files import explain_os_errors

LINEAGE = "snapshots.json"
"""In a checkpoint's training/: which snapshots belong to the trajectory that led to it."""


class PowerAverage(MovingAverage):
    """The power-function average of the relative length ``sigma_rel``, stepped once each training step, from the first.

    It is diffusers' moving average with another decay: (1 − 1/t)^(γ + 1) at step t.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], sigma_rel: float) -> None:
        super().__init__(parameters, foreach=True)
        self.gamma = gamma_of(sigma_rel)

    def get_decay(self, optimization_step: int) -> float:
        return decay_at(optimization_step, self.gamma)


def snapshot_is_due(step: int, config: TrainConfig) -> bool:
    """Whether a snapshot belongs to this step."""
    every = config.posthoc_ema_every or config.checkpoint_every
    return bool(config.posthoc_ema) and (step % every == 0 or step == config.steps)


def snapshot_steps(config: TrainConfig) -> list[int]:
    """The steps after which a whole run makes snapshots."""
    return [step for step in range(1, config.steps + 1) if snapshot_is_due(step, config)]


def write_snapshot(run: Path, step: int, state: TrainingState, accelerator: Accelerator) -> None:
    """Write the snapshot of a step into the run's folder.

    Every process must call it, to gather the averages; the main one writes.
    """
    averages = state.gather_averages()
    if accelerator.is_main_process:
        save_snapshot(run, step, averages)
    accelerator.wait_for_everyone()


def note_lineage(run: Path, training: Path) -> None:
    """Write into a checkpoint's ``training`` folder which snapshots its run has."""
    kept = {place.name: fingerprint(place / INDEX) for _, place in find_snapshots(run) if (place / INDEX).is_file()}
    (training / LINEAGE).write_text(json.dumps(kept, indent=2))


def keep_lineage(run: Path, checkpoint: Path | None) -> Path | None:
    """Leave in a run's folder only the snapshots that led to ``checkpoint``; None stands for the run's beginning.

    A run that goes on from an older checkpoint makes the later ones anew, and need not make the same. Those of another
    trajectory are moved to ``posthoc-ema-abandoned-N`` in the run's folder; those of this one that an earlier resume
    moved away come back.

    Returns:
        The folder that some were moved to; None if there was nothing to move.
    """
    noted = {}
    if checkpoint is not None and (checkpoint / "training" / LINEAGE).is_file():
        noted = read_json(checkpoint / "training" / LINEAGE)

    def belongs(place: Path) -> bool:
        return (place / INDEX).is_file() and noted.get(place.name) == fingerprint(place / INDEX)

    strangers = [place for _, place in find_snapshots(run) if not belongs(place)]
    aside = None
    with explain_os_errors(run):
        if strangers:
            numbers = itertools.count(1)
            aside = next(place for n in numbers if not (place := run / f"{SNAPSHOTS}-abandoned-{n}").exists())
            aside.mkdir()
        for place in strangers:
            place.rename(aside / place.name)
        for name in noted:
            for place in sorted(run.glob(f"{SNAPSHOTS}-abandoned-*/{name}")):
                if belongs(place) and not (run / SNAPSHOTS / name).exists():
                    (run / SNAPSHOTS).mkdir(exist_ok=True)
                    place.rename(run / SNAPSHOTS / name)
    return aside
