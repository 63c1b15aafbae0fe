"""Kill programs at random file operations, start them again, and compare the end with that of undisturbed ones.

    OMP_NUM_THREADS=1 python scripts/kill_trials.py --json docs/reliability/kills.json

Training, encoding, evaluation and sampling run in forked processes, small but as their commands run them. Each is run
once undisturbed, which counts the operations on files that it opens for writing, makes, renames or removes. A trial
kills it (SIGKILL) before one of them, drawn at random, or up to 20 ms later, in the middle of a write; and starts it
again without a kill. Then its folder must hold the same files with the same bytes, and nothing else. Exits with 1 if a
folder does not.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from small_programs import PROGRAMS, contents, make_checkpoint

from sit.utils.cli import one_line_errors
from sit.utils.errors import UserError, entry_point
from sit.utils.forks import own_progress_lock
from sit.utils.record import write_record

LIMIT = 300
"""seconds after which a process counts as hanging"""

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
EVENTS = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod", "os.link")


@dataclass
class Arguments:
    """Kill and start again."""

    training: int = 50
    """SIGKILLs of each"""
    encoding: int = 20
    evaluation: int = 20
    sampling: int = 20
    seed: int = 0
    """of the moments"""
    json: str | None = None
    """a file for the counts"""

    def __post_init__(self) -> None:
        for name in PROGRAMS:
            if getattr(self, name) < 0:
                raise UserError(f"`{name}` must be at least 0, not {getattr(self, name)}")


def count_operations(folder: Path, kill_at: int | None, delay: float) -> list[int]:
    """Count, in a list's only item, this process's operations on ``folder``; kill it at one of them, or soon after."""
    count = [0]
    inside = os.path.realpath(folder) + os.sep

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if not isinstance(flags, int) or not flags & WRITES:
                return
        elif event in EVENTS:
            path = arguments[0]
        else:
            return
        if not isinstance(path, (str, bytes, os.PathLike)) or not os.path.abspath(os.fsdecode(path)).startswith(inside):
            return
        count[0] += 1
        if count[0] == kill_at:
            if not delay:
                os.kill(os.getpid(), signal.SIGKILL)
            threading.Thread(target=kill_later, args=(delay,), daemon=True).start()

    sys.addaudithook(hook)
    return count


def kill_later(delay: float) -> None:
    time.sleep(delay)
    os.kill(os.getpid(), signal.SIGKILL)


def run_forked(
    program: Callable[[Path], None], folder: Path, checkpoint: Path, kill_at: int | None = None, delay: float = 0.0
) -> int | None:
    """Run a program in a process of its own with ``folder`` as its current one.

    Returns:
        How many operations on files it did; None if it was killed.

    Raises:
        UserError: it failed or hung; its output is at the end of the message.
    """
    folder.mkdir(exist_ok=True)
    said, told = folder.with_suffix(".txt"), folder.with_suffix(".count")
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException), open(said, "w") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            signal.alarm(LIMIT)
            own_progress_lock()
            os.chdir(folder)
            count = count_operations(folder, kill_at, delay)
            try:
                program(checkpoint)
                told.write_text(str(count[0]))
                os._exit(0)
            except BaseException:
                import traceback

                traceback.print_exc()
        os._exit(1)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL and kill_at is not None:
        return None
    if status:
        raise UserError(f"{program.__name__} ended with {status}: {said.read_text()[-2000:]}")
    return int(told.read_text())


def try_kills(name: str, kills: int, place: Path, checkpoint: Path, chance: random.Random) -> dict[str, Any]:
    """All trials of one program; what came out, and where it differed."""
    program = PROGRAMS[name]
    operations = run_forked(program, place / f"{name}-whole", checkpoint)
    expected = contents(place / f"{name}-whole")
    killed, different = 0, []
    for trial in range(kills):
        kill_at, delay = chance.randint(1, operations), chance.choice([0.0, chance.uniform(0, 0.02)])
        folder = place / f"{name}-{trial}"
        killed += run_forked(program, folder, checkpoint, kill_at, delay) is None
        run_forked(program, folder, checkpoint)
        found = contents(folder)
        if found != expected:
            names = [path for path in sorted(found.keys() | expected.keys()) if found.get(path) != expected.get(path)]
            different.append({"operation": kill_at, "delay": delay, "files": names})
        shutil.rmtree(folder)
    return {"operations": operations, "kills": kills, "met": killed, "different": different}


def run(arguments: Arguments, place: Path) -> dict[str, dict[str, Any]]:
    """All trials of all programs, printed as they end."""
    run_forked(make_checkpoint, place / "made", Path())
    checkpoint, results = place / "made" / "run", {}
    chance = random.Random(arguments.seed)
    for name in PROGRAMS:
        if kills := getattr(arguments, name):
            results[name] = try_kills(name, kills, place, checkpoint, chance)
            told = {key: value if key != "different" else len(value) for key, value in results[name].items()}
            print(f"{name}: {told}", flush=True)
            for trial in results[name]["different"]:
                print(f"  {trial}", flush=True)
    return results


@entry_point
def main() -> None:
    with one_line_errors():
        arguments = tyro.cli(Arguments, prog="scripts/kill_trials.py")
    with tempfile.TemporaryDirectory() as place:
        results = run(arguments, Path(place))
    if arguments.json:
        write_record(arguments.json, "cpu", {"trials": results})
    sys.exit(any(result["different"] for result in results.values()))


if __name__ == "__main__":
    main()
