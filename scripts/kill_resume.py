"""Kill a training run at random moments, resume it each time, and compare its end with that of an uninterrupted run.

    python scripts/kill_resume.py --kills 20

The moments are drawn from a seed. Checkpoints are written every other step, so that some kills meet one half written.
Exits with 1 unless the final weights, moving averages and optimizer states are bitwise the same, on the CPU with one
thread, and so are the logged losses.
"""

from __future__ import annotations

import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from safetensors.torch import load_file

from sit.utils.cli import one_line_errors
from sit.utils.errors import UserError, entry_point

ROOT = Path(__file__).parent.parent
COMPARED = (
    "training/model.safetensors",
    "training/optimizer.pt",
    "transformer/diffusion_pytorch_model.safetensors",
)


@dataclass
class Arguments:
    """Kill and resume."""

    kills: int = 20
    """SIGKILLs in all"""
    steps: int = 600
    """steps of the run; it must outlast the kills"""
    checkpoint_every: int = 2
    mixer: str = "atconv"
    model: str = "SiT-XS/2"
    seed: int = 0
    """of the moments"""

    def __post_init__(self) -> None:
        for name in ("kills", "steps", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise UserError(f"`{name}` must be at least 1, not {getattr(self, name)}")


def command(arguments: Arguments, folder: Path) -> list[str]:
    """Train into ``folder``, from its newest checkpoint if there is one."""
    return [
        sys.executable, str(ROOT / "train.py"), "--mixer", arguments.mixer, "--model", arguments.model,
        "--steps", str(arguments.steps), "--batch-size", "16", "--checkpoint-every", str(arguments.checkpoint_every),
        "--preview-every", "0", "--log-every", "1", "--cpu-threads", "1", "--trackers", "tensorboard",
        "--output-dir", str(folder), "--resume", "auto",
    ]  # fmt: skip


def contents(path: Path) -> dict[str, bytes | object]:
    """Every tensor of a file as bytes, and every plain value, by name."""
    flat: dict[str, bytes | object] = {}

    def walk(name: str, value: object) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{name}/{key}", inner)
        elif isinstance(value, (list, tuple)):
            walk(name, dict(enumerate(value)))
        else:
            flat[name] = value.numpy().tobytes() if isinstance(value, torch.Tensor) else value

    walk("", load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True))
    return flat


def newest_step(folder: Path) -> int:
    """The step of a run's newest checkpoint; 0 before the first."""
    steps = [int(path.name.split("-")[1]) for path in (folder / "checkpoints").glob("step-*")]
    return max(steps, default=0)


def run(arguments: Arguments) -> bool:
    """Train once without and once with kills, and print whether the ends are the same; that is returned, too."""
    chance = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as place:
        whole, killed = Path(place) / "whole", Path(place) / "killed"
        subprocess.run(command(arguments, whole), check=True, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)

        writing = 0
        for kill in range(arguments.kills):
            process = subprocess.Popen(command(arguments, killed), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
            before = newest_step(killed)
            while newest_step(killed) <= before and process.poll() is None:
                time.sleep(0.01)  # it must get anywhere between two kills
            time.sleep(chance.uniform(0, 1))
            process.kill()
            process.wait()
            half = list((killed / "checkpoints").glob(".step-*"))
            writing += bool(half)
            where = "while writing a checkpoint" if half else "between checkpoints"
            print(f"kill {kill + 1:2}: after step {newest_step(killed)}, {where}", flush=True)
        subprocess.run(command(arguments, killed), check=True, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)

        last = f"checkpoints/step-{arguments.steps:07d}"
        same = [contents(whole / last / name) == contents(killed / last / name) for name in COMPARED]
        rows = [
            [line.split(", ")[:2] for line in (folder / "metrics.jsonl").read_text().splitlines()]
            for folder in (whole, killed)
        ]
        print(f"{arguments.kills} kills, {writing} of them while writing a checkpoint")
        for name, equal in zip(COMPARED, same, strict=True):
            print(f"{name}: {'bitwise the same' if equal else 'DIFFERENT'}")
        print(f"losses of {len(rows[0])} steps: {'the same' if rows[0] == rows[1] else 'DIFFERENT'}")
        return all(same) and rows[0] == rows[1]


@entry_point
def main() -> None:
    with one_line_errors():
        arguments = tyro.cli(Arguments, prog="scripts/kill_resume.py")
    sys.exit(0 if run(arguments) else 1)


if __name__ == "__main__":
    main()
