"""What a run keeps for post-hoc EMA: its averages and snapshots, through crashes and older checkpoints."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from tiny_runs import tiny_run

from sit.checkpoint.load import load_for_sampling
from sit.checkpoint.posthoc_ema import gamma_of
from sit.checkpoint.snapshots import find_snapshots
from sit.training.config import TrainConfig
from sit.training.trainer import train
from sit.transport.transport import Transport

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
LENGTHS = (0.05, 0.1)


def small(folder: Path, **changes) -> TrainConfig:
    """Six steps, a snapshot of every second, a checkpoint of every third."""
    averaged = dict(warmup_steps=0, keep_last=0, posthoc_ema=LENGTHS, posthoc_ema_every=2)
    return tiny_run(folder, **averaged | changes)


def checkpoint(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:07d}"


def tensors(*files: Path) -> dict[str, torch.Tensor]:
    """What safetensors files hold, by the file's name and key."""
    return {f"{file.stem}/{name}": tensor for file in files for name, tensor in load_file(file).items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def training(run: Path, step: int) -> dict[str, torch.Tensor]:
    """Raw weights and kept averages of a checkpoint."""
    found = tensors(*sorted((checkpoint(run, step) / "training").glob("*.safetensors")))
    assert {name.split("/")[0] for name in found} == {"model", *(f"posthoc-ema-{sigma}" for sigma in LENGTHS)}
    return found


def snapshot(run: Path, step: int, folder: str = "posthoc-ema") -> dict[str, torch.Tensor]:
    return tensors(*sorted((run / folder / f"step-{step:07d}").glob("*.safetensors")))


def steps(run: Path, folder: str = "posthoc-ema") -> list[int]:
    return [int(place.name.removeprefix("step-")) for place in sorted((run / folder).iterdir())]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run that was never interrupted, with a checkpoint of every step."""
    AcceleratorState._reset_state(reset_partial_state=True)
    folder = tmp_path_factory.mktemp("run") / "a"
    train(small(folder, checkpoint_every=1))
    return folder


def crash_in(step: int, config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train, and end in the middle of a step, counted from where the run starts."""
    original, count = Transport.training_loss, itertools.count(1)

    def crashing(*args, **kwargs):
        if next(count) == step:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Transport, "training_loss", crashing)
        train(config)
    AcceleratorState._reset_state(reset_partial_state=True)


def poisoned(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the loss of one step, counted from 1, be NaN."""
    original, count = Transport.training_loss, itertools.count(1)

    def changed(*args, **kwargs):
        return original(*args, **kwargs) * (float("nan") if next(count) == step else 1)

    monkeypatch.setattr(Transport, "training_loss", changed)


def check_averages(run: Path) -> None:
    """The averages of a run with a checkpoint of every step, against the integral over its raw weights in float64.

    Those of a step hold from the step before it to it, so the integral of τ^γ over that time is its weight.
    """
    name = "final_layer.linear.weight"
    files = [checkpoint(run, step) / "training/model.safetensors" for step in range(1, 7)]
    raw = np.stack([load_file(file)[name].double().numpy() for file in files])
    for sigma in LENGTHS:
        tau = (np.arange(6 * 4000) + 0.5) / 4000
        for step in (1, 2, 6):
            weights = np.where(tau < step, (tau / step) ** gamma_of(sigma), 0.0).reshape(6, -1).sum(1)
            expected = torch.from_numpy(np.tensordot(weights / weights.sum(), raw, axes=1))
            found = load_file(checkpoint(run, step) / f"training/posthoc-ema-{sigma}.safetensors")[name]
            torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-5)
        assert np.abs(expected.numpy() - raw[-1]).max() > 1e-5


def test_the_averages_are_the_integrals_over_the_run(finished):
    check_averages(finished)


def test_a_skipped_step_counts_as_time(tmp_path, monkeypatch):
    poisoned(4, monkeypatch)
    train(small(tmp_path / "a", checkpoint_every=1))
    assert same(tensors(checkpoint(tmp_path / "a", 3) / "training/model.safetensors"),
                tensors(checkpoint(tmp_path / "a", 4) / "training/model.safetensors"))  # fmt: skip
    check_averages(tmp_path / "a")


def test_snapshots_are_the_averages_in_float16(finished):
    assert steps(finished) == [2, 4, 6]
    for step in (2, 6):
        kept = {name.removeprefix("posthoc-ema-"): t for name, t in training(finished, step).items()}
        stored = snapshot(finished, step)
        parameters = {name for name in kept if not name.startswith("model/")}
        assert stored.keys() == parameters and len(stored) > 100
        assert all(torch.equal(stored[name], kept[name].half()) for name in stored)


def test_the_average_of_a_stored_length_is_reconstructed(finished):
    """That of a snapshot's step is the snapshot, whatever others there are."""
    found = dict(load_for_sampling(finished, ema=0.1).model.named_parameters())
    for name, tensor in load_file(checkpoint(finished, 6) / "training/posthoc-ema-0.1.safetensors").items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-6)


