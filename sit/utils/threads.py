"""How many threads a command computes with on a CPU: one flag, and one default, for all commands."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

from sit.utils.allocator import keep_freed_memory
from sit.utils.errors import UserError

CGROUP = Path("/sys/fs/cgroup")
LAUNCHED = "ACCELERATE_DYNAMO_MODE"
"""what ``accelerate launch`` sets, for one process as well, and nobody by hand"""


@dataclass(frozen=True)
class CpuThreads:
    """Computing threads on a CPU."""

    cpu_threads: int | None = None
    """computing threads of a process on a CPU; None takes OMP_NUM_THREADS, or without it the cores that it may use"""

    def __post_init__(self) -> None:
        if self.cpu_threads is not None and self.cpu_threads < 1:
            raise UserError(f"`cpu_threads` must be at least 1, not {self.cpu_threads}")

    def use(self) -> None:
        """Let torch compute with them in this process: :func:`use_threads`."""
        use_threads(self.cpu_threads)


def use_threads(wanted: int | None) -> None:
    """Let torch compute with ``wanted`` threads in this process; None: with :func:`usual_threads`.

    Where there is no accelerator the process also keeps the memory that it frees.
    """
    import torch  # seconds that a command's flags can be read without

    torch.set_num_threads(wanted or usual_threads())
    if not torch.accelerator.is_available():  # with one, weights are read here and go there
        keep_freed_memory()


def usual_threads() -> int:
    """OMP_NUM_THREADS, or the cores that this process may use, divided among the launch's processes on this machine.

    ``accelerate launch`` and ``torchrun`` set OMP_NUM_THREADS to 1 where it is not set, so under them 1 counts as not
    set.
    """
    beside = _number(os.environ.get("LOCAL_WORLD_SIZE")) or _number(os.environ.get("WORLD_SIZE")) or 1
    launched = beside > 1 or LAUNCHED in os.environ
    told = _number(os.environ.get("OMP_NUM_THREADS", "").partition(",")[0])
    if told is not None and (told > 1 or not launched):
        return told
    return max(1, usable_cores() // beside)


def usable_cores() -> int:
    """The cores that this process may run on, by its affinity, or as many as its control group's quota comes to."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota()
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def _quota() -> float | None:
    """Processor time for each second that a container may use; None if it is not limited, or nothing tells."""
    for files in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            words = " ".join((CGROUP / name).read_text() for name in files).split()
            quota, period = map(int, words)
        except (OSError, ValueError):  # not there, or "max"
            continue
        if quota > 0 and period > 0:
            return quota / period
    return None


def _number(word: str | None) -> int | None:
    """A count of at least 1; None if the word is none."""
    return int(word) if word and word.strip().isdecimal() and int(word) > 0 else None
