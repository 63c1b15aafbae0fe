"""A run's folder: its making, and its metrics file."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker, on_main_process

from sit.checkpoint.snapshots import SNAPSHOTS
from sit.training.config import TrainConfig
from sit.training.recipes import run_settings
from sit.utils.errors import UserError
from sit.utils.files import atomic_write, clear_dead, explain_os_errors, new_output
from sit.utils.json_text import json_text


def make_run_folder(
    config: TrainConfig,
    begun: Path | None,
    save_vae: Callable[[Path], object],
    keep_identity: Callable[[Path], None],
) -> Path:
    """Make the folder of a run, or bring that of a ``begun`` one up to date: ``config.yaml`` and ``vae/``.

    Args:
        config: the run's; it is written as it is in force now.
        begun: the folder of a run that goes on.
        save_vae: writes the VAE into the folder that it is given, if that is needed.
        keep_identity: refuses to go on with a folder that was begun with something else, or notes there what this is.
    """
    folder = begun
    if folder is not None:
        keep_identity(folder)  # before anything there is changed
    else:
        label = f"{config.model}-{config.mixer}".replace("/", "-").replace(",", "+").replace(":", "-")
        folder = new_run_folder(config.output_dir, label)
    with atomic_write(folder / "config.yaml") as temporary:  # first: it makes the folder a run that can be resumed
        temporary.write_text(run_settings(dataclasses.replace(config, resume=None, output_dir=str(folder))))
    if begun is None:
        keep_identity(folder)
    if not (folder / "vae").is_dir():
        save_vae(folder / "vae")
    clear_leftovers(folder)
    return folder


def new_run_folder(output_dir: str | None, label: str) -> Path:
    """Make the empty folder of a new run: ``output_dir``, or a new one under ``runs/`` named by date and ``label``.

    Raises:
        UserError: ``output_dir`` holds something already, or can't be written.
    """
    if output_dir is not None:
        return new_output(output_dir, "output_dir")
    stem = f"{time.strftime('%Y%m%d-%H%M%S')}-{label}"
    for attempt in range(100):
        folder = Path("runs") / (stem if not attempt else f"{stem}-{attempt}")
        with explain_os_errors(folder), contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)  # at once, so that two programs of one second take two
            return folder
    raise UserError(f"runs/{stem} and a hundred names like it are taken; give `output_dir`")


class JsonLinesTracker(GeneralTracker):
    """Writes each logged row as a line of ``metrics.jsonl``; on resuming, drops the rows after the resumed step."""

    name = "jsonl"
    requires_logging_directory = False

    def __init__(self, path: Path, resumed_step: int) -> None:
        super().__init__()
        self.path = path
        self.resumed_step = resumed_step

    @on_main_process
    def start(self) -> None:
        rows = [row for row in read_metrics(self.path) if row["step"] <= self.resumed_step]
        with atomic_write(self.path) as temporary:
            temporary.write_text("".join(json_text(row) + "\n" for row in rows))
        self.file = open(self.path, "a", buffering=1)  # noqa: SIM115

    @property
    def tracker(self):
        return self.file

    def store_init_configuration(self, values: dict) -> None:
        """Nothing: ``config.yaml`` has it."""

    @on_main_process
    def log(self, values: dict, step: int | None = None, **kwargs) -> None:
        with explain_os_errors(self.path):
            self.file.write(json_text({"step": step, **values}) + "\n")

    @on_main_process
    def finish(self) -> None:
        self.file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a ``metrics.jsonl``; damaged lines are left out, and a missing file has none.

    Raises:
        UserError: the file must not be read.
    """
    rows = []
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{path} can't be read ({error.strerror})") from error
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:  # cut off in the writing, or not UTF-8
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def last_metrics(path: Path, step: int) -> dict[str, float]:
    """The last value of each metric in a ``metrics.jsonl`` up to a step, by name, but for the speeds.

    Raises:
        UserError: the file must not be read.
    """
    rows = [row for row in read_metrics(path) if row["step"] <= step]
    return {
        name: value
        for row in rows
        for name, value in row.items()
        if name != "step" and not name.endswith("_per_second") and isinstance(value, int | float)
    }


def clear_start(run: str | Path) -> None:
    """Delete what is left of a process that was killed while it wrote ``config.yaml``: the folder is empty again."""
    for leftover in Path(run).glob(".config.yaml.*.tmp"):
        leftover.unlink(missing_ok=True)


def clear_leftovers(run: Path) -> None:
    """Delete what a killed process left half-written or half-deleted; nobody else writes into the folder now."""
    clear_start(run)
    for place in (run, run / "samples", run / "heldout", run / "checkpoints", run / SNAPSHOTS):
        clear_dead(place)
    parts = (
        ".metrics.jsonl.*.tmp",
        ".identity.json.*.tmp",
        ".tracker-id.*.tmp",
        "samples/.step-*.tmp",
        "heldout/.step-*.tmp",
    )
    for leftover in (found for part in parts for found in run.glob(part)):  # of another machine's process
        leftover.unlink(missing_ok=True)
    for leftover in [*run.glob(".vae.*.tmp"), *run.glob("checkpoints/.step-*"), *run.glob(f"{SNAPSHOTS}/.step-*")]:
        shutil.rmtree(leftover, ignore_errors=True)
