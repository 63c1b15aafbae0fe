"""The trainer of small VAEs, on the digits."""

from __future__ import annotations

import math

import pytest
import torch
from PIL import Image
from processes import Connected

from sit.latents import train_vae
from sit.latents.arguments import VAEArguments
from sit.latents.train_vae import VAEConfig, build, center_latents, moments, reconstructions, train
from sit.latents.vae import encode_moments, load_vae
from sit.metrics import train_classifier
from sit.metrics.arguments import ClassifierArguments
from sit.utils.errors import UserError


@pytest.mark.slow
def test_a_vae_is_trained_and_written(tmp_path):
    folder = tmp_path / "vae"
    folder.mkdir()  # an empty one is as good as none
    words = ["-m", "sit.train_vae", "--data", "digits:train", "--steps", "10", "--widths", "4", "8", "--out"]
    Connected(1, *words, folder).output()
    assert "held-out images" in (folder / "README.md").read_text()
    mean, _ = encode_moments(load_vae(str(folder)), torch.zeros(1, 3, 32, 32))
    assert mean.shape == (1, 4, 16, 16)
    with pytest.raises(AssertionError, match="exit status 2.*exists and is not empty") as refused:
        Connected(1, *words, folder).output()
    assert "Traceback" not in str(refused.value)


def test_centering_changes_the_latents_and_not_the_images():
    torch.manual_seed(0)
    vae, images = build((4, 8), 16).double().eval(), torch.randn(32, 3, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        before = vae.decode(vae.encode(images).latent_dist.mean).sample
        center_latents(vae, images)
        posterior = vae.encode(images).latent_dist
        after = vae.decode(posterior.mean).sample
    torch.testing.assert_close(after, before)
    torch.testing.assert_close(
        posterior.mean.mean(dim=(0, 2, 3)), torch.zeros(4, dtype=torch.float64), atol=1e-6, rtol=0
    )
    scaled = posterior.mean.var(dim=(0, 2, 3)) + posterior.std.square().mean(dim=(0, 2, 3))
    torch.testing.assert_close(scaled.sqrt() * vae.config.scaling_factor, torch.ones(4).double(), atol=2e-3, rtol=0)


def test_measuring_takes_no_more_images_at_once_than_suit_their_side(monkeypatch):
    """And gives what one batch of all would, to rounding."""
    torch.manual_seed(0)
    vae, images = build((4, 8), 16).eval(), torch.rand(150, 3, 16, 16) * 2 - 1
    mean, std = encode_moments(vae, images)
    sizes = []
    original = vae.encode
    monkeypatch.setattr(vae, "encode", lambda chunk: sizes.append(len(chunk)) or original(chunk))
    for found, expected in zip(moments(vae, images), (mean, std), strict=True):
        torch.testing.assert_close(found, expected)
    center_latents(vae, images)
    reconstructions(vae, images)
    assert sizes == [64, 64, 22] * 3


@pytest.fixture
def small(tmp_path):
    """A training of no step; what is to be done instead is put in the place of ``fit``."""
    return VAEArguments(data="digits:train", steps=1, widths=(4, 8), image_size=16, out=tmp_path / "some" / "vae")


def test_a_vae_that_diverges_is_not_written(small, monkeypatch):
    monkeypatch.setattr(train_vae, "fit", lambda vae, *_: next(vae.parameters()).data.fill_(math.nan))
    with pytest.raises(UserError, match="the VAE diverged at `learning_rate=0.003`: take a lower one"):
        train(small)
    assert not any(small.out.parent.iterdir())


def test_an_output_that_can_not_be_made_is_told_before_the_training(small, monkeypatch):
    """Not after it, when it would be lost."""
    small.out.parent.write_text("a file")
    monkeypatch.setattr(train_vae, "fit", lambda *_: pytest.fail("trained"))
    monkeypatch.setattr(train_classifier, "fit", lambda *_: pytest.fail("trained"))
    for begin, arguments in ((train, small), (train_classifier.train, ClassifierArguments(out=small.out))):
        with pytest.raises(UserError, match="vae can't be written: a file stands where a folder is needed"):
            begin(arguments)


def test_large_images_are_measured_on_fewer(small, monkeypatch):
    asked = []
    monkeypatch.setattr(train_vae, "MOST_PIXELS", 40 * 16**2)
    monkeypatch.setattr(train_vae, "fit", lambda *_: None)
    monkeypatch.setattr(train_vae, "moments", lambda vae, images: asked.append(len(images)) or moments(vae, images))
    train(small)
    small.heldout, small.out = "digits:heldout", small.out.parent / "other"
    train(small)
    assert asked == [40, 15, 40, 40], "a hundredth of the 1,437 digits are held out where there is no other set"


def test_ten_steps_are_a_schedule(small):
    small.steps = 10
    train(small)
    assert load_vae(small.out).config.scaling_factor > 0


def test_bad_settings_are_named():
    for name in ("kl_weight", "edge_weight", "latent_noise"):
        for value in (-1.0, math.nan, math.inf):
            with pytest.raises(UserError, match=f"`{name}={value}` must be 0 or more"):
                VAEConfig(**{name: value})
    for name, value in (("steps", 0), ("batch_size", -1), ("learning_rate", 0.0), ("learning_rate", math.nan)):
        with pytest.raises(UserError, match=f"`{name}={value}` must be positive"):
            VAEConfig(**{name: value})
    for widths in ((), (2, 8), (4, 6)):
        with pytest.raises(UserError, match="`widths="):
            VAEConfig(widths=widths)


def test_one_image_is_too_few(tmp_path):
    (tmp_path / "data").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "data" / "1.png")
    with pytest.raises(UserError, match="`data=.*data` has one image, which is held out: give more, or `heldout`"):
        train(VAEArguments(data=str(tmp_path / "data"), image_size=16, out=tmp_path / "vae"))
