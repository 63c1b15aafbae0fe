"""How the threads of a process on a CPU wait for one another."""

from __future__ import annotations

import os

SPINS = 10_000
"""turns of a waiting thread's loop, a part of a millisecond"""


def wait_briefly() -> None:
    """Let computing threads that wait give their core away soon; to be called before torch is loaded.

    GNU OpenMP, which torch has on Linux, lets a thread turn in a loop 300,000 times before it sleeps (libgomp's manual,
    GOMP_SPINCOUNT). Where another program holds the core of the thread that it waits for, it so keeps a core from both:
    two threads then are slower than one (docs/performance.md). What the user has set stays.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))