def test_a_run_without_them_keeps_nothing(tmp_path):
    train(small(tmp_path / "a", steps=2, posthoc_ema=(), posthoc_ema_every=None))
    assert not (tmp_path / "a" / "posthoc-ema").exists()
    assert sorted(p.name for p in (checkpoint(tmp_path / "a", 2) / "training").iterdir()) == [
        "model.safetensors", "optimizer.pt"]  # fmt: skip


def test_a_crash_changes_nothing(finished, tmp_path, monkeypatch, capsys):
    """Weights, averages and snapshots are those of the uninterrupted run, to the bit."""
    run = tmp_path / "b"
    crash_in(5, small(run), monkeypatch)
    assert steps(run) == [2, 4]
    before = snapshot(run, 4)
    half = run / "posthoc-ema" / ".step-0000006.1.tmp"
    half.mkdir()
    train(small(run, resume="auto"))
    assert f"the snapshots beyond {checkpoint(run, 3)} are set aside in {run / 'posthoc-ema-abandoned-1'}" in (
        capsys.readouterr().out
    )
    assert steps(run) == [2, 4, 6] and steps(run, "posthoc-ema-abandoned-1") == [4] and not half.exists()
    assert same(snapshot(run, 4), before)
    assert same(training(run, 6), training(finished, 6))
    assert all(same(snapshot(run, step), snapshot(finished, step)) for step in (2, 4, 6))


def test_a_run_that_begins_anew_sets_all_snapshots_aside(tmp_path, monkeypatch):
    run = tmp_path / "b"
    crash_in(3, small(run, checkpoint_every=6), monkeypatch)
    assert steps(run) == [2]
    crash_in(1, small(run, checkpoint_every=6, resume="auto"), monkeypatch)
    assert find_snapshots(run) == [] and steps(run, "posthoc-ema-abandoned-1") == [2]


def test_snapshots_go_with_their_trajectory(finished, tmp_path):
    """An older checkpoint goes on without the later ones; back on the abandoned trajectory, they are there again."""
    run = tmp_path / "a"
    shutil.copytree(finished, run)
    first = {step: snapshot(run, step) for step in (2, 4, 6)}
    changed = dict(learning_rate=1e-2, checkpoint_every=2)
    train(small(run, resume=str(checkpoint(run, 3)), **changed))
    assert steps(run) == [2, 4, 6] and steps(run, "posthoc-ema-abandoned-1") == [4, 6]
    assert same(snapshot(run, 2), first[2]) and not same(snapshot(run, 4), first[4])
    second = snapshot(run, 4)

    AcceleratorState._reset_state(reset_partial_state=True)
    aside = run / "checkpoints-abandoned-1" / "step-0000005"
    train(small(run, resume=str(aside), steps=5))
    assert steps(run) == [2, 4] and steps(run, "posthoc-ema-abandoned-1") == [6]
    assert steps(run, "posthoc-ema-abandoned-2") == [4, 6]
    assert same(snapshot(run, 4), first[4]) and same(snapshot(run, 4, "posthoc-ema-abandoned-2"), second)
