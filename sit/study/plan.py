"""What a study is and will take, before anything is started: runs, hours, disk."""

from __future__ import annotations

import statistics

import torch

from sit.model import create_model
from sit.study import record
from sit.study.config import Study
from sit.study.progress import in_words, remaining_hours, seconds_of_a_step, steps_done
from sit.study.runs import Run
from sit.study.schedule import State
from sit.training.config import TrainConfig
from sit.training.muon import hidden_matrices
from sit.training.plan import describe_data, naming
from sit.training.posthoc_ema import snapshot_steps
from sit.utils.errors import UserError
from sit.utils.sizes import size_text
from sit.utils.tables import text_table

BYTES = 16
"""of a checkpoint, for each parameter, in float32: averaged weights, raw weights, and AdamW's two moments"""
MOMENT = 4
"""of them that a matrix of Muon's, which has one moment, does without"""
AVERAGE = 4
"""in addition for each average that others are put together from"""
SNAPSHOT = 2
"""of a snapshot of such an average, for each parameter, in float16"""


def plan(study: Study, state: State, jobs: int, seconds_per_step: float | None, only: tuple[str, ...] = ()) -> str:
    """A table, as text: each run with its state, steps, hours and disk, and their sums.

    Args:
        study: the study.
        state: what is known of it.
        jobs: runs at a time.
        seconds_per_step: where nothing is measured yet.
        only: names of runs or variants; empty for all.
    """
    runs = state.wanted(only)
    missing = state.missing(study, only)
    unknown = 0 if only else state.unknown
    counts: dict[str, tuple[int, int]] = {}
    rows: list[tuple[str, ...]] = [("run", "state", "steps", "hours", "disk")]
    total, trainings = 0, list[float]()
    for run in runs:
        counts[run.variant] = counts.get(run.variant) or parameter_counts(run)
        size = disk_bytes(run.config, *counts[run.variant])
        total += size
        pace = seconds_of_a_step(run, state.runs, state.found, seconds_per_step)
        hours = "?" if pace is None else f"{pace * run.config.steps / 3600:.2f}"
        trainings.append(0.0 if pace is None else pace * run.config.steps / 3600)
        rows.append((run.name, how_far(run, study, state), f"{run.config.steps:,}", hours, size_text(size)))
    lines = [text_table(rows, align="llrrr"), ""]
    done = len(runs) - len(missing)
    lines.append(f"runs: {len(runs) + unknown}, of them {done} done")
    if unknown:
        decided = "not known before it is chosen what each variant is best with"
        lines.append(f"besides those above: {unknown}, {decided}")
    left = remaining_hours(study, runs, state.found, jobs=jobs, told=seconds_per_step, known=state.runs)
    if left is not None and unknown:
        left += statistics.fmean(trainings or [0.0]) * unknown / jobs  # as long as those above, on average
    trained = "training what is missing, without evaluations: "
    lines.append(
        f"{trained}{in_words(left)} with {jobs} at a time" + ("" if left is not None else ": no run has measured it")
    )
    if runs:
        total += total * unknown // len(runs)
    lines.append(f"disk: {size_text(total)} of checkpoints and snapshots in {study.out / 'work'}")
    return "\n".join(lines)


def how_far(run: Run, study: Study, state: State) -> str:
    """In a word or two, how far a run is."""
    if run.name in state.found:
        found = state.found[run.name]
        if found.get("failed"):
            return "failed"
        return "done" if record.is_finished(run, study, found) else "trained"
    step = steps_done(run, study)
    return f"at step {step:,}" if step else "missing"


def parameter_counts(run: Run) -> tuple[int, int]:
    """The parameters of a run's network, and those with one moment, which are Muon's; counted on the meta device.

    Raises:
        UserError: the network can't be made for the data; the message names the variant, and what was assumed.
    """
    shape, classes, _, assumed = describe_data(run.config)
    try:
        with naming(assumed), torch.device("meta"):
            network = create_model(run.config.model, **run.config.network_options(shape, classes))
    except UserError as error:
        raise UserError(f"{run.variant}: {error}") from error
    with_one = sum(p.numel() for p in hidden_matrices(network)) if run.config.optimizer == "muon" else 0
    return sum(parameter.numel() for parameter in network.parameters()), with_one


def disk_bytes(config: TrainConfig, parameters: int, with_one: int) -> int:
    """Bytes of the checkpoints and of the averages' snapshots that a run leaves."""
    averages = len(config.posthoc_ema)
    checkpoint = (BYTES + AVERAGE * averages) * parameters - MOMENT * with_one
    return checkpoint * checkpoints_kept(config) + SNAPSHOT * averages * parameters * len(snapshot_steps(config))


def checkpoints_kept(config: TrainConfig) -> int:
    """How many checkpoints a run leaves."""
    steps = sorted({*range(config.checkpoint_every, config.steps + 1, config.checkpoint_every), config.steps})
    if not config.keep_last:
        return len(steps)
    for_good = [step for step in steps if config.keep_every and step % config.keep_every == 0]
    return len({*for_good, *steps[-config.keep_last :]})
