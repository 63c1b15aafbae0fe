"""One program at a time at a run: its lock, and how a program ends that finds it taken."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from sit.utils.lock import InUse, locked

if TYPE_CHECKING:
    from sit.study.config import Study
    from sit.study.runs import Run

IN_USE_EXIT = 75
"""Exit status of a run that another program is at: to be tried again later (EX_TEMPFAIL of sysexits.h)."""


def holding(run: Run, study: Study) -> AbstractContextManager[None]:
    """Hold a run for this process while the block runs; raises as :func:`sit.utils.lock.locked`."""
    return locked(run.work(study), "out")


def is_held(run: Run, study: Study) -> bool:
    """Whether another program is at a run.

    Raises:
        UserError: its folder can't be written.
    """
    if not run.work(study).is_dir():
        return False
    try:
        with holding(run, study):
            return False
    except InUse:
        return True
