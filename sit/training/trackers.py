"""The trackers of a run, through Accelerate: whole configuration, one name, the same run when it resumes, images."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers
from accelerate.utils import LoggerType
from PIL import Image

from sit.training.config import TrainConfig
from sit.utils.errors import UserError
from sit.utils.files import atomic_write

ID = "tracker-id"
"""the file of a run with what trackers know it by"""


def check_trackers(names: Sequence[str]) -> None:
    """Raise UserError unless Accelerate knows all these trackers, and their packages are installed if they need one."""
    installed = [str(name) for name in get_available_trackers()]
    installed += [name for name in LOGGER_TYPE_TO_CLASS if name not in LoggerType.list()]  # registered by a program
    for name in names:
        if name not in installed:
            what = "its package is not installed" if name in LOGGER_TYPE_TO_CLASS else "Accelerate has no such tracker"
            raise UserError(f"`trackers={name}`: {what}; here there are: {', '.join(installed) or 'none'}")


def start_trackers(accelerator: Accelerator, config: TrainConfig, folder: Path, own: GeneralTracker, step: int) -> None:
    """Start the config's trackers and one of our own; every process must call it.

    Args:
        accelerator: gets them.
        config: all of which they are told.
        folder: the run's, whose name they show.
        own: a tracker that is there always.
        step: the steps done before, which stay as they were logged.
    """
    asks = accelerator.is_main_process and not {"wandb", "trackio"}.isdisjoint(config.trackers)
    known = _id_of(folder) if asks else ""
    options: dict[str, dict[str, Any]] = {
        "tensorboard": {"purge_step": step + 1},
        "wandb": {"name": folder.name, "id": known, "resume": "allow", "dir": str(folder)},
        "trackio": {"name": f"{folder.name}-{known}", "resume": "allow"},
    }
    accelerator.log_with = [*config.trackers, own]
    accelerator.init_trackers(config.project, plain_settings(config, folder), options)


def _id_of(folder: Path) -> str:
    """What trackers know the run in a folder by, now and when it resumes."""
    path = folder / ID
    if not path.is_file():
        with atomic_write(path) as temporary:
            temporary.write_text(secrets.token_hex(4) + "\n")
    return path.read_text().strip()


def plain_settings(config: TrainConfig, folder: Path) -> dict[str, bool | int | float | str | None]:
    """All settings as trackers take them: several values of one are a text."""
    settings = dataclasses.asdict(dataclasses.replace(config, output_dir=str(folder)))
    return {name: " ".join(map(str, value)) if isinstance(value, tuple) else value for name, value in settings.items()}


def log_image(accelerator: Accelerator, name: str, image: Image.Image, step: int) -> None:
    """Give an image to every tracker that shows images; the main process does."""
    if accelerator.is_main_process:
        for tracker in accelerator.trackers:
            _LOG_IMAGE.get(tracker.name, _log_a_list)(tracker, name, image, step)


def _log_a_list(tracker: GeneralTracker, name: str, image: Image.Image, step: int) -> None:
    if hasattr(tracker, "log_images"):
        tracker.log_images({name: [image]}, step=step)


def _log_an_array(tracker: GeneralTracker, name: str, image: Image.Image, step: int) -> None:
    import numpy as np

    tracker.log_images({name: np.asarray(image)[None]}, step=step, dataformats="NHWC")
    tracker.tracker.flush()


def _log_to_trackio(tracker: GeneralTracker, name: str, image: Image.Image, step: int) -> None:
    import trackio

    tracker.log({name: trackio.Image(image)}, step=step)


_LOG_IMAGE: dict[str, Callable[[GeneralTracker, str, Image.Image, int], None]] = {
    "tensorboard": _log_an_array,
    "trackio": _log_to_trackio,
    "aim": lambda tracker, name, image, step: tracker.log_images({name: image}, step=step),
}
"""the trackers whose ``log_images`` in Accelerate takes no list of images, or that have none"""
