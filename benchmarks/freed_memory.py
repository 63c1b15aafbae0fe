"""What a process on a CPU gains by keeping the memory that it frees: a training step and a forward pass both ways.

    python benchmarks/freed_memory.py --json docs/performance/freed-memory.json

How memory is freed is a matter of a whole process, so there are two, forked, which take turns. Needs glibc.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import tyro
from beside import process_with
from checks import at_least_one
from torch import nn

from sit.model import check_model_name, create_model
from sit.training.ema import averaged_parameters, moving_average
from sit.utils.allocator import keep_freed_memory
from sit.utils.cli import one_line_errors
from sit.utils.errors import UserError, entry_point
from sit.utils.record import machine, write_record
from sit.utils.tables import markdown_table
from sit.utils.threads import usual_threads
from sit.utils.timing import interleaved

CPU = torch.device("cpu")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """What is timed: ``model`` on ``images`` latents (4, side, side)."""

    model: str
    side: int
    images: int
    dtype: str

    def programs(self, mixer: str) -> dict[str, Callable[[], None]]:
        """A training step under autocast, with optimizer and average, and a forward pass of weights of the dtype."""
        low = DTYPES[self.dtype]
        network = create_model(self.model, mixer=mixer, input_size=self.side)
        sampled = nn.Module.to(create_model(self.model, mixer=mixer, input_size=self.side).eval(), low)
        optimizer = torch.optim.AdamW(network.parameters(), fused=True)
        averaged = averaged_parameters(network)
        average = moving_average(averaged, decay=0.9999, warmup=False)
        x, t = torch.randn(self.images, 4, self.side, self.side), torch.rand(self.images)
        labels = torch.arange(self.images)

        def step() -> None:
            with torch.autocast("cpu", low, enabled=low != torch.float32):
                loss = network(x, t, labels).float().square().mean()
            loss.backward()
            optimizer.step()
            average.step(averaged)
            optimizer.zero_grad()

        @torch.inference_mode()
        def forward() -> None:
            sampled(x.to(low), t, labels)

        return {"training step": step, "forward pass": forward}


@dataclass
class Arguments:
    """Time both processes in turn."""

    models: tuple[str, ...] = ("SiT-XS/2", "SiT-S/2", "SiT-B/2")
    sides: tuple[int, ...] = (8, 32, 32)
    """of the latents, for each model"""
    images: tuple[int, ...] = (64, 8, 4)
    """in a batch, for each model"""
    dtypes: tuple[str, ...] = tuple(DTYPES)
    mixer: str = "atconv"
    threads: int | None = None
    """None takes OMP_NUM_THREADS, or the cores that this process may use"""
    repeats: int = 7
    json: Path | None = None
    """file for all numbers"""

    def __post_init__(self) -> None:
        at_least_one(self, "repeats", *(["threads"] if self.threads is not None else []))
        if not len(self.models) == len(self.sides) == len(self.images):
            raise UserError("`sides` and `images` take one number for each model")
        for name in self.models:
            check_model_name(name)
        for name in self.dtypes:
            if name not in DTYPES:
                raise UserError(f"`dtypes={name}`: {' or '.join(DTYPES)}")


def programs(case: Case, mixer: str, threads: int, keep: bool) -> dict[str, Callable[[], None]]:
    """What is timed, in a process of its own that keeps what it frees, or not."""
    if keep and not keep_freed_memory():
        raise UserError("this system's C library is not glibc, which alone can be told to keep freed memory")
    torch.set_num_threads(threads)
    return case.programs(mixer)


def measure(case: Case, arguments: Arguments, threads: int) -> list[dict[str, object]]:
    """A row for training and one for the forward pass."""
    rows: list[dict[str, object]] = []
    with (
        process_with(programs, case, arguments.mixer, threads, False) as given_back,
        process_with(programs, case, arguments.mixer, threads, True) as kept,
    ):
        for what in ("training step", "forward pass"):
            ways = {"given back": lambda what=what: given_back(what), "kept": lambda what=what: kept(what)}
            seconds = interleaved(ways, CPU, arguments.repeats, warm_up=2)
            rows.append({"what": what, **asdict(case), **seconds, "ratio": seconds["given back"] / seconds["kept"]})
    return rows


HEADER = ("", "model", "images", "latents", "dtype", "given back", "kept", "ratio")


def run(arguments: Arguments) -> None:
    threads, rows = arguments.threads or usual_threads(), []
    torch.set_num_threads(threads)
    for model, side, images in zip(arguments.models, arguments.sides, arguments.images, strict=True):
        for dtype in arguments.dtypes:
            rows += measure(Case(model, side, images, dtype), arguments, threads)
    told = [
        (row["what"], row["model"], row["images"], f"{row['side']}×{row['side']}", row["dtype"],
         f"{1e3 * row['given back']:.3g} ms", f"{1e3 * row['kept']:.3g} ms", f"{row['ratio']:.2f}")
        for row in rows
    ]  # fmt: skip
    print(f"{machine(CPU)}; medians of {arguments.repeats}\n")
    print(markdown_table(HEADER, told, align="ll"))
    if arguments.json is not None:
        write_record(arguments.json, CPU, {"repeats": arguments.repeats, "rows": rows})


@entry_point
def main() -> None:
    with one_line_errors():
        arguments = tyro.cli(Arguments, prog="benchmarks/freed_memory.py")
    run(arguments)


if __name__ == "__main__":
    main()
