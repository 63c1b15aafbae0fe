"""Pixels without a VAE: the codec against the formula, in every precision, saved and loaded, and its name's options."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from sit.checkpoint.save import save_checkpoint
from sit.latents.cache import CachedLatents
from sit.latents.datasets import PixelData
from sit.latents.encode import Encode, encode
from sit.latents.factory import open_latents
from sit.latents.measure import Measure, constants, measure
from sit.latents.pixels import PixelCodec
from sit.latents.vae import (
    decode,
    downsampling,
    empty_vae,
    encode_images,
    is_on_hub,
    latent_shape,
    load_vae,
    sample_posterior,
    vae_fingerprint,
)
from sit.utils.errors import UserError

GRAY = "none:channels=1:shift=-0.25:scale=1.5"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes of two colored images each, 8x8."""
    root, rng = tmp_path_factory.mktemp("colored"), np.random.default_rng(0)
    for number in range(4):
        place = root / f"class{number % 2}" / f"{number}.png"
        place.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, size=(8, 8, 3), dtype=np.uint8)).save(place)
    return root


def every_value(channels: int) -> torch.Tensor:
    """(1, 3, 16, 48) uint8 with every value in every channel, the channels alike if there is to be one."""
    values = torch.arange(256, dtype=torch.uint8)
    rows = [values.roll(0 if channels == 1 else 85 * shift) for shift in range(3)]
    return torch.stack(rows).reshape(1, 3, 16, 16).repeat(1, 1, 1, 3)


@pytest.mark.parametrize("name, channels, shift, scale", [("none", 3, 0.0, 2.0), (GRAY, 1, -0.25, 1.5)])
def test_latents_are_the_channels_scaled_by_the_stated_constants(name, channels, shift, scale):
    codec, images = load_vae(name), every_value(channels)
    assert latent_shape(codec, 30) == (channels, 30, 30) and downsampling(codec) == 1
    mean, std = encode_images(codec, images)
    assert not std.any() and mean.shape == (1, channels, 16, 48)
    latents = sample_posterior(mean, std, torch.randn_like(mean), codec.config)
    expected = (images[:, :channels].double() / 127.5 - 1 - shift) * scale
    torch.testing.assert_close(latents.double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["none", GRAY])
def test_images_come_back_as_they_were_in_every_precision(name, dtype):
    """Also through the half precision of the moments that are kept."""
    codec = load_vae(name, dtype=dtype)
    images = every_value(codec.config.latent_channels)
    mean, std = (part.half() for part in encode_images(codec, images))
    latents = sample_posterior(mean, std, torch.randn(mean.shape), codec.config)
    assert torch.equal(decode(codec, latents).permute(0, 3, 1, 2), images)


def test_color_becomes_gray_where_one_channel_is_asked_for(folder):
    data = open_latents(str(folder), load_vae("none:channels=1:scale=1"), "none", image_size=8, progress=False)
    pixels = np.asarray(Image.open(folder / "class0" / "0.png")).astype(float)
    expected = (pixels @ [1, 2, 1]) / 4 / 127.5 - 1
    made = data.fetch(np.array([0]), np.array([False]), torch.zeros(1, 1, 8, 8))["latents"]
    np.testing.assert_allclose(made[0, 0].numpy(), expected, atol=5e-4)


def test_a_folder_of_it_is_read_back(tmp_path):
    for name in ("none", GRAY):
        codec, place = load_vae(name), tmp_path / name
        codec.save_pretrained(place)
        again = load_vae(place, dtype=torch.bfloat16)
        assert type(again) is PixelCodec and again.dtype == torch.bfloat16
        assert vae_fingerprint(again) == vae_fingerprint(codec)
        for codec in (again, empty_vae(place), empty_vae(name)):
            assert latent_shape(codec, 8) == latent_shape(load_vae(name), 8)
    prints = [
        vae_fingerprint(load_vae(f"none:{option}")) for option in ("channels=1", "channels=3", "scale=3", "shift=1")
    ]
    assert len(set(prints)) == 4
    assert [is_on_hub(name) for name in ("none", GRAY, "digits", str(tmp_path), "a/vae")] == [False] * 4 + [True]
    config = tmp_path / "none" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"scaling_factor": 0}))
    with pytest.raises(UserError, match=f"`vae={tmp_path / 'none'}`.*scaling divides by zero"):
        load_vae(tmp_path / "none")


@pytest.mark.parametrize(
    "name, words",
    [
        ("none:chanels=1", "`vae=none:chanels=1` has no option 'chanels'; its options are channels, scale, shift"),
        ("none:channels=2", "`vae=none:channels=2`: pixels are of 1 or 3 channels, not 2"),
        ("none:channels=1.0", "channels must be an integer, not 1.0"),
        ("none:scale=0", "`vae=none:scale=0`: pixels need a positive scale"),
        ("none:scale=.nan", "positive scale"),
        ("none:shift=.inf", "finite shift"),
        ("none:shift", "`vae=none:shift`: 'shift' is not option=value"),
    ],
)
def test_mistakes_in_its_options(name, words):
    with pytest.raises(UserError, match=words):
        load_vae(name)


