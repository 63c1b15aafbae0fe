"""A crew of forked processes: jobs of Python that compute in short operations, where threads would wait for its lock.

A fork has the caller's networks without a copy, and takes milliseconds. What makes forks dangerous is a lock that
another thread holds at that moment, and an accelerator's context; where there is any of it, :func:`can_fork` says no.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
from tqdm import TMonitor, tqdm

from sit.utils.signals import WATCHER


def can_fork() -> bool:
    """Whether forks are safe here: on Linux, in a process without other threads of Python that may hold a lock,
    without an accelerator in use, and of which multiprocessing lets children be had."""
    if sys.platform != "linux" or multiprocessing.current_process().daemon:
        return False
    if torch.cuda.is_initialized() or torch.xpu.is_initialized():
        return False
    harmless = (thread for thread in threading.enumerate() if isinstance(thread, TMonitor) or thread.name == WATCHER)
    return set(threading.enumerate()) == {threading.main_thread(), *harmless}


def own_progress_lock() -> None:
    """In a forked process: let its progress bars take turns by a lock of this process alone.

    tqdm's own lock is shared among forks, so one that is killed while it draws would hold it, and all others that draw
    would wait forever.
    """
    tqdm.set_lock(threading.RLock())


class Forks:
    """Processes that take jobs in turn, and send what they tell and find: results without gradients."""

    def __init__(self, jobs: Sequence[Callable[..., Any]], listens: bool) -> None:
        self.jobs, self.listens, self.parent = jobs, listens, os.getpid()
        self.context = multiprocessing.get_context("fork")
        self.taken = self.context.Value("q", 0)
        self.processes: dict[Connection, Any] = {}

    def start(self, count: int, inherited: Callable[[], AbstractContextManager[Any]]) -> None:
        """Fork ``count`` processes, which compute within the context that ``inherited`` makes.

        Raises:
            OSError: the system has no room for them.
        """
        for _ in range(count):
            ours, theirs = self.context.Pipe(duplex=False)
            process = self.context.Process(target=self._work, args=(theirs, inherited), name="sit-worker", daemon=True)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # of threads, which `can_fork` has looked at
                process.start()
            theirs.close()
            self.processes[ours] = process

    def _work(
        self, pipe: Connection, inherited: Callable[[], AbstractContextManager[Any]]
    ) -> None:  # pragma: no cover (in another process)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the caller ends this process
        torch.set_num_threads(1)
        own_progress_lock()
        while (number := self._next()) < len(self.jobs):
            try:
                with inherited():
                    message = pickle.dumps(("result", number, self.jobs[number](self._teller(number, pipe))))
            except BaseException as error:
                message = pickle.dumps(("error", number, _portable(error)))
            pipe.send_bytes(message)

    def _next(self) -> int:
        with self.taken.get_lock():
            self.taken.value += 1
            return self.taken.value - 1

    def _teller(self, number: int, pipe: Connection) -> Callable[..., None]:
        def tell(*what: Any) -> None:
            if os.getppid() != self.parent:
                os._exit(1)  # nobody waits for the result any more
            if self.listens:
                pipe.send_bytes(pickle.dumps(("told", number, what)))

        return tell

    def said(self) -> Iterator[tuple[str, int, Any]]:
        """What comes from the processes: (``told``, ``result`` or ``error``; the job's number; what).

        Raises:
            RuntimeError: one ended before its time, killed for want of memory perhaps.
        """
        waiting = list(self.processes)
        while waiting:
            for pipe in wait(waiting):
                assert isinstance(pipe, Connection)
                try:
                    message = pipe.recv_bytes()
                except EOFError:
                    waiting.remove(pipe)
                    self.processes[pipe].join()
                    if status := self.processes[pipe].exitcode:
                        raise RuntimeError(
                            f"a computing process ended with status {status}"
                            + (", as if killed for want of memory" if status == -signal.SIGKILL else "")
                        ) from None
                else:
                    yield pickle.loads(message)

    def end(self) -> None:
        """End what still runs; the processes own nothing that could be lost."""
        for pipe, process in self.processes.items():
            pipe.close()
            process.kill()
            process.join()


def _portable(error: BaseException) -> BaseException:  # pragma: no cover (in another process)
    """The error as it can be sent; one that can't be is told by its traceback."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError("".join(traceback.format_exception(error)))
    return error
