"""What a GPU is wanted for, in the half hour that one can be had: checks of the kernels, of sampling and of training,
speed, and a study. In pieces of at most ten minutes:

    until python experiments/gpu_half_hour.py --minutes 9 --out docs/gpu; do [ $? = 85 ] || break; done

Each part writes OUT/PART.json after every piece, and all of them OUT/README.md. The same command goes on with what is
left: a piece is done again only after a change of the code that it runs. It begins none that it can't be expected to
finish, and ends with exit status 85 if something is left. Where there is no GPU, ``--tiny`` does all of it in a tiny
form on the CPU, Triton's kernels in its interpreter:

    python experiments/gpu_half_hour.py --tiny --out runs/gpu-tiny
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from sit.utils.cli import one_line_errors
from sit.utils.errors import UserError, entry_point

STARTED = time.monotonic()  # before torch is imported, which takes its time too
PARTS = ("kernels", "sampling", "speed", "training", "study")


@dataclass
class Arguments:
    """Do what is left of the parts, as far as the time goes."""

    parts: tuple[Literal["kernels", "sampling", "speed", "training", "study"], ...] = PARTS
    """what to do; always in this order"""
    minutes: float = 9.0
    """time limit of this call"""
    out: Path = Path("docs/gpu")
    """folder of the JSONs, the page and the study"""
    tiny: bool = False
    """all of it in a tiny form on the CPU, Triton's kernels in its interpreter: to see that it works"""
    report: bool = False
    """write the page of what is there, and start nothing"""

    def __post_init__(self) -> None:
        if not self.minutes > 0:
            raise UserError(f"`minutes` must be positive, not {self.minutes}")
        if not self.parts:
            raise UserError("`parts` must name one or more")


def run(arguments: Arguments) -> bool:
    """Do what is left, write the page, and tell whether nothing is left.

    Raises:
        UserError: no GPU or too old a one, a folder of other settings, or less time than the next piece takes.
    """
    from gpu_parts import report
    from gpu_parts.device import gpu
    from gpu_parts.pieces import Clock, carry_out
    from gpu_parts.plan import parts

    if arguments.report:
        print(f"page: {report.write(arguments.out)}")
        return True
    device = gpu(arguments.tiny)
    chosen = parts(arguments.parts, device, arguments.tiny, arguments.out)
    try:
        return carry_out(chosen, arguments.out, device, Clock(STARTED, 60 * arguments.minutes))
    finally:
        if report.has_parts(arguments.out):  # what ended it before the first one is told, not that there is none
            print(f"page: {report.write(arguments.out)}")


@entry_point
def main() -> None:
    with one_line_errors():
        arguments = tyro.cli(Arguments, prog="experiments/gpu_half_hour.py")
    if arguments.tiny:  # before torch and Triton are imported, which read them then
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
    if not run(arguments):
        from sit.utils.signals import REQUEUE_EXIT

        sys.exit(REQUEUE_EXIT)


if __name__ == "__main__":
    main()
