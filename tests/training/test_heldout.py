"""The held-out loss: which images, not in training, the number itself, and training as it was."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import math
import os
import signal
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file

from sit.checkpoint.load import load_for_sampling
from sit.data.factory import open_images
from sit.latents.encode import Encode, encode
from sit.latents.vae import encode_images, load_vae
from sit.training.config import TrainConfig
from sit.training.data import Opened, open_training_data
from sit.training.heldout import BATCH, heldout_times, losses_at_times
from sit.training.loader import training_batches
from sit.training.recipes import load_recipe
from sit.training.run_folder import read_metrics
from sit.training.stop_signal import REQUEUE_EXIT
from sit.training.trainer import train
from sit.transport.transport import Transport
from sit.utils.errors import UserError
from sit.utils.random import generator

EIGHTHS = [0.0625, 0.1875, 0.3125, 0.4375, 0.5625, 0.6875, 0.8125, 0.9375]
NAMES = ["heldout_loss", *(f"heldout_loss_t{part}" for part in EIGHTHS)]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> dict[str, Path]:
    """Folders of noise: ``train`` of 24 images in two classes, ``other`` of 6 in the same, ``strange`` of one more."""
    rng, root = np.random.default_rng(0), tmp_path_factory.mktemp("images")
    for part, count, classes in (("train", 24, "ab"), ("other", 6, "ab"), ("strange", 3, "abc")):
        for number in range(count):
            place = root / part / classes[number % len(classes)] / f"{number}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, size=(32, 32, 3), dtype=np.uint8)).save(place)
    return {part: root / part for part in ("train", "other", "strange")}


@pytest.fixture(scope="module")
def begin(images, tmp_path_factory):
    """A function that trains four steps on the folder ``train`` and gives the run's folder."""

    def begin(**changes) -> Path:
        folder = tmp_path_factory.mktemp("run") / "a"
        AcceleratorState._reset_state(reset_partial_state=True)
        try:
            train(settings(images, output_dir=str(folder), **changes))
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
        return folder

    return begin


def settings(images: dict[str, Path], **changes) -> TrainConfig:
    small = dict(
        data=str(images["train"]), model="SiT-XS/4", mixer="attention", steps=4, batch_size=4, learning_rate=0.01,
        warmup_steps=0, final_learning_rate=None, log_every=1, preview_every=0, checkpoint_every=2, trackers=(),
        cpu_threads=1, seed=5,
    )  # fmt: skip
    return dataclasses.replace(load_recipe("digits"), **small | changes)


@pytest.fixture(scope="module")
def measured(begin) -> Path:
    """A run that measures a quarter of its images every second step."""
    return begin(heldout="0.25", heldout_every=2)


def opened(config: TrainConfig) -> Opened:
    return open_training_data(config, torch.device("cpu"), progress=False)


def written(run: Path, step: int = 4) -> dict:
    return json.loads((run / "heldout" / f"step-{step:07d}.json").read_text())


def raw_weights(run: Path, step: int = 4) -> bytes:
    return (run / "checkpoints" / f"step-{step:07d}" / "training" / "model.safetensors").read_bytes()


