"""Carrying out a study: the runs that are missing, one after another or several at a time, with a line of progress."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch

from sit.study import record
from sit.study.config import Study
from sit.study.holding import IN_USE_EXIT, is_held
from sit.study.one_run import do
from sit.study.progress import Progress
from sit.study.runs import Run, planned, to_be_known
from sit.study.selection import chosen, tried
from sit.training.stop_signal import REQUEUE_EXIT
from sit.utils.errors import UserError
from sit.utils.lock import InUse
from sit.utils.signals import TRAINING, handled

POLL = 0.5
"""seconds between two looks at the runs that are going on"""


@dataclass
class State:
    """What is known of a study at one moment.

    Attributes:
        runs: those that are known, in order.
        found: run's name → its JSON, where there is one.
        losses: variant → choice → held-out loss of the runs that decide.
        choices: variant → choice, where that is made.
        unknown: how many runs there will be besides.
    """

    runs: list[Run]
    found: dict[str, dict[str, Any]]
    losses: dict[str, dict[int, float]]
    choices: dict[str, int]
    unknown: int

    def wanted(self, only: tuple[str, ...] = ()) -> list[Run]:
        """The runs: all, or those of the given names of runs or variants."""
        return [run for run in self.runs if not only or run.name in only or run.variant in only]

    def missing(self, study: Study, only: tuple[str, ...] = ()) -> list[Run]:
        """Those of the wanted runs with something left to do."""
        return [run for run in self.wanted(only) if not record.is_finished(run, study, self.found.get(run.name))]


class Known:
    """The JSONs of a study's runs, each read again only when it has changed."""

    def __init__(self, study: Study) -> None:
        self.study = study
        self.read: dict[str, tuple[int, dict[str, Any]]] = {}

    def state(self) -> State:
        """What is known now.

        Raises:
            UserError: a JSON that can't be read, or one of other settings.
        """
        runs = planned(self.study, {})
        found = self._found(runs)
        losses = tried(self.study, runs, found)
        choices = chosen(self.study, losses)
        runs = planned(self.study, choices)
        return State(runs, self._found(runs), losses, choices, to_be_known(self.study, choices))

    def _found(self, runs: list[Run]) -> dict[str, dict[str, Any]]:
        found = {}
        for run in runs:
            path = run.json(self.study)
            changed = path.stat().st_mtime_ns if path.is_file() else 0
            if self.read.get(run.name, (0, {}))[0] != changed and changed:
                content = record.read(run, self.study)
                if content is not None:
                    self.read[run.name] = changed, content
            if changed:
                found[run.name] = self.read[run.name][1]
        return found


def tidy(study: Study, state: State) -> None:
    """Remove the checkpoints of runs of which nothing is wanted any more, if the study does not keep them."""
    if study.keep_checkpoints:
        return
    wanted = {run.name for run in state.missing(study)}
    for run in state.runs:
        decided = study.select is None or run.variant in state.choices
        if decided and run.name not in wanted and run.training(study).is_dir() and not is_held(run, study):
            shutil.rmtree(run.training(study))


def command(run: Run, study: Study, out: str | None) -> list[str]:
    """The command that does one run, for a process of its own or a line of a cluster's array job."""
    python = [sys.executable]
    if study.processes > 1:
        launch = ["-m", "accelerate.commands.launch", "--num_processes", str(study.processes)]
        python += [*launch, "-m"]
    else:
        python += ["-m"]
    return [*python, "sit.study", str(study.path), "--run", run.name, *(("--out", out) if out else ())]


@contextlib.contextmanager
def as_it_was_read(study: Study) -> Iterator[Study]:
    """The study with a file of its own in its folder until the block ends, for the processes of its runs to read.

    Its own file may be edited meanwhile, for the next time that the command is given.
    """
    folder = study.out / "work"
    folder.mkdir(parents=True, exist_ok=True)
    copy = folder / f".{study.path.stem}.{os.getpid()}.yaml"
    copy.write_text(study.text, encoding="utf-8")
    try:
        yield dataclasses.replace(study, path=copy)
    finally:
        copy.unlink(missing_ok=True)


@contextlib.contextmanager
def ended_with(active: list[Job]) -> Iterator[None]:
    """However the block ends, its jobs have ended by then: those that still go on are asked to save themselves."""
    try:
        yield
    finally:
        for job in active:
            job.signal(signal.SIGTERM)
        while not all([job.is_over() for job in active]):
            time.sleep(POLL)


