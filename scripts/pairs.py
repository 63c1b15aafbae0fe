"""Start two of each program at once on one folder: one works, the other says who holds it.

    python scripts/pairs.py --json docs/reliability/pairs.json

Training, encoding, sampling and evaluation, each on the embedded digits with a tiny network. The two begin together;
the second to come to the folder must end with status 2 and one line, either that the folder is in use by the first,
with its process, or, if the first was through by then, that it has something in it (an encoding and an evaluation may
be gone on with, so they end well). The folder must hold all of the work and no leftovers. Exits with 1 if a round went
otherwise.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import tyro

from sit.utils.cli import one_line_errors
from sit.utils.errors import UserError, entry_point
from sit.utils.record import write_record

ROOT = Path(__file__).parent.parent


@dataclass
class Arguments:
    """Start pairs of programs."""

    rounds: int = 10
    """for each program"""
    programs: tuple[str, ...] = ()
    """train, encode, sample, evaluate; none given means all"""
    json: str | None = None
    """a file for what came out"""

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise UserError(f"`rounds` must be at least 1, not {self.rounds}")
        if unknown := set(self.programs) - set(PROGRAMS):
            raise UserError(f"`programs={sorted(unknown)[0]}` is none of {', '.join(PROGRAMS)}")


@dataclass(frozen=True)
class Program:
    """A program's words after ``python``, for a folder and a checkpoint, and the files that it leaves in the folder."""

    words: Callable[[Path, Path], list[str]]
    leaves: tuple[str, ...]


TINY = [
    "--model", "SiT-XS/8", "--mixer", "attention", "--batch-size", "4", "--preview-every", "0", "--cpu-threads", "1",
]  # fmt: skip
CONTINUED = ("encode", "evaluate")
"""programs whose folder may be given again"""
PROGRAMS = {
    "train": Program(
        lambda folder, checkpoint: ["train.py", *TINY, "--steps", "20", "--checkpoint-every", "20", "--log-every", "1",
                                    "--trackers", "tensorboard", "--output-dir", str(folder)],
        ("config.yaml", "metrics.jsonl", "vae", "checkpoints/step-0000020/sit.json"),
    ),
    "encode": Program(
        lambda folder, checkpoint: ["-m", "sit.latents", "encode", "--data", "digits:heldout", "--workers", "0",
                                    "--chunk", "32", "--out", str(folder)],
        ("manifest.json", "labels.npy", "moments-00000.npy"),
    ),
    "sample": Program(
        lambda folder, checkpoint: ["sample.py", "--ckpt", str(checkpoint), "--steps", "8", "--num-samples", "20",
                                    "--out", str(folder)],
        ("samples.npz", "grid.png", "000019.png"),
    ),
    "evaluate": Program(
        lambda folder, checkpoint: ["eval_fid.py", "--ckpt", str(checkpoint), "--reference", "digits:heldout",
                                    "--features", "digits", "--steps", "4", "--num-samples", "100",
                                    "--work-dir", str(folder)],
        ("samples-*/about.json", "samples-*/numbers-*.json"),
    ),
}  # fmt: skip
"""Name → program."""


def make_checkpoint(folder: Path) -> Path:
    """A run of two steps, to sample from."""
    words = ["train.py", *TINY, "--steps", "2", "--trackers", "tensorboard", "--output-dir", str(folder)]
    subprocess.run([sys.executable, *words], cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return folder


def start(words: list[str]) -> subprocess.Popen:
    """Begin a program, of its words after ``python``; what it says on standard error is kept."""
    return subprocess.Popen(
        [sys.executable, *words], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def flaw(program: Program, folder: Path, checkpoint: Path) -> str | None:
    """Run a pair; what is wrong with how it ended, None if nothing is."""
    pair = [start(program.words(folder, checkpoint)) for _ in "12"]
    ends = [(process.communicate()[1], process.returncode, process.pid) for process in pair]
    (_, good, first), (told, bad, _) = sorted(ends, key=lambda end: end[1])
    lines = [line for line in told.splitlines() if line.startswith("error: ")]
    if (good, bad) == (0, 2):
        said = lines[0] if len(lines) == 1 else ""
        if not re.search(rf"in use by process {first} on|exists", said) or str(folder) not in said:
            return f"the second said {lines or told[-500:]}"
    elif (good, bad) != (0, 0) or program not in [PROGRAMS[name] for name in CONTINUED]:
        return f"statuses {good} and {bad}: {told[-500:]}"
    if missing := [name for name in program.leaves if not list(folder.glob(name))]:
        return f"the folder lacks {', '.join(missing)}"
    if left := [path for path in folder.parent.iterdir() if path.name.startswith(f".{folder.name}")]:
        return f"left beside it: {left[0].name}"
    if left := [path for path in folder.rglob("*") if path.name.endswith((".tmp", ".lock"))]:
        return f"left in it: {left[0]}"
    return None


def run(arguments: Arguments) -> dict[str, dict[str, object]]:
    """Run all pairs, print what came of them, and return it by program: how many rounds, and what was wrong."""
    results: dict[str, dict[str, object]] = {}
    with tempfile.TemporaryDirectory(prefix="pairs-") as place:
        checkpoint = make_checkpoint(Path(place) / "run")
        for name in arguments.programs or PROGRAMS:
            flaws = [flaw(PROGRAMS[name], Path(place) / f"{name}-{i}", checkpoint) for i in range(arguments.rounds)]
            found = [words for words in flaws if words is not None]
            results[name] = {"rounds": arguments.rounds, "wrong": found}
            print(f"{name:10} {arguments.rounds - len(found)} of {arguments.rounds} pairs as they should", flush=True)
            for words in found:
                print(f"           {words}", flush=True)
    return results


@entry_point
def main() -> None:
    with one_line_errors():
        arguments = tyro.cli(Arguments, prog="scripts/pairs.py")
    results = run(arguments)
    if arguments.json:
        write_record(arguments.json, "cpu", {"programs": results})
    sys.exit(any(result["wrong"] for result in results.values()))


if __name__ == "__main__":
    main()
