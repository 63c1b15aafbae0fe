"""What all the numbers of an evaluation cost after its features are made: seconds and memory, by number.

    OMP_NUM_THREADS=2 python benchmarks/metrics_time.py --json docs/evaluation/time.json

Features are drawn at random, with covariances that decay as real ones' do. *CPU* is the processor time of all threads,
which other work on the machine does not lengthen much; *wall* is what a clock shows.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from checks import at_least_one

from sit.metrics.distances import RootedMoments, frechet, frechet_at_infinity, inception_score, kernel_distance
from sit.metrics.estimate import jackknife_groups
from sit.metrics.moments import GroupSums, Moments
from sit.metrics.neighbors import neighborhoods
from sit.utils.cli import one_line_errors
from sit.utils.errors import entry_point
from sit.utils.record import machine, write_record
from sit.utils.tables import markdown_table


@dataclass
class Arguments:
    """Time every number."""

    samples: int = 50_000
    dimensions: int = 2048
    spatial: int = 2023
    """dimensions of sFID's features"""
    classes: int = 1000
    reference: int = 10_000
    """reference features of precision, recall, density, coverage and KID"""
    device: str = "cpu"
    """where distances and kernels are made"""
    json: Path | None = None
    """file for all numbers"""

    def __post_init__(self) -> None:
        at_least_one(self, "samples", "dimensions", "spatial", "classes", "reference")


def drawn(rng: np.random.Generator, count: int, dimensions: int) -> np.ndarray:
    """Features (count, dimensions) float32 without a large temporary."""
    found = rng.standard_normal((count, dimensions), dtype=np.float32)
    found *= np.exp(-np.arange(dimensions, dtype=np.float32) / (dimensions / 10)) + 0.01
    return found


def measure(arguments: Arguments) -> tuple[dict[str, dict[str, float]], float]:
    """Seconds of each number, and the peak of memory above the features' in GiB."""
    rng = np.random.default_rng(0)
    real = drawn(rng, arguments.reference, arguments.dimensions)
    moments = {"FID": Moments.of(real), "sFID": Moments.of(drawn(rng, arguments.reference, arguments.spatial))}
    features = drawn(rng, arguments.samples, arguments.dimensions)
    spatial = drawn(rng, arguments.samples, arguments.spatial)
    logits = rng.standard_normal((arguments.samples, arguments.classes), dtype=np.float32)
    group = jackknife_groups(arguments.samples, np.arange(arguments.samples) % arguments.classes)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    spent: dict[str, dict[str, float]] = {}

    def timed(name: str, compute: Callable[[], Any]) -> Any:
        wall, cpu = time.perf_counter(), time.process_time()
        found = compute()
        spent[name] = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        print(f"{name}: {spent[name]['wall']:.1f} s", flush=True)
        return found

    for name, of in (("FID", features), ("sFID", spatial)):
        root = timed(f"{name}: root of the reference", lambda name=name: RootedMoments.of(moments[name]))
        sums = timed(f"{name}: sums by group", lambda of=of: GroupSums.of(of, group))
        distance = timed(f"{name}: distance and its error", lambda s=sums, r=root: frechet(s, r))
        if name == "FID":
            timed("FID at infinity", lambda s=sums, r=root, d=distance: frechet_at_infinity(s, r, d))
        del sums, root
    timed("Inception score", lambda: inception_score(logits, group))
    around = dict(device=arguments.device)
    timed("precision, recall, density, coverage", lambda: neighborhoods(features, real, group, **around))
    timed("KID", lambda: kernel_distance(features, real, group, **around))
    return spent, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20


@entry_point
def main() -> None:
    with one_line_errors():
        arguments = tyro.cli(Arguments, prog="benchmarks/metrics_time.py")
    spent, memory = measure(arguments)
    together = {kind: sum(each[kind] for each in spent.values()) for kind in ("wall", "cpu")}
    rows = [(name, f"{each['wall']:.1f}", f"{each['cpu']:.1f}") for name, each in (*spent.items(), ("all", together))]
    print(machine(torch.device(arguments.device)))
    print(markdown_table(["", "seconds, wall", "seconds, CPU"], rows))
    print(f"memory above the features': {memory:.2f} GiB")
    if arguments.json:
        settings = {name: value for name, value in vars(arguments).items() if name != "json"}
        write_record(arguments.json, arguments.device, {"settings": settings, "seconds": spent, "memory_gib": memory})


if __name__ == "__main__":
    main()
