"""Time and peak memory of one sampling step of SiT-XL/2 with random weights, on the CPU.

Each case runs in a process of its own, as the peak is the process's: ``python benchmarks/xl_step.py``. The step is one
Euler step of the ODE for one image at 256x256 (a latent of 4x32x32), without guidance: one evaluation of the network.
"""

from __future__ import annotations

import itertools
import json
import resource
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

from sit.model import check_model_name, create_model, sincos_table
from sit.sampling.config import SamplerConfig
from sit.sampling.sampler import sample
from sit.transport.transport import Transport
from sit.utils.cli import one_line_errors
from sit.utils.errors import UserError, entry_point
from sit.utils.record import machine, write_record
from sit.utils.tables import markdown_table
from sit.utils.timing import once

Dtype = Literal["float32", "bfloat16"]


@dataclass
class Arguments:
    """Time one sampling step, each case in a process of its own."""

    model: str = "SiT-XL/2"
    mixers: tuple[str, ...] = ("attention", "atconv")
    dtypes: tuple[Dtype, ...] = ("float32", "bfloat16")
    case: tuple[str, Dtype] | None = None
    """mixer and dtype: measure this case alone, in this process, and print JSON"""
    json: Path | None = None
    """file for all numbers"""

    def __post_init__(self) -> None:
        check_model_name(self.model)


HEADER = (
    "mixer",
    "dtype",
    "parameters",
    "peak memory",
    "of which imports",
    "first step",
    "later steps (median of 3)",
)


def peak_gib() -> float:
    """The process's largest resident set so far, in GiB (Linux counts in KiB, macOS in bytes)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**30


def random_network(name: str, mixer: str, dtype: torch.dtype) -> torch.nn.Module:
    """The network made on the meta device and filled in ``dtype``, so that no second copy is ever in memory."""
    with torch.device("meta"):
        model = create_model(name, mixer=mixer)
    model = torch.nn.Module.to(model, dtype).to_empty(device="cpu").eval().requires_grad_(False)
    source = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.normal_(std=0.02, generator=source)
    if model.config.positional_embedding:
        model.pos_embed.copy_(sincos_table(model.config.hidden_size, *(torch.arange(side) for side in model.grid)))
    return model


@torch.no_grad()
def measure(name: str, mixer: str, dtype: str) -> dict[str, object]:
    """Build the network and take one step; seconds and GiB."""
    imports = peak_gib()
    model = random_network(name, mixer, getattr(torch, dtype))
    built = peak_gib()
    noise = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(1))
    config = SamplerConfig(sampler="ode", method="euler", steps=1)
    latents = torch.empty(0)

    def step() -> None:
        nonlocal latents
        latents = sample(model, Transport(), noise, torch.tensor([207]), config)

    seconds = [once(step, torch.device("cpu")) for _ in range(4)]
    return dict(
        mixer=mixer,
        dtype=dtype,
        parameters=sum(p.numel() for p in model.parameters()),
        finite=bool(latents.isfinite().all()),
        imports_gib=round(imports, 2),
        built_gib=round(built, 2),
        peak_gib=round(peak_gib(), 2),
        first_step_s=round(seconds[0], 2),
        later_step_s=round(statistics.median(seconds[1:]), 2),
    )


def in_own_process(name: str, mixer: str, dtype: str) -> dict[str, object]:
    """What :func:`measure` returns, from a process that does nothing else.

    Raises:
        UserError: the process failed, or the step is not finite.
    """
    command = [sys.executable, __file__, "--model", name, "--case", mixer, dtype]
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode:
        last = (ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"])[-1]
        raise UserError(f"{mixer} in {dtype}: {last.removeprefix('error: ')}")
    found = json.loads(ended.stdout.splitlines()[-1])
    if not found["finite"]:
        raise UserError(f"{mixer} in {dtype}: the step is not finite")
    return found


def row(found: dict[str, object]) -> tuple[object, ...]:
    """The cells of a case under :data:`HEADER`."""
    return (
        found["mixer"],
        found["dtype"],
        f"{found['parameters']:,}",
        f"{found['peak_gib']:.2f} GiB",
        f"{found['imports_gib']:.2f} GiB",
        f"{found['first_step_s']:.2f} s",
        f"{found['later_step_s']:.2f} s",
    )


@entry_point
def main() -> None:
    with one_line_errors():
        arguments = tyro.cli(Arguments, prog="benchmarks/xl_step.py")
    if arguments.case is not None:
        print(json.dumps(measure(arguments.model, *arguments.case)))
        return
    print(f"{arguments.model}, one image of 256x256, one step; {machine('cpu')}")
    cases = itertools.product(arguments.mixers, arguments.dtypes)
    found = [in_own_process(arguments.model, *case) for case in cases]
    print(markdown_table(HEADER, map(row, found)))
    if arguments.json:
        write_record(arguments.json, "cpu", {"cases": found})


if __name__ == "__main__":
    main()
