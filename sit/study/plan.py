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
from sit.training.muon import hidden_matrices
from sit.training.plan import describe_data
from sit.utils.errors import UserError
from sit.utils.sizes import size_text
from sit.utils.tables import text_table

BYTES = 20
"""of a checkpoint, for each parameter, in float32: averaged weights, twice (to sample from and to go on with), raw
weights, and AdamW's two moments"""
MOMENT = 4
"""of them that a matrix of Muon's, which has one moment, does without"""


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
    sizes = {variant.name: 0.0 for variant in study.variants}
    rows: list[tuple[str, ...]] = [("run", "state", "steps", "hours", "disk")]
    total, trainings = 0.0, []
    for run in runs:
        sizes[run.variant] = sizes[run.variant] or checkpoint_bytes(run)
        size = sizes[run.variant] * checkpoints_kept(run)
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
        total += total / len(runs) * unknown
    lines.append(f"disk: {size_text(total)} of checkpoints in {study.out / 'work'}")
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


def checkpoint_bytes(run: Run) -> float:
    """Bytes of a checkpoint of a run, counted on the meta device.

    Raises:
        UserError: the network can't be made for the data; the message names the variant.
    """
    shape, classes, _, _ = describe_data(run.config)
    try:
        with torch.device("meta"):
            network = create_model(run.config.model, **run.config.network_options(shape, classes))
    except UserError as error:
        raise UserError(f"{run.variant}: {error}") from error
    with_one = sum(p.numel() for p in hidden_matrices(network)) if run.config.optimizer == "muon" else 0
    return BYTES * sum(parameter.numel() for parameter in network.parameters()) - MOMENT * with_one


def checkpoints_kept(run: Run) -> int:
    """How many checkpoints a run leaves."""
    config = run.config
    if not config.keep_last:
        return -(-config.steps // config.checkpoint_every)
    for_good = config.steps // config.keep_every if config.keep_every else 0
    return for_good + config.keep_last
