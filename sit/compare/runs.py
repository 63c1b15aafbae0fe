"""The runs that are compared: their folders, checkpoints and data, and which repeat each other."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from sit.checkpoint.find import find_checkpoints
from sit.checkpoint.integrity import is_complete
from sit.data.factory import open_images
from sit.latents.cache import MANIFEST, Manifest
from sit.training.config import TrainConfig
from sit.training.recipes import load_recipe
from sit.utils.errors import UserError


@dataclass
class Run:
    """A run's folder, its config, and its complete checkpoints as (step, folder)."""

    folder: Path
    config: TrainConfig
    checkpoints: list[tuple[int, Path]]
    name: str = ""

    def evaluation_seed(self, given: int | None) -> int:
        """The seed of its samples: the one that was given, else that of its training.

        Runs of one training seed are then evaluated with the same labels and noise, whatever their mixer, and runs of
        several training seeds with several: an interval over training seeds would otherwise leave the samples' spread
        out.
        """
        return self.config.seed if given is None else given


def open_run(path: str, at_steps: tuple[int, ...]) -> Run:
    """Open a run's folder.

    Raises:
        UserError: it is none, has no complete checkpoint, or none at a step that was asked for.
    """
    folder = Path(path)
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder} is not a run's folder: it has no config.yaml")
    complete = [(step, place) for step, place in find_checkpoints(folder) if is_complete(place)]
    if not complete:
        raise UserError(f"{folder} has no complete checkpoint to compare")
    have = [step for step, _ in complete]
    if absent := [step for step in at_steps if step not in have]:
        raise UserError(
            f"`at_steps={absent[0]}`: {folder} has no complete checkpoint of that step; its steps are: {listed(have)}"
        )
    chosen = [(step, place) for step, place in complete if not at_steps or step in at_steps]
    return Run(folder, load_recipe(str(folder / "config.yaml")), chosen)


def listed(steps: Iterable[int]) -> str:
    """Steps as words."""
    return ", ".join(map(str, steps))


def open_runs(paths: tuple[str, ...], at_steps: tuple[int, ...]) -> list[Run]:
    """Open all runs, and name them by what tells them apart; runs that differ by their seed alone share a name.

    If any two of one model and mixer differ by more, or by nothing, every run is named by the end of its folder too.

    Raises:
        UserError: there is none, one is given twice, or they were trained on different images.
    """
    if not paths:
        raise UserError("give at least one run's folder")
    runs = [open_run(path, at_steps) for path in paths]
    for run in runs[1:]:
        check_same_data(runs[0], run)
    for run in runs:
        run.name = f"{run.config.model} {run.config.mixer}"
    different = {run.name: replace(run.config, seed=0, output_dir=None, resume=None) for run in runs}
    if any(replace(run.config, seed=0, output_dir=None, resume=None) != different[run.name] for run in runs) or (
        len({(run.name, run.config.seed) for run in runs}) < len(runs)
    ):  # they are not repetitions of each other with other seeds
        for run, end in zip(runs, shortest_ends([run.folder for run in runs]), strict=True):
            run.name += f" ({end})"
    check_each_once(runs)
    return runs


def shortest_ends(folders: list[Path]) -> list[str]:
    """The last parts of each path, equally many of all: as few as tell different ones apart."""
    every = [Path(os.path.abspath(folder)).parts for folder in folders]  # links keep the names that they were given
    for count in range(1, max(map(len, every)) + 1):
        ends = {parts: Path(*parts[-count:]).as_posix() for parts in every}
        if len(set(ends.values())) == len(ends):
            break
    return [ends[parts] for parts in every]


def check_each_once(runs: list[Run]) -> None:
    """Raise UserError if two runs share their name and training seed, by which their numbers are kept."""
    seen: dict[tuple[str, int], Run] = {}
    for run in runs:
        other = seen.setdefault((run.name, run.config.seed), run)
        if other is not run:
            raise UserError(
                f"{other.folder} and {run.folder} are both {run.name}, training seed {run.config.seed}: give a run once"
            )


def check_same_data(one: Run, other: Run) -> None:
    """Raise UserError unless both were trained on the same images of one size, be it through a latent cache of them."""
    for setting in ("image_size", "data"):
        ours, first = getattr(other.config, setting), getattr(one.config, setting)
        if ours == first or (setting == "data" and _same_images(one.config, other.config)):
            continue
        raise UserError(f"{other.folder} was trained with {setting} {ours} and {one.folder} with {first}")


def _same_images(one: TrainConfig, other: TrainConfig) -> bool:
    """Whether two data sets of other names list the same images with the same labels; no if one can't be had."""
    try:
        return fingerprint(one) == fingerprint(other)
    except UserError:
        return False


def fingerprint(config: TrainConfig) -> str:
    """Of the list of a run's training images and their labels, the same for a data set and a latent cache of it.

    Raises:
        UserError: the data can't be had where they were.
    """
    manifest = Path(config.data) / MANIFEST
    if manifest.is_file():
        return Manifest.read(manifest).files
    return open_images(config.data, config.image_size).fingerprint()


def grouped(runs: list[Run]) -> dict[str, list[Run]]:
    """Runs by their name: those of a group differ by their seed alone."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.name, []).append(run)
    return groups


def keep_common_steps(groups: dict[str, list[Run]]) -> dict[str, list[int]]:
    """Leave the runs those checkpoints, in place, whose step all runs of their group have: means are over all seeds.

    Returns:
        The steps that are left out, by the run's folder; runs that keep all are not in it.

    Raises:
        UserError: the runs of a group have no step in common.
    """
    left_out: dict[str, list[int]] = {}
    for name, members in groups.items():
        steps = {str(run.folder): [step for step, _ in run.checkpoints] for run in members}
        common = set.intersection(*map(set, steps.values()))
        if not common:
            have = "; ".join(f"{folder}: {listed(own)}" for folder, own in steps.items())
            raise UserError(
                f"the runs of {name} differ by their seed alone and have no step in common, at which a mean could be "
                f"taken: {have}; leave runs out, or train them to the same step"
            )
        for run in members:
            if rest := [step for step in steps[str(run.folder)] if step not in common]:
                left_out[str(run.folder)] = rest
            run.checkpoints = [(step, place) for step, place in run.checkpoints if step in common]
    return left_out
