"""The VAE: loading, posterior against an independent computation, the committed one's quality, bad folders."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DModel
from PIL import Image
from sklearn.svm import SVC

from sit.data.digits import shrink_digits
from sit.data.factory import open_images
from sit.latents.datasets import scaled_sample
from sit.latents.vae import (
    DIGITS_VAE,
    decode,
    encode_images,
    encode_moments,
    latent_shape,
    load_vae,
    sample_posterior,
    scaling,
    to_unit,
    vae_fingerprint,
)
from sit.utils.errors import UserError


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    return load_vae("digits")


@pytest.fixture(scope="module")
def heldout() -> tuple[torch.Tensor, np.ndarray]:
    data = open_images("digits:heldout")
    return torch.stack([data[index][0] for index in range(200)]), data.labels[:200]


def test_moments_are_the_encoders_own(vae, heldout):
    images = to_unit(heldout[0][:4])
    assert images.min() >= -1 and images.max() <= 1
    mean, std = encode_moments(vae, images)
    with torch.no_grad():
        raw_mean, logvar = vae.quant_conv(vae.encoder(images)).chunk(2, dim=1)
    assert torch.allclose(mean, raw_mean, atol=1e-5) and torch.allclose(std, (logvar / 2).exp(), atol=1e-5)
    assert mean.shape == (4, *latent_shape(vae, 32)) == (4, 4, 8, 8)


def test_posterior_sample_applies_shift_and_scale():
    mean, std, noise = torch.randn(3, 2, 4, 8, 8).unbind()
    expected = (mean.double() + std.double() * noise.double() - 0.25) * 1.5
    sample = sample_posterior(mean, std, noise, {"scaling_factor": 1.5, "shift_factor": 0.25})
    assert torch.allclose(sample.double(), expected, atol=1e-5)
    assert torch.equal(sample_posterior(mean, std, noise * 0, {"scaling_factor": 2.0, "shift_factor": None}), mean * 2)


def test_decode_undoes_the_scaling_and_rounds_as_published(vae):
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        pixels = vae.decode(latents / vae.config.scaling_factor).sample.permute(0, 2, 3, 1).numpy()
    scaled = np.clip(np.float32(127.5) * pixels + np.float32(128), 0, 255)
    images = decode(vae, latents, batch_size=len(latents))  # in another batch convolutions may round differently
    assert images.dtype == torch.uint8 and images.shape == (3, 32, 32, 3)
    assert np.array_equal(images.numpy(), np.floor(scaled)) and not np.array_equal(np.floor(scaled), np.round(scaled))
    assert decode(vae, latents[:0]).shape == (0, 32, 32, 3)


def test_decoding_and_encoding_do_not_depend_on_the_batch(vae, heldout):
    latents = torch.randn(19, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    together = decode(vae, latents)
    assert torch.equal(together, torch.cat([decode(vae, latents[i : i + 1]) for i in range(19)]))
    mean, std = encode_images(vae, heldout[0][:11], batch_size=4)
    singly = [encode_images(vae, heldout[0][i : i + 1], batch_size=4) for i in range(11)]
    assert torch.equal(mean, torch.cat([m for m, _ in singly])) and torch.equal(std, torch.cat([s for _, s in singly]))


def test_committed_vae_is_small_normalized_and_good(vae, heldout):
    assert sum(file.stat().st_size for file in DIGITS_VAE.glob("*.safetensors")) < 1_500_000
    images, labels = heldout
    mean, std = encode_images(vae, images)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
    latents = sample_posterior(mean, std, noise, vae.config)
    assert 0.9 < latents.std() < 1.1 and latents.mean().abs() < 0.1
    made = decode(vae, latents).numpy()
    error = np.square(made / 255.0 - images.permute(0, 2, 3, 1).numpy() / 255.0).mean()
    assert -10 * np.log10(error) > 30
    train = open_images("digits:train")
    classifier = SVC(C=10).fit(shrink_digits(train.source.images) / 16, train.labels)
    assert classifier.score(shrink_digits(images.numpy()) / 16, labels) > 0.97
    assert classifier.score(shrink_digits(made) / 16, labels) > 0.97


def test_loading_from_folders_and_in_other_precisions(tmp_path, vae, heldout):
    shutil.copytree(DIGITS_VAE, tmp_path / "pipeline" / "vae")
    half = load_vae(tmp_path / "pipeline", dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and not half.training
    assert vae_fingerprint(half) == vae_fingerprint(vae) == vae_fingerprint(load_vae(None))
    mean, std = encode_images(half, heldout[0][:4])
    assert mean.dtype == torch.float32 and (mean - encode_images(vae, heldout[0][:4])[0]).abs().max() < 0.5
    assert decode(half, torch.zeros(1, 4, 8, 8)).shape == (1, 32, 32, 3)
    with torch.no_grad():
        half.decoder.conv_out.bias += 1
    assert vae_fingerprint(half) != vae_fingerprint(vae)


def test_other_sizes_and_a_size_that_does_not_fit(vae):
    assert encode_moments(vae, torch.zeros(1, 3, 48, 20))[0].shape == (1, 4, 12, 5)
    assert latent_shape(vae, 64) == (4, 16, 16)
    with pytest.raises(UserError, match="`image_size=30` must be a multiple of 4"):
        latent_shape(vae, 30)
    with pytest.raises(ValueError, match="multiples of 4"):
        encode_moments(vae, torch.zeros(1, 3, 30, 32))


def test_what_is_said_of_vaes_that_can_not_be_had(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    empty = tmp_path / "empty"
    empty.mkdir()
    other = tmp_path / "unet"
    UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8,), norm_num_groups=4,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    ).save_pretrained(other)  # fmt: skip
    cut, bare, config = tmp_path / "cut", tmp_path / "bare", tmp_path / "config"
    for folder in (cut, bare, config):
        shutil.copytree(DIGITS_VAE, folder)
    weights = cut / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    (bare / "diffusion_pytorch_model.safetensors").unlink()
    (config / "config.json").write_text("{")
    for name in (tmp_path / "missing", empty, other, cut, bare, config, "nobody/no-such-vae", "nonsense"):
        with pytest.raises(UserError) as caught:
            load_vae(name)
        assert f"`vae={name}`" in str(caught.value) and "\n" not in str(caught.value)


def test_channels_with_a_scaling_of_their_own(vae, heldout):
    """(z − mean) · scaling_factor / std for each channel, and back in the decoder: what diffusers' SDXL pipeline does
    to latents before it decodes them gives the same images."""
    mean, std = [0.5, -1.0, 0.0, 2.0], [1.5, 0.5, 2.0, 1.0]
    config = {"scaling_factor": 0.7, "latents_mean": mean, "latents_std": std, "latent_channels": 4}
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    scaled = sample_posterior(z, torch.zeros_like(z), torch.zeros_like(z), config)
    for channel in range(4):
        expected = (z[:, channel].double() - mean[channel]) * 0.7 / std[channel]
        torch.testing.assert_close(scaled[:, channel].double(), expected, atol=1e-5, rtol=1e-5)
    moments = torch.stack([z, torch.zeros_like(z)], dim=1)
    torch.testing.assert_close(scaled_sample(moments, torch.zeros_like(z), scaling(config)), scaled)

    other = load_vae("digits")
    before = vae_fingerprint(other)
    other.register_to_config(scaling_factor=0.7, latents_mean=mean, latents_std=std)
    assert vae_fingerprint(other) != before == vae_fingerprint(vae)
    sdxl = scaled * torch.tensor(std).view(1, 4, 1, 1) / 0.7 + torch.tensor(mean).view(1, 4, 1, 1)
    with torch.no_grad():
        pixels = vae.decode(sdxl).sample.permute(0, 2, 3, 1)
    close = decode(other, scaled, batch_size=2).int() - (127.5 * pixels + 128).clamp(0, 255).int()
    assert close.abs().max() <= 1 and (close != 0).float().mean() < 0.01


def test_the_cache_keeps_the_scaling_of_channels(tmp_path):
    from sit.latents.cache import CachedLatents
    from sit.latents.datasets import encode_in_memory
    from sit.latents.encode import Encode, Verify, encode, verify

    folder = tmp_path / "vae"
    other = load_vae("digits")
    other.register_to_config(latents_mean=[0.5, -1.0, 0.0, 2.0], latents_std=[1.5, 0.5, 2.0, 1.0])
    other.save_pretrained(folder)
    source = tmp_path / "images"
    for name in "ab":
        (source / name).mkdir(parents=True)
        Image.fromarray(np.full((8, 8, 3), ord(name), dtype=np.uint8)).save(source / name / "0.png")
    out = encode(Encode(tmp_path / "cache", str(source), str(folder), 8, workers=0, flip=False))
    cache, again = CachedLatents(out), load_vae(folder)
    cache.check(again, str(folder))
    assert cache.scaling == scaling(again.config) != scaling(load_vae("digits").config)
    everything, noise = np.arange(2), torch.randn(2, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    memory = encode_in_memory(open_images(str(source), 8), again, progress=False)
    flipped = np.zeros(2, dtype=bool)
    one, two = (data.fetch(everything, flipped, noise.clone())["latents"] for data in (cache, memory))
    torch.testing.assert_close(one, two, atol=1e-2, rtol=1e-2)
    assert verify(Verify(out))["compared"] == 2
    with pytest.raises(UserError, match="scaling .*; `vae=digits` has"):
        cache.check(load_vae("digits"), "digits")
