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
from pathlib import Path
from typing import Any

import torch
import tyro
from checks import at_least_one
from sampling_cpu import busy_loops

from sit.study.speed import training_step
from sit.training.recipes import load_recipe
from sit.utils.cli import one_line_errors
from sit.utils.errors import UserError, entry_point
from sit.utils.record import machine, write_record
from sit.utils.tables import markdown_table
from sit.utils.threads import usable_cores
from sit.utils.timing import interleaved


@dataclass
class Arguments:
    """Time training beside busy loops."""

    recipe: str = "digits"
    mixer: str = "atconv"
    steps: int = 5
    """timed at a time"""
    threads: int | None = None
    """None takes the cores that this process may use"""
    busy: tuple[int, ...] = (0, 2, 8)
    """numbers of busy loops"""
    repeats: int = 5
    json: Path | None = None
    """file for all numbers"""

    def __post_init__(self) -> None:
        at_least_one(self, "steps", "repeats")
        if self.threads is not None and self.threads < 2:
            raise UserError(f"`threads` must be at least 2, not {self.threads}")
        for count in self.busy:
            if count < 0:
                raise UserError(f"`busy={count}` can't be less than 0")


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

    return {"one thread": trains(1), f"{threads} threads": trains(threads)}


def measure(arguments: Arguments, threads: int) -> list[dict[str, Any]]:
    """A row for each number of busy loops and each way."""
    timed, rows = ways(arguments, threads), list[dict[str, Any]]()
    for count in arguments.busy:
        with busy_loops(count):
            seconds = interleaved(timed, torch.device("cpu"), arguments.repeats, warm_up=0 if rows else 1)
        rows += [
            {"busy": count, "way": way, "steps_per_second": arguments.steps / time,
             "of_one_thread": seconds["one thread"] / time}
            for way, time in seconds.items()
        ]  # fmt: skip
    return rows


@entry_point
def main() -> None:
    with one_line_errors():
        arguments = tyro.cli(Arguments, prog="benchmarks/training_cpu.py")
    before = torch.get_num_threads()
    threads = arguments.threads or max(2, usable_cores())
    torch.set_num_threads(threads)
    print(f"{arguments.recipe}, {arguments.mixer}; {machine('cpu')}")
    try:
        rows = measure(arguments, threads)
        torch.set_num_threads(threads)
        cells = [(r["busy"], r["way"], f"{r['steps_per_second']:.2f}", f"{r['of_one_thread']:.2f}") for r in rows]
        print(markdown_table(["busy loops", "way", "steps/s", "of one thread"], cells))
        if arguments.json:
            write_record(arguments.json, "cpu", {"threads": threads, "rows": rows})
    finally:
        torch.set_num_threads(before)


if __name__ == "__main__":
    main()
