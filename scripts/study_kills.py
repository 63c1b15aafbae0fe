"""A study, killed at random moments and given again, against one that nobody disturbs: the reports' numbers are equal.

    python scripts/study_kills.py --kills 10 --json docs/reliability/study-kills.json

It trains six tiny runs on the embedded digits. Each kill is a SIGKILL to the study and to the runs that it has started,
after a time drawn at random; a study that comes to its end is compared, and another one begun until there were as many
kills as wanted. What depends on the clock is left out of the comparison.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

from sit.utils.cli import one_line_errors
from sit.utils.errors import UserError, entry_point
from sit.utils.record import write_record

STUDY = """
recipe: digits
settings: {model: SiT-XS/8, data: "digits:heldout", vae: "none:channels=1", heldout: 0.1, heldout_images: 20,
           heldout_every: 3, checkpoint_every: 3, steps: STEPS, batch_size: 4, warmup_steps: 0, log_every: 1}
seeds: [SEEDS]
select: {seed: 0, learning_rate: [2e-3, 4e-3]}
variants:
  - {name: attention, mixer: attention}
  - {name: depthwise, mixer: depthwise}
evaluate: {reference: digits, num_samples: 40, sampler: {sampler: ode, method: euler, steps: 2}}
"""


@dataclass
class Arguments:
    """Kill a study at random moments and compare its report."""

    kills: int = 10
    """how often"""
    longest: float | None = None
    """seconds until a kill, at most; None takes half of those of the undisturbed study"""
    steps: int = 30
    """of each run"""
    seeds: int = 2
    """training seeds"""
    seed: int = 0
    """of the moments"""
    jobs: int = 2
    """runs at a time"""
    json: Path | None = None
    """file for what was found"""

    def __post_init__(self) -> None:
        if min(self.kills, self.steps, self.seeds, self.jobs) < 1:
            raise UserError("`kills`, `steps`, `seeds` and `jobs` must be at least 1")


def command(file: Path, out: Path, jobs: int) -> list[str]:
    return [sys.executable, "-m", "sit.study", str(file), "--out", str(out), "--jobs", str(jobs)]


def children(process: int) -> list[int]:
    """The processes that one has started, and theirs."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(entry.read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue
        if parent == process:
            found += [int(entry.parent.name), *children(int(entry.parent.name))]
    return found


def killed(
    moments: random.Random, most: int, longest: float, file: Path, out: Path, jobs: int
) -> list[dict[str, float]]:
    """Start the study and kill it, again and again, until it comes to its end or was killed ``most`` times.

    Returns:
        Of each kill the seconds after which it came, how many processes it ended, and how many runs were done.
    """
    kills: list[dict[str, float]] = []
    while True:
        process = subprocess.Popen(command(file, out, jobs), stderr=subprocess.DEVNULL)
        wait = moments.uniform(0, longest) if len(kills) < most else None
        try:
            process.wait(wait)
        except subprocess.TimeoutExpired:
            doomed = [process.pid, *children(process.pid)]
            for number in doomed:
                try:
                    os.kill(number, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            process.wait()
            done = len(list((out / "runs").glob("*.json")))
            print(f"killed {len(doomed)} processes after {wait:.1f} s; {done} runs have their JSON", flush=True)
            kills.append({"seconds": round(wait or 0, 1), "processes": len(doomed), "runs_done": done})
            continue
        if process.returncode:
            raise UserError(f"the study ended with exit status {process.returncode}")
        return kills


def numbers(out: Path) -> dict:
    """A report's numbers but those that depend on the clock."""
    found = json.loads((out / "report" / "numbers.json").read_text())
    del found["seconds"]
    return found


def run(arguments: Arguments) -> None:
    """Compare, and say so.

    Raises:
        UserError: the numbers differ.
    """
    with tempfile.TemporaryDirectory(prefix="study-kills-") as place:
        file = Path(place) / "digits.yaml"
        seeds = ", ".join(map(str, range(arguments.seeds)))
        file.write_text(STUDY.replace("STEPS", str(arguments.steps)).replace("SEEDS", seeds))
        start = time.monotonic()
        subprocess.run(command(file, Path(place) / "whole", arguments.jobs), stderr=subprocess.DEVNULL, check=True)
        seconds = time.monotonic() - start
        print(f"undisturbed in {seconds:.0f} s", flush=True)
        expected, studies, equal = numbers(Path(place) / "whole"), [], True
        moments, left = random.Random(arguments.seed), arguments.kills
        while left and equal:
            out = Path(place) / f"killed-{len(studies)}"
            studies.append(killed(moments, left, arguments.longest or seconds / 2, file, out, arguments.jobs))
            equal = numbers(out) == expected
            left -= len(studies[-1])
        if arguments.json is not None:
            found = {"studies": studies, "undisturbed_seconds": round(seconds, 1), "same_numbers": equal}
            write_record(arguments.json, "cpu", found)
        kills = f"after {arguments.kills - left} kills of {len(studies)} studies"
        if not equal:
            raise UserError(f"{kills} the report has other numbers")
        print(f"{kills} the reports have the same numbers")


@entry_point
def main() -> None:
    with one_line_errors():
        arguments = tyro.cli(Arguments, prog="scripts/study_kills.py")
    run(arguments)


if __name__ == "__main__":
    main()
