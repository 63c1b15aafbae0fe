"""The signals by which batch systems ask a run to save itself and end."""

from __future__ import annotations

import signal

import torch
from accelerate import Accelerator

REQUEUE_EXIT = 85
"""Exit status of a run that a signal stopped after saving itself (the "checkpointed" status of batch systems)."""


class StopSignal:
    """Notes SIGTERM and SIGUSR1 (what batch systems send before they take the machine away) while the block runs."""

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self) -> None:
        self.received = False

    def __enter__(self) -> StopSignal:
        self.before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        self.received = True

    def received_anywhere(self, accelerator: Accelerator) -> bool:
        """Whether any process got a signal; every process must call it, and all get the same answer."""
        if accelerator.num_processes == 1:
            return self.received
        return bool(accelerator.reduce(torch.tensor(int(self.received), device=accelerator.device), "sum"))
