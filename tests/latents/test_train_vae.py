"""The trainer of small VAEs, on the digits."""

from __future__ import annotations

import math

import pytest
import torch
from PIL import Image
from processes import Connected

from sit.latents.arguments import VAEArguments
from sit.latents.train_vae import VAEConfig, build, center_latents, train
from sit.latents.vae import encode_moments, load_vae
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


def test_bad_settings_are_named():
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
