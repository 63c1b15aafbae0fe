"""Ways of computing something on a CPU, timed in turn with other programs beside them that keep cores busy."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from checks import at_least_one

from sit.utils.errors import UserError
from sit.utils.record import machine, write_record
from sit.utils.tables import markdown_table
from sit.utils.threads import usable_cores
from sit.utils.timing import interleaved

FIRST = "one thread"
"""the way that the others are compared with"""


@dataclass
class BusyArguments:
    """What both programs take."""

    threads: int | None = None
    """None takes the cores that this process may use"""
    busy: tuple[int, ...] = (0, 2, 8)
    """numbers of busy loops"""
    repeats: int = 5
    json: Path | None = None
    """file for all numbers"""

    def __post_init__(self) -> None:
        at_least_one(self, "repeats")
        if self.threads is not None and self.threads < 2:
            raise UserError(f"`threads` must be at least 2, not {self.threads}")
        for count in self.busy:
            if count < 0:
                raise UserError(f"`busy={count}` can't be less than 0")


@contextlib.contextmanager
def busy_loops(count: int) -> Iterator[None]:
    """Within the block, ``count`` processes compute without a pause."""
    loops = []
    try:
        for _ in range(count):
            loops.append(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def measure(
    timed: Mapping[str, Callable[[], object]], arguments: BusyArguments, amount: int, unit: str
) -> list[dict[str, Any]]:
    """A row for each number of busy loops and each way.

    Args:
        timed: ways, by name; :data:`FIRST` is one of them.
        arguments: how often, and beside what.
        amount: how much of ``unit`` a call makes.
        unit: what is counted, in the plural.
    """
    rows: list[dict[str, Any]] = []
    for count in arguments.busy:
        with busy_loops(count):
            seconds = interleaved(timed, torch.device("cpu"), arguments.repeats, warm_up=0 if rows else 1)
        rows += [
            {"busy": count, "way": way, f"{unit}_per_second": amount / time, "of_one_thread": seconds[FIRST] / time}
            for way, time in seconds.items()
        ]
    return rows


def run(arguments: BusyArguments, what: str, unit: str, find: Callable[[int], list[dict[str, Any]]]) -> None:
    """Find the rows with so many threads, print them below ``what``, and keep them as JSON."""
    before = torch.get_num_threads()
    threads = arguments.threads or max(2, usable_cores())
    torch.set_num_threads(threads)
    print(f"{what}; {machine('cpu')}")
    try:
        rows = find(threads)
        torch.set_num_threads(threads)
        cells = [(r["busy"], r["way"], f"{r[f'{unit}_per_second']:.2f}", f"{r['of_one_thread']:.2f}") for r in rows]
        print(markdown_table(["busy loops", "way", f"{unit}/s", f"of {FIRST}"], cells))
        if arguments.json:
            write_record(arguments.json, "cpu", {"threads": threads, "rows": rows})
    finally:
        torch.set_num_threads(before)
