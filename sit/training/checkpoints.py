"""The checkpoints of a run: their writing, which are kept, and which are set aside when an older one goes on."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
from pathlib import Path

from accelerate import Accelerator

from sit.checkpoint.find import find_checkpoints
from sit.checkpoint.info import CheckpointInfo, read_info
from sit.checkpoint.integrity import is_complete
from sit.checkpoint.save import save_checkpoint
from sit.training.config import TrainConfig
from sit.training.data import Opened
from sit.training.posthoc_ema import note_lineage
from sit.training.run_folder import last_metrics
from sit.training.state import TrainingState
from sit.transport.transport import Transport
from sit.utils.files import explain_os_errors


def write_checkpoint(
    run: Path,
    step: int,
    config: TrainConfig,
    *,
    opened: Opened,
    state: TrainingState,
    transport: Transport,
    accelerator: Accelerator,
) -> None:
    """Write ``checkpoints/step-…`` into the run's folder, and delete those that are not to be kept beside it.

    Every process must call it, to gather the state; the main one writes.
    """
    averaged, raw, optimizer = state.gather()
    averages = state.gather_averages()

    def save_training(inside: Path) -> None:
        state.save(inside, raw, optimizer, averages)
        if averages:
            note_lineage(run, inside)

    if accelerator.is_main_process:
        save_checkpoint(
            run / "checkpoints" / f"step-{step:07d}",
            model=state.model,
            weights=averaged,
            transport=transport,
            vae_source=opened.save_vae,  # from memory: damage to the run's vae/ is not handed on
            info=CheckpointInfo(
                step=step,
                images_seen=step * config.batch_size,
                image_size=(config.image_size, config.image_size),
                classes=len(opened.data.classes),
                label_names=list(opened.data.classes),
                data=config.data,
                mixer=config.mixer,
            ),
            training_state=save_training,
            recipe=dataclasses.replace(
                config, output_dir=None, resume=None
            ).to_yaml(),  # where the run lies is not published
            metrics=last_metrics(run / "metrics.jsonl", step),
        )
        prune_checkpoints(find_checkpoints(run), config.keep_last, config.keep_every, config.checkpoint_every)
    accelerator.wait_for_everyone()


def set_aside_later(run: Path, checkpoint: Path) -> Path | None:
    """Move the checkpoints of the same or a later step than ``checkpoint`` away, complete or damaged, but not that one.

    A run that resumes from an older checkpoint, or from the one before a damaged one, is another run from there on:
    the later checkpoints must be neither continued nor counted among its own. They go to ``checkpoints-abandoned-N``
    in the run's folder, with a copy of the metrics so far.

    Returns:
        The folder that they went to; None if there was nothing to move.
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


def prune_checkpoints(
    checkpoints: list[tuple[int, Path]], keep_last: int, keep_every: int | None, checkpoint_every: int = 1
) -> None:
    """Delete all complete checkpoints but the last ``keep_last`` and the first from every ``keep_every``-th step on.

    Args:
        checkpoints: (step, folder) of each. Incomplete ones are neither counted nor deleted.
        keep_last: 0 keeps all.
        keep_every: None keeps none besides the last.
        checkpoint_every: steps between checkpoints; one that is so far beyond a ``keep_every``-th step is not its.
    """
    if not keep_last:
        return
    for_good: dict[int, int] = {}  # of every so many steps, the first checkpoint
    for step, _ in sorted(checkpoints) if keep_every else ():
        if step >= keep_every and step % keep_every < checkpoint_every:
            for_good.setdefault(step // keep_every, step)
    last = 0
    for step, folder in sorted(checkpoints, reverse=True):
        if last == keep_last and step in for_good.values():
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
