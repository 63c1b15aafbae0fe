"""What the C library does with memory that is freed."""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""of glibc's malloc.h"""


def keep_freed_memory() -> bool:
    """Let this process keep what it frees, up to the most that it ever held, for what it allocates next.

    By default glibc gives large blocks back to the system at once, and a network's next layer, or training's next step,
    has them anew: the system then clears each page, which is up to a tenth of the time on a CPU (docs/performance.md).

    Returns:
        Whether it will: without glibc nothing changes.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl and macOS have no mallopt, and Windows no such library
        return False
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1))
