"""The training loop on the embedded data: reproducible, resumable, the same on two processes, careful with NaN."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image
from processes import Connected
from safetensors.torch import load_file
from tiny_runs import tiny_run

from sit.checkpoint.integrity import INDEX, write_json
from sit.checkpoint.load import load_for_sampling
from sit.training.checkpoints import prune_checkpoints
from sit.training.cli import main, parse_train_arguments
from sit.training.config import TrainConfig
from sit.training.data import Opened
from sit.training.loader import EpochPermutation
from sit.training.run_folder import read_metrics
from sit.training.schedule import learning_rate_at
from sit.training.start import find_start
from sit.training.stop_signal import REQUEUE_EXIT
from sit.training.trainer import train
from sit.transport.transport import Transport
from sit.utils.errors import UserError

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("fresh_accelerate")


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step-{step:07d}" / "training" / "model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run of six steps with a preview."""
    AcceleratorState._reset_state(reset_partial_state=True)
    folder = tmp_path_factory.mktemp("run") / "a"
    train(tiny_run(folder, preview_every=6, preview_steps=2, trackers=("tensorboard",)))
    return folder


def test_a_run_folder_has_what_it_should(finished):
    assert (finished / "config.yaml").is_file()
    assert [row["step"] for row in read_metrics(finished / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert sorted(p.name for p in (finished / "checkpoints").iterdir()) == ["step-0000003", "step-0000006"]
    assert (finished / "samples" / "step-0000006.png").is_file()
    assert list((finished / "logs").rglob("events.out.tfevents*"))
    loaded = load_for_sampling(finished)
    assert (loaded.info.step, loaded.info.images_seen, loaded.info.classes) == (6, 48, 10)
    assert loaded.info.label_names == [str(digit) for digit in range(10)]


def test_same_seed_same_weights_other_seed_others(finished, tmp_path):
    train(tiny_run(tmp_path / "b"))
    assert same(weights(finished, 6), weights(tmp_path / "b", 6))
    AcceleratorState._reset_state(reset_partial_state=True)
    train(tiny_run(tmp_path / "c", seed=1, steps=3))
    assert not same(weights(finished, 3), weights(tmp_path / "c", 3))


def test_resuming_is_exact(finished, tmp_path, monkeypatch):
    train_until(4, tiny_run(tmp_path / "b", checkpoint_every=2), monkeypatch)
    AcceleratorState._reset_state(reset_partial_state=True)
    train(tiny_run(tmp_path / "b", checkpoint_every=2, resume="auto"))
    assert same(weights(finished, 6), weights(tmp_path / "b", 6))
    last = "checkpoints/step-0000006/transformer/diffusion_pytorch_model.safetensors"
    assert same(load_file(finished / last), load_file(tmp_path / "b" / last))
    losses = [[row["loss"] for row in read_metrics(run / "metrics.jsonl")] for run in (finished, tmp_path / "b")]
    assert losses[0] == losses[1]


def before_each_loss(monkeypatch: pytest.MonkeyPatch, change: Callable[[int, torch.Tensor], None]) -> None:
    """Let ``change(step, x1)`` act before each loss is computed, of a run from scratch without micro-batches."""
    original, step = Transport.training_loss, itertools.count(1)

    def changed(transport, model, x1, *args, **kwargs):
        x1 = x1.clone()
        change(next(step), x1)
        return original(transport, model, x1, *args, **kwargs)

    monkeypatch.setattr(Transport, "training_loss", changed)


def train_until(step: int, config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train, and get a SIGTERM in the middle of the given step, counted from where the run starts."""

    def signalled(now: int, x1: torch.Tensor) -> None:
        if now == step:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        before_each_loss(patch, signalled)
        train(config)
    assert stopped.value.code == REQUEUE_EXIT


def names(folder: Path) -> list[str]:
    return sorted(place.name for place in folder.iterdir())


def test_an_older_checkpoint_goes_on_without_the_later_ones(finished, tmp_path, monkeypatch, capsys):
    """Later checkpoints of the abandoned trajectory are set aside: not continued, sampled from, or counted."""
    run = tmp_path / "a"
    shutil.copytree(finished, run)
    older = str(run / "checkpoints" / "step-0000003")
    train_until(1, tiny_run(run, resume=older, steps=9, keep_last=1, learning_rate=2e-3), monkeypatch)
    aside = run / "checkpoints-abandoned-1"
    assert f"the checkpoints beyond {older} are set aside in {aside}" in capsys.readouterr().out
    assert names(run / "checkpoints") == ["step-0000004"]
    assert names(aside) == ["metrics.jsonl", "step-0000006"]
    assert read_metrics(aside / "metrics.jsonl")[-1]["step"] == 6
    assert load_for_sampling(run).info.step == 4
    assert same(weights(finished, 6), load_file(aside / "step-0000006/training/model.safetensors"))

    # back to the abandoned trajectory, a checkpoint of which is one like any other
    AcceleratorState._reset_state(reset_partial_state=True)
    train(tiny_run(run, resume=str(aside / "step-0000006"), steps=7))
    assert names(run / "checkpoints") == ["step-0000004", "step-0000007"]


def test_a_run_goes_on_in_its_own_folder_and_in_no_other(finished, tmp_path):
    """Named in any way, and wherever it was moved since it began; another is refused before anything is changed."""
    run, other = tmp_path / "moved", tmp_path / "other"
    shutil.copytree(finished, run)
    (tmp_path / "link").symlink_to(run)
    older = run / "checkpoints" / "step-0000003"
    for resumed in (run, older):
        for place in (run, tmp_path / "link", run / "logs" / ".."):
            words = ["--resume", str(resumed), "--output-dir", str(place)]
            assert find_start(parse_train_arguments(words).config).folder == run
        assert find_start(parse_train_arguments(["--resume", str(resumed)]).config).folder == run
        for place in (other, finished, tmp_path):
            words = ["--resume", str(resumed), "--output-dir", str(place)]
            with pytest.raises(UserError, match=f"`output_dir={place}` is not the folder of `resume={resumed}`"):
                find_start(parse_train_arguments(words).config)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    with pytest.raises(UserError, match="`output_dir=.*other` is not the folder of"):
        train(tiny_run(other, resume=str(older), steps=9))
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before and not other.exists()


def test_a_dry_run_of_a_run_to_resume(finished, tmp_path, monkeypatch, capsys):
    """The time is that of the steps left; what training would refuse is refused, in a folder that stays as it is."""
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    speed = str(tiny_run(finished).batch_size / 86400)  # a step a day
    resumed = ["--resume", str(finished)]

    def dry_run(*words: str) -> None:
        monkeypatch.setattr(sys, "argv", ["train.py", "--dry-run", *words])
        main()

    dry_run(*resumed, "--steps", "9", "--images-per-second", speed)
    told = capsys.readouterr().out
    assert "3 of 9" in told and "3.00 days" in told
    for words, said in (
        ([*resumed, "--output-dir", str(tmp_path / "other")], "is not the folder of"),
        ([*resumed, "--seed", "1"], "can't continue the run"),
        (["--output-dir", str(finished)], "exists and is not empty"),
    ):
        with pytest.raises(SystemExit):
            dry_run(*words)
        told = capsys.readouterr().err
        assert said in told and told.count("\n") == 1
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


def test_a_damaged_newest_checkpoint_does_not_outlive_the_whole_ones(finished, tmp_path, monkeypatch):
    run = tmp_path / "a"
    shutil.copytree(finished, run)
    (run / "checkpoints" / "step-0000006" / "sit.json").unlink()
    train_until(1, tiny_run(run, resume="auto", steps=9, keep_last=1), monkeypatch)
    assert load_for_sampling(run).info.step == 4
    assert names(run / "checkpoints-abandoned-1") == ["metrics.jsonl", "step-0000006"]


def test_the_moving_average(finished):
    """The saved EMA weights are the average of the raw weights of all steps, with diffusers' warm-up of the decay."""
    AcceleratorState._reset_state(reset_partial_state=True)
    folder = finished.parent / "every"
    train(tiny_run(folder, checkpoint_every=1, keep_last=0))
    name = "blocks.0.mlp.fc1.weight"
    average = None
    for step in range(1, 7):
        raw = weights(folder, step)[name].double()
        decay = 0.0 if step == 1 else step / (9 + step)
        average = raw if average is None else decay * average + (1 - decay) * raw
    saved = load_file(folder / "checkpoints/step-0000006/transformer/diffusion_pytorch_model.safetensors")[name]
    torch.testing.assert_close(saved.double(), average, atol=1e-6, rtol=1e-5)


def test_accumulated_micro_batches_are_one_batch(finished, tmp_path):
    train(tiny_run(tmp_path / "b", gradient_accumulation=4))
    losses = [[row["loss"] for row in read_metrics(run / "metrics.jsonl")] for run in (finished, tmp_path / "b")]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


@pytest.mark.distributed
@pytest.mark.parametrize("objective", ["interpolant", "MeanFlow"])
def test_two_processes_are_one(tmp_path, objective):
    """20 steps over gloo on two processes and on one: the same losses, and the same order of images.

    And the same held-out losses, of five images, which two processes can't share equally.
    """
    common = ["--steps", "20", "--batch-size", "16", "--model", "SiT-XS/4", "--log-every", "1", "--preview-every", "0",
              "--cpu-threads", "1", "--heldout", "0.01", "--heldout-images", "5", "--trackers"]  # fmt: skip
    if objective == "MeanFlow":  # with a guided velocity, and times and second times of each image
        common = ["--prediction", "average-velocity", "--meanflow-omega", "2", "--meanflow-kappa", "0.5",
                  "--mixer", "depthwise", *common]  # fmt: skip
    losses, heldout = [], []
    for processes in (1, 2):
        run = tmp_path / str(processes)
        Connected(processes, "train.py", "--output-dir", run, *common).output()
        losses.append([row["loss"] for row in read_metrics(run / "metrics.jsonl") if "loss" in row])
        heldout.append(json.loads((run / "heldout" / "step-0000020.json").read_text()))
    assert len(losses[0]) == 20
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
    assert heldout[0]["images"] == heldout[1]["images"] and np.shape(heldout[0]["loss"]) == (5, 8)
    np.testing.assert_allclose(heldout[0]["loss"], heldout[1]["loss"], rtol=1e-4)


@pytest.mark.slow
def test_a_step_that_is_not_finite_is_named_skipped_and_in_the_end_fatal(tmp_path, monkeypatch, capsys):
    def poison(step: int, x1: torch.Tensor) -> None:
        if step in (2, 4, 5):
            x1[2] = float("nan")

    with monkeypatch.context() as patch:
        before_each_loss(patch, poison)
        train(tiny_run(tmp_path / "a", steps=5, non_finite_limit=3))
    out = capsys.readouterr()
    third_of_second_step = EpochPermutation(1797, seed=0)(np.array([8 + 2])).item()
    assert f"step 2: loss nan at images [{third_of_second_step}]; the step is skipped (1 in a row)" in out.out + out.err
    assert "step 5" in out.out + out.err and "(2 in a row)" in out.out + out.err
    assert all(torch.isfinite(tensor).all() for tensor in weights(tmp_path / "a", 5).values())

    AcceleratorState._reset_state(reset_partial_state=True)
    before_each_loss(monkeypatch, lambda step, x1: x1.mul_(float("inf")))
    with pytest.raises(UserError, match="step 2: loss nan .* `non_finite_limit` is 2"):
        train(tiny_run(tmp_path / "b", steps=5, non_finite_limit=2))


@pytest.fixture
def in_float16(monkeypatch):
    """A function after which training autocasts to float16 and scales the loss, as on GPUs; here on the CPU."""

    def scale(**scaling) -> None:
        class InFloat16(Accelerator):
            def prepare(self, *args):
                self.native_amp, self.state._mixed_precision = True, "fp16"
                self.scaler = torch.amp.GradScaler("cpu", **scaling)
                return super().prepare(*args)

        AcceleratorState._reset_state(reset_partial_state=True)
        monkeypatch.setattr("sit.training.distributed.Accelerator", InFloat16)

    return scale


def saved(run: Path, step: int) -> dict[str, Any]:
    """What a checkpoint holds for resuming besides the weights."""
    return torch.load(run / "checkpoints" / f"step-{step:07d}" / "training" / "optimizer.pt", weights_only=True)


def test_float16_overflows_until_the_loss_scale_fits(tmp_path, capsys, in_float16):
    """The scale falls by itself; neither the weights nor their average move until it fits, and no limit is reached."""
    in_float16(init_scale=2.0**60, backoff_factor=2.0**-25)
    train(tiny_run(tmp_path / "a", steps=5, checkpoint_every=1, keep_last=0, non_finite_limit=1))
    assert "step 2: gradient overflow at the loss scale 3.43597e+10; the step is skipped" in capsys.readouterr().out
    assert saved(tmp_path / "a", 5)["scaler"]["scale"] == 2.0**10
    assert saved(tmp_path / "a", 5)["ema_updates"] == 3
    first, second, third = (weights(tmp_path / "a", step) for step in (1, 2, 3))
    assert same(first, second) and not same(second, third)
    assert [row["step"] for row in read_metrics(tmp_path / "a" / "metrics.jsonl")] == [3, 4, 5]


def test_float16_does_not_hide_a_loss_that_is_not_finite(tmp_path, monkeypatch, in_float16):
    in_float16()
    before_each_loss(monkeypatch, lambda step, x1: x1.mul_(float("nan")))
    with pytest.raises(UserError, match="step 2: loss nan .* `non_finite_limit` is 2"):
        train(tiny_run(tmp_path / "a", non_finite_limit=2))


def test_float16_ends_when_no_loss_scale_fits(tmp_path, monkeypatch, in_float16):
    """At the scales 2 and 1 an overflow does not count; below it does. The losses themselves stay finite."""
    original = Transport.training_loss

    def overflowing(*args, **kwargs):
        loss = original(*args, **kwargs)
        loss.register_hook(lambda gradient: gradient * float("inf"))
        return loss

    in_float16(init_scale=2.0)
    monkeypatch.setattr(Transport, "training_loss", overflowing)
    with pytest.raises(UserError, match="step 4: gradient norm (inf|nan) .* `non_finite_limit` is 2"):
        train(tiny_run(tmp_path / "a", non_finite_limit=2))


@pytest.mark.slow
def test_float16_resumes_exactly(tmp_path, monkeypatch, in_float16):
    scaling = dict(init_scale=2.0**10, growth_interval=3)
    in_float16(**scaling)
    train(tiny_run(tmp_path / "a"))
    in_float16(**scaling)
    train_until(4, tiny_run(tmp_path / "b"), monkeypatch)
    in_float16(**scaling)
    train(tiny_run(tmp_path / "b", resume="auto"))
    assert saved(tmp_path / "b", 6)["scaler"]["scale"] == 2.0**12
    assert same(weights(tmp_path / "a", 6), weights(tmp_path / "b", 6))


def test_float16_goes_on_from_a_checkpoint_without_loss_scale(finished, tmp_path, in_float16):
    shutil.copytree(finished, tmp_path / "a")
    in_float16(init_scale=2.0**9)
    train(tiny_run(tmp_path / "a", steps=7, resume="auto"))
    assert saved(tmp_path / "a", 7)["scaler"]["scale"] == 2.0**9


def test_the_objective_is_stored_in_the_checkpoint(tmp_path):
    objective = dict(interpolant="gvp", prediction="noise", loss_weight="velocity", train_eps=0.01, sample_eps=0.02)
    objective["time_distribution"] = "logit-normal"
    train(tiny_run(tmp_path / "a", steps=1, **objective))
    config = load_for_sampling(tmp_path / "a").transport.config
    assert {name: config[name] for name in objective} == objective


def test_training_on_a_folder_of_images(tmp_path):
    rng = np.random.default_rng(0)
    for number in range(12):
        (tmp_path / "data" / f"class{number % 2}").mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, size=(40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "data" / f"class{number % 2}" / f"{number}.png")
    train(tiny_run(tmp_path / "a", data=str(tmp_path / "data"), flip=True, steps=2, workers=1))
    info = load_for_sampling(tmp_path / "a").info
    assert info.label_names == ["class0", "class1"] and info.images_seen == 16


def test_learning_rate():
    config = TrainConfig(learning_rate=1.0, warmup_steps=4, steps=12, final_learning_rate=0.1)
    rates = [learning_rate_at(step, config) for step in range(12)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[8] == pytest.approx(0.55)
    assert all(a > b for a, b in zip(rates[4:], rates[5:], strict=False)) and rates[-1] > 0.1
    assert learning_rate_at(10**6, TrainConfig()) == 1e-4


def test_a_run_of_skipped_steps_alone_is_no_success(tmp_path, monkeypatch):
    """Also where it ends before the limit."""
    before_each_loss(monkeypatch, lambda step, x1: x1.mul_(float("nan")))
    with pytest.raises(UserError, match="all 3 steps were skipped, as their gradients were not finite"):
        train(tiny_run(tmp_path / "a", steps=3))


def test_which_checkpoints_are_kept(tmp_path):
    folders = [(step, tmp_path / f"step-{step}") for step in range(1, 8)]
    for _, folder in folders:
        folder.mkdir()
        write_json(folder / INDEX, {"format": 1, "files": {}})
    (folders[4][1] / INDEX).unlink()
    prune_checkpoints(folders, keep_last=2, keep_every=3)
    kept = ["step-3", "step-5", "step-6", "step-7"]  # step 5 is damaged
    assert sorted(p.name for p in tmp_path.iterdir()) == kept
    (folders[6][1] / INDEX).unlink()
    prune_checkpoints([folders[i] for i in (2, 4, 5, 6)], keep_last=1, keep_every=None)
    assert sorted(p.name for p in tmp_path.iterdir()) == kept[1:]  # a damaged one is none of the last


@pytest.mark.parametrize(
    ("every", "keep_every", "left"),
    [(3, 4, [6, 9, 12, 15]), (500, 700, [1000, 1500, 2500, 3000, 3500]), (10, 4, [10, 20, 30]), (2, 4, [4, 8, 9])],
)
def test_kept_for_good_is_the_first_from_every_so_many_steps_on(tmp_path, every, keep_every, left):
    """Where checkpoints are written at other steps too; each is written and then all but these are removed."""
    there = []
    for step in [*range(every, left[-1] + 1, every), left[-1]]:
        folder = tmp_path / f"{step}"
        folder.mkdir(exist_ok=True)
        write_json(folder / INDEX, {"format": 1, "files": {}})
        there = [(int(path.name), path) for path in tmp_path.iterdir()]
        prune_checkpoints(there, keep_last=1, keep_every=keep_every, checkpoint_every=every)
    assert sorted(int(path.name) for path in tmp_path.iterdir()) == left


def test_a_row_cut_off_in_the_writing_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 1}) + "\n" + '{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1}]


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(mixer="mamba"), "unknown mixer 'mamba'"),
        (dict(model="SiT-XXL/2"), "unknown model 'SiT-XXL/2'"),
        (dict(data="/no/such/folder"), "`data=/no/such/folder`"),
        (dict(resume="auto", output_dir=None), "`resume=auto` needs `output_dir`"),
        (dict(mixer="atconv:kernel_size=["), "is not a YAML scalar"),
        (dict(mixed_precision="fp16"), "`mixed_precision=fp16` is for GPUs, and this is a CPU: use bf16 or no"),
        (dict(trackers=("foo",)), "`trackers=foo`: Accelerate has no such tracker; here there are: .*tensorboard"),
        (dict(trackers=("tensorboard", "wandb")), "`trackers=wandb`: its package is not installed"),
    ],
)
def test_mistakes_leave_no_run_folder(tmp_path, monkeypatch, changes, words):
    monkeypatch.setattr("sit.training.trackers.get_available_trackers", lambda: ["tensorboard"])
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(UserError, match=words):
        train(tiny_run(tmp_path / "a", **changes))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("saved", [False, True])
def test_a_run_killed_while_its_folder_is_made_begins_again(tmp_path, monkeypatch, saved):
    original = Opened.save_vae

    def save_and_die(opened, folder):
        if saved:
            original(opened, folder)
        raise SystemExit

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(Opened, "save_vae", save_and_die)
        train(tiny_run(tmp_path / "a", steps=1))
    (tmp_path / "a" / ".vae.1.tmp").mkdir()
    AcceleratorState._reset_state(reset_partial_state=True)
    train(tiny_run(tmp_path / "a", steps=1, resume="auto"))
    assert names(tmp_path / "a") == ["checkpoints", "config.yaml", "identity.json", "metrics.jsonl", "vae"]
    assert load_for_sampling(tmp_path / "a").vae is not None


def test_a_config_that_was_cut_off_is_not_in_the_way(tmp_path):
    (tmp_path / ".config.yaml.1.tmp").write_text("data: di")
    train(tiny_run(tmp_path, steps=1, resume="auto"))
    assert not list(tmp_path.glob(".*"))


def test_a_folder_with_another_run_is_refused(finished):
    with pytest.raises(UserError, match="exists and is not empty"):
        train(tiny_run(finished))
