"""Images a second on a CPU with other programs beside it: groups of samples shared among processes, and two other ways.

    python benchmarks/sampling_cpu.py --threads 2 --json docs/performance/sampling-cpu.json

*ours* is what sample.py does. *one thread* computes all groups one after another; *all threads in each operation* does
too, with every thread in every operation. They take turns, with 0, 2 and 8 processes beside them that keep a core busy
each. The noise, the network and, but for the last way, the images are the same to the bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import tyro
from busy import FIRST, BusyArguments, measure, run
from checks import at_least_one

from sit.model import check_model_name, create_model
from sit.sampling import sampler
from sit.sampling.config import SamplerConfig
from sit.transport.transport import Transport
from sit.utils.cli import one_line_errors
from sit.utils.errors import UserError, entry_point


@dataclass
class Arguments(BusyArguments):
    """Time sampling beside busy loops."""

    model: str = "SiT-XS/2"
    mixer: str = "atconv"
    images: int = 64
    steps: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        check_model_name(self.model)
        at_least_one(self, "images")
        if self.steps < 2:
            raise UserError(f"`steps` must be at least 2, not {self.steps}")


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
        FIRST: lambda: made(1),
        "ours": lambda: made(threads),
        "all threads in each operation": in_each_operation,
    }


def found(arguments: Arguments, threads: int) -> list[dict[str, Any]]:
    """The rows.

    Raises:
        UserError: our images are not those of one thread.
    """
    timed = ways(arguments, threads)
    if not torch.equal(timed[FIRST](), timed["ours"]()):
        raise UserError(f"{threads} threads make other images than one")
    return measure(timed, arguments, arguments.images, "images")


@entry_point
def main() -> None:
    with one_line_errors():
        arguments = tyro.cli(Arguments, prog="benchmarks/sampling_cpu.py")
    what = f"{arguments.model}, {arguments.mixer}, {arguments.images} images, {arguments.steps} steps"
    run(arguments, what, "images", lambda threads: found(arguments, threads))


if __name__ == "__main__":
    main()
