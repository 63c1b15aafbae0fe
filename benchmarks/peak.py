"""The most memory that a program takes above what there was before it."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_bytes(run: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that ``run`` takes at most, of the device's memory, or of this process's on a CPU.

    Not after :func:`sit.utils.allocator.keep_freed_memory`: what a process keeps is used again unseen, or not at all.

    Returns:
        They, to within the pages that an allocator keeps on a CPU; None where the system does not tell (no Linux).
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with contextlib.suppress(AttributeError, OSError, TypeError):  # no glibc: what was freed may be used again unseen
        ctypes.CDLL(None).malloc_trim(0)
    try:
        CLEAR.write_text("5")  # the peak is what is resident now (proc(5))
        before = _resident("VmRSS")
    except OSError:
        return None
    run()
    return max(0, _resident("VmHWM") - before)


def _resident(name: str) -> int:
    """A line of the process's status, in bytes."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) << 10
