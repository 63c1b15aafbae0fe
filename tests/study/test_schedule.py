"""Carrying out a study, with programs that take no time in place of the trainings: started, waited for, stopped."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from sit.study import schedule
from sit.study.cli import main
from sit.study.config import Evaluation, read_study
from sit.study.progress import Progress, remaining_hours
from sit.study.schedule import carry_out
from sit.utils.errors import UserError
from sit.utils.lock import locked

STUDY = """
recipe: digits
settings: {model: SiT-XS/8, heldout: 0.1, steps: 6}
seeds: [0, 1]
select: {seed: 0, learning_rate: [2e-3, 4e-3]}
variants: [{name: A, mixer: attention}, {name: B, mixer: linear_attention}]
"""
FINISH = """
import json, os, sys, time
path, content, folder = sys.argv[1:4]
open(os.path.join(folder, "begun"), "a").write(f"{time.time()}\\n")
time.sleep(float(sys.argv[4]))
open(os.path.join(folder, "ended"), "a").write(f"{time.time()}\\n")
os.makedirs(os.path.dirname(path), exist_ok=True)
open(path + ".tmp", "w").write(content)
os.rename(path + ".tmp", path)
"""
HOLD = """
import os, sys
from sit.utils.lock import locked
folder, path, content = sys.argv[1:4]
with locked(folder, "out"):
    print("held", flush=True)
    sys.stdin.read()
    if content:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        open(path, "w").write(content)
"""
WAIT = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(85))
open(sys.argv[1] + "/begun", "a").write("x")
time.sleep(60)
"""


@pytest.fixture
def study(tmp_path):
    (tmp_path / "mine.yaml").write_text(STUDY)
    return read_study(tmp_path / "mine.yaml", str(tmp_path / "out"))


def record_of(run) -> str:
    config = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(run.config).items()}
    loss = {"A": 0.3, "B": 0.2}[run.variant] + run.config.learning_rate
    heldout = {"steps": [6], "loss": [loss]}
    one = {"format": 1, "config": config, "heldout": heldout, "evaluation": None, "speed": {"seconds_per_step": 1}}
    one["machine"] = "m"
    return json.dumps(one)


def finishing(study, seconds: float = 0.0):
    """A command that leaves the JSON of a run after some seconds."""

    def command(run, *_):
        words = str(run.json(study)), record_of(run), str(run.work(study)), str(seconds)
        return [sys.executable, "-c", FINISH, *words]

    return command


