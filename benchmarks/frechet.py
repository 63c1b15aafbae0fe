"""The Fréchet distance at 2048 dimensions: symmetric eigenvalues against SciPy's general matrix square root.

    python benchmarks/frechet.py

Interleaved in one process, medians; the values must agree to 1e-6 relative.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from checks import at_least_one
from scipy import linalg

from sit.metrics.distances import frechet_distance
from sit.metrics.moments import Moments
from sit.utils.cli import one_line_errors
from sit.utils.errors import UserError, entry_point
from sit.utils.record import machine, write_record
from sit.utils.tables import text_table
from sit.utils.timing import interleaved


@dataclass
class Arguments:
    """Time the Fréchet distance."""

    dimensions: int = 2048
    samples: int = 10_000
    repeats: int = 3
    json: Path | None = None
    """file for all numbers"""

    def __post_init__(self) -> None:
        at_least_one(self, "dimensions", "repeats")
        if self.samples < 2:
            raise UserError(f"`samples` must be at least 2, not {self.samples}")


def by_sqrtm(a: Moments, b: Moments) -> float:
    """The textbook way, as most FID code has it."""
    cross = linalg.sqrtm(a.sigma @ b.sigma)
    difference = a.mu - b.mu
    return float(difference @ difference + np.trace(a.sigma) + np.trace(b.sigma) - 2 * np.trace(cross.real))


def compare(arguments: Arguments) -> tuple[dict[str, float], dict[str, float]]:
    """Median seconds and values of both ways."""
    rng = np.random.default_rng(0)
    spectrum = np.exp(-np.arange(arguments.dimensions) / 200)  # features' covariances decay like this
    mixing = linalg.qr(rng.normal(size=(arguments.dimensions, arguments.dimensions)))[0]
    shape = (arguments.samples, arguments.dimensions)
    a, b = (Moments.of(rng.normal(size=shape) * spectrum @ mixing + shift) for shift in (0.0, 0.01))
    ways = {"symmetric eigenvalues": frechet_distance, "scipy.linalg.sqrtm": by_sqrtm}
    values = {name: compute(a, b) for name, compute in ways.items()}
    runs = {name: functools.partial(compute, a, b) for name, compute in ways.items()}
    return interleaved(runs, torch.device("cpu"), arguments.repeats, warm_up=0), values


@entry_point
def main() -> None:
    with one_line_errors():
        arguments = tyro.cli(Arguments, prog="benchmarks/frechet.py")
    seconds, values = compare(arguments)
    print(machine("cpu"))
    print(
        text_table([(name, f"{values[name]:.10g}", f"{median:.2f} s") for name, median in seconds.items()], align="lrr")
    )
    ours, theirs = values.values()
    fast, slow = seconds.values()
    print(f"ratio {slow / fast:.1f}x, relative difference {abs(ours - theirs) / abs(theirs):.1e}")
    if arguments.json:
        write_record(arguments.json, "cpu", {"seconds": seconds, "values": values})


if __name__ == "__main__":
    main()
