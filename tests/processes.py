"""Programs in processes beside the tests: connected ones, forked from this one, and one that holds a folder.

A fork has all imports done, which take a new interpreter some ten seconds of computing.
"""

from __future__ import annotations

import contextlib
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, PartialState

ROOT = Path(__file__).parent.parent
HOLD = """
import sys, time
from sit.utils.lock import locked
with locked(sys.argv[1], "held"):
    print("held", flush=True)
    time.sleep(120)
"""


class Connected:
    """``program`` and its arguments on so many connected CPU processes, as torch's launcher would run it.

    Args:
        processes: how many.
        program: ``-m MODULE`` or a file, and the arguments.
    """

    def __init__(self, processes: int, *program: object) -> None:
        self.count, self.words = processes, list(map(str, program))
        self.folder = tempfile.TemporaryDirectory()
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        self.children = []
        for number in range(processes):
            child = os.fork()
            if not child:
                os._exit(self._child(number, port))
            self.children.append(child)

    def _child(self, number: int, port: int) -> int:
        """All that a forked process does; returns its exit status."""
        os.chdir(ROOT)
        for stream, descriptor in (("stdout", 1), ("stderr", 2)):
            file = os.open(self._path(stream, number), os.O_WRONLY | os.O_CREAT)
            os.dup2(file, descriptor)
            setattr(sys, stream, os.fdopen(descriptor, "w", buffering=1, closefd=False))
        os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(self.count)}
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        os.environ |= {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        torch.set_num_threads(1)  # the threads of this pool are not in a fork
        AcceleratorState._reset_state(reset_partial_state=True)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            self._program()
            state = PartialState()
            assert (state.process_index, state.num_processes) == (number, self.count), "not connected to the others"
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

    def _path(self, stream: str, number: int) -> Path:
        return Path(self.folder.name) / f"{stream}-{number}"

    def running(self) -> bool:
        """Whether all of them are still at work."""
        return all(os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None for child in self.children)

    def kill(self) -> None:
        """End all of them at once, and wait for that."""
        for child in self.children:
            os.kill(child, signal.SIGKILL)
        for child in self.children:
            os.waitpid(child, 0)
        self.children = []

    def output(self, seconds: float = 240) -> str:
        """Wait for the end; returns the standard output of all.

        Raises:
            AssertionError: one failed, was not connected to the others, or does not end in time.
        """
        deadline = time.monotonic() + seconds
        failed = []
        while self.children and time.monotonic() < deadline and not failed:
            for child in self.children:
                ended, status = os.waitpid(child, os.WNOHANG)
                if ended:
                    self.children.remove(child)
                    failed += [f"exit status {os.waitstatus_to_exitcode(status)}"] if status else []
                    break
            else:
                time.sleep(0.02)
        if self.children:
            failed += ["does not end"] * (not failed)
            self.kill()
        said = {s: [self._path(s, n).read_text() for n in range(self.count)] for s in ("stdout", "stderr")}
        assert not failed, (failed, [text[-2000:] for text in said["stderr"]])
        self.folder.cleanup()
        return "".join(said["stdout"])


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
