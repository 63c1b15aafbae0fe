"""How far a study is: one line for the whole and the runs at hand; and what is left, in hours."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterable, Mapping
from typing import Any

from sit.study.config import Study
from sit.study.runs import Run
from sit.training.run_folder import read_metrics

SELDOM = 60.0
"""seconds between two lines where nobody watches"""


def seconds_of_a_step(
    run: Run, runs: Iterable[Run], found: Mapping[str, Mapping[str, Any]], told: float | None
) -> float | None:
    """Measured on runs of the same variant, else on all, else as told; None where nothing is known."""
    paces: dict[bool, list[float]] = {True: [], False: []}
    for other in runs:
        if other.name in found and (pace := found[other.name]["speed"]["seconds_per_step"]):
            paces[other.variant == run.variant].append(pace)
    for own in (True, False):
        if paces[own]:
            return statistics.median(paces[own])
    return told


def steps_done(run: Run, study: Study) -> int:
    """The last step that a training has logged."""
    rows = read_metrics(run.training(study) / "metrics.jsonl")
    return rows[-1]["step"] if rows else 0


def remaining_hours(
    study: Study,
    runs: list[Run],
    found: Mapping[str, Mapping[str, Any]],
    *,
    jobs: int,
    told: float | None,
    known: list[Run] | None = None,
) -> float | None:
    """Hours that the trainings of ``runs`` will take which are not finished, ``jobs`` at a time; None if not known.

    Evaluations are not counted. Speeds are those of the finished runs among ``known``, None for ``runs`` themselves.
    """
    total = 0.0
    for run in runs:
        if run.name in found:
            continue
        pace = seconds_of_a_step(run, known or runs, found, told)
        if pace is None:
            return None
        total += pace * (run.config.steps - steps_done(run, study))
    return total / jobs / 3600


def in_words(hours: float | None) -> str:
    """Hours as ``2 h 05 min``."""
    if hours is None:
        return "time not known yet"
    minutes = round(60 * hours)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"


class Progress:
    """Writes a study's line of progress to stderr."""

    def __init__(self, study: Study, jobs: int, told: float | None) -> None:
        self.study, self.jobs, self.told = study, jobs, told
        self.shown = -SELDOM
        self.width = 0

    def show(self, state: Any, active: list[Run], stopping: bool = False) -> None:
        """Show the state: often to a terminal, seldom to a log."""
        watched = sys.stderr.isatty()
        if time.monotonic() - self.shown < (2 if watched else SELDOM):
            return
        self.shown = time.monotonic()
        self._write(self.line(state, active, stopping), watched)

    def line(self, state: Any, active: list[Run], stopping: bool = False) -> str:
        """The line: runs done of all, the time left, and the runs that go on."""
        missing = state.missing(self.study)
        left = remaining_hours(self.study, state.runs, state.found, jobs=self.jobs, told=self.told)
        done = len(state.runs) - len(missing)
        more = f" + {state.unknown} once the best is chosen" if state.unknown else ""
        parts = [f"study {done}/{len(state.runs)}{more}, {in_words(left)} left"]
        parts += [self._at_hand(run, state) for run in active]
        if stopping:
            parts.append("stopping")
        elif not active and missing:
            parts.append("waiting for other programs")
        return " | ".join(parts)

    def _at_hand(self, run: Run, state: Any) -> str:
        step = steps_done(run, self.study)
        if step >= run.config.steps:
            return f"{run.name}: {'evaluating' if run.steps_to_evaluate(self.study) else 'finishing'}"
        pace = seconds_of_a_step(run, state.runs, state.found, self.told)
        left = "" if pace is None else f", {in_words(pace * (run.config.steps - step) / 3600)}"
        return f"{run.name}: step {step}/{run.config.steps}{left}"

    def say(self, text: str) -> None:
        """A line of its own."""
        self._write(text, watched=False)

    def close(self, state: Any) -> None:
        """The last line."""
        missing = state.missing(self.study)
        self.say(f"study: {len(state.runs) - len(missing)} of {len(state.runs) + state.unknown} runs done")

    def _write(self, text: str, watched: bool) -> None:
        padded = text.ljust(self.width)
        self.width = len(text) if watched else 0
        sys.stderr.write(f"\r{padded}" if watched else f"{padded}\n")
        sys.stderr.flush()
