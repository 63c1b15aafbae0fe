"""Programs in processes beside the tests: connected ones, forked from this one, and one that holds a folder.

A fork has all imports done, which take a new interpreter some ten seconds of computing.
"""

from __future__ import annotations

import contextlib
import functools
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, PartialState

from sit.utils.forks import own_progress_lock

ROOT = Path(__file__).parent.parent
HOLD = """
import sys, time
from sit.utils.lock import locked
with locked(sys.argv[1], "held"):
    print("held", flush=True)
    time.sleep(120)
"""


class Forked:
    """``program`` and its arguments in a fork of this process, and what ``subprocess.Popen`` would have of it.

    Args:
        program: ``-m MODULE`` or a file, and the arguments.
        environment: variables in addition.
        folder: in which it works.
        then: called in the fork when the program is through.
    """

    def __init__(
        self,
        *program: object,
        environment: Mapping[str, str] | None = None,
        folder: Path = ROOT,
        then: Callable[[], None] = lambda: None,
    ) -> None:
        self.words, self.environment, self.folder, self.then = list(map(str, program)), environment or {}, folder, then
        self.said = tempfile.TemporaryDirectory()
        self.returncode: int | None = None
        self.pid = os.fork()
        if not self.pid:
            os._exit(self._child())

    def _child(self) -> int:
        """All that a forked process does; returns its exit status."""
        os.chdir(self.folder)
        for stream, descriptor in (("stdout", 1), ("stderr", 2)):
            file = os.open(self._path(stream), os.O_WRONLY | os.O_CREAT)
            os.dup2(file, descriptor)
            setattr(sys, stream, os.fdopen(descriptor, "w", buffering=1, closefd=False))
        os.environ |= {"OMP_NUM_THREADS": "1", **self.environment}
        torch.set_num_threads(1)  # the threads of this pool are not in a fork
        own_progress_lock()
        AcceleratorState._reset_state(reset_partial_state=True)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            self._program()
            self.then()
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stdout.flush()
        sys.stderr.flush()
        return status

    def _program(self) -> None:
        words = self.words
        if words[0] == "-m":
            sys.argv = words[1:]
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words
            runpy.run_path(words[0], run_name="__main__")

    def _path(self, stream: str) -> Path:
        return Path(self.said.name) / stream

    def poll(self) -> int | None:
        """The exit status, None before the end."""
        if self.returncode is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if ended else None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def communicate(self, timeout: float = 240) -> tuple[str, str]:
        """Wait for the end, for so many seconds and then by a kill; returns the standard output and error."""
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            time.sleep(0.01)
            if time.monotonic() > deadline:
                self.send_signal(signal.SIGKILL)
        said = self._path("stdout").read_text(), self._path("stderr").read_text()
        self.said.cleanup()
        return said


class Connected:
    """``program`` and its arguments on so many connected CPU processes, as torch's launcher would run it.

    Args:
        processes: how many.
        program: ``-m MODULE`` or a file, and the arguments.
    """

    def __init__(self, processes: int, *program: object) -> None:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        shared = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        shared |= {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}

        def check(number: int) -> None:
            state = PartialState()
            assert (state.process_index, state.num_processes) == (number, processes), "not connected to the others"

        self.children = [
            Forked(
                *program,
                environment=shared | {"RANK": str(number), "LOCAL_RANK": str(number)},
                then=functools.partial(check, number),
            )
            for number in range(processes)
        ]

    def running(self) -> bool:
        """Whether all of them are still at work."""
        return all(child.poll() is None for child in self.children)

    def kill(self) -> None:
        """End all of them at once, and wait for that."""
        for child in self.children:
            child.send_signal(signal.SIGKILL)
        for child in self.children:
            child.communicate()

    def output(self, seconds: float = 240) -> str:
        """Wait for the end; returns the standard output of all.

        Raises:
            AssertionError: one failed, was not connected to the others, or does not end in time.
        """
        deadline = time.monotonic() + seconds
        statuses = [child.poll() for child in self.children]
        while None in statuses and not any(statuses) and time.monotonic() < deadline:
            time.sleep(0.01)
            statuses = [child.poll() for child in self.children]
        for child in self.children:
            child.send_signal(signal.SIGKILL)
        said = [child.communicate() for child in self.children]
        ends = ["does not end" if status is None else f"exit status {status}" for status in statuses if status != 0]
        assert not ends, (ends, [err[-2000:] for _, err in said])
        return "".join(out for out, _ in said)


@contextlib.contextmanager
def holder_of(folder: Path) -> Iterator[subprocess.Popen]:
    """Another program that holds ``folder`` until the block ends."""
    command = [sys.executable, "-c", HOLD, str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()


def noted(notes: Path) -> list[tuple[int, int]]:
    """(number of the process, how many there were) of each that came to the end of ``python processes.py NOTES …``."""
    return sorted(tuple(map(int, note.read_text().split())) for note in notes.iterdir())


def main() -> None:
    """``python processes.py NOTES FILE …`` runs FILE, and writes which process of how many it was into a folder."""
    notes, sys.argv = Path(sys.argv[1]), sys.argv[2:]
    sys.path[0] = str(ROOT)
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        state = PartialState()
        notes.mkdir(exist_ok=True)
        (notes / str(os.getpid())).write_text(f"{state.process_index} {state.num_processes}")


if __name__ == "__main__":
    main()
