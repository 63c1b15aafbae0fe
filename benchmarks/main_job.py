"""How long the commands take that the README begins with: training on the digits, a grid of samples, and an evaluation.

    python benchmarks/main_job.py --json docs/performance/main-job.json

Each is a process of its own, as a user starts it, from the start of Python on; all three, for each number of threads.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tyro
from checks import at_least_one

from sit.utils.cli import one_line_errors
from sit.utils.errors import UserError, entry_point
from sit.utils.record import machine, write_record
from sit.utils.tables import markdown_table

ROOT = Path(__file__).parent.parent


@dataclass
class Arguments:
    """Time training, sampling and evaluation as processes."""

    mixer: str = "atconv"
    cpu_threads: tuple[int, ...] = (1, 2)
    """of each process"""
    steps: int = 1500
    """of training"""
    sampler_steps: tuple[int, int] = (250, 50)
    """of sampling and of the evaluation"""
    num_samples: int = 500
    """of the evaluation"""
    json: Path | None = None
    """file for all numbers"""

    def __post_init__(self) -> None:
        at_least_one(self, "steps")
        for threads in self.cpu_threads:
            if threads < 1:
                raise UserError(f"`cpu_threads` must be at least 1, not {threads}")

    def commands(self, run: Path, threads: int) -> dict[str, list[str]]:
        """What is timed, by name, on a run in the folder ``run``."""
        sampling, evaluation = map(str, self.sampler_steps)
        train = ["-m", "accelerate.commands.launch", "train.py", "--mixer", self.mixer, "--output-dir", str(run)]
        measure = ["eval_fid.py", "--ckpt", str(run), "--reference", "digits", "--steps", evaluation]
        words = {
            "training": [*train, "--steps", str(self.steps)],
            "sampling": ["sample.py", "--ckpt", str(run), "--steps", sampling],
            "evaluation": [*measure, "--num-samples", str(self.num_samples)],
        }
        return {name: [sys.executable, *these, "--cpu-threads", str(threads)] for name, these in words.items()}


def measure(arguments: Arguments, threads: int) -> dict[str, float]:
    """Seconds of each command with so many computing threads.

    Raises:
        UserError: a command failed.
    """
    seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, words in arguments.commands(Path(folder) / "run", threads).items():
            start = time.perf_counter()
            done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
            seconds[name] = time.perf_counter() - start
            if done.returncode:
                raise UserError(f"{name}: {(done.stderr.strip().splitlines() or ['it failed'])[-1]}")
    return seconds | {"all": sum(seconds.values())}


@entry_point
def main() -> None:
    with one_line_errors():
        arguments = tyro.cli(Arguments, prog="benchmarks/main_job.py")
    found = {threads: measure(arguments, threads) for threads in arguments.cpu_threads}
    rows = [(threads, *(f"{value:.0f} s" for value in seconds.values())) for threads, seconds in found.items()]
    print(machine("cpu"))
    print(markdown_table(["threads", *next(iter(found.values()))], rows))
    if arguments.json is not None:
        write_record(arguments.json, "cpu", {"mixer": arguments.mixer, "seconds": found})


if __name__ == "__main__":
    main()
