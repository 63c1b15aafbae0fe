"""How a program ends when a signal asks it to: with one line and a known status, from its first line to its last.

Nothing heavy is imported here, so that a program can listen before it imports what is.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

REQUEUE_EXIT = 85
"""Exit status of a training run that a batch system's signal stopped (the "checkpointed" status of batch systems)."""

PLAIN = {number: 128 + number for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
"""signal → exit status, as shells report a program that the signal ended"""

TRAINING = {signal.SIGINT: 128 + signal.SIGINT, signal.SIGTERM: REQUEUE_EXIT, signal.SIGUSR1: REQUEUE_EXIT}
"""the same for training, which a batch system is to start again"""

WATCHER = "sit-signals"
"""name of the thread that waits for signals, and holds nothing meanwhile"""

GRACE = 5.0
"""seconds until a process ends hard that can't end by itself, as it is in a call that waits for others"""


@contextlib.contextmanager
def handled(numbers: Iterable[int], handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Within the block, the signals ``numbers`` call ``handler(number, frame)``; after it, what they called before."""
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


class Signalled(SystemExit):
    """A signal asked for the end; ``code`` is the exit status."""


class _Listener:
    """What came so far, and whether somebody answers it in time."""

    def __init__(self, statuses: Mapping[int, int], grace: float) -> None:
        self.statuses, self.grace = statuses, grace
        self.first: int | None = None
        self.interrupts = 0
        self.deferring = False
        self.owner = os.getpid()

    def handle(self, number: int, _frame: object) -> None:
        if self.first is None:
            self.first = number
            raise Signalled(self.statuses[number])

    def watch(self, reading: int) -> None:
        """In a thread: the main one may sit in a call for long, where no handler runs."""
        while came := os.read(reading, 1):
            number = came[0]
            if number not in self.statuses:
                continue
            self.interrupts += number == signal.SIGINT
            if self.interrupts == 2:
                os._exit(self.statuses[number])
            if not self.deferring:
                threading.Thread(target=self.end_hard, args=(number,), daemon=True).start()

    def end_hard(self, number: int) -> None:
        time.sleep(self.grace)
        if not self.deferring:
            os.write(2, f"ended by {signal.Signals(number).name}\n".encode())
            os._exit(self.statuses[number])


_listener: _Listener | None = None


@contextlib.contextmanager
def ended_by_signals(statuses: Mapping[int, int], message: str, grace: float = GRACE) -> Iterator[None]:
    """While the block runs, a signal of ``statuses`` ends it; the program exits with the status, and says so in a line.

    The block unwinds as after an exception. Where it can't, because it is in a call that waits, the process ends after
    ``grace`` seconds as it is; at a second SIGINT it does at once. Within :func:`deferred_signals` nothing of this
    holds, but for the second SIGINT. After the block, when only the end of the interpreter is left, signals are
    ignored. Forked processes have the handlers that were there before.

    Args:
        statuses: signal → exit status.
        message: what the line says after "ended by SIGTERM: ".
        grace: in seconds.
    """
    global _listener
    listener = _listener = _Listener(statuses, grace)
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before: dict[int, Any] = {}

    def in_a_child() -> None:
        if _listener is listener:
            signal.set_wakeup_fd(-1)
            for number, handler in before.items():
                if signal.getsignal(number) == listener.handle:
                    signal.signal(number, handler)

    os.register_at_fork(after_in_child=in_a_child)
    try:
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        threading.Thread(target=listener.watch, args=(reading,), name=WATCHER, daemon=True).start()
        for number in statuses:
            before[number] = signal.signal(number, listener.handle)  # from here on it may raise
        yield
    except BaseException as error:
        saved = isinstance(error, SystemExit) and not isinstance(error, Signalled)  # told by whoever deferred it
        if listener.first is None or saved:
            raise
        # whatever it is: a library that was interrupted, as in its import, may have made another error of it
        print(f"ended by {signal.Signals(listener.first).name}: {message}", file=sys.stderr, flush=True)
        raise SystemExit(statuses[listener.first]) from None
    finally:
        listener.deferring = True
        for number in statuses:
            signal.signal(number, signal.SIG_IGN)
        signal.set_wakeup_fd(-1)


@contextlib.contextmanager
def deferred_signals(statuses: Mapping[int, int]) -> Iterator[list[int]]:
    """While the block runs, signals of ``statuses`` are noted, and the block ends when it is ready to.

    A second SIGINT ends the process at once.

    Yields:
        The signals that came, in order; at first one that :func:`ended_by_signals` raised and somebody swallowed.
    """
    listener = _listener
    came = [] if listener is None or listener.first is None else [listener.first]

    def note(number: int, _frame: object) -> None:
        came.append(number)
        if came.count(signal.SIGINT) == 2:
            os._exit(statuses[number])

    if listener is not None:
        listener.deferring = True
    before = {number: signal.signal(number, note) for number in statuses}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if listener is not None:
            listener.deferring = False