def holder(study, run, content: str = "") -> subprocess.Popen:
    """Another program that holds a run until its input ends, and then leaves what is given as the run's JSON."""
    words = [str(run.work(study)), str(run.json(study)), content]
    other = subprocess.Popen([sys.executable, "-c", HOLD, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout.readline() == b"held\n"
    return other


@pytest.fixture(autouse=True)
def often(monkeypatch):
    monkeypatch.setattr(schedule, "POLL", 0.01)


def moments(study, what: str) -> dict[str, list[float]]:
    found = sorted((study.out / "work").glob(f"*/{what}"))
    return {path.parent.name: [float(line) for line in path.read_text().split()] for path in found}


def test_all_runs_are_done_once_the_deciding_ones_first(study, monkeypatch, capsys):
    monkeypatch.setattr(schedule, "command", finishing(study, 0.2))
    assert carry_out(study, jobs=1)
    begun, ended = moments(study, "begun"), moments(study, "ended")
    # the lower learning rate has the lower loss, and its run of seed 0 is there already
    assert set(begun) == {"A-0.002-seed0", "A-0.004-seed0", "B-0.002-seed0", "B-0.004-seed0"} | {
        "A-0.002-seed1",
        "B-0.002-seed1",
    }
    assert all(len(times) == 1 for times in begun.values())
    order = sorted(begun, key=lambda name: begun[name])
    assert all(ended[a][0] <= begun[b][0] for a, b in zip(order, order[1:], strict=False)), "one at a time"
    assert begun["A-0.002-seed1"][0] > ended["A-0.004-seed0"][0]
    assert "study: 6 of 6 runs done" in capsys.readouterr().err
    assert carry_out(study, jobs=1) and moments(study, "begun") == begun


def test_finished_runs_tell_the_time_that_is_left(study, monkeypatch):
    """Of six steps at a second each, five runs: no flag told the speed."""
    monkeypatch.setattr(schedule, "command", finishing(study))
    carry_out(study, jobs=1, only=("A-0.002-seed0",))
    state = schedule.Known(study).state()
    hours = remaining_hours(study, state.runs, state.found, jobs=2, told=None)
    assert hours == 3 * 6 / 2 / 3600 and "study 1/4 + 2 once the best is chosen, 0 min left" in Progress(
        study, 2, None
    ).line(state, [])


def test_a_run_that_only_helps_to_choose_is_not_said_to_be_evaluated(study, monkeypatch):
    monkeypatch.setattr("sit.study.progress.steps_done", lambda run, _: run.config.steps)
    state = schedule.Known(study).state()
    line = Progress(study, 1, None).line
    assert line(state, [state.runs[0]]).endswith(f"{state.runs[0].name}: finishing")
    evaluated = dataclasses.replace(study, evaluate=Evaluation(reference="digits"))
    assert Progress(evaluated, 1, None).line(state, [state.runs[0]]).endswith("finishing")
    compared = dataclasses.replace(state.runs[0], compared=True)
    assert Progress(evaluated, 1, None).line(state, [compared]).endswith("evaluating")


def test_a_job_has_the_lowest_slot_that_is_free():
    """Two GPUs: when the first job ends, the next gets its GPU and not that of the second."""
    jobs = [schedule.Job(None, None, None, slot) for slot in (0, 1, 2)]
    assert schedule.free_slot([]) == 0 and schedule.free_slot(jobs) == 3
    assert schedule.free_slot(jobs[1:]) == 0 and schedule.free_slot([jobs[0], jobs[2]]) == 1


def test_two_at_a_time_and_those_alone_that_are_named(study, monkeypatch):
    monkeypatch.setattr(schedule, "command", finishing(study, 0.3))
    assert carry_out(study, jobs=2, only=("A-0.002-seed0", "A-0.004-seed0"))
    begun, ended = moments(study, "begun"), moments(study, "ended")
    assert set(begun) == {"A-0.002-seed0", "A-0.004-seed0"}
    assert max(begun.values()) < min(ended.values()), "both at once"
    assert carry_out(study, jobs=2, only=("A",)) and set(moments(study, "begun")) == {*begun, "A-0.002-seed1"}


def test_a_run_that_fails_keeps_no_other_from_being_done(study, monkeypatch):
    finish = finishing(study)

    def command(run, *_):
        bad = [sys.executable, "-c", "import sys; print('error: no such luck'); sys.exit(2)"]
        return bad if run.name == "A-0.002-seed0" else finish(run)

    monkeypatch.setattr(schedule, "command", command)
    with pytest.raises(UserError, match="A-0.002-seed0 stopped with exit status 2: error: no such luck; see the logs"):
        carry_out(study, jobs=1)
    assert set(moments(study, "ended")) == {"A-0.004-seed0", "B-0.002-seed0", "B-0.004-seed0", "B-0.002-seed1"}


def test_after_the_time_limit_runs_save_themselves_and_none_is_begun(study, monkeypatch):
    monkeypatch.setattr(schedule, "command", lambda run, *_: [sys.executable, "-c", WAIT, str(run.work(study))])
    start = time.monotonic()
    assert not carry_out(study, jobs=1, hours=3.0 / 3600)  # in which a new process begins
    assert time.monotonic() - start < 30, "not the minute that the run would have taken"
    assert [path.parent.name for path in (study.out / "work").glob("*/begun")] == ["A-0.002-seed0"]


def test_a_file_that_is_edited_meanwhile_counts_the_next_time(study, monkeypatch):
    """The processes of runs read what the command had read; nothing of it stays."""
    finish, read = finishing(study), []

    def command(run, of, out):
        read.append((of.path.read_text(), out))
        study.path.write_text("recipe: another")
        return finish(run)

    monkeypatch.setattr(schedule, "command", command)
    assert carry_out(study, jobs=1, only=("A",)) and len(read) == 3
    assert set(read) == {(STUDY, str(study.out))}
    assert not list((study.out / "work").glob(".*"))


def test_an_error_leaves_no_run_going_on(study, monkeypatch):
    monkeypatch.setattr(schedule, "command", lambda run, *_: [sys.executable, "-c", WAIT, str(run.work(study))])
    started = []
    real = schedule.start
    monkeypatch.setattr(schedule, "start", lambda *words: started.append(real(*words)) or started[-1])

    def show(progress, state, active, stopping):
        if len(list((study.out / "work").glob("*/begun"))) == 2:
            raise UserError("the disk is full")

    monkeypatch.setattr(Progress, "show", show)
    with pytest.raises(UserError, match="the disk is full"):
        carry_out(study, jobs=2)
    assert [job.process.returncode for job in started] == [85, 85], "they were asked to save themselves"


def test_a_run_that_another_program_is_at_is_waited_for(study, monkeypatch):
    """Another process holds it; a lock of this one would not count."""
    run = schedule.Known(study).state().runs[0]
    other = holder(study, run)
    assert schedule.is_held(run, study)
    monkeypatch.setattr(schedule, "command", finishing(study))
    assert not carry_out(study, jobs=1, only=(run.name,), hours=0.5 / 3600)
    assert not (run.work(study) / "begun").exists()
    other.communicate()
    assert carry_out(study, jobs=1, only=(run.name,)) and (run.work(study) / "begun").exists()
    with locked(run.work(study), "out"):
        pass


@pytest.mark.parametrize("finishes", [True, False])
@pytest.mark.parametrize("processes, status", [(1, 75), (2, 1)])
def test_a_run_that_another_program_takes_while_it_starts_is_waited_for(
    study, monkeypatch, capsys, finishes, processes, status
):
    """It was free when it was started; if the other leaves it undone, it is done here. Launchers exit with 1."""
    of = dataclasses.replace(study, processes=processes)
    run, others, started = schedule.Known(of).state().runs[0], [], []
    monkeypatch.setattr(Progress, "show", lambda *_, **__: others and len(started) == 1 and looks.append(1))
    looks = []

    def command(*words):
        started.append(1)
        if len(started) > 1:
            return finishing(of)(*words)
        others.append(holder(of, run, record_of(run) if finishes else ""))
        threading.Timer(1.5, others[0].communicate).start()
        return [sys.executable, "-c", f"import sys; print('error: in use'); sys.exit({status})"]

    monkeypatch.setattr(schedule, "command", command)
    assert carry_out(of, jobs=1, only=(run.name,))
    assert len(started) == (1 if finishes else 2) and len(looks) > 10, "not begun again until the other's end"
    assert run.json(of).read_text() == record_of(run) and "stopped with" not in capsys.readouterr().err


def test_a_run_that_another_program_finishes_has_not_failed(study, monkeypatch):
    """It failed here, as for want of memory, and is there in the end."""
    first, second = schedule.Known(study).state().runs[:2]

    def command(run, *_):
        if run.name == second.name:  # meanwhile the other program is done with the first
            subprocess.run(finishing(study)(first), check=True)
            return finishing(study)(second)
        return [sys.executable, "-c", "import sys; sys.exit(2)"]

    monkeypatch.setattr(schedule, "command", command)
    assert carry_out(study, jobs=1, only=(first.name, second.name))


@pytest.mark.parametrize("words", [["--run", "A-0.002-seed0"], ["--jobs", "0"]])
def test_a_program_that_finds_a_run_in_use_exits_with_a_status_of_its_own(study, monkeypatch, capsys, words):
    """A folder that can't be written is a mistake as any other: waiting does not help."""
    run = schedule.Known(study).state().runs[0]
    monkeypatch.setattr(sys, "argv", ["study", str(study.path), "--out", str(study.out), *words])
    other = holder(study, run)
    with pytest.raises(SystemExit) as ended:
        main()
    told = capsys.readouterr().err
    assert ended.value.code == 75 and told.count("\n") == 1 and f"is in use by process {other.pid} on" in told
    other.communicate()
    run.work(study).write_text("a file")
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2 and "a file stands where a folder is needed" in capsys.readouterr().err


def test_what_is_not_wanted_any_more_is_removed(study, monkeypatch, tmp_path):
    (tmp_path / "mine.yaml").write_text(STUDY + "keep_checkpoints: false\n")
    sparing = read_study(tmp_path / "mine.yaml", str(study.out))
    monkeypatch.setattr(schedule, "command", finishing(study))
    for name in ("A-0.002-seed0", "B-0.002-seed0"):
        (study.out / "work" / name / "run").mkdir(parents=True)
    assert carry_out(sparing, jobs=1, only=("A", "B-0.002-seed0"))
    assert [path.parent.name for path in Path(study.out / "work").glob("*/run")] == ["B-0.002-seed0"], "not yet decided"
    assert carry_out(sparing, jobs=1)
    assert list(Path(study.out / "work").glob("*/run")) == []
