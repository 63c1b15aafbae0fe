"""Freed memory that stays in the process, seen by the pages that the system has to clear."""

from __future__ import annotations

import platform
import resource
import subprocess
import sys

import pytest
import torch
from processes import ROOT

from sit.utils import allocator, threads
from sit.utils.allocator import keep_freed_memory

SIZES = (4 << 20, 80 << 20)
"""bytes: less and more than :data:`KEPT_BY_DEFAULT`"""

KEPT_BY_DEFAULT = 32 << 20
"""bytes: a freed block up to this raises what glibc keeps from then on, so that it is had again as it is"""

PAGES_OF_A_SECOND_TIME = """
import resource, sys
from sit.utils.allocator import keep_freed_memory
if sys.argv[2] == "kept":
    assert keep_freed_memory()
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = b"x" * int(sys.argv[1])
    del block
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def pages_of_a_second_time(size: int, how: str) -> int:
    """Pages that the system clears for a block that was had and freed before, in a process of its own."""
    command = [sys.executable, "-c", PAGES_OF_A_SECOND_TIME, str(size), how]
    return int(subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="this system has another C library than glibc")
@pytest.mark.parametrize("size", SIZES)
def test_a_block_is_had_again_as_it_is(size):
    pages = size // resource.getpagesize()
    assert pages_of_a_second_time(size, "kept") < 0.05 * pages
    if size > KEPT_BY_DEFAULT:
        assert pages_of_a_second_time(size, "by default") > 0.9 * pages, "what there is to win"


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: object())
    assert keep_freed_memory() is False


@pytest.mark.parametrize("accelerator", (False, True))
def test_commands_keep_it_where_there_is_no_accelerator(accelerator, monkeypatch):
    asked = []
    monkeypatch.setattr(threads, "keep_freed_memory", lambda: asked.append(True))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: accelerator)
    threads.use_threads(torch.get_num_threads())
    assert bool(asked) is not accelerator
