"""A run's folder: its making, its metrics file, and which of its checkpoints are kept."""

from __future__ import annotations

import itertools
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers, on_main_process

from sit.checkpoint.find import find_checkpoints
from sit.checkpoint.info import read_info
from sit.checkpoint.integrity import is_complete
from sit.utils.errors import UserError
from sit.utils.files import atomic_write, explain_os_errors, new_output


def new_run_folder(output_dir: str | None, label: str) -> Path:
    """Make the empty folder of a new run: ``output_dir``, or a new one under ``runs/`` named by date and ``label``.

    Raises:
        UserError: ``output_dir`` holds something already, or can't be written.
    """
    if output_dir is not None:
        return new_output(output_dir, "--output-dir")
    stem = f"{time.strftime('%Y%m%d-%H%M%S')}-{label}"
    for attempt in range(100):
        folder = Path("runs") / (stem if not attempt else f"{stem}-{attempt}")
        if not folder.exists():
            return new_output(folder, "--output-dir")
    raise UserError(f"runs/{stem} and a hundred names like it are taken; give --output-dir")


def check_trackers(names: Sequence[str]) -> None:
    """Whether Accelerate has all trackers of ``--trackers`` here.

    Raises:
        UserError: it does not know one, or one's package is not installed.
    """
    installed = [str(name) for name in get_available_trackers()]
    for name in names:
        if name not in installed:
            what = "its package is not installed" if name in LOGGER_TYPE_TO_CLASS else "Accelerate has no such tracker"
            raise UserError(f"--trackers {name}: {what}; there are here: {', '.join(installed) or 'none'}")


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
            temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.file = open(self.path, "a", buffering=1)  # noqa: SIM115

    @property
    def tracker(self):
        return self.file

    def store_init_configuration(self, values: dict) -> None:
        """Nothing: ``config.yaml`` has it."""

    @on_main_process
    def log(self, values: dict, step: int | None = None, **kwargs) -> None:
        with explain_os_errors(self.path):
            self.file.write(json.dumps({"step": step, **values}) + "\n")

    @on_main_process
    def finish(self) -> None:
        self.file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a ``metrics.jsonl``; a last line cut off in the writing is left out, a missing file has none."""
    rows = []
    if path.is_file():
        for line in path.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return rows


def set_aside_later(run: Path, checkpoint: Path) -> Path | None:
    """Move those checkpoints of a run away that going on from ``checkpoint`` meets again, whole or damaged.

    A run resumed from an older checkpoint, or past a damaged one, is another run from there on: the later checkpoints
    must be neither continued nor counted among its own. They go to ``checkpoints-abandoned-N`` in the run's folder,
    with a copy of the metrics so far.

    Returns:
        That folder; None if there was nothing to move.
    """
    begun = read_info(checkpoint).step
    later = [place for step, place in find_checkpoints(run) if step >= begun and not place.samefile(checkpoint)]
    if not later:
        return None
    numbers = itertools.count(1)
    aside = next(place for n in numbers if not (place := run / f"checkpoints-abandoned-{n}").exists())
    with explain_os_errors(aside):
        aside.mkdir()
        if (run / "metrics.jsonl").is_file():
            shutil.copy2(run / "metrics.jsonl", aside)
        for place in later:
            place.rename(aside / place.name)
    return aside


def clear_start(run: str | Path) -> None:
    """Delete what a process killed before ``config.yaml`` was whole left of it, so that the folder is empty again."""
    for leftover in Path(run).glob(".config.yaml.*.tmp"):
        leftover.unlink(missing_ok=True)


def clear_leftovers(run: Path) -> None:
    """Delete what a killed process left half-written or half-deleted in a run's folder and among its checkpoints."""
    clear_start(run)
    for leftover in [*run.glob(".vae.*.tmp"), *(run / "checkpoints").glob(".step-*")]:
        shutil.rmtree(leftover, ignore_errors=True)


def prune_checkpoints(checkpoints: list[tuple[int, Path]], keep_last: int, keep_every: int | None) -> None:
    """Delete all whole ones but the last ``keep_last`` (0: none) and every ``keep_every`` steps of (step, folder)."""
    if not keep_last:
        return
    last = 0
    for step, folder in sorted(checkpoints, reverse=True):
        if last == keep_last and keep_every and step % keep_every == 0:
            continue
        if not is_complete(folder):
            continue
        if last < keep_last:
            last += 1
            continue
        # renamed first: a folder half deleted must not look like a checkpoint
        doomed = folder.with_name(f".{folder.name}.deleted")
        folder.rename(doomed)
        shutil.rmtree(doomed)
