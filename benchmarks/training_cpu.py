"""Training steps a second of a small network on a CPU with other programs beside it, with one computing thread and all.

    python benchmarks/training_cpu.py --threads 2 --json docs/performance/training-cpu.json

The step is that of a recipe on one process, on a batch that lies ready: forward and backward pass, optimizer and
average. All threads share each operation, and wait for one another as a command's threads do, briefly
(`sit/utils/openmp.py`), or as GNU OpenMP has it without being told. Each way has a process of its own; they take turns,
with 0, 2 and 8 processes beside them that keep a core busy each.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import tyro
from beside import process_with
from busy import FIRST, BusyArguments, measure, run
from checks import at_least_one

from sit.study.speed import training_step
from sit.training.recipes import load_recipe
from sit.utils.cli import one_line_errors
from sit.utils.errors import entry_point
from sit.utils.threads import use_threads


@dataclass
class Arguments(BusyArguments):
    """Time training beside busy loops."""

    recipe: str = "digits"
    mixer: str = "atconv"
    steps: int = 5
    """timed at a time"""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_one(self, "steps")


def programs(arguments: Arguments, threads: int) -> dict[str, Callable[[], None]]:
    """What is timed, in a process of its own: so many steps."""
    use_threads(threads)
    config = dataclasses.replace(load_recipe(arguments.recipe), mixer=arguments.mixer)
    step = training_step(config, torch.device("cpu"), arguments.recipe)

    def steps() -> None:
        for _ in range(arguments.steps):
            step()

    return {"steps": steps}


def found(arguments: Arguments, threads: int) -> list[dict[str, Any]]:
    """The rows, of three ways."""
    told = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    kinds: dict[str, tuple[int, tuple[str, ...]]] = {
        FIRST: (1, ()),
        f"{threads} threads": (threads, ()),
        f"{threads} threads that wait as usual": (threads, told),
    }
    with contextlib.ExitStack() as processes:
        timed = {
            way: functools.partial(
                processes.enter_context(process_with(programs, arguments, computing, start="spawn", unset=unset)),
                "steps",
            )
            for way, (computing, unset) in kinds.items()
        }
        return measure(timed, arguments, arguments.steps, "steps")


@entry_point
def main() -> None:
    with one_line_errors():
        arguments = tyro.cli(Arguments, prog="benchmarks/training_cpu.py")
    what = f"{arguments.recipe}, {arguments.mixer}"
    run(arguments, what, "steps", lambda threads: found(arguments, threads))


if __name__ == "__main__":
    main()
