"""Autoencoders of diffusers' other classes, and of latent diffusion's layout, against their own encode and decode."""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from sit.checkpoint.arguments import ConvertVAE
from sit.checkpoint.info import CheckpointInfo
from sit.checkpoint.ldm_vae import convert_vae
from sit.checkpoint.load import load_for_sampling
from sit.checkpoint.save import save_checkpoint
from sit.data.factory import open_images
from sit.latents.arguments import Verify
from sit.latents.cache import CachedLatents
from sit.latents.datasets import PixelData, encode_in_memory
from sit.latents.encode import Encode, encode, verify
from sit.latents.factory import open_latents
from sit.latents.spread import note_spread, spread
from sit.latents.vae import (
    decode,
    downsampling,
    encode_images,
    latent_shape,
    load_vae,
    sample_posterior,
    vae_fingerprint,
)
from sit.model import SiT
from sit.transport.transport import Transport
from sit.utils.errors import UserError

KL = dict(
    block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4,
    down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
)  # fmt: skip
CASES = {
    "AutoencoderKL": (KL | dict(scaling_factor=1.5305, shift_factor=0.0609), 2),
    "AutoencoderDC": (
        dict(
            latent_channels=8, attention_head_dim=4, encoder_block_out_channels=(8, 8, 16),
            decoder_block_out_channels=(8, 8, 16), encoder_layers_per_block=(1, 1, 1),
            decoder_layers_per_block=(1, 1, 1),
            encoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"), encoder_qkv_multiscales=((), (), (5,)),
            decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"), decoder_qkv_multiscales=((), (), (5,)),
            scaling_factor=0.41407,
        ),
        4,
    ),
    "AutoencoderTiny": (
        dict(
            encoder_block_out_channels=(8, 8, 8), decoder_block_out_channels=(8, 8, 8), num_encoder_blocks=(1, 1, 1),
            num_decoder_blocks=(1, 1, 1), latent_channels=4, scaling_factor=0.7, shift_factor=0.1,
        ),
        4,
    ),
    "AsymmetricAutoencoderKL": (
        dict(
            down_block_types=("DownEncoderBlock2D",) * 2, down_block_out_channels=(8, 8), layers_per_down_block=1,
            up_block_types=("UpDecoderBlock2D",) * 2, up_block_out_channels=(8, 8), layers_per_up_block=1,
            norm_num_groups=4, scaling_factor=0.5,
        ),
        2,
    ),
}  # fmt: skip


