"""The signals by which batch systems and people ask a run to save itself and end."""

from __future__ import annotations

import contextlib

import torch
from accelerate import Accelerator

from sit.utils.signals import REQUEUE_EXIT, TRAINING, deferred_signals

__all__ = ["REQUEUE_EXIT", "StopSignal"]

EVERY = 10
"""steps between questions to the other processes, on GPUs"""


class StopSignal:
    """Notes SIGTERM, SIGUSR1 (what batch systems send before they take the machine away) and SIGINT (Ctrl-C).

    It does while the block runs. A second SIGINT ends the process at once.
    """

    def __enter__(self) -> StopSignal:
        self.held = contextlib.ExitStack()
        self.came = self.held.enter_context(deferred_signals(TRAINING))
        return self

    def __exit__(self, *exception) -> None:
        self.held.close()

    @property
    def status(self) -> int:
        """The exit status that the first signal asks for; 0 before any."""
        return TRAINING[self.came[0]] if self.came else 0

    @staticmethod
    def is_asked_at(step: int, accelerator: Accelerator) -> bool:
        """Whether step ``step`` ends with a call of :meth:`received_anywhere`, even if nothing else is done then.

        Every step does, but where the host would wait for its GPU to do all that is queued: there one of ``EVERY``.
        """
        return step % EVERY == 0 or accelerator.num_processes == 1 or accelerator.device.type != "cuda"

    def received_anywhere(self, accelerator: Accelerator) -> int:
        """The highest :attr:`status` of all processes; every process must call it, and all get the same answer."""
        if accelerator.num_processes == 1:
            return self.status
        return int(accelerator.gather(torch.tensor([self.status], device=accelerator.device)).max())
