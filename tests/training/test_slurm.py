"""The job script for Slurm, on this machine: two CPU processes, with stand-ins for Slurm's commands and the big run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import Forked, noted

from sit.checkpoint.find import newest_checkpoint
from sit.checkpoint.info import read_info
from sit.training.run_folder import read_metrics
from sit.training.stop_signal import REQUEUE_EXIT

ROOT = Path(__file__).parents[2]

PYTHON = """
import json, os, sys
with open("task-" + os.environ["SLURM_PROCID"], "w") as task:
    json.dump([os.getpid(), dict(os.environ), sys.argv[1:]], task)
"""

SRUN = """
import json, os, subprocess, sys, time
command = [word for word in sys.argv[1:] if not word.startswith("--")]
assert len(sys.argv) - 1 - len(command) == 2, "srun's own options"
begun = [subprocess.Popen(command, env=os.environ | {"SLURM_PROCID": str(task), "SLURM_LOCALID": str(task)})
         for task in range(int(os.environ["SLURM_NTASKS"]))]
status = max(task.wait() for task in begun)  # as srun does it, https://slurm.schedmd.com/srun.html
if status or not os.path.exists("task-0"):
    sys.exit(status)
tasks = [json.load(open(f"task-{number}")) for number in range(len(begun))]
assert [task[0] for task in tasks] == [task.pid for task in begun], "a signal to the task has to reach the program"
with open("tasks.tmp", "w") as file:
    json.dump([task[1:] for task in tasks], file)
os.rename("tasks.tmp", "tasks")
while not os.path.exists("status"):
    time.sleep(0.01)
sys.exit(int(open("status").read()))
"""
"""writes down what its tasks are to run, and ends as the test says that they did, which runs them in forks"""

SCONTROL = """
import sys
if sys.argv[1:] == ["show", "hostnames", "nodes"]:
    sys.stdout.write("localhost\\nelsewhere\\n")
else:
    open("scontrol", "w").write(" ".join(sys.argv[1:]))
"""

SMALL = (
    "--data digits:heldout --vae digits --image-size 32 --model SiT-XS/8 --mixer attention --batch-size 8 "
    "--steps 100000 --log-every 1 --preview-every 0 --cpu-threads 1 --trackers"
)


def start(folder: Path, program: str) -> subprocess.Popen:
    """The job script with ``program`` in place of ``python``, in ``folder``."""
    (folder / "bin").mkdir()
    interpreter = f"#!{sys.executable} -S\n"
    for name, text in (("srun", interpreter + SRUN), ("scontrol", interpreter + SCONTROL), ("python", program)):
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "nodes", "SLURM_NTASKS": "2"}
    environment = os.environ | job | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{folder / 'bin'}:{environment['PATH']}"
    script = ROOT / "docs" / "accelerate" / "slurm-4nodes.sh"
    return subprocess.Popen(
        ["bash", str(script)], cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.distributed
def test_a_signalled_job_saves_itself_and_goes_back_into_the_queue(tmp_path):
    job, run = start(tmp_path, f"#!{sys.executable} -S\n{PYTHON}"), tmp_path / "runs" / "xl2-atconv"
    while not (tmp_path / "tasks").exists():
        assert job.poll() is None, job.stdout.read()
        time.sleep(0.01)
    tasks = []
    for environment, (file, *words) in json.loads((tmp_path / "tasks").read_text()):
        noting = ROOT / "tests" / "processes.py", tmp_path / "notes", ROOT / file
        tasks.append(Forked(*noting, *words, *SMALL.split(), environment=environment, folder=tmp_path))
    while not read_metrics(run / "metrics.jsonl"):
        assert all(task.poll() is None for task in tasks), [task.communicate() for task in tasks]
        time.sleep(0.05)
    for task in tasks:
        task.send_signal(signal.SIGUSR1)
    said = [task.communicate(300)[1] for task in tasks]
    (tmp_path / "status").write_text(str(max(task.returncode for task in tasks)))
    output, _ = job.communicate(timeout=60)
    assert job.returncode == REQUEUE_EXIT, (output, said)
    assert noted(tmp_path / "notes") == [(0, 2), (1, 2)]
    assert (tmp_path / "scontrol").read_text() == "requeue 7"
    last = read_metrics(run / "metrics.jsonl")[-1]["step"]
    assert read_info(newest_checkpoint(run, resumable=True)).step == last < 100000
    assert not any("Traceback" in text for text in said)


@pytest.mark.distributed
@pytest.mark.parametrize("status", [0, 2])
def test_a_job_that_ends_or_fails_does_not(tmp_path, status):
    assert start(tmp_path, f"#!/bin/bash\nexit {status}\n").wait(timeout=60) == status
    assert not (tmp_path / "scontrol").exists()
