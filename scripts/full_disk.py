"""Let the disk be full for training, encoding, evaluation and sampling, and start them again when it is not.

    OMP_NUM_THREADS=1 python scripts/full_disk.py --json docs/reliability/full-disk.json

The system's limit on the size of files stands for the disk: what would grow beyond it can't be written. Each program
is run once without it, then under so many limits, spread evenly in their logarithms from 64 bytes to the size of its
largest file. It must end with status 2 and one line, and leave what was there before as it was; started again without
the limit it must end in the same bytes as the run without. Exits with 1 if one does not.
"""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from small_programs import PROGRAMS, contents, make_checkpoint

from sit.utils.cli import one_line_errors
from sit.utils.errors import UserError, entry_point
from sit.utils.forks import own_progress_lock
from sit.utils.record import write_record

LIMIT = 300
"""seconds after which a process counts as hanging"""
SMALLEST = 64
"""bytes"""


@dataclass
class Arguments:
    """Fill the disk."""

    sizes: int = 10
    """limits for each program"""
    programs: tuple[str, ...] = tuple(PROGRAMS)
    json: str | None = None
    """a file for what came out"""

    def __post_init__(self) -> None:
        if self.sizes < 1:
            raise UserError(f"`sizes` must be at least 1, not {self.sizes}")
        if unknown := set(self.programs) - PROGRAMS.keys():
            raise UserError(f"`programs={sorted(unknown)[0]}` is none of {', '.join(PROGRAMS)}")


def run_limited(program: Callable[[Path], None], folder: Path, checkpoint: Path, limit: int | None) -> tuple[int, str]:
    """Run a program in a process of its own with ``folder`` as its current one: its status, and what it said."""
    folder.mkdir(exist_ok=True)
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            for descriptor, name in ((1, "stdout"), (2, "stderr")):
                os.dup2(writing, descriptor)
                setattr(
                    sys, name, os.fdopen(descriptor, "w", buffering=1, closefd=False)
                )  # a test has put others there
            os.close(reading)
            signal.alarm(LIMIT)
            own_progress_lock()
            os.chdir(folder)
            if limit is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            try:
                entry_point(program)(checkpoint)
                os._exit(0)
            except SystemExit as stop:
                os._exit(int(stop.code or 0))
            except BaseException:
                import traceback

                traceback.print_exc()
        os._exit(1)
    os.close(writing)
    with os.fdopen(reading, errors="replace") as said:
        told = said.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), told


def flaw(status: int, said: str) -> str | None:
    """What is wrong with how a program ended on a full disk; None if nothing is."""
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    if "Traceback" in said:
        return f"a traceback: {said.splitlines()[-1]}"
    if status != 2 or len(lines) != 1:
        return f"status {status} and {len(lines)} lines: {said[-300:]}"
    return None


def trials(name: str, sizes: int, place: Path, checkpoint: Path) -> list[dict[str, Any]]:
    """What came of one program under each limit, by what was ``wrong``."""
    program, whole = PROGRAMS[name], place / f"{name}-whole"
    status, said = run_limited(program, whole, checkpoint, None)
    if status:
        raise UserError(f"{name} without a limit ended with {status}: {said[-500:]}")
    expected = contents(whole)
    largest = max(path.stat().st_size for path in whole.rglob("*") if path.is_file())
    found = []
    for number, limit in enumerate(np.geomspace(SMALLEST, largest - 1, sizes).astype(int).tolist()):
        folder = place / f"{name}-{number}"
        before = contents(checkpoint)
        status, said = run_limited(program, folder, checkpoint, limit)
        wrong = [problem] if (problem := flaw(status, said)) else []
        if contents(checkpoint) != before:
            wrong.append("what was there before changed")
        status, again = run_limited(program, folder, checkpoint, None)
        if status:
            wrong.append(f"started again it ended with {status}: {again[-300:]}")
        if unlike := unlike_names(expected, contents(folder)):
            wrong.append(f"started again it left other files: {', '.join(unlike)}")
        line = next((line for line in said.splitlines() if line.startswith("error: ")), "")
        found.append({"limit": limit, "said": line.replace(str(place), ""), "wrong": wrong})
        shutil.rmtree(folder)
    return found


def unlike_names(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """Names of files that are not as expected, but for PNGs that sampling kept and named when the disk was full."""
    kept = {name for name in found if name.split("/")[0].endswith("-unfinished")}
    names = (expected.keys() | found.keys()) - kept
    return sorted(name for name in names if expected.get(name, 0) != found.get(name, 0))


@entry_point
def main() -> None:
    with one_line_errors():
        arguments = tyro.cli(Arguments, prog="scripts/full_disk.py")
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        status, said = run_limited(make_checkpoint, place / "made", Path(), None)
        if status:
            raise UserError(f"training a checkpoint ended with {status}: {said[-500:]}")
        for name in arguments.programs:
            results[name] = trials(name, arguments.sizes, place, place / "made" / "run")
            well = sum(not trial["wrong"] for trial in results[name])
            print(f"{name}: {well} of {arguments.sizes} sizes as they should", flush=True)
            for trial in results[name]:
                if trial["wrong"]:
                    print(f"  {trial}", flush=True)
    if arguments.json:
        write_record(arguments.json, "cpu", {"trials": results})
    sys.exit(any(trial["wrong"] for found in results.values() for trial in found))


if __name__ == "__main__":
    main()
