"""Send signals to ``train.py`` at moments from its imports to its end, and look at how it ends.

    OMP_NUM_THREADS=1 python scripts/signal_trials.py --json docs/reliability-signals.json

The run, on the embedded data, is timed once undisturbed. Then each signal is sent at so many moments, spread evenly
over that time from when the process listens. It must exit with the documented status, or with 0 if all its steps were
done; within 10 seconds; without a traceback; and if it had taken a step, with a checkpoint of its last one. Exits with
1 if it does not.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from sit.checkpoint.find import newest_checkpoint
from sit.checkpoint.info import read_info
from sit.training.run_folder import read_metrics
from sit.utils.cli import one_line_errors
from sit.utils.errors import UserError, entry_point
from sit.utils.record import write_record
from sit.utils.signals import TRAINING

ROOT = Path(__file__).parent.parent
LIMIT = 10.0
"""seconds from the signal to the end"""


@dataclass
class Arguments:
    """Send signals."""

    moments: int = 10
    """of each signal"""
    signals: tuple[str, ...] = tuple(number.name for number in TRAINING)
    json: str | None = None
    """a file for what came out"""

    def __post_init__(self) -> None:
        if self.moments < 1:
            raise UserError(f"`moments` must be at least 1, not {self.moments}")
        if unknown := set(self.signals) - {number.name for number in TRAINING}:
            raise UserError(f"`signals={unknown.pop()}` is none that training answers")


def start(folder: Path) -> subprocess.Popen:
    """Begin a run in ``folder``, and return when it listens to signals."""
    words = ["--data", "digits:heldout", "--model", "SiT-XS/4", "--mixer", "attention", "--steps", "150"]
    words += [
        "--batch-size",
        "8",
        "--log-every",
        "1",
        "--preview-every",
        "50",
        "--preview-steps",
        "5",
        "--checkpoint-every",
        "50",
    ]
    words += ["--cpu-threads", "1", "--output-dir", str(folder), "--resume", "auto", "--trackers"]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    while process.poll() is None and not _listens(process.pid):
        time.sleep(0.001)
    return process


def _listens(pid: int) -> bool:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    caught = next(int(line.split()[1], 16) for line in lines if line.startswith("SigCgt"))
    return bool(caught >> (signal.SIGUSR1 - 1) & 1)


def trial(folder: Path, number: signal.Signals, after: float) -> dict[str, Any]:
    """One run that gets one signal: how it ended, and what was wrong with that."""
    process = start(folder)
    time.sleep(after)
    process.send_signal(number)
    sent = time.monotonic()
    said = process.communicate()[1]
    seconds, status = time.monotonic() - sent, process.returncode
    rows = read_metrics(folder / "metrics.jsonl")
    done = rows[-1]["step"] if rows else 0
    checkpoint = newest_checkpoint(folder, resumable=True) if folder.exists() else None
    saved = read_info(checkpoint).step if checkpoint else 0
    wrong = [
        what
        for what, holds in (
            ("status", status == TRAINING[number] or (status == 0 and saved == 150)),
            ("slow", seconds <= LIMIT),
            ("traceback", "Traceback" not in said),
            ("not saved", saved == done),
        )
        if not holds
    ]
    found = {"signal": number.name, "after": round(after, 2), "status": status, "seconds": round(seconds, 2)}
    return found | {"saved_step": saved, "wrong": wrong}


@entry_point
def main() -> None:
    with one_line_errors():
        arguments = tyro.cli(Arguments, prog="scripts/signal_trials.py")
    trials = []
    with tempfile.TemporaryDirectory() as place:
        whole = start(Path(place) / "whole")
        began = time.monotonic()
        if whole.wait():
            raise UserError(f"the run without signals ended with {whole.returncode}: {whole.stderr.read()[-500:]}")
        length = time.monotonic() - began
        for name in arguments.signals:
            for moment in range(arguments.moments):
                after = length * moment / arguments.moments
                folder = Path(place) / f"{name}-{moment}"
                trials.append(trial(folder, signal.Signals[name], after))
                print(json.dumps(trials[-1]), flush=True)
    if arguments.json:
        write_record(arguments.json, "cpu", {"seconds_undisturbed": round(length, 2), "trials": trials})
    sys.exit(any(found["wrong"] for found in trials))


if __name__ == "__main__":
    main()
