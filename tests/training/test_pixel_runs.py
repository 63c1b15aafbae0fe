"""A run on pixels without a VAE, from training to the pipeline, with a positional table that its mixer needs not."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

from sit import PixelCodec, SiTPipeline
from sit.checkpoint.load import load_for_sampling
from sit.latents import factory
from sit.model import sincos_table
from sit.sampling.config import SamplerConfig
from sit.sampling.images import balanced_labels, sample_images
from sit.training.config import TrainConfig
from sit.training.plan import plan
from sit.training.recipes import load_recipe
from sit.training.run_folder import read_metrics
from sit.training.trainer import train
from sit.utils.random import generator

BATCH, SIDE, SHIFT, SCALE = 4, 8, -0.25, 1.5


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> Path:
    """One gray image, symmetric about its vertical axis, in two classes twice each: whatever is drawn, it is this."""
    root = tmp_path_factory.mktemp("same")
    half = np.random.default_rng(0).integers(0, 256, size=(SIDE, SIDE // 2), dtype=np.uint8)
    for number in range(4):
        place = root / f"class{number % 2}" / f"{number}.png"
        place.parent.mkdir(exist_ok=True)
        Image.fromarray(np.hstack([half, half[:, ::-1]])).save(place)
    return root


@pytest.fixture(scope="module")
def config(picture) -> TrainConfig:
    return TrainConfig(
        data=str(picture), image_size=SIDE, flip=True, vae=f"none:channels=1:shift={SHIFT}:scale={SCALE}",
        model="SiT-XS/2", mixer="atconv", positional_embedding="on", steps=1, batch_size=BATCH, log_every=1,
        preview_every=1, preview_steps=2, checkpoint_every=1, trackers=(), cpu_threads=1,
    )  # fmt: skip


def trained(config: TrainConfig, folder: Path, **changes) -> Path:
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        train(dataclasses.replace(config, **{"output_dir": str(folder)} | changes))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    return folder


@pytest.fixture(scope="module")
def run(config, tmp_path_factory) -> Path:
    return trained(config, tmp_path_factory.mktemp("run") / "a")


def first_loss(picture: Path) -> float:
    """The untrained network answers zero: the mean square of x1 − x0, with x1 written out."""
    pixels = np.asarray(Image.open(picture / "class0" / "0.png")).astype(np.float64)
    x1 = torch.from_numpy((pixels / 127.5 - 1 - SHIFT) * SCALE)
    losses = []
    for position in range(BATCH):
        source = generator(0, "train", position)
        torch.rand(3, generator=source)
        _, x0 = torch.randn(2, 1, SIDE, SIDE, generator=source).double()
        losses.append((x1 - x0).square().mean())
    return torch.stack(losses).mean().item()


def test_the_loss_is_that_of_the_scaled_pixels(run, picture, config, tmp_path, monkeypatch):
    assert read_metrics(run / "metrics.jsonl")[0]["loss"] == pytest.approx(first_loss(picture), rel=1e-3)
    monkeypatch.setattr(factory, "MEMORY_LIMIT", 3)
    late = trained(config, tmp_path / "late", preview_every=0)
    assert read_metrics(late / "metrics.jsonl")[0]["loss"] == pytest.approx(first_loss(picture), rel=1e-6)


def test_the_run_keeps_what_decodes_and_goes_on(run, config, tmp_path):
    assert json.loads((run / "vae" / "config.json").read_text())["shift_factor"] == SHIFT
    assert (run / "samples" / "step-0000001.png").is_file()
    more = shutil.copytree(run, tmp_path / "more")
    trained(config, more, resume=str(more), steps=2, output_dir=None)
    straight = trained(config, tmp_path / "straight", steps=2)
    one, other = (load_for_sampling(place) for place in (more, straight))
    assert one.info.step == other.info.step == 2
    theirs = other.model.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in one.model.state_dict().items())


def test_samples_of_the_checkpoint_and_of_the_pipeline(run, tmp_path):
    loaded = load_for_sampling(run)
    labels = balanced_labels(range(3), [0, 1])
    euler = SamplerConfig(sampler="ode", method="euler", steps=2)
    batches = sample_images(loaded, torch.arange(3), labels, seed=0, config=euler)
    images = torch.cat([batch.images for batch in batches])
    assert images.shape == (3, SIDE, SIDE, 3) and torch.equal(images[..., 0], images[..., 2])
    pipe = SiTPipeline.from_pretrained(loaded.path)
    assert isinstance(pipe.vae, PixelCodec)
    pipe.save_pretrained(tmp_path / "saved")
    index = json.loads((tmp_path / "saved" / "model_index.json").read_text())
    assert index["vae"] == ["sit", "PixelCodec"] == json.loads((loaded.path / "model_index.json").read_text())["vae"]
    again = SiTPipeline.from_pretrained(tmp_path / "saved")
    made = []
    for one in (pipe, again):
        one.set_progress_bar_config(disable=True)
        source = torch.Generator().manual_seed(0)
        made.append(one([0, 1], 1.0, source, 2, height=12, width=8, output_type="np").images)
    assert made[0].shape == (2, 12, 8, 3) and np.array_equal(*made)


def test_the_table_is_in_the_network_and_its_config(run, config):
    network = load_for_sampling(run).model
    assert network.config.positional_embedding
    table = sincos_table(128, torch.arange(4), torch.arange(4))
    torch.testing.assert_close(network.pos_embed, table)
    rows = dict(line.split("  ", 1) for line in plan(config, 1, None).splitlines())
    assert rows["latent, tokens"].strip() == "1x8x8, 16" and rows["positional table"].strip() == "yes"
    without = plan(dataclasses.replace(config, positional_embedding="off", mixer="attention"), 1, None)
    assert dict(line.split("  ", 1) for line in without.splitlines())["positional table"].strip() == "no"


def test_the_recipe_is_256_tokens_of_gray_pixels(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = plan(load_recipe("fashion-mnist-pixels"), 1, None)
    assert "1x32x32, 256" in text and "VAE" not in text