def shown(data, count: int) -> list[int]:
    batches = training_batches(data, seed=0, global_batch=4)
    return torch.cat([batch["indices"] for batch in itertools.islice(batches, count // 4)]).tolist()


# ---------------------------------------------------------------- which images


@pytest.mark.parametrize("repa", [None, "an/encoder"])
def test_a_share_is_never_trained_on_and_all_else_is(images, repa):
    """Both where latents are in memory and where the images are encoded while training."""
    found = opened(settings(images, heldout="0.25", repa=repa))
    held, kept = set(found.heldout.numbers.tolist()), shown(found.data, 72)
    assert len(held) == 6 and found.heldout.labels.tolist().count(0) == 3
    assert sorted(kept) == sorted([*set(range(24)) - held] * 4)
    batch = next(training_batches(found.data, seed=0, global_batch=4))
    whole = open_images(str(images["train"]), 32)
    assert batch["labels"].tolist() == whole.labels[batch["indices"]].tolist()
    if repa:
        assert torch.equal(batch["images"][2], whole[batch["indices"][2]][0])


def test_the_share_depends_on_no_seed_and_a_smaller_measurement_is_its_beginning(images):
    one = opened(settings(images, heldout="0.5"))
    few = opened(settings(images, heldout="0.5", heldout_images=5, seed=6, seed_order=7, seed_noise=8))
    assert one.heldout.numbers[:5].tolist() == few.heldout.numbers.tolist()
    assert len(one.data.labels) == len(few.data.labels) == 12
    assert one.heldout.fingerprint != few.heldout.fingerprint
    again = opened(settings(images, heldout="0.5", seed=6))
    assert one.heldout.fingerprint == again.heldout.fingerprint
    assert torch.equal(one.heldout.latents(np.arange(3)), again.heldout.latents(np.arange(3)))


def test_auto_is_the_test_set_or_five_percent():
    parts = [
        opened(dataclasses.replace(load_recipe("digits"), data=data, heldout="auto"))
        for data in ("digits", "digits:train")
    ]
    assert [len(part.data.labels) for part in parts] == [1797 - 90, 1437]
    assert [len(part.heldout.numbers) for part in parts] == [90, 360]
    assert np.bincount(parts[0].heldout.labels).tolist() == [9] * 10
    assert parts[1].heldout.data.name == "digits:heldout"


def test_another_data_set(images):
    found = opened(settings(images, heldout=str(images["other"])))
    assert len(found.data.labels) == 24 and sorted(found.heldout.numbers) == list(range(6))
    other = open_images(str(images["other"]), 32)
    assert found.heldout.labels.tolist() == other.labels[found.heldout.numbers].tolist()


def test_data_as_it_lies_holds_images_out(images, tmp_path):
    """A flat folder and WebDataset shards: a share of them, and other shards, but none that are trained on."""
    found = opened(settings(images, data=f"flat:{images['train']}", heldout="0.25"))
    assert len(found.data) == 18 and len(found.heldout.numbers) == 6
    for part in ("train", "other"):
        for number, place in enumerate(sorted(images[part].rglob("*.png"))):
            with tarfile.open(tmp_path / f"{part}-{number % 2}.tar", "a") as shard:
                shard.add(place, f"{number}.png")
                label = tarfile.TarInfo(f"{number}.cls")
                label.size = 1
                shard.addfile(label, io.BytesIO(b"01"[number % 2 : number % 2 + 1]))
    shards = f"{tmp_path}/train-{{0..1}}.tar"
    share = opened(settings(images, data=shards, heldout="0.25"))
    assert len(share.data) == 18 and np.bincount(share.heldout.labels).tolist() == [3, 3]
    others = opened(settings(images, data=shards, heldout=f"{tmp_path}/other-{{0..1}}.tar"))
    assert len(others.data) == 24 and sorted(others.heldout.numbers) == list(range(6))
    with pytest.raises(UserError, match="train-1.tar and 11 others are in"):
        opened(settings(images, data=shards, heldout=f"webdataset:{tmp_path}/train-1.tar"))


def test_classes_are_matched_by_name(images, tmp_path):
    (tmp_path / "b").symlink_to(images["other"] / "b")
    found = opened(settings(images, heldout=str(tmp_path)))
    assert found.heldout.data.classes == ["b"] and found.heldout.labels.tolist() == [1, 1, 1]


def test_a_cache_holds_out_a_share_of_its_entries(images, tmp_path):
    for part in ("train", "other"):
        encode(Encode(data=str(images[part]), vae="digits", out=tmp_path / part, image_size=32))
    pixels = opened(settings(images, heldout="0.05"))
    for heldout in ("auto", "0.05"):
        cached = opened(settings(images, data=str(tmp_path / "train"), heldout=heldout))
        assert shown(cached.data, 24) == shown(pixels.data, 24) and len(cached.data.labels) == 23
        assert cached.heldout.fingerprint == pixels.heldout.fingerprint
        assert torch.equal(cached.heldout.latents(np.arange(1)), pixels.heldout.latents(np.arange(1)))
    beside = opened(settings(images, data=str(tmp_path / "train"), heldout=str(tmp_path / "other")))
    assert len(beside.data.labels) == 24 and len(beside.heldout.numbers) == 6
    for same in (tmp_path / "train", images["train"]):
        with pytest.raises(UserError, match="these are the images of `data=.*train`"):
            opened(settings(images, data=str(tmp_path / "train"), heldout=str(same)))


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(heldout="/nowhere"), "`heldout=/nowhere`: .*no such folder"),
        (dict(heldout="strange"), "`heldout=.*strange`: `data=.*train` has no class c"),
        (dict(heldout="train/"), "`heldout=.*train/`: .*train/.*png and 23 others are in `data=.*train` too"),
        (dict(data="digits", heldout="digits:heldout"), "`heldout=digits:heldout`: digit .* and 359 others are in"),
        (dict(heldout="0.99"), "`heldout=0.99` leaves none of the 24 images to train on"),
    ],
)
def test_mistakes_are_told_in_one_line(images, changes, words):
    name = changes["heldout"].rstrip("/")
    if name in images:
        changes = dict(heldout=f"{images[name]}/" if "/" in changes["heldout"] else str(images[name]))
    with pytest.raises(UserError, match=words) as caught:
        opened(settings(images, **changes))
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- the number


