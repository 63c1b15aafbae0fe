"""How fast: ``benchmarks/speed.py``, a case a piece. A layer of SiT-XL/2, SiT-B/2 around it, training and sampling."""

from __future__ import annotations

import sys
from dataclasses import asdict
from types import ModuleType

import torch

from gpu_parts.pieces import ROOT, Figures, Part, Piece

PIXELS = {256: 64, 512: 16, 1024: 4}
"""side of the images and their number: 16384 tokens in all"""
CASES = (("mixer", "SiT-XL/2", False, 20), ("network", "SiT-B/2", True, 60), ("training", "SiT-B/2", True, 120),
         ("sampling", "SiT-B/2", True, 60), ("mixer", "SiT-XL/2", True, 25), ("network", "SiT-B/2", False, 20),
         ("training", "SiT-B/2", False, 25))  # fmt: skip
"""scope, model, compiled, and seconds: what matters most comes first"""


def benchmark() -> ModuleType:
    """``benchmarks/speed.py``, whose folder is no package."""
    if (folder := str(ROOT / "benchmarks")) not in sys.path:
        sys.path.append(folder)
    import speed

    return speed


def rates(arguments) -> Figures:
    """The machine's rates, which the shares of the roofline are taken of."""
    speed = benchmark()
    machine = speed.measure_machine(torch.device(arguments.device), arguments.dtypes, arguments.rate_repeats)
    return {"passed": None, "rates": asdict(machine)}


def timed(case, arguments, done: dict[str, Figures]) -> Figures:
    """The rows of a case. Raise RuntimeError where the rates are not known."""
    speed = benchmark()
    if "rates" not in done.get("rates", {}):
        raise RuntimeError("the machine's rates were not measured")
    made = speed.measure(case, arguments, speed.Machine(**done["rates"]["rates"]))
    if not any(row.seconds for row in made):
        raise RuntimeError("no variant could be timed")
    return {"passed": None, "rows": [asdict(row) for row in made]}


def part(device: torch.device, tiny: bool) -> Part:
    """First the rates; then the cases, from the shortest sequence to the longest for each scope."""
    speed = benchmark()
    settings = dict(dtypes=("bfloat16",), device=device.type, repeats=1 if tiny else 11, steps=2 if tiny else 4)
    arguments = speed.Arguments(**settings, rate_repeats=1 if tiny else 15)
    pieces = [Piece("rates", 1 if tiny else 5, lambda done, left: rates(arguments))]

    def add(scope: str, model: str, pixels: int, compiled: bool, seconds: float) -> None:
        case = speed.Case(scope, model, pixels, 1 if tiny else PIXELS[pixels], "bfloat16", compiled)
        name = f"{scope}, {model}, {pixels} pixels{', compiled' if compiled else ''}"
        pieces.append(Piece(name, seconds, lambda done, left: timed(case, arguments, done)))

    if tiny:
        for scope in ("mixer", "network", "training", "sampling"):
            add(scope, "SiT-XS/8", 256, False, 1)
    else:
        for scope, model, compiled, seconds in CASES:
            for pixels in PIXELS:
                add(scope, model, pixels, compiled, seconds)
    sources = ("atconv", "sit/model.py", "sit/mixers", "sit/sampling", "sit/transport", "sit/utils/compile.py",
               "benchmarks/speed.py", "benchmarks/baselines.py", "experiments/gpu_parts/speed.py")  # fmt: skip
    return Part("speed", pieces, sources, {"tiny": tiny})
