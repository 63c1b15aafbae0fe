"""What happens when a gradient is not finite: the step is skipped and named, and too many of them end the run."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from accelerate import Accelerator
from tqdm import tqdm

from sit.utils.errors import UserError


class Diverged(UserError):
    """A training ended because its gradients were not finite, time after time."""


@dataclass
class NonFinitePolicy:
    """Counts the steps in a row that were skipped.

    Attributes:
        accelerator: gathers what to report from all processes.
        limit: how many in a row end the run.
        in_a_row: how many there are now; a step that succeeds sets it to 0.
    """

    accelerator: Accelerator
    limit: int
    in_a_row: int = 0

    def report(self, step: int, norm: float, loss: torch.Tensor, indices: torch.Tensor, *, scale: float | None) -> None:
        """Tell of step ``step``, skipped for its gradient's ``norm``; every process must call it.

        A gradient that overflows under the loss scale of float16, while every loss is finite, is how that scale finds
        its size, and does not count. A scale below 1 amplifies nothing, so what is not finite then does.

        Args:
            step: the number of the step, from 1.
            norm: of the whole gradient.
            loss: (b,) losses of this process.
            indices: (b,) of their images in the data.
            scale: what the loss was multiplied by, in float16; None otherwise.

        Raises:
            Diverged: there were too many in a row.
        """
        loss, indices = self.accelerator.gather((loss, indices))
        bad = ~loss.isfinite()
        if scale is not None and scale >= 1 and not bad.any():
            self._tell(f"step {step}: gradient overflow at the loss scale {scale:g}; the step is skipped")
            return
        self.in_a_row += 1
        if bad.any():
            values = sorted({str(value) for value in loss[bad].tolist()})
            what = f"loss {', '.join(values)} at images {indices[bad].tolist()}"
        else:
            what = f"gradient norm {norm} of images {indices.tolist()}"
        message = f"step {step}: {what}; the step is skipped ({self.in_a_row} in a row)"
        if self.in_a_row >= self.limit:
            raise Diverged(f"{message}: stopped, as `non_finite_limit` is {self.limit}")
        self._tell(f"warning: {message}")

    def check_end(self, steps: int) -> None:
        """Raise Diverged if all of so many steps, with which a training ended, were skipped: fewer than the limit."""
        if 0 < steps <= self.in_a_row:
            raise Diverged(f"all {steps} steps were skipped, as their gradients were not finite: nothing was trained")

    def _tell(self, message: str) -> None:
        if self.accelerator.is_main_process:
            tqdm.write(message)