def test_a_network_that_answers_zero_costs_the_mean_square_of_the_velocity():
    """Of 70 images, so that the last batch is filled up; every batch has the same size."""
    source, sizes = torch.Generator().manual_seed(0), []
    x1, numbers = torch.randn(70, 2, 4, 4, generator=source), list(range(100, 170))

    def zero(x, t, y):
        sizes.append(len(x))
        return torch.zeros_like(x)

    labels = torch.zeros(70, dtype=torch.int64)
    found = losses_at_times(zero, Transport(), x1, labels=labels, numbers=numbers)
    assert found.shape == (70, 8) and set(sizes) == {BATCH}
    for row, number in enumerate(numbers):
        for part in range(8):
            x0 = torch.randn(2, 4, 4, generator=generator(0, "heldout", "noise", number, part))
            assert found[row, part].item() == pytest.approx((x1[row] - x0).double().square().mean().item(), rel=1e-6)
    alone = losses_at_times(zero, Transport(), x1[7:8], labels=labels[:1], numbers=numbers[7:8])
    assert torch.equal(alone, found[7:8])


def test_the_times_lie_in_the_training_interval_whatever_its_distribution():
    assert heldout_times(Transport(time_distribution="logit-normal")) == EIGHTHS
    late = heldout_times(Transport(prediction="score", train_eps=0.2))
    assert late == pytest.approx([0.2 + 0.6 * part for part in EIGHTHS])


def test_the_losses_of_a_run_against_a_loop_in_float64(measured, images):
    """With the averaged weights, the labels, and a posterior sample of each image."""
    loaded, vae = load_for_sampling(measured), load_vae("digits")
    raw = load_file(measured / "checkpoints/step-0000004/training/model.safetensors")
    assert any(not torch.equal(raw[name], tensor) for name, tensor in loaded.model.state_dict().items())
    model, data = loaded.model.double(), open_images(str(images["train"]), 32)
    numbers = opened(settings(images, heldout="0.25")).heldout.numbers.tolist()
    content = written(measured)
    assert content["step"] == 4 and content["times"] == EIGHTHS and len(content["loss"]) == len(numbers) == 6
    expected = []
    for number in numbers:
        pixels, label = data[number]
        mean, std = encode_images(vae, pixels[None])
        noise = torch.randn(4, 8, 8, generator=generator(0, "heldout", "posterior", number))
        x1 = ((mean + std * noise) * vae.config.scaling_factor).double()
        for part, time in enumerate(EIGHTHS):
            x0 = torch.randn(4, 8, 8, generator=generator(0, "heldout", "noise", number, part)).double()
            with torch.no_grad():
                out = model(time * x1 + (1 - time) * x0, torch.tensor([time]).double(), torch.tensor([label]))
            expected.append((out - (x1 - x0)).square().mean().item())
    expected = np.array(expected).reshape(6, 8)
    np.testing.assert_allclose(content["loss"], expected, rtol=1e-3)  # the moments are kept in float16
    row = next(row for row in read_metrics(measured / "metrics.jsonl") if row["step"] == 4 and "heldout_loss" in row)
    assert list(row) == ["step", *NAMES]
    assert row["heldout_loss"] == pytest.approx(expected.mean(), rel=1e-4)
    assert [row[name] for name in NAMES[1:]] == pytest.approx(expected.mean(axis=0).tolist(), rel=1e-3)


