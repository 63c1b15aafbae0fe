"""How a run ends that is told to, and what is left of one that was killed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from limits import file_size_limit
from tiny_runs import tiny_run

from sit.checkpoint.find import find_checkpoints, newest_checkpoint
from sit.checkpoint.integrity import flaw
from sit.training import preview, trainer
from sit.training.config import TrainConfig
from sit.training.trainer import train
from sit.utils.errors import UserError
from sit.utils.signals import PLAIN, TRAINING

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("fresh_accelerate")


def small(folder: Path, **changes) -> TrainConfig:
    few = dict(data="digits:heldout", model="SiT-XS/8", steps=2, batch_size=4, preview_steps=5, checkpoint_every=1)
    return tiny_run(folder, **few | changes)


def go(config: TrainConfig) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    train(config)


def test_what_a_killed_process_left_is_cleared(tmp_path):
    """Half-written files of this machine and of others, and a checkpoint more than are kept."""
    run = tmp_path / "run"
    go(small(run, steps=3, keep_last=2, preview_every=3))
    expected = sorted(path.relative_to(run) for path in run.rglob("*"))
    shutil.copytree(run / "checkpoints" / "step-0000002", run / "checkpoints" / "step-0000001")
    for name in (".metrics.jsonl.elsewhere-1.tmp", ".identity.json.1.tmp", "samples/.step-0000002.png.elsewhere-1.tmp"):
        (run / name).write_text("half")
    for name in ("checkpoints/.step-0000004.elsewhere-1.tmp", "checkpoints/.step-0000001.deleted", ".vae.x-1.tmp"):
        (run / name).mkdir()
    go(small(run, steps=3, keep_last=2, preview_every=3, resume="auto"))
    assert sorted(path.relative_to(run) for path in run.rglob("*")) == expected


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_the_step_before_a_preview(tmp_path, number, monkeypatch):
    """It comes before a preview that is due, and once more, for a run that goes on, while one is being sampled."""
    run, generate = tmp_path / "run", preview.generate
    monkeypatch.setattr(trainer, "accumulate_gradients", signalling(trainer.accumulate_gradients, number))
    with pytest.raises(SystemExit) as stopped:
        go(small(run, steps=4, preview_every=1, checkpoint_every=4))
    assert stopped.value.code == TRAINING[number]
    assert newest_checkpoint(run, resumable=True).name == "step-0000001"
    assert not (run / "samples").exists()
    monkeypatch.undo()

    seen = []

    def sampling(*arguments, on_step, **options):
        def signalled(step, *rest) -> None:
            seen.append(step)
            if step == 1:
                os.kill(os.getpid(), number)
            on_step(step, *rest)

        return generate(*arguments, on_step=signalled, **options)

    monkeypatch.setattr(preview, "generate", sampling)
    with pytest.raises(SystemExit) as stopped:
        go(small(run, steps=4, preview_every=1, checkpoint_every=4, resume="auto"))
    assert stopped.value.code == TRAINING[number] and max(seen) < 5
    assert newest_checkpoint(run, resumable=True).name == "step-0000002"
    assert not (run / "samples").exists()


def signalling(original, number: int):
    """``original``, in the middle of which this process gets a signal."""

    def call(*arguments):
        os.kill(os.getpid(), number)
        return original(*arguments)

    return call


def test_an_error_is_told_after_the_bar_is_closed(tmp_path, monkeypatch):
    closed, original = [], trainer.progress_bar

    def watched(*arguments):
        bar = original(*arguments)
        close = bar.close
        bar.close = lambda: (closed.append(True), close())
        return bar

    def fail(*_, **__):
        raise UserError("no")

    monkeypatch.setattr(trainer, "progress_bar", watched)
    monkeypatch.setattr(trainer, "write_checkpoint", fail)
    with pytest.raises(UserError, match="no"):
        go(small(tmp_path / "run"))
    assert closed


@pytest.mark.parametrize(
    "size", [0, 20_000, 50_000, 100_000, 200_000, 500_000, 1_000_000, 2_000_000, 3_000_000, 4_000_000]
)
def test_a_full_disk_ends_training_in_one_line(tmp_path_factory, tmp_path, size, begun):
    """The system's own limit on the size of files; the run before goes on when there is room again.

    Sizes between 0 and that of what pytest keeps of the progress bar would fail there.
    """
    run = shutil.copytree(begun, tmp_path / "run")
    config = small(run, resume="auto")
    with file_size_limit(size), pytest.raises(UserError, match="limit on the size of files is reached") as caught:
        go(config)
    assert "\n" not in str(caught.value)
    assert [step for step, _ in find_checkpoints(run)] == [1] and flaw(find_checkpoints(run)[0][1]) is None
    go(config)
    assert [step for step, _ in find_checkpoints(run)] == [1, 2]


@pytest.fixture(scope="module")
def begun(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("begun") / "run"
    go(small(run, steps=1))
    return run


COMMANDS = {
    "train.py": (["train.py"], TRAINING),
    "sample.py": (["sample.py", "--ckpt", "nowhere"], PLAIN),
    "eval_fid.py": (["eval_fid.py", "--ckpt", "nowhere", "--reference", "digits"], PLAIN),
    "sit.latents": (["-m", "sit.latents", "encode", "--out", "nowhere"], PLAIN),
}


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGINT], ids=["USR1", "INT"])
@pytest.mark.parametrize("command", COMMANDS)
def test_commands_end_in_one_line_while_they_import(command, number):
    words, statuses = COMMANDS[command]
    process = subprocess.Popen([sys.executable, *words], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while not listens(process.pid, number):
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == statuses[number], said
    assert said.startswith(f"ended by {signal.Signals(number).name}: ") and said.count("\n") == 1


def listens(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal, and one for SIGUSR1, which Python has none for by itself."""
    (caught,) = (line.split()[1] for line in Path(f"/proc/{pid}/status").read_text().splitlines() if "SigCgt" in line)
    return all(int(caught, 16) >> (wanted - 1) & 1 for wanted in (number, signal.SIGUSR1))
