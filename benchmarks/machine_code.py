"""What the Triton kernels become on a GPU, without one: registers, spills, warps and instructions of the machine code.

    python benchmarks/machine_code.py
    python benchmarks/machine_code.py --images 1 --grids 32 64 --dtypes float32

Each kernel is compiled as it would be launched. Instructions are counted in the program text, which is the number that
runs, save for loops (``average``, ``route``) and masked ends; "for each value" divides a program's, over its threads,
by the values (pixels × channels) that it works on. The least of ``convolve`` and ``correlate`` is k² multiply-adds.
"""

from __future__ import annotations

import itertools
import math
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import triton
import triton.language as tl
import tyro
from checks import at_least_one
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from atconv.triton import INTERPRETED, convolution, kernel_branch, launch
from sit.utils.cli import one_line_errors
from sit.utils.errors import UserError, entry_point
from sit.utils.record import write_record
from sit.utils.tables import markdown_table

REGISTERS = 65536  # of a multiprocessor, for all its warps
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
NAMES = {"float32": "fp32", "bfloat16": "bf16"}


@dataclass
class Arguments:
    """Compile the kernels and look at them."""

    images: int = 128
    channels: int = 1152
    grids: tuple[int, ...] = (16, 32, 64)
    """side of the square of tokens"""
    kernel_sizes: tuple[int, ...] = (3,)
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("bfloat16",)
    target: int = 90
    """compute capability, times ten"""
    json: Path | None = None
    """file for all numbers"""

    def __post_init__(self) -> None:
        at_least_one(self, "images", "channels")


@dataclass(frozen=True)
class Build:
    """A kernel with what it is launched with."""

    name: str
    kernel: Any
    pointers: dict[str, str]
    constants: dict[str, Any]
    warps: int
    values: int
    """pixels × channels that a program works on"""


def builds(arguments: Arguments, grid: int, side: int, dtype: str) -> Iterator[Build]:
    """Every kernel at one size, contiguous values."""
    channels, item, short = arguments.channels, getattr(torch, dtype).itemsize, NAMES[dtype]
    narrow, wide, taps = "*" + short, "*fp32", side**2
    options = launch.tile(arguments.images, grid, grid, channels, side=side, item=item)
    warps = options.pop("num_warps")
    values = math.prod(options.values())
    common = options | {"height": grid, "width": grid, "channels": channels, "SIDE": side, "WIDE": tl.float32}
    rows = {"v_row": grid * channels, "v_column": channels}
    yield Build("convolve", convolution._convolve, {"v": narrow, "kernels": wide, "out": narrow},
                common | rows | {"FLIP": False}, warps, values)  # fmt: skip
    yield Build("correlate", convolution._correlate, {"v": narrow, "grad": narrow, "out": wide},
                common | rows | {"g_row": grid * channels, "g_column": channels}, warps, values)  # fmt: skip
    block = launch.channel_block(channels, item)
    pooling = {"BINS": taps, "CHANNELS": block, "WIDE": tl.float32}
    yield Build("average", kernel_branch._average, {"x": narrow, "out": wide}, pooling | {"TOKENS": 32}, 1, 32 * block)
    yield Build("spread", kernel_branch._spread, {"grad": wide, "out": narrow},
                pooling | {"TOKENS": 64, "SPAN": 2}, 4, 64 * block)  # fmt: skip
    names = ("weight", "bias", "control", "raw", "inhibited")
    routing = {"channels": channels, "TAPS": taps, "CHANNELS": 128, "ACTIVATION": "gelu_tanh", "INHIBIT": True}
    yield Build("route", kernel_branch._route, {"logits": narrow} | dict.fromkeys(names, wide),
                routing | {"WIDE": tl.float32}, 4, taps * 128)  # fmt: skip


def compile_for(build: Build, target: int) -> bytes:
    """The machine code, with what a launch knows: pointers and strides of multiples of 16, channels side by side."""
    names = build.kernel.arg_names
    ones = {name: 1 for name in names if name.endswith("_channel")}
    constants = build.constants | ones
    signature = {name: "constexpr" if name in constants else build.pointers.get(name, "i32") for name in names}
    known = [name for name in names if name not in constants and name not in ("height", "width", "tokens")]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in known}
    source = ASTSource(build.kernel, signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": build.warps}
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options=options).asm["cubin"]


def look(code: bytes) -> tuple[int, int, int]:
    """Registers a thread, bytes that it spills, and instructions."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()

        def ask(*command: str) -> str:
            return subprocess.run([*command, file.name], capture_output=True, text=True, check=True).stdout

        usage = dict(re.findall(r"(REG|STACK):(\d+)", ask(str(TOOLS / "cuobjdump"), "--dump-resource-usage")))
        listing = ask(str(TOOLS / "nvdisasm"), "-c")
    instructions = re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", listing, re.MULTILINE)
    return int(usage["REG"]), int(usage["STACK"]), sum(not name.startswith("NOP") for name in instructions)


HEADER = ("kernel", "for", "dtype", "grid", "k", "tile", "warps", "registers", "warps on a multiprocessor",
          "instructions", "for each value", "spilled, bytes", "multiply-adds")  # fmt: skip


def row(build: Build, arguments: Arguments, grid: int, side: int, dtype: str) -> tuple[object, ...]:
    """The cells of one kernel under :data:`HEADER`."""
    registers, spilled, instructions = look(compile_for(build, arguments.target))
    resident = REGISTERS // (-(-registers // 8) * 8 * 32) // build.warps * build.warps
    sizes = [build.constants[name] for name in ("ROWS", "COLUMNS") if name in build.constants]
    tile = " x ".join(map(str, [*sizes, build.constants["CHANNELS"]]))
    least = side**2 if build.name in ("convolve", "correlate") else ""
    each = instructions * 32 * build.warps / build.values
    return (build.name, f"sm_{arguments.target}", dtype, grid, side, tile, build.warps, registers, resident,
            instructions, f"{each:.1f}", spilled, least)  # fmt: skip


def run(arguments: Arguments) -> None:
    """Compile every kernel at every size, and print what became of it."""
    if INTERPRETED:
        raise UserError("TRITON_INTERPRET is set: unset it, the interpreter makes no machine code")
    cases = itertools.product(arguments.dtypes, arguments.grids, arguments.kernel_sizes)
    rows = [
        row(build, arguments, grid, side, dtype)
        for dtype, grid, side in cases
        for build in builds(arguments, grid, side, dtype)
    ]
    print(f"triton {triton.__version__}, {arguments.images} images, {arguments.channels} channels\n")
    print(markdown_table(HEADER, rows))
    if arguments.json:
        kernels = [dict(zip(HEADER, row, strict=True)) for row in rows]
        write_record(arguments.json, "cpu", {"triton": triton.__version__, "kernels": kernels})


@entry_point
def main() -> None:
    with one_line_errors():
        arguments = tyro.cli(Arguments, prog="benchmarks/machine_code.py")
    run(arguments)


if __name__ == "__main__":
    main()
