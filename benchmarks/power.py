"""How many training seeds tell a difference of FID, by the spread over seeds and by what pairing leaves of it.

    python benchmarks/power.py --json docs/evaluation/power.json

Two arms of runs with the seeds 1 … n each. Unpaired, their means are compared by Student's t; paired, the
differences of the runs of a seed are tested. If the two runs of a seed have correlation r, pairing leaves 1 − r of
the variance of a difference. The spread is a share of the FID: training again with another seed moves FID on ImageNet
by 1 to 2 % whatever its size (arXiv 2606.20536).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from checks import at_least_one

from sit.metrics.paired import seeds_needed
from sit.utils.cli import one_line_errors
from sit.utils.errors import UserError, entry_point
from sit.utils.record import write_record
from sit.utils.tables import markdown_table

WORTH_TELLING = 0.15
"""The difference of FID that is reported of ATConv and attention in SiT-XL/2 (arXiv 2510.20092)."""


@dataclass
class Arguments:
    """Make the table of power."""

    fid: float = 17.2
    """the FID around which a difference is to be told: SiT-XL/2 after 400,000 steps, without guidance"""
    differences: tuple[float, ...] = (WORTH_TELLING, 2 * WORTH_TELLING)
    """true differences of FID"""
    spreads: tuple[float, ...] = (0.005, 0.01, 0.015, 0.02)
    """standard deviations over seeds, as shares of the FID"""
    left: tuple[float, ...] = (0.57, 0.3, 0.1)
    """shares of a difference's variance that pairing leaves"""
    power: int = 80
    """percent of the comparisons that tell the difference"""
    json: Path | None = None
    """file for all numbers"""

    def __post_init__(self) -> None:
        at_least_one(self, "power")
        for name in ("differences", "spreads", "left"):
            if not getattr(self, name) or not all(0 < value < math.inf for value in getattr(self, name)):
                raise UserError(f"`{name}` must be above 0")
        if not self.power < 100 or not 0 < self.fid < math.inf:
            raise UserError(f"`power={self.power}` must be below 100 and `fid={self.fid}` above 0")


def rows(arguments: Arguments) -> list[dict[str, Any]]:
    """Seeds of each arm for each difference and spread, unpaired and by what pairing leaves."""
    found = []
    for difference in arguments.differences:
        for share in arguments.spreads:
            spread, wanted = share * arguments.fid, arguments.power / 100
            paired = {
                str(left): seeds_needed(spread * math.sqrt(2 * left), difference, wanted=wanted)
                for left in arguments.left
            }
            unpaired = seeds_needed(spread, difference, wanted=wanted, arms=2)
            found.append({"difference": difference, "spread": spread, "unpaired": unpaired, "paired": paired})
    return found


def table(found: list[dict[str, Any]], arguments: Arguments) -> str:
    header = ["true difference", "spread over seeds", "unpaired"]
    header += [f"pairing leaves {left:.0%}" for left in arguments.left]
    lines = []
    for row in found:
        cells = [row["unpaired"], *row["paired"].values()]
        of_fid = f"{row['difference']:g} ({row['difference'] / arguments.fid:.1%} of {arguments.fid:g})"
        spread = f"{row['spread']:.2f} ({row['spread'] / arguments.fid:.1%})"
        lines.append([of_fid, spread, *("more than can be had" if cell is None else str(cell) for cell in cells)])
    return markdown_table(header, lines)


@entry_point
def main() -> None:
    with one_line_errors():
        arguments = tyro.cli(Arguments, prog="benchmarks/power.py")
    found = rows(arguments)
    print(table(found, arguments))
    if arguments.json:
        settings = {name: value for name, value in vars(arguments).items() if name != "json"}
        write_record(arguments.json, "cpu", {"settings": settings, "rows": found})


if __name__ == "__main__":
    main()
