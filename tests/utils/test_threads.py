"""How many threads a command computes with."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command, launch_command_parser

from sit.utils import threads
from sit.utils.errors import UserError
from sit.utils.openmp import SPINS
from sit.utils.threads import CpuThreads, usable_cores, usual_threads

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "told, processes, expected",
    [
        (None, None, 6), ("4", None, 4), ("1", None, 1), ("4,2", None, 4), ("many", None, 6),
        ("1", "2", 3), (None, "2", 3), ("4", "2", 4), (None, "50", 1),
    ],
)  # fmt: skip
def test_the_usual_number(monkeypatch, told, processes, expected):
    monkeypatch.setattr(threads, "usable_cores", lambda: 6)
    monkeypatch.delenv(threads.LAUNCHED, raising=False)
    for name, value in {"OMP_NUM_THREADS": told, "LOCAL_WORLD_SIZE": processes, "WORLD_SIZE": None}.items():
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert usual_threads() == expected


@pytest.mark.parametrize("told, expected", [(None, "1 6"), ("3", "3 3")])
def test_accelerate_launch_of_one_process_leaves_the_number_to_the_user(tmp_path, monkeypatch, capfd, told, expected):
    """Asked of ``accelerate launch`` itself, which sets the variable to 1 where it is not set."""
    program = tmp_path / "asks.py"
    program.write_text(
        "import os\nfrom sit.utils import threads\nthreads.usable_cores = lambda: 6\n"
        "print(os.environ['OMP_NUM_THREADS'], threads.usual_threads())\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if told is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", told)
    launch_command(launch_command_parser().parse_args(["--num_processes", "1", str(program)]))
    assert capfd.readouterr().out.strip() == expected


def test_threads_wait_briefly_in_a_command():
    """What libgomp itself says when torch loads it."""
    gnu = platform.system() == "Linux" and any("gomp" in line for line in open("/proc/self/maps"))
    if not gnu:
        pytest.skip("torch has another OpenMP than GNU's here")
    program = "from sit.utils.errors import entry_point\nentry_point(lambda: __import__('torch'))()"
    for given, turns in (({}, SPINS), ({"GOMP_SPINCOUNT": "77"}, 77), ({"OMP_WAIT_POLICY": "passive"}, 0)):
        environment = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
        environment |= {"OMP_DISPLAY_ENV": "verbose", **given}
        said = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, cwd=ROOT
        )
        assert f"GOMP_SPINCOUNT = '{turns}'" in said.stderr, said.stderr


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
