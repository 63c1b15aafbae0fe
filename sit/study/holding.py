"""One program at a time at a run: its lock, and how a program ends that finds it taken."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from sit.utils.errors import UserError
from sit.utils.lock import locked

if TYPE_CHECKING:
    from sit.study.config import Study
    from sit.study.runs import Run

IN_USE_EXIT = 75
"""Exit status of a run that another program is at: to be tried again later (EX_TEMPFAIL of sysexits.h)."""


class InUse(UserError):
    """Another program is at the run."""


@contextlib.contextmanager
def holding(run: Run, study: Study) -> Iterator[None]:
    """Hold a run for this process while the block runs.

    Raises:
        InUse: another program does.
        UserError: its folder can't be written.
    """
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(locked(run.work(study), "out"))
        except UserError as error:
            if error.__cause__ is not None:  # the system refused the folder: that does not pass by waiting
                raise
            raise InUse(str(error)) from None
        yield


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
