"""``python -m sit.study STUDY.yaml``: mixers × training seeds, trained, evaluated and compared in one report.

The same command may be given again at any time: what is done is not done again, and what was cut off goes on. Each
finished run leaves a small JSON in ``OUT/runs``, from which the study goes on on another machine.
"""

from __future__ import annotations

import contextlib
import math
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import tyro

from sit.study.config import Study, read_study
from sit.study.holding import IN_USE_EXIT
from sit.utils.cli import parse
from sit.utils.errors import UserError, entry_point
from sit.utils.lock import InUse

if TYPE_CHECKING:
    from sit.study.schedule import State


@dataclass
class Arguments:
    """Train what is missing of a study, evaluate it, and write its report."""

    study: tyro.conf.Positional[str]
    """the study's YAML file"""
    out: str | None = None
    """the study's folder; None takes the file's, or studies/NAME"""
    only: tuple[str, ...] = ()
    """names of runs or variants to do; none given means all"""
    jobs: int = 1
    """runs at a time, each with one computing thread on a CPU, or on the next GPU; 0 does them in this process"""
    hours: float | None = None
    """time limit: after it no run is begun, those that go on save themselves, and the exit status is 85"""
    seconds_per_step: float | None = None
    """for the hours that are left, where no run has measured it yet"""
    dry_run: bool = False
    """tell runs, hours and disk, and start nothing"""
    print_commands: bool = False
    """print the command of each run that can be started now, for a cluster's array job, and start nothing"""
    report_only: bool = False
    """write the report of what is there, and start nothing"""
    against: str | None = None
    """write a second report too, in OUT/report-NAME, in which the others are compared with this variant"""
    measure_speed: bool = False
    """time a training step of each variant, in turn and with nothing beside it, for the report; train nothing"""
    run: str | None = None
    """do this run alone, in this process and those launched with it; what the lines of --print-commands do"""

    def __post_init__(self) -> None:
        if self.jobs < 0:
            raise UserError(f"`jobs` must be at least 0, not {self.jobs}")
        for name in ("hours", "seconds_per_step"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"`{name}` must be positive, not {value}")
        modes = [name for name in ("dry_run", "print_commands", "report_only", "measure_speed") if getattr(self, name)]
        modes += ["run"] if self.run is not None else []
        if len(modes) > 1:
            raise UserError(f"`{modes[0]}` and `{modes[1]}` exclude each other")
        if self.jobs == 0 and self.seconds_per_step is not None and not self.dry_run:
            raise UserError("`seconds_per_step` plays no part with `jobs=0`: leave it out")
        mode = modes[0] if modes else None
        for name, without in PLAY_NO_PART.items():
            if mode in without and getattr(self, name) not in (None, ()):
                raise UserError(f"`{name}` plays no part with `{mode}`: leave it out")


PLAY_NO_PART = {
    "only": ("run", "report_only", "measure_speed"),
    "hours": ("run", "report_only", "measure_speed", "dry_run", "print_commands"),
    "against": ("run", "measure_speed", "dry_run", "print_commands"),
    "seconds_per_step": ("run", "report_only", "measure_speed", "print_commands"),
}
"""Flags, and the modes in which they would be ignored."""


def run_study(arguments: Arguments) -> bool:
    """Do what the arguments say; returns whether nothing is left to do.

    Raises:
        InUse: another program is at the run, or at the next one with ``jobs`` of 0.
        UserError: the study's file is wrong, a name is unknown, or runs failed.
    """
    study = read_study(arguments.study, arguments.out)
    from sit.study.evaluation import check_evaluation  # torch comes once the file is read
    from sit.study.report import check_folder
    from sit.study.schedule import Known, carry_out, carry_out_here, command_lines

    if arguments.measure_speed:
        from sit.study.speed import measure

        print(f"speeds: {measure(study)}")
        return True
    known = Known(study)
    state = known.state()
    only = asked_for(arguments, study, state)
    if arguments.against is not None:
        study.variant(arguments.against)  # a wrong name is told before anything is trained
    if arguments.dry_run:
        from sit.study.plan import plan

        print(plan(study, state, arguments.jobs or 1, arguments.seconds_per_step, only))
        return True
    if arguments.print_commands:
        print(command_lines(study, state, only, arguments.out))
        return True
    if arguments.run:
        from sit.study.one_run import do

        do(next(run for run in state.runs if run.name == arguments.run), study)
        return True
    if arguments.report_only:
        report(arguments, study, known.state())
        return True
    check_folder(study, study.out / "report")
    check_evaluation(study, state.missing(study, only))
    try:
        if arguments.jobs:
            done = carry_out(
                study,
                jobs=arguments.jobs,
                only=only,
                hours=arguments.hours,
                out=arguments.out,
                seconds_per_step=arguments.seconds_per_step,
            )
        else:
            done = carry_out_here(study, only=only, hours=arguments.hours)
    except UserError:
        with contextlib.suppress(UserError):  # what went wrong first is what is told
            if (state := known.state()).found:
                report(arguments, study, state)
        raise
    state = known.state()
    if done or state.found:
        report(arguments, study, state)
    return done


def asked_for(arguments: Arguments, study: Study, state: State) -> tuple[str, ...]:
    """The names that ``only`` asks for, of runs as they are, of variants as the study has them.

    Raises:
        UserError: one is no run's and no variant's, or ``run`` is no run's.
    """
    runs = {run.name for run in state.runs}
    names = {name: name for name in runs}
    names |= {spelled: variant.name for variant in study.variants for spelled in (variant.name, variant.slug)}
    for name in arguments.only:
        if name not in names:
            raise UserError(f"`only={name}`: {_no_such('run and no variant', study, state)}")
    if arguments.run is not None and arguments.run not in runs:
        raise UserError(f"`run={arguments.run}`: {_no_such('run', study, state)}")
    return tuple(names[name] for name in arguments.only)


def _no_such(what: str, study: Study, state: State) -> str:
    variants = ", ".join(variant.name for variant in study.variants)
    return f"no {what} is called so; the variants are {variants}, and a run's name is like {state.runs[0].name}"


def report(arguments: Arguments, study: Study, state: State) -> None:
    """Write the report, and the one against another variant if it is asked for."""
    from sit.study.report import write_report

    print(f"report: {write_report(study, state) / 'README.md'}")
    if arguments.against is not None:
        print(f"report: {write_report(study, state, arguments.against) / 'README.md'}")


@entry_point
def main() -> None:
    arguments = parse(Arguments, "python -m sit.study", description=__doc__)
    try:
        done = run_study(arguments)
    except InUse as error:
        error.status = IN_USE_EXIT
        raise
    if not done:
        from sit.training.stop_signal import REQUEUE_EXIT

        sys.exit(REQUEUE_EXIT)
