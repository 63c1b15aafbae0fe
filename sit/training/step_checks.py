"""How a step's gradient comes to the weights, unless it is not finite, and when the host learns of it.

On a CPU the host looks at each step's norm. On a GPU that would let the device run dry at every step; there the device
itself leaves a step out whose norm is not finite, and the host reads a whole row of steps at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from diffusers.training_utils import EMAModel
from torch import nn

from sit.training.ema import step_average
from sit.training.non_finite import NonFinitePolicy
from sit.training.rows import Rows


@dataclass(frozen=True)
class Updated:
    """What a step changes: the weights, by ``optimizer``, and the moving average ``ema`` of the ``averaged`` ones."""

    optimizer: AcceleratedOptimizer
    ema: EMAModel
    averaged: Sequence[nn.Parameter]


class StepChecks(Protocol):
    """A way to update weights, moments and moving average by finite gradients alone."""

    def update(self, step: int, norm: torch.Tensor, values: dict[str, torch.Tensor], indices: torch.Tensor) -> None:
        """Take optimizer step ``step``, counted from 1, unless the gradient's ``norm`` () is not finite.

        ``values`` are the loss and metrics of the images of this process, each (b,), and ``indices`` (b,) which images
        they are. Every process must call it.

        Raises:
            UserError: the policy's limit of steps that are not finite is reached.
        """

    def read(self) -> float:
        """Hand the steps so far to the rows and the policy; the gradient's norm at the last one.

        Every process must call it, after the same step. What the average counts is up to date afterwards.

        Raises:
            UserError: the policy's limit of steps that are not finite is reached.
        """


def make_step_checks(
    accelerator: Accelerator, updated: Updated, rows: Rows, policy: NonFinitePolicy, *, every: int
) -> StepChecks:
    """The way for the accelerator's device. ``every``: the most steps between two calls of ``read``."""
    if accelerator.device.type == "cuda":
        return OnDevice(accelerator, updated, rows, policy, every)
    return AtOnce(accelerator, updated, rows, policy)


@dataclass
class AtOnce:
    """The host reads each step's norm before it takes the step."""

    accelerator: Accelerator
    updated: Updated
    rows: Rows
    policy: NonFinitePolicy
    norm: float = math.nan

    def update(self, step: int, norm: torch.Tensor, values: dict[str, torch.Tensor], indices: torch.Tensor) -> None:
        self.norm, scaler = norm.item(), self.accelerator.scaler
        if math.isfinite(self.norm):
            self.policy.in_a_row = 0
            self.rows.add(values)
            self.updated.optimizer.step()
            self.updated.ema.step(self.updated.averaged)
        else:
            scale = None if scaler is None else scaler.get_scale()
            self.policy.report(step, self.norm, values["loss"], indices, scale=scale)
            if scaler is not None:
                scaler.update()  # optimizer.step() does it otherwise

    def read(self) -> float:
        return self.norm


@dataclass
class OnDevice:
    """The device decides; the host waits for it in ``read`` alone.

    The fused optimizer leaves weights, moments and its own count of steps as they are where ``found_inf`` is 1, which
    is how PyTorch's loss scaling skips a step. The moving average moves by a weight that is then 0; as its decay
    depends on the number of steps that were taken, the device counts them and looks their weights up.
    """

    accelerator: Accelerator
    updated: Updated
    rows: Rows
    policy: NonFinitePolicy
    every: int
    norm: float = math.nan
    pending: list[tuple[int, dict[str, torch.Tensor], torch.Tensor]] = field(default_factory=list)
    norms: list[torch.Tensor] = field(default_factory=list)
    scales: list[torch.Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        ema, device = self.updated.ema, self.accelerator.device
        ahead = range(ema.optimization_step + 1, ema.optimization_step + 1 + self.every)
        self.weights = torch.tensor([1 - ema.get_decay(count) for count in ahead], device=device)
        self.taken = torch.zeros(1, dtype=torch.int64, device=device)
        for collected in (self.pending, self.norms, self.scales):
            collected.clear()

    def update(self, step: int, norm: torch.Tensor, values: dict[str, torch.Tensor], indices: torch.Tensor) -> None:
        if len(self.pending) == self.every:
            self.read()
        finite, scaler = norm.isfinite(), self.accelerator.scaler
        self.pending.append((step, values, indices))
        self.norms.append(norm)
        if scaler is not None:
            self.scales.append(scaler.scale(torch.ones_like(norm)))

        # not through the scaler: it would overlook a norm that overflows where no gradient does
        optimizer = self.updated.optimizer.optimizer
        optimizer.found_inf = finite.logical_not().float()
        optimizer.step()
        del optimizer.found_inf
        if scaler is not None:
            scaler.update()  # by what it saw when it unscaled the gradients

        weight = self.weights.index_select(0, self.taken).squeeze(0)  # indexing by a tensor would wait for it
        step_average(self.updated.ema, self.updated.averaged, weight * finite)
        self.taken += finite

    def read(self) -> float:
        if not self.pending:
            return self.norm
        norms = torch.stack(self.norms).tolist()
        scales = torch.stack(self.scales).tolist() if self.scales else [None] * len(norms)
        for (step, values, indices), norm, scale in zip(self.pending, norms, scales, strict=True):
            if math.isfinite(norm):
                self.policy.in_a_row = 0
                self.rows.add(values)
                self.updated.ema.optimization_step += 1
            else:
                self.policy.report(step, norm, values["loss"], indices, scale=scale)
        self.norm = norms[-1]
        self._begin()
        return self.norm
