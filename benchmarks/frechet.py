"""The Fréchet distance at 2048 dimensions: symmetric eigenvalues against SciPy's general matrix square root.

    python benchmarks/frechet.py

Interleaved in one process, medians; the values must agree to 1e-6 relative.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import numpy as np
import tyro
from scipy import linalg

from sit.metrics.distances import Moments, frechet_distance


@dataclass
class Arguments:
    """Time the Fréchet distance."""

    dimensions: int = 2048
    samples: int = 10_000
    repeats: int = 3


def by_sqrtm(a: Moments, b: Moments) -> float:
    """The textbook way, as most FID code has it."""
    cross = linalg.sqrtm(a.sigma @ b.sigma)
    difference = a.mu - b.mu
    return float(difference @ difference + np.trace(a.sigma) + np.trace(b.sigma) - 2 * np.trace(cross.real))


def main(arguments: Arguments) -> None:
    rng = np.random.default_rng(0)
    spectrum = np.exp(-np.arange(arguments.dimensions) / 200)  # features' covariances decay like this
    mixing = linalg.qr(rng.normal(size=(arguments.dimensions, arguments.dimensions)))[0]
    shape = (arguments.samples, arguments.dimensions)
    a, b = (Moments.of(rng.normal(size=shape) * spectrum @ mixing + shift) for shift in (0.0, 0.01))
    seconds, values = {"symmetric eigenvalues": [], "scipy.linalg.sqrtm": []}, {}
    for _ in range(arguments.repeats):
        for name, compute in (("symmetric eigenvalues", frechet_distance), ("scipy.linalg.sqrtm", by_sqrtm)):
            start = time.perf_counter()
            values[name] = compute(a, b)
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    ours, theirs = values.values()
    for name, median in medians.items():
        print(f"{name:<22}  {values[name]:.10g}  {median:8.2f} s")
    fast, slow = medians.values()
    print(f"ratio {slow / fast:.1f}x, relative difference {abs(ours - theirs) / abs(theirs):.1e}")


if __name__ == "__main__":
    main(tyro.cli(Arguments, prog="benchmarks/frechet.py"))
