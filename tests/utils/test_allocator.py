"""Freed memory that stays in the process, seen by the pages that the system has to clear."""

from __future__ import annotations

import ctypes
import multiprocessing
import platform
import resource
from collections.abc import Callable

import pytest
import torch

from sit.utils import allocator, threads
from sit.utils.allocator import keep_freed_memory

SIZES = (4 << 20, 80 << 20)
"""bytes: less and more than what glibc can be told to keep by itself"""


def pages_of_a_second_time(size: int, prepare: Callable[[], object]) -> int:
    """Pages that the system clears for a block that was had and freed before."""
    prepare()
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        block = b"x" * size
        del block
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def in_a_fork(size: int, prepare: Callable[[], object]) -> int:
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(pages_of_a_second_time, (size, prepare))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="this system has another C library than glibc")
@pytest.mark.parametrize("size", SIZES)
def test_a_block_is_had_again_as_it_is(size):
    pages = size // resource.getpagesize()
    assert in_a_fork(size, prepare=default_allocator) > 0.9 * pages, "what there is to win"
    assert in_a_fork(size, prepare=keep_freed_memory) < 0.05 * pages


def default_allocator() -> None:
    """What glibc does in a new process: the fork's parent may have been told otherwise."""
    mallopt = ctypes.CDLL(None).mallopt
    for option, value in ((allocator.M_MMAP_MAX, 65536), (allocator.M_TRIM_THRESHOLD, 128 << 10), (-3, 128 << 10)):
        assert mallopt(option, value) == 1


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