def test_a_cache_of_pixels(folder, tmp_path):
    """What training reads from it is what it reads from the images, and another count of channels is refused."""
    cache = encode(Encode(tmp_path / "cache", str(folder), "none", 8, workers=0, batch_size=4))
    codec = load_vae("none")
    images = open_latents(str(folder), codec, "none", image_size=8, flip=True, progress=False)
    kept = open_latents(str(cache), codec, "none", image_size=8, flip=True)
    assert isinstance(kept, CachedLatents)
    draws = np.array([2, 0]), np.array([True, False]), torch.randn(2, 3, 8, 8)
    assert torch.equal(kept.fetch(*draws)["latents"], images.fetch(*draws)["latents"])
    with pytest.raises(UserError, match="give the same VAE or encode again"):
        open_latents(str(cache), load_vae("none:channels=1"), "none:channels=1", image_size=8)


def test_encoding_while_training_gives_the_same_with_flips(folder):
    codec = load_vae("none")
    memory = open_latents(str(folder), codec, "none", image_size=8, flip=True, progress=False)
    late = open_latents(str(folder), codec, "none", image_size=8, flip=True, keep_images=True)
    assert isinstance(late, PixelData)
    draws = np.array([3, 1]), np.array([False, True]), torch.randn(2, 3, 8, 8)
    batch = late.finish(late.fetch(*draws))
    torch.testing.assert_close(batch["latents"], memory.fetch(*draws)["latents"], rtol=0, atol=2**-11)
    torch.testing.assert_close(batch["latents"], (batch["images"].float() / 127.5 - 1) * 2)


def test_the_measured_constants_give_unit_spread(folder):
    """Of the whole set, against NumPy's mean and standard deviation; a VAE's posterior has a spread of its own."""
    pixels = np.stack([np.asarray(Image.open(file)) for file in sorted(folder.rglob("*.png"))]).astype(float)
    mean, deviation = measure(Measure(str(folder), "none", 8))
    assert (mean, deviation) == pytest.approx(((pixels / 127.5 - 1).mean(), (pixels / 127.5 - 1).std()), rel=1e-5)
    spec = constants("none:scale=7", mean, deviation)
    assert re.fullmatch(r"none:channels=3:shift=-?0\.\d{4}:scale=\d\.\d{4}", spec)
    data = open_latents(str(folder), load_vae(spec), "none", image_size=8, progress=False)
    latents = data.fetch(np.arange(4), np.zeros(4, bool), torch.zeros(4, 3, 8, 8))["latents"]
    assert latents.mean().abs() < 1e-3 and latents.std(correction=0) == pytest.approx(1, abs=1e-3)
    assert measure(Measure("digits", "digits", images=200))[1] * load_vae("digits").config.scaling_factor == (
        pytest.approx(1, abs=0.05)
    )
    with pytest.raises(UserError, match="`seed=-1` must not be negative"):
        measure(Measure(seed=-1))
    with pytest.raises(UserError, match="of one value"):
        constants("none", 0.5, 0.0)


def test_latents_of_other_channels_are_refused():
    with pytest.raises(UserError, match="4 channels, and the VAE takes 3; give the one that they belong to as `vae`"):
        decode(load_vae("none"), torch.zeros(1, 4, 8, 8))


def test_a_checkpoint_takes_it_by_name(tmp_path):
    from sit.checkpoint.info import CheckpointInfo
    from sit.checkpoint.load import load_for_sampling
    from sit.model import SiT
    from sit.transport.transport import Transport

    model = SiT(8, 2, in_channels=1, hidden_size=32, depth=1, num_heads=2, num_classes=3, mixer="atconv")
    info = CheckpointInfo(image_size=(8, 8), classes=3, label_names=["a", "b", "c"])
    save_checkpoint(tmp_path / "a", model=model, transport=Transport(), vae_source=GRAY, info=info)
    vae = load_for_sampling(tmp_path / "a").vae
    assert (vae.config.latent_channels, vae.config.shift_factor, vae.config.scaling_factor) == (1, -0.25, 1.5)


@pytest.mark.parametrize("table", [True, False])
def test_a_published_file_of_pixels_is_read_at_its_own_size(tmp_path, table):
    """A pixel a latent, not eight, with the VAE named; from the positional table or from the size that is told."""
    from sit.checkpoint.convert import Convert, convert
    from sit.checkpoint.hints import Hints
    from sit.checkpoint.load import load_for_sampling
    from sit.model import SiT

    model = SiT((8, 12), 2, 1, hidden_size=32, depth=1, num_heads=2, mixer="atconv", positional_embedding=table)
    torch.save(model.state_dict(), tmp_path / "a.pt")
    size = None if table else (8, 12)
    convert(Convert(tmp_path / "a.pt", tmp_path / "ours", vae=GRAY, hints=Hints(image_size=size)))
    for loaded in (
        load_for_sampling(tmp_path / "ours"),
        load_for_sampling(tmp_path / "a.pt", vae=GRAY, image_size=size),
    ):
        assert tuple(loaded.info.image_size) == tuple(loaded.model.config.input_size) == (8, 12)
        assert loaded.model.config.positional_embedding == table
        assert loaded.vae.config.latent_channels == 1
