"""Training steps a second of a small network on a CPU with other programs beside it, with one computing thread and all.

    python benchmarks/training_cpu.py --threads 2 --json docs/performance/training-cpu.json

The step is that of a recipe on one process, on a batch that lies ready: forward and backward pass, optimizer and
average. All threads share each operation; they take turns with one, with 0, 2 and 8 processes beside them that keep a
core busy each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
import tyro
from busy import FIRST, BusyArguments, measure, run
from checks import at_least_one

from sit.study.speed import training_step
from sit.training.recipes import load_recipe
from sit.utils.cli import one_line_errors
from sit.utils.errors import entry_point


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


def ways(arguments: Arguments, threads: int) -> dict[str, Callable[[], None]]:
    """What is timed, by name: so many steps, each way with a network of its own."""
    config = dataclasses.replace(load_recipe(arguments.recipe), mixer=arguments.mixer)

    def trains(computing: int) -> Callable[[], None]:
        step = training_step(config, torch.device("cpu"), arguments.recipe)

        def steps() -> None:
            torch.set_num_threads(computing)
            for _ in range(arguments.steps):
                step()

        return steps

    return {FIRST: trains(1), f"{threads} threads": trains(threads)}


@entry_point
def main() -> None:
    with one_line_errors():
        arguments = tyro.cli(Arguments, prog="benchmarks/training_cpu.py")
    what = f"{arguments.recipe}, {arguments.mixer}"
    run(
        arguments, what, "steps", lambda threads: measure(ways(arguments, threads), arguments, arguments.steps, "steps")
    )


if __name__ == "__main__":
    main()
