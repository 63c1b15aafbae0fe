"""Runs a program on several CPU processes and notes, from outside of its code, how many it was connected to.

``python processes.py NOTES PROGRAM …`` runs PROGRAM (``-m MODULE`` or a file), and then writes into the folder NOTES
which process of how many it was. ``accelerate launch --cpu --num_processes 2`` starts one process, unless it has MPI;
torch's launcher starts two.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent


def launch(notes: Path, processes: int, *program: object) -> list[str]:
    """The command that runs ``program`` and its arguments on so many processes."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes)
    return list(map(str, (sys.executable, *launcher, __file__, notes, *program)))


def environment() -> dict[str, str]:
    """The variables for :func:`launch`: CPU only, and as many threads here as there, as convolutions round by them."""
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | threads | {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}


def noted(notes: Path) -> list[tuple[int, int]]:
    """(number of the process, how many there were) of each that came to the end of its program."""
    return sorted(tuple(map(int, note.read_text().split())) for note in notes.iterdir())


def everyone(processes: int) -> list[tuple[int, int]]:
    """What :func:`noted` gives for processes that were all connected."""
    return [(number, processes) for number in range(processes)]


def main() -> None:
    notes, sys.argv = Path(sys.argv[1]), sys.argv[2:]
    sys.path[0] = str(ROOT)
    try:
        if sys.argv[0] == "-m":
            del sys.argv[0]
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        from accelerate import PartialState

        state = PartialState()
        notes.mkdir(exist_ok=True)
        (notes / str(os.getpid())).write_text(f"{state.process_index} {state.num_processes}")


if __name__ == "__main__":
    main()
