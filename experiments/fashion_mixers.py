"""Mixers on Fashion-MNIST: train every mixer with every seed, several runs at a time, going on where it stopped.

    python experiments/fashion_mixers.py --seeds 0 1 2

It needs the latents of the recipe ``fashion-mnist``; docs/results.md has the commands that make them, and the one that
reports the runs. A run that is finished is left alone, one that was cut off is resumed, so the same command may be
given again at any time. All runs of a seed see the same data in the same order with the same noise.
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import tyro

from sit.checkpoint.find import find_checkpoints
from sit.checkpoint.integrity import is_complete
from sit.training.recipes import load_recipe
from sit.utils.cli import one_line_errors
from sit.utils.errors import UserError, entry_point

ROOT = Path(__file__).parent.parent
MIXERS = {
    "attention": "attention",
    "atconv": "atconv",
    "hybrid": "attention,atconv",
    "static": "atconv:routing=false",
    "no-inhibition": "atconv:inhibition=false",
}
"""the published mixer, the paper's, both in turn, and the paper's two findings taken away"""


@dataclass
class Arguments:
    """Train the mixers on Fashion-MNIST."""

    seeds: tuple[int, ...] = (0, 1, 2)
    mixers: tuple[str, ...] = tuple(MIXERS)
    """of attention, atconv, hybrid, static, no-inhibition"""
    recipe: str = "fashion-mnist"
    steps: int | None = None
    """None takes the recipe's"""
    model: str | None = None
    """None takes the recipe's"""
    checkpoint_every: int = 500
    jobs: int = max(1, (os.cpu_count() or 1))
    """runs at a time, of one CPU thread each"""
    out: Path = Path("runs/fashion")
    """folder of the runs"""

    def __post_init__(self) -> None:
        for name in self.mixers:
            if name not in MIXERS:
                raise UserError(f"`mixers={name}`: unknown; they are {', '.join(MIXERS)}")
        if self.jobs < 1:
            raise UserError(f"`jobs` must be at least 1, not {self.jobs}")
        if self.steps is not None and self.steps < 1:
            raise UserError(f"`steps` must be at least 1, not {self.steps}")


def train(name: str, seed: int, arguments: Arguments) -> None:
    """Train one run to its end, unless it is there."""
    recipe = load_recipe(arguments.recipe)
    folder = arguments.out / f"{name}-seed{seed}"
    steps = arguments.steps or recipe.steps
    done = [step for step, place in find_checkpoints(folder) if is_complete(place)] if folder.is_dir() else []
    if steps in done:
        print(f"{folder}: done", flush=True)
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable, str(ROOT / "train.py"), "--recipe", arguments.recipe, "--mixer", MIXERS[name],
        "--seed", str(seed), "--steps", str(steps), "--model", arguments.model or recipe.model,
        "--checkpoint-every", str(arguments.checkpoint_every), "--keep-last", "0", "--preview-every", "0",
        "--cpu-threads", "1", "--output-dir", str(folder), "--resume", "auto",
    ]  # fmt: skip
    with open(folder.with_suffix(".log"), "a") as log:
        print(f"{folder}: from step {max(done, default=0)} to {steps}", flush=True)
        result = subprocess.run(command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if result.returncode:
        raise UserError(f"{folder} stopped with exit code {result.returncode}; see {log.name}")


@entry_point
def main() -> None:
    with one_line_errors():
        arguments = tyro.cli(Arguments, prog="experiments/fashion_mixers.py")
    run(arguments)


def run(arguments: Arguments) -> None:
    """Train all runs that are not finished."""
    with ThreadPoolExecutor(arguments.jobs) as pool:
        # a seed at a time, so that whatever is finished can be compared
        futures = [pool.submit(train, name, seed, arguments) for seed in arguments.seeds for name in arguments.mixers]
        for future in futures:
            future.result()


if __name__ == "__main__":
    main()
