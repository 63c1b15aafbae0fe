"""Rows of metrics: what is averaged over the steps since the row before."""

from __future__ import annotations

import time
from collections import defaultdict

import torch
from accelerate import Accelerator


class Rows:
    """Collects the losses and metrics of steps, and logs their means as a row.

    They stay on the device until a row is written, so that a step does not wait for them.

    Args:
        accelerator: averages over the processes, and has the trackers.
        step: the steps done before.
        batch_size: images a step, over all processes.
    """

    def __init__(self, accelerator: Accelerator, step: int, batch_size: int) -> None:
        self.accelerator, self.batch_size = accelerator, batch_size
        self._begin(step)

    def _begin(self, step: int) -> None:
        self.step, self.time = step, time.perf_counter()
        self.collected: dict[str, list[torch.Tensor]] = defaultdict(list)

    def __bool__(self) -> bool:
        """Whether there is anything to average: not if every step since the last row was skipped."""
        return bool(self.collected)

    def add(self, values: dict[str, torch.Tensor]) -> None:
        """Take in one step's ``loss`` and metrics, each (b,)."""
        for name, part in values.items():
            self.collected[name].append(part)

    def write(self, step: int, *, gradient_norm: float, learning_rate: float) -> float:
        """Log the row of optimizer step ``step``; every process must call it. Returns the mean loss."""
        means = {
            name: self.accelerator.reduce(torch.cat(parts).mean(), "mean").item()
            for name, parts in self.collected.items()
        }
        pace = (step - self.step) / (time.perf_counter() - self.time)
        row = {
            "loss": means.pop("loss"),
            "gradient_norm": gradient_norm,
            "learning_rate": learning_rate,
            "images_seen": step * self.batch_size,
            "steps_per_second": pace,
            "images_per_second": pace * self.batch_size,
        }
        self.accelerator.log(row | means, step=step)
        self._begin(step)
        return row["loss"]