@pytest.fixture(params=CASES)
def made(request, tmp_path) -> tuple[Path, torch.nn.Module]:
    """A small autoencoder with random weights, and the folder that diffusers saves it to."""
    torch.manual_seed(0)
    options, _ = CASES[request.param]
    model = getattr(diffusers, request.param)(**options).eval()
    model.save_pretrained(tmp_path / "vae")
    return tmp_path / "vae", model


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for name in "ab":
        (folder / name).mkdir()
        for number in range(2):
            pixels = np.random.RandomState(ord(name) + number).randint(0, 255, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


def test_latents_and_images_are_diffusers_own(made, images):
    folder, model = made
    options, factor = CASES[type(model).__name__]
    vae = load_vae(folder)
    assert type(vae) is type(model) and downsampling(vae) == factor
    assert latent_shape(vae, 16) == (model.config.latent_channels, 16 // factor, 16 // factor)
    pixels = torch.stack([open_images(str(images), 16)[n][0] for n in range(4)])
    mean, std = encode_images(vae, pixels, batch_size=4)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(1))
    latents = sample_posterior(mean, std, noise, vae.config)
    x = pixels.double() / 127.5 - 1
    model = model.double()
    with torch.no_grad():
        answer = model.encode(x)
        if "KL" in type(model).__name__:
            z = answer.latent_dist.mean + answer.latent_dist.std * noise
        else:
            z = answer.latent if "DC" in type(model).__name__ else answer.latents
        expected = (z - options.get("shift_factor", 0.0)) * options["scaling_factor"]
        torch.testing.assert_close(latents.double(), expected, atol=1e-4, rtol=1e-4)
        shown = model.decode(latents.double() / options["scaling_factor"] + options.get("shift_factor", 0.0)).sample
    shown = (127.5 * shown + 128).clamp(0, 255).permute(0, 2, 3, 1).to(torch.uint8)
    off = (decode(vae, latents, batch_size=4).int() - shown.int()).abs()
    assert off.max() <= 1 and (off != 0).float().mean() < 0.01
    assert len(shown.unique()) > 5  # no gray plane


def test_a_cache_of_it_says_which_and_is_verified(made, images, tmp_path):
    folder, model = made
    out = encode(Encode(tmp_path / "cache", str(images), str(folder), 16, workers=0))
    manifest = CachedLatents(out).manifest
    assert manifest.vae_class == type(model).__name__ and manifest.vae == str(folder)
    assert verify(Verify(out))["compared"] == 4
    with pytest.raises(UserError, match="give the same"):
        CachedLatents(out).check(load_vae("digits"), "digits")
    memory = encode_in_memory(open_images(str(images), 16), load_vae(folder), progress=False)
    expected = spread(memory.moments[:, 0], memory.scaling)
    assert manifest.spread == pytest.approx(expected, rel=1e-3)


def test_the_class_is_in_the_fingerprint():
    """Two classes may have the same weights by name."""

    class Other(diffusers.AutoencoderKL):
        pass

    one = diffusers.AutoencoderKL(**KL)
    other = Other(**KL)
    other.load_state_dict(one.state_dict())
    assert vae_fingerprint(one) != vae_fingerprint(other)


def test_autoencoders_of_no_images_are_named(tmp_path):
    for cls, options, words in (
        (diffusers.AutoencoderKLWan, dict(base_dim=4, z_dim=4, num_res_blocks=1), "has no latent_channels"),
        (diffusers.AutoencoderKL, KL | dict(in_channels=1), "takes no RGB images"),
        (diffusers.AutoencoderKL, KL | dict(out_channels=4), r"were expected"),
    ):
        folder = tmp_path / words[:5]
        cls(**options).save_pretrained(folder)
        with pytest.raises(UserError, match=words) as caught:
            load_vae(folder)
        assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


# ---------------------------------------------------------------- the spread


def test_spread_is_that_of_drawn_samples():
    source = torch.Generator().manual_seed(0)
    mean, std = torch.randn(50, 3, 8, 8, generator=source), torch.rand(50, 3, 8, 8, generator=source)
    shift, scale = (0.5, -1.0, 0.0), (2.0, 0.5, 1.0)
    drawn = mean + std * torch.randn(400, *mean.shape, generator=source)
    drawn = (drawn - torch.tensor(shift)[:, None, None]) * torch.tensor(scale)[:, None, None]
    assert spread(torch.stack([mean, std], 1), (shift, scale)) == pytest.approx(float(drawn.double().std()), rel=2e-3)


def test_a_spread_far_from_one_is_said(images, tmp_path, caplog, monkeypatch):
    vae = load_vae("digits")
    vae.register_to_config(scaling_factor=vae.config.scaling_factor * 20)
    vae.save_pretrained(tmp_path / "vae")
    wrong = load_vae(tmp_path / "vae")

    def said() -> int:
        found = sum("standard deviation" in record.message for record in caplog.records)
        caplog.clear()
        note_spread.cache_clear()
        return found

    note_spread.cache_clear()
    open_latents("digits:heldout", load_vae("digits"), "digits", progress=False)
    assert said() == 0
    open_latents(str(images), wrong, "wrong", image_size=16, progress=False)
    assert said() == 1
    out = encode(Encode(tmp_path / "cache", str(images), str(tmp_path / "vae"), 16, workers=0))
    assert said() == 1
    with monkeypatch.context() as patch:
        patch.setattr("sit.latents.factory.spread", None)  # the manifest has it
        open_latents(str(out), wrong, "wrong")
    assert said() == 1
    values = json.loads((out / "manifest.json").read_text())
    for name in ("spread", "contents", "rows_per_checksum", "checksums", "labels_checksum", "checksum"):
        del values[name]  # as version 0.1.0 wrote it
    (out / "manifest.json").write_text(json.dumps(values))
    open_latents(str(out), wrong, "wrong")
    assert "standard deviation 0," not in caplog.text
    assert said() == 1
    lazy = PixelData(open_images(str(images), 16), wrong)
    for _ in range(2):
        noise = torch.zeros(4, *lazy.latent_shape)
        lazy.finish(lazy.fetch(np.arange(4), np.zeros(4, dtype=bool), noise))
    assert said() == 1


# ---------------------------------------------------------------- latent diffusion's layout


def ldm_weights(ch: int, multiples: tuple[int, ...], z: int, blocks: int) -> dict[str, torch.Tensor]:
    """Random weights under the published keys, with attention at the smallest level as VA-VAE has it."""
    source, state = torch.Generator().manual_seed(0), {}

    def conv(name, inputs, outputs, side):
        state[f"{name}.weight"] = torch.randn(outputs, inputs, side, side, generator=source) / (inputs * side**2) ** 0.5
        state[f"{name}.bias"] = torch.randn(outputs, generator=source) / 10

    def norm(name, channels):
        state[f"{name}.weight"] = 1 + torch.randn(channels, generator=source) / 5
        state[f"{name}.bias"] = torch.randn(channels, generator=source) / 5

    def block(name, inputs, outputs):
        norm(f"{name}.norm1", inputs), conv(f"{name}.conv1", inputs, outputs, 3)
        norm(f"{name}.norm2", outputs), conv(f"{name}.conv2", outputs, outputs, 3)
        if inputs != outputs:
            conv(f"{name}.nin_shortcut", inputs, outputs, 1)

    def attention(name, channels):
        norm(f"{name}.norm", channels)
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{name}.{part}", channels, channels, 1)

    widths, last = [ch * multiple for multiple in multiples], len(multiples) - 1
    for side in ("encoder", "decoder"):
        block(f"{side}.mid.block_1", widths[-1], widths[-1]), attention(f"{side}.mid.attn_1", widths[-1])
        block(f"{side}.mid.block_2", widths[-1], widths[-1])
        norm(f"{side}.norm_out", widths[-1] if side == "encoder" else widths[0])
    conv("encoder.conv_in", 3, ch, 3), conv("encoder.conv_out", widths[-1], 2 * z, 3)
    conv("decoder.conv_in", z, widths[-1], 3), conv("decoder.conv_out", widths[0], 3, 3)
    conv("quant_conv", 2 * z, 2 * z, 1), conv("post_quant_conv", z, z, 1)
    width = ch
    for level, next_width in enumerate(widths):
        for number in range(blocks):
            block(f"encoder.down.{level}.block.{number}", width, next_width)
            width = next_width
            if level == last:
                attention(f"encoder.down.{level}.attn.{number}", width)
        if level != last:
            conv(f"encoder.down.{level}.downsample.conv", width, width, 3)
    for level in reversed(range(len(widths))):
        for number in range(blocks + 1):
            block(f"decoder.up.{level}.block.{number}", width, widths[level])
            width = widths[level]
            if level == last:
                attention(f"decoder.up.{level}.attn.{number}", width)
        if level:
            conv(f"decoder.up.{level}.upsample.conv", width, width, 3)
    return state


class Published:
    """The forward pass of the published autoencoder, from its description, in float64."""

    def __init__(self, state: dict[str, torch.Tensor], levels: int, blocks: int) -> None:
        self.state, self.levels, self.blocks = {name: value.double() for name, value in state.items()}, levels, blocks

    def conv(self, name, x, **options):
        return F.conv2d(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"], **options)

    def norm(self, name, x):
        return F.group_norm(x, 32, self.state[f"{name}.weight"], self.state[f"{name}.bias"], 1e-6)

    def block(self, name, x):
        h = self.conv(f"{name}.conv1", F.silu(self.norm(f"{name}.norm1", x)), padding=1)
        h = self.conv(f"{name}.conv2", F.silu(self.norm(f"{name}.norm2", h)), padding=1)
        return h + (self.conv(f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in self.state else x)

    def attention(self, name, x):
        if f"{name}.q.weight" not in self.state:
            return x
        h = self.norm(f"{name}.norm", x)
        q, k, v = (self.conv(f"{name}.{part}", h).flatten(2) for part in "qkv")
        weights = (q.transpose(1, 2) @ k / q.shape[1] ** 0.5).softmax(-1)
        return x + self.conv(f"{name}.proj_out", (v @ weights.transpose(1, 2)).view_as(x))

    def middle(self, side, x):
        x = self.attention(f"{side}.mid.attn_1", self.block(f"{side}.mid.block_1", x))
        return self.block(f"{side}.mid.block_2", x)

    def end(self, side, x):
        return self.conv(f"{side}.conv_out", F.silu(self.norm(f"{side}.norm_out", x)), padding=1)

    def encode(self, x):
        x = self.conv("encoder.conv_in", x, padding=1)
        for level in range(self.levels):
            for number in range(self.blocks):
                name = f"encoder.down.{level}"
                x = self.attention(f"{name}.attn.{number}", self.block(f"{name}.block.{number}", x))
            if level < self.levels - 1:
                x = self.conv(f"encoder.down.{level}.downsample.conv", F.pad(x, (0, 1, 0, 1)), stride=2)
        return self.conv("quant_conv", self.end("encoder", self.middle("encoder", x)))

    def decode(self, z):
        x = self.middle("decoder", self.conv("decoder.conv_in", self.conv("post_quant_conv", z), padding=1))
        for level in reversed(range(self.levels)):
            for number in range(self.blocks + 1):
                name = f"decoder.up.{level}"
                x = self.attention(f"{name}.attn.{number}", self.block(f"{name}.block.{number}", x))
            if level:
                x = self.conv(f"decoder.up.{level}.upsample.conv", F.interpolate(x, scale_factor=2.0), padding=1)
        return self.end("decoder", x)


def test_va_vaes_layout_against_its_own_forward_pass(tmp_path):
    """f16d32 at a quarter of its width: five levels, multiples 1 1 2 2 4, 32 channels, attention at the smallest."""
    state = ldm_weights(32, (1, 1, 2, 2, 4), 32, 1)
    beside = {"loss.discriminator.main.3.num_batches_tracked": torch.tensor(5), "linear_proj.weight": torch.ones(2, 2)}
    torch.save({"state_dict": state | beside, "global_step": 7}, tmp_path / "vavae.pt")
    source = torch.Generator().manual_seed(1)
    mean, std = torch.randn(1, 32, 1, 1, generator=source), 0.5 + torch.rand(1, 32, 1, 1, generator=source)
    torch.save({"mean": mean, "std": std}, tmp_path / "latents_stats.pt")
    folder = convert_vae(ConvertVAE(tmp_path / "vavae.pt", tmp_path / "vae", tmp_path / "latents_stats.pt"))
    vae = load_vae(folder)
    assert downsampling(vae) == 16 and latent_shape(vae, 256) == (32, 16, 16)

    published = Published(state, levels=5, blocks=1)
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=source)
    found, spread_of = encode_images(vae, pixels, batch_size=2)
    noise = torch.randn(found.shape, generator=source)
    moments = published.encode(pixels.double() / 127.5 - 1)
    z = moments[:, :32] + (moments[:, 32:].clamp(-30, 20) / 2).exp() * noise
    expected = (z - mean.double()) / std.double()  # as LightningDiT's reader of latents does
    latents = sample_posterior(found, spread_of, noise, vae.config)
    torch.testing.assert_close(latents.double(), expected, atol=1e-3, rtol=1e-3)
    shown = published.decode(expected * std.double() + mean.double())
    shown = (127.5 * shown + 128).clamp(0, 255).permute(0, 2, 3, 1).to(torch.uint8)
    off = (decode(vae, expected.float(), batch_size=2).int() - shown.int()).abs()
    assert off.max() <= 1 and (off != 0).float().mean() < 0.01 and shown.float().std() > 10

    for part, words in (({"mean": mean}, "`mean` and `std`"), ({"mean": mean, "std": std * 0}, "divides by zero")):
        torch.save(part, tmp_path / "latents_stats.pt")
        with pytest.raises(UserError, match=words):
            convert_vae(ConvertVAE(tmp_path / "vavae.pt", tmp_path / "other", tmp_path / "latents_stats.pt"))
    for factor in (0.0, float("nan")):
        with pytest.raises(UserError, match=f"`scaling_factor={factor}` must be a finite number other than 0"):
            convert_vae(ConvertVAE(tmp_path / "vavae.pt", tmp_path / "other", scaling_factor=factor))
    del state["decoder.mid.attn_1.q.weight"]
    torch.save(state, tmp_path / "vavae.pt")
    with pytest.raises(UserError, match="vavae.pt is no autoencoder in latent diffusion's layout"):
        convert_vae(ConvertVAE(tmp_path / "vavae.pt", tmp_path / "other"))
    assert not (tmp_path / "other").exists()


def test_a_checkpoint_names_its_class(made, tmp_path):
    """As diffusers' pipelines look for it, and sampling loads it."""
    folder, model = made
    network = SiT(2, 1, in_channels=model.config.latent_channels, hidden_size=8, depth=1, num_heads=1, num_classes=2)
    place = tmp_path / "checkpoint"
    save_checkpoint(place, model=network, transport=Transport(), vae_source=folder, info=CheckpointInfo(classes=2))
    assert json.loads((place / "model_index.json").read_text())["vae"] == ["diffusers", type(model).__name__]
    assert type(load_for_sampling(place).vae) is type(model)
