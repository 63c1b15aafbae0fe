"""Send signals to the commands at moments from their imports to their end, and look at how they end.

    OMP_NUM_THREADS=1 python scripts/signal_trials.py --json docs/reliability/signals.json

Training, encoding, sampling and evaluation, on the embedded data, are each timed once undisturbed. Then each signal is
sent at so many moments, spread evenly over that time from when the process listens. It must exit with the documented
status, or, in the last third of that time, with 0 if all was done; within 10 seconds; and with one line that names the
signal, unless it saved a step or was through. A run that had taken a step must have a checkpoint of its last one. Exits
with 1 if one does not.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pairs
import tyro

from sit.checkpoint.find import newest_checkpoint
from sit.checkpoint.info import read_info
from sit.training.run_folder import read_metrics
from sit.utils.cli import one_line_errors
from sit.utils.errors import UserError, entry_point
from sit.utils.record import write_record
from sit.utils.signals import PLAIN, TRAINING

LIMIT = 10.0
"""seconds from the signal to the end"""
LATE = 2 / 3
"""of the undisturbed time: only then a program may have done all and end with 0"""
STEPS = 150


@dataclass
class Arguments:
    """Send signals."""

    moments: int = 10
    """of each signal"""
    signals: tuple[str, ...] = tuple(number.name for number in TRAINING)
    programs: tuple[str, ...] = tuple(pairs.PROGRAMS)
    json: str | None = None
    """a file for what came out"""

    def __post_init__(self) -> None:
        if self.moments < 1:
            raise UserError(f"`moments` must be at least 1, not {self.moments}")
        if unknown := set(self.signals) - {number.name for number in TRAINING}:
            raise UserError(f"`signals={unknown.pop()}` is none that the commands answer")
        if unknown := set(self.programs) - pairs.PROGRAMS.keys():
            raise UserError(f"`programs={unknown.pop()}` is none of {', '.join(pairs.PROGRAMS)}")


def words_of(name: str, folder: Path, checkpoint: Path) -> list[str]:
    """The command line of a program; training is longer than in pairs, to be met in its steps."""
    words = pairs.PROGRAMS[name].words(folder, checkpoint)
    if name == "train":
        words += ["--data", "digits:heldout", "--steps", str(STEPS), "--preview-every", "50", "--preview-steps", "5"]
        words += ["--checkpoint-every", "50", "--resume", "auto"]
    return words


def start(words: list[str]) -> subprocess.Popen:
    """Begin a program, and return when it listens to signals."""
    process = pairs.start(words)
    while process.poll() is None and not _listens(process.pid):
        time.sleep(0.001)
    return process


def _listens(pid: int) -> bool:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    caught = next(int(line.split()[1], 16) for line in lines if line.startswith("SigCgt"))
    return bool(caught >> (signal.SIGUSR1 - 1) & 1)


def trial(
    name: str, words: list[str], folder: Path, *, number: signal.Signals, after: float, length: float
) -> dict[str, Any]:
    """One program, of so many seconds, that gets one signal: how it ended, and what was wrong with that."""
    process = start(words)
    time.sleep(after)
    process.send_signal(number)
    sent = time.monotonic()
    said = process.communicate()[1]
    seconds, status = time.monotonic() - sent, process.returncode
    statuses: Mapping[int, int] = TRAINING if name == "train" else PLAIN
    lines = sum(line.startswith(f"ended by {number.name}") for line in said.splitlines())
    done, saved = steps_of(folder) if name == "train" else (0, 0)
    ends = {
        "status": status == statuses[number] or (status == 0 and after >= LATE * length),
        "slow": seconds <= LIMIT,
        "traceback": "Traceback" not in said,
        "lines": status == 0 or saved > 0 or lines == 1,
        "not saved": saved == done and (name != "train" or status != 0 or saved == STEPS),
    }
    found = {"program": name, "signal": number.name, "after": round(after, 2), "status": status}
    found |= {"seconds": round(seconds, 2), "saved_step": saved}
    return found | {"wrong": [what for what, holds in ends.items() if not holds]}


def steps_of(run: Path) -> tuple[int, int]:
    """The last step that a run took, and the last that it saved."""
    rows = read_metrics(run / "metrics.jsonl")
    checkpoint = newest_checkpoint(run, resumable=True) if run.exists() else None
    return rows[-1]["step"] if rows else 0, read_info(checkpoint).step if checkpoint else 0


def trials(name: str, arguments: Arguments, place: Path, checkpoint: Path) -> dict[str, Any]:
    """All signals to one program, printed as it ends."""
    whole = start(words_of(name, place / f"{name}-whole", checkpoint))
    began = time.monotonic()
    said = whole.communicate()[1]
    if whole.returncode:
        raise UserError(f"{name} without signals ended with {whole.returncode}: {said[-500:]}")
    length, found = time.monotonic() - began, []
    for sent in arguments.signals:
        for moment in range(arguments.moments):
            folder = place / f"{name}-{sent}-{moment}"
            words, after = words_of(name, folder, checkpoint), length * moment / arguments.moments
            number = signal.Signals[sent]
            found.append(trial(name, words, folder, number=number, after=after, length=length))
            print(json.dumps(found[-1]), flush=True)
    return {"seconds_undisturbed": round(length, 2), "trials": found}


@entry_point
def main() -> None:
    with one_line_errors():
        arguments = tyro.cli(Arguments, prog="scripts/signal_trials.py")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        checkpoint = pairs.make_checkpoint(place / "run") if set(arguments.programs) - {"train", "encode"} else place
        results = {name: trials(name, arguments, place, checkpoint) for name in arguments.programs}
    if arguments.json:
        write_record(arguments.json, "cpu", {"programs": results})
    sys.exit(any(one["wrong"] for result in results.values() for one in result["trials"]))


if __name__ == "__main__":
    main()
