"""How many threads a command computes with."""

from __future__ import annotations

import pytest

from sit.utils import threads
from sit.utils.errors import UserError
from sit.utils.threads import CpuThreads, usable_cores, usual_threads


@pytest.mark.parametrize(
    "told, processes, expected",
    [
        (None, None, 6), ("4", None, 4), ("1", None, 1), ("4,2", None, 4), ("many", None, 6),
        ("1", "2", 3), (None, "2", 3), ("4", "2", 4), (None, "50", 1),
    ],
)  # fmt: skip
def test_the_usual_number(monkeypatch, told, processes, expected):
    monkeypatch.setattr(threads, "usable_cores", lambda: 6)
    for name, value in {"OMP_NUM_THREADS": told, "LOCAL_WORLD_SIZE": processes, "WORLD_SIZE": None}.items():
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert usual_threads() == expected


@pytest.mark.parametrize(
    "files, expected",
    [
        ({}, 8), ({"cpu.max": "max 100000\n"}, 8), ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "10000 100000"}, 1), ({"cpu.max": "9900000 100000"}, 8),
        ({"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
    ],
)  # fmt: skip
def test_cores_are_those_that_may_be_used(monkeypatch, tmp_path, files, expected):
    monkeypatch.setattr(threads, "CGROUP", tmp_path)
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert usable_cores() == expected


def test_no_thread_is_too_few():
    with pytest.raises(UserError, match="`cpu_threads` must be at least 1, not 0"):
        CpuThreads(0)
