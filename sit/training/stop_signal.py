"""The signals by which batch systems ask a run to save itself and end."""

from __future__ import annotations

import signal

REQUEUE_EXIT = 85
"""Exit status of a run that a signal stopped after saving itself (the "checkpointed" status of batch systems)."""


class StopSignal:
    """Notes SIGTERM and SIGUSR1 (what batch systems send before they take the machine away) while the block runs."""

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

    def __enter__(self) -> StopSignal:
        self.received = False
        self.before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        self.received = True
