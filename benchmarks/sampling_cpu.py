"""Images a second on a CPU with other programs beside it: groups of samples shared among processes, and two other ways.

    python benchmarks/sampling_cpu.py --threads 2 --json docs/performance/sampling-cpu.json

*ours* is what sample.py does. *one thread* computes all groups one after another; *all threads in each operation* does
too, with every thread in every operation. They take turns, with 0, 2 and 8 processes beside them that keep a core busy
each. The noise, the network and, but for the last way, the images are the same to the bit.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from checks import at_least_one

from sit.model import check_model_name, create_model
from sit.sampling import sampler
from sit.sampling.config import SamplerConfig
from sit.transport.transport import Transport
from sit.utils.cli import one_line_errors
from sit.utils.errors import UserError, entry_point
from sit.utils.record import machine, write_record
from sit.utils.tables import markdown_table
from sit.utils.threads import usable_cores
from sit.utils.timing import interleaved

HEADER = ("busy loops", "way", "images/s", "of one thread")


@dataclass
class Arguments:
    """Time sampling beside busy loops."""

    model: str = "SiT-XS/2"
    mixer: str = "atconv"
    images: int = 64
    steps: int = 20
    threads: int | None = None
    """None takes the cores that this process may use"""
    busy: tuple[int, ...] = (0, 2, 8)
    """numbers of busy loops"""
    repeats: int = 5
    json: Path | None = None
    """file for all numbers"""

    def __post_init__(self) -> None:
        check_model_name(self.model)
        at_least_one(self, "images", "repeats")
        if self.steps < 2:
            raise UserError(f"`steps` must be at least 2, not {self.steps}")
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


@contextlib.contextmanager
def each_operation_shared() -> Iterator[None]:
    """Within the block, the sampler takes the network for a large one."""
    before = sampler.computes_apart
    sampler.computes_apart = lambda *arguments: False
    try:
        yield
    finally:
        sampler.computes_apart = before


def ways(arguments: Arguments, threads: int) -> dict[str, Callable[[], torch.Tensor]]:
    """What is timed, by name: each gives the latents (n, 4, 8, 8)."""
    model = create_model(arguments.model, 0, input_size=8, in_channels=4, num_classes=10, mixer=arguments.mixer).eval()
    source = torch.Generator().manual_seed(1)
    for parameter in model.parameters():  # zeros at first would be a network that computes nothing
        parameter.data.normal_(std=0.05, generator=source)
    indices, transport = torch.arange(arguments.images), Transport()
    options: dict[str, Any] = dict(seed=0, config=SamplerConfig(steps=arguments.steps), latent_shape=(4, 8, 8))

    def made(computing: int) -> torch.Tensor:
        torch.set_num_threads(computing)
        batches = sampler.generate(
            model, transport, indices, indices % 10, device="cpu", batch_size=arguments.images, **options
        )
        return torch.cat([latents for _, latents in batches])

    def in_each_operation() -> torch.Tensor:
        with each_operation_shared():
            return made(threads)

    return {
        "one thread": lambda: made(1),
        "ours": lambda: made(threads),
        "all threads in each operation": in_each_operation,
    }


def measure(arguments: Arguments, threads: int) -> list[dict[str, Any]]:
    """A row for each number of busy loops and each way.

    Raises:
        UserError: our images are not those of one thread.
    """
    timed, rows = ways(arguments, threads), []
    if not torch.equal(timed["one thread"](), timed["ours"]()):
        raise UserError(f"{threads} threads make other images than one")
    for count in arguments.busy:
        with busy_loops(count):
            seconds = interleaved(timed, torch.device("cpu"), arguments.repeats, warm_up=0 if rows else 1)
        rows += [
            {"busy": count, "way": way, "images_per_second": arguments.images / time,
             "of_one_thread": seconds["one thread"] / time}
            for way, time in seconds.items()
        ]  # fmt: skip
    return rows


@entry_point
def main() -> None:
    with one_line_errors():
        arguments = tyro.cli(Arguments, prog="benchmarks/sampling_cpu.py")
    before = torch.get_num_threads()
    threads = arguments.threads or max(2, usable_cores())
    torch.set_num_threads(threads)
    print(f"{arguments.model}, {arguments.mixer}, {arguments.images} images, {arguments.steps} steps; {machine('cpu')}")
    try:
        rows = measure(arguments, threads)
        torch.set_num_threads(threads)
        cells = [(r["busy"], r["way"], f"{r['images_per_second']:.1f}", f"{r['of_one_thread']:.2f}") for r in rows]
        print(markdown_table(HEADER, cells))
        if arguments.json:
            write_record(arguments.json, "cpu", {"threads": threads, "rows": rows})
    finally:
        torch.set_num_threads(before)


if __name__ == "__main__":
    main()
