"""Interleaved timing in one process: every round runs each candidate once, and the medians are compared."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable

import torch

ROUND = 0.02
"""seconds that a round of a candidate takes at least on an accelerator"""


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def interleaved(
    candidates: dict[str, Callable[[], object]], device: torch.device, repeats: int, warm_up: int = 1
) -> dict[str, float]:
    """Median seconds of each candidate over ``repeats`` rounds, in turn, after ``warm_up`` rounds.

    On accelerators a candidate runs several times in a round, so that starting and waiting don't count.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(warm_up):
        for run in candidates.values():
            run()
    times = dict.fromkeys(candidates, 1)
    if device.type != "cpu":
        times = {name: max(1, math.ceil(ROUND / once(run, device))) for name, run in candidates.items()}
    for _ in range(repeats):
        for name, run in candidates.items():
            seconds[name].append(once(run, device, times[name]))
    return {name: statistics.median(values) for name, values in seconds.items()}


def once(run: Callable[[], object], device: torch.device, times: int = 1) -> float:
    """Seconds of one run, on average over ``times`` runs that are waited for together."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(times):
        run()
    synchronize(device)
    return (time.perf_counter() - start) / times