@dataclass
class Job:
    """A run that goes on in a process group of its own."""

    run: Run
    process: subprocess.Popen
    log: TextIO
    slot: int

    def signal(self, number: int) -> None:
        """Send a signal to all its processes; those of ``accelerate launch`` do not hand it on."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def is_over(self) -> bool:
        """Whether all its processes have ended: a launcher may end before what it launched."""
        if self.process.poll() is None:
            return False
        try:
            os.killpg(self.process.pid, 0)
        except ProcessLookupError:
            self.log.close()
            return True
        return False


def free_slot(active: list[Job]) -> int:
    """The lowest number that no job has; it tells which GPU a job gets."""
    return next(slot for slot in range(len(active) + 1) if slot not in {job.slot for job in active})


def start(run: Run, study: Study, out: str | None, slot: int) -> Job:
    """Start a run in a process of its own; what it says goes to ``log.txt`` in its folder."""
    run.work(study).mkdir(parents=True, exist_ok=True)
    log = open(run.work(study) / "log.txt", "a", buffering=1)  # noqa: SIM115 - until the job is over
    environment = os.environ | {"OMP_NUM_THREADS": str(run.config.cpu_threads or 1)}
    if study.processes == 1 and "CUDA_VISIBLE_DEVICES" not in os.environ and (gpus := torch.cuda.device_count()) > 1:
        environment["CUDA_VISIBLE_DEVICES"] = str(slot % gpus)
    process = subprocess.Popen(
        command(run, study, out),
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        env=environment,
        start_new_session=True,
    )
    return Job(run, process, log, slot)


@dataclass
class Stop:
    """Whether, and why, no further run is begun and those that go on are to save themselves."""

    deadline: float | None
    asked: bool = False
    sent: bool = field(default=False, init=False)

    def __bool__(self) -> bool:
        return self.asked or (self.deadline is not None and time.monotonic() >= self.deadline)


@contextlib.contextmanager
def heeding_signals(stop: Stop) -> Iterator[None]:
    """Within the block, an interrupt or a batch system's signal stops the study as its time limit does."""

    def ask(number: int, frame: object) -> None:
        stop.asked = True

    with handled(TRAINING, ask):
        yield


def found_in_use(job: Job, study: Study) -> bool:
    """Whether a job ended because another program was first at its run.

    ``accelerate launch`` does not hand on the exit status of what it launched.
    """
    status = job.process.returncode
    return status == IN_USE_EXIT or (study.processes > 1 and status != 0 and is_held(job.run, study))


def carry_out(
    study: Study,
    *,
    jobs: int,
    only: tuple[str, ...] = (),
    hours: float | None = None,
    out: str | None = None,
    seconds_per_step: float | None = None,
) -> bool:
    """Do all runs that are missing, ``jobs`` at a time, each in a process of its own.

    A run that another program is at is waited for, and so is one that another was first at after both had started it.
    One that fails does not keep the others from being done, and has not failed if another program finishes it.

    Args:
        study: the study.
        jobs: runs at a time.
        only: names of runs or variants; empty for all.
        hours: after which no run is begun, and those that go on are asked to save themselves; None for no limit.
        out: the folder that was given on the command line.
        seconds_per_step: for the time that remains, where nothing is measured yet.

    Returns:
        Whether all is done; else the time was up, or a signal came.

    Raises:
        UserError: runs failed, or a JSON is not of this study.
    """
    known, active, failed = Known(study), list[Job](), dict[str, str]()
    progress = Progress(study, jobs, seconds_per_step)
    stop = Stop(None if hours is None else time.monotonic() + 3600 * hours)
    with heeding_signals(stop), as_it_was_read(study) as unchanging, ended_with(active):
        while True:
            for job in [job for job in active if job.is_over()]:
                active.remove(job)
                status = job.process.returncode
                if status not in (0, REQUEUE_EXIT) and not stop and not found_in_use(job, study):
                    failed[job.run.name] = f"exit status {status}: {last_line(Path(job.log.name))}"
                    progress.say(f"{job.run.name} stopped with {failed[job.run.name]}; see {job.log.name}")
            state = known.state()
            if stop and not stop.sent:
                stop.sent = True
                for job in active:
                    job.signal(signal.SIGTERM)
            tidy(study, state)
            busy = {job.run.name for job in active}
            todo = [run for run in state.missing(study, only) if run.name not in busy and run.name not in failed]
            if not active and (stop or not todo):
                break
            for run in todo:
                if stop or len(active) >= jobs:
                    break
                if not is_held(run, study):
                    active.append(start(run, unchanging, out or str(study.out), free_slot(active)))
            progress.show(state, [job.run for job in active], stopping=bool(stop))
            time.sleep(POLL)
    progress.close(state)
    left = {run.name for run in state.missing(study, only)}
    failed = {name: said for name, said in failed.items() if name in left}
    if failed:
        name, said = next(iter(failed.items()))
        others = f", and {len(failed) - 1} others" if len(failed) > 1 else ""
        raise UserError(f"{name} stopped with {said}{others}; see the logs in {study.out / 'work'}")
    return not left


def carry_out_here(study: Study, *, only: tuple[str, ...] = (), hours: float | None = None) -> bool:
    """Do all runs that are missing in this process, one after another; arguments and result as :func:`carry_out`'s.

    Raises:
        InUse: another program is at a run.
        UserError: a run failed.
    """
    known = Known(study)
    stop = Stop(None if hours is None else time.monotonic() + 3600 * hours)
    timer = threading.Timer(0 if hours is None else 3600 * hours, os.kill, (os.getpid(), signal.SIGTERM))
    timer.daemon = True
    with heeding_signals(stop):
        if hours is not None:
            timer.start()
        try:
            while (todo := known.state().missing(study, only)) and not stop:
                tidy(study, known.state())
                try:
                    do(todo[0], study)
                except InUse:
                    raise
                except UserError as error:
                    raise UserError(f"{todo[0].name}: {error}") from error
                except SystemExit as end:  # a signal asked for it
                    if end.code != REQUEUE_EXIT:
                        raise
                    stop.asked = True
        finally:
            timer.cancel()
    tidy(study, known.state())
    return not todo


def last_line(log: Path) -> str:
    """The last line of a log that says something."""
    lines = [line.strip() for line in log.read_bytes()[-4000:].decode(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it said nothing"


def command_lines(study: Study, state: State, only: tuple[str, ...], out: str | None) -> str:
    """The commands of all runs that are missing and can be started now, a line each."""
    return "\n".join(shlex.join(command(run, study, out)) for run in state.missing(study, only))