def test_losses_are_written_to_six_digits(measured):
    losses = np.array(written(measured)["loss"])
    assert all(value == float(f"{value:.6g}") for value in losses.flatten())
    row = [row for row in read_metrics(measured / "metrics.jsonl") if "heldout_loss" in row][-1]
    assert row["heldout_loss"] == pytest.approx(losses.mean(), rel=1e-6)


# ---------------------------------------------------------------- within a run


def test_measured_every_so_many_steps_and_after_the_last(measured, begin):
    assert sorted(path.name for path in (measured / "heldout").iterdir()) == ["step-0000002.json", "step-0000004.json"]
    assert written(measured, 2)["loss"] != written(measured)["loss"]
    last = begin(heldout="0.25")
    assert [path.name for path in (last / "heldout").iterdir()] == ["step-0000004.json"]
    assert written(last) == written(measured)
    assert raw_weights(last) == raw_weights(measured)


def test_training_is_the_same_to_the_bit_with_it(begin, images):
    """Held-out images from elsewhere leave the data as they are."""
    plain, beside = begin(), begin(heldout=str(images["other"]), heldout_every=1)
    assert len(list((beside / "heldout").iterdir())) == 4 and not (plain / "heldout").exists()
    assert raw_weights(plain) == raw_weights(beside)
    rows = [[row for row in read_metrics(run / "metrics.jsonl") if "loss" in row] for run in (plain, beside)]
    for name in ("loss", "gradient_norm"):
        assert [row[name] for row in rows[0]] == [row[name] for row in rows[1]]


def test_a_resumed_run_writes_its_files_again(begin, measured, images):
    run = begin(heldout="0.25", heldout_every=2, keep_last=0)
    (run / "heldout" / "step-0000004.json").write_text("{}")
    (run / "heldout" / ".step-0000004.json.1.tmp").write_text("{")
    AcceleratorState._reset_state(reset_partial_state=True)
    config = settings(images, output_dir=str(run), heldout="0.25", heldout_every=2, keep_last=0)
    train(dataclasses.replace(config, resume=str(run / "checkpoints" / "step-0000002")))
    AcceleratorState._reset_state(reset_partial_state=True)
    assert written(run) == written(measured)
    assert sorted(path.name for path in (run / "heldout").iterdir()) == ["step-0000002.json", "step-0000004.json"]
    steps = [row["step"] for row in read_metrics(run / "metrics.jsonl") if "heldout_loss" in row]
    assert steps == [2, 4]


@pytest.mark.usefixtures("fresh_accelerate")
def test_a_signal_in_the_last_step_leaves_nothing_unmeasured(measured, images, tmp_path, monkeypatch):
    """The run ends with its checkpoint, and given again it measures, and does nothing else."""
    run, original, losses = tmp_path / "run", Transport.training_loss, []

    def signalled(*args, **kwargs):
        losses.append(1)
        if len(losses) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    monkeypatch.setattr(Transport, "training_loss", signalled)
    config = settings(images, output_dir=str(run), heldout="0.25", heldout_every=2)
    with pytest.raises(SystemExit) as stopped:
        train(config)
    assert stopped.value.code == REQUEUE_EXIT and not (run / "heldout" / "step-0000004.json").exists()
    AcceleratorState._reset_state(reset_partial_state=True)
    train(dataclasses.replace(config, resume="auto"))
    assert written(run) == written(measured) and len(losses) == 4


def test_losses_that_are_not_finite_cost_a_line(begin, monkeypatch, capsys):
    original = Transport.loss

    def broken(self, model, x1, t, x0, **conditions):
        loss = original(self, model, x1, t, x0, **conditions)
        return loss if torch.is_grad_enabled() else loss * math.nan

    monkeypatch.setattr(Transport, "loss", broken)
    run = begin(heldout="0.25", steps=1)
    told = capsys.readouterr()
    assert "no held-out loss of step 1: it is not finite for 6 of 6 images" in told.out + told.err
    assert not (run / "heldout").exists() and raw_weights(run, 1)
