"""Where a run starts: anew, or from a checkpoint of the run that it continues."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sit.checkpoint.find import FOR_RESUMING, newest_checkpoint, resolve
from sit.checkpoint.info import read_info
from sit.mixers import parse_mixers
from sit.model import MODELS, check_model_name
from sit.training.config import TrainConfig, check_heeded, check_needed
from sit.training.identity import FILE as IDENTITY
from sit.training.meanflow import check_meanflow
from sit.training.recipes import check_same_run, run_folder
from sit.training.repa import aligned_block, check_block
from sit.training.run_folder import clear_start
from sit.training.trackers import check_trackers
from sit.transport.transport import Transport
from sit.utils.errors import UserError
from sit.utils.files import refuse_used
from sit.utils.lock import locked


@dataclass(frozen=True)
class Start:
    """Where a run starts.

    Attributes:
        folder: of the run to continue; None for a new run.
        checkpoint: what to go on from; None from scratch, which a begun run without a checkpoint does too.
        step: the optimizer steps already done.
    """

    folder: Path | None = None
    checkpoint: Path | None = None
    step: int = 0


@contextlib.contextmanager
def held_start(config: TrainConfig, is_main_process: bool) -> Iterator[Start]:
    """:func:`find_start`, and no other program in the run's folder while the block runs.

    Raises:
        UserError: another program is in it, or as :func:`find_start`.
    """
    start = find_start(config)
    place = start.folder or config.output_dir
    if place is None or not is_main_process:
        yield start
    else:
        with locked(place, "output_dir"):
            yield find_start(config)  # as it is now that nobody else can change it


def find_start(config: TrainConfig, clear: bool = True) -> Start:
    """Find out where to start, and refuse what can be seen to be wrong before the data is read.

    Args:
        config: the run.
        clear: delete what a process left in the output folder that was killed while it began.

    Raises:
        UserError: names that are unknown, an output folder that is taken or is not that of the run to resume, or a run
            that can't be continued.
    """
    parse_mixers(config.mixer)
    check_model_name(config.model)
    check_trackers(config.trackers)
    check_heeded(config)
    check_meanflow(config)
    Transport(**config.transport_options())
    if config.repa is not None:
        check_block(aligned_block(config), MODELS[config.model]["depth"])

    folder = _begun_folder(config)
    if folder is None:
        check_needed(config)
    if folder is not None:
        check_same_run(config, folder, has_identity=(folder / IDENTITY).is_file())
    elif config.output_dir is not None:
        if clear:
            clear_start(config.output_dir)
        refuse_used(config.output_dir, "output_dir")

    checkpoint = _checkpoint(config)
    step = 0 if checkpoint is None else read_info(checkpoint).step
    if step > config.steps:
        raise UserError(
            f"`steps={config.steps}`: {checkpoint} has done {step} already; ask for more, or sample from it"
        )
    return Start(folder, checkpoint, step)


def _begun_folder(config: TrainConfig) -> Path | None:
    """The folder of the run to continue; None for a new run.

    Raises:
        UserError: there is no such run, or ``output_dir`` is another folder than its own.
    """
    if config.resume is None:
        return None
    if config.resume != "auto":
        folder = run_folder(config.resume)
        if config.output_dir is not None and Path(config.output_dir).resolve() != folder:
            raise UserError(
                f"`output_dir={config.output_dir}` is not the folder of `resume={config.resume}`, in which that run "
                "goes on: leave it out, resume a copy of that folder, or begin a new run with `init_from`"
            )
        return folder
    if config.output_dir is None:
        raise UserError("`resume=auto` needs `output_dir`, the run to continue if it has begun")
    folder = Path(config.output_dir)
    try:
        (folder / "config.yaml").stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(f"`output_dir={folder}` can't be read ({error.strerror})") from error
    return folder


def _checkpoint(config: TrainConfig) -> Path | None:
    """The checkpoint to go on from, with the state for it; None if there is none to be had."""
    if config.resume is None:
        return None
    if config.resume == "auto":
        return newest_checkpoint(config.output_dir, resumable=True)
    checkpoint = resolve(config.resume, unread=FOR_RESUMING)
    if not (checkpoint / "training").is_dir():
        raise UserError(f"`resume={checkpoint}`: it has no training/ to resume from")
    return checkpoint
