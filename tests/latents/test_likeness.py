"""Two VAEs are alike if an image's latents are: by the files, and by encoding it with both."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from sit.data.factory import open_images
from sit.latents.likeness import difference
from sit.latents.vae import DIGITS_VAE, encode_images, load_vae, sample_posterior
from sit.utils.weight_files import WEIGHTS

Change = Callable[[dict[str, torch.Tensor], dict], object]


def changed(folder: Path, change: Change, vae: Path = DIGITS_VAE) -> str:
    """A VAE, else the digits', with other weights or another config."""
    shutil.copytree(vae, folder)
    state, config = load_file(folder / WEIGHTS), json.loads((folder / "config.json").read_text())
    state = change(state, config) or state
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def scaled(name: str, factor: float) -> Change:
    return lambda state, config: state | {name: state[name] * factor}


CHANGES: dict[str, Change] = {
    "nothing": lambda state, config: None,
    "the decoder": scaled("decoder.conv_in.weight", 1.5),
    "what follows the latents": scaled("post_quant_conv.weight", 1.5),
    "precision": lambda state, config: {name: tensor.bfloat16() for name, tensor in state.items()},
    "the encoder": scaled("encoder.conv_out.weight", 1.2),
    "what precedes the latents": scaled("quant_conv.weight", 1.2),
    "the scale": lambda state, config: config.update(scaling_factor=2 * config["scaling_factor"]),
    "the shift": lambda state, config: config.update(shift_factor=0.5),
}


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    data = open_images("digits", 32)
    return torch.stack([data[number][0] for number in range(4)])


def latents(name: str, images: torch.Tensor) -> torch.Tensor:
    vae = load_vae(name)
    mean, std = encode_images(vae, images)
    return sample_posterior(mean, std, torch.zeros_like(mean), vae.config)


@pytest.mark.parametrize("what", CHANGES)
def test_likeness_is_that_of_the_latents(tmp_path, images, what):
    other = changed(tmp_path / "vae", CHANGES[what])
    ours, theirs = latents("digits", images), latents(other, images)
    alike = bool(torch.dist(ours, theirs) < 0.02 * ours.norm())
    assert (difference("digits", other) is None) == (difference(other, "digits") is None) == alike


def test_old_names_of_attention(tmp_path, images):
    """As they are in Stable Diffusion's files on the Hub; ours are of today."""
    old = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}

    def renamed(state, config):
        pairs = ((name, next((part for part in old if part in name), "")) for name in state)
        return {name.replace(part, old.get(part, "")) if part else name: state[name] for name, part in pairs}

    torch.manual_seed(0)
    AutoencoderKL(block_out_channels=(4, 8), norm_num_groups=2, down_block_types=("DownEncoderBlock2D",) * 2,
                  up_block_types=("UpDecoderBlock2D",) * 2).save_pretrained(tmp_path / "vae")  # fmt: skip
    before, after = str(tmp_path / "vae"), changed(tmp_path / "old", renamed, tmp_path / "vae")
    assert any(".query." in name for name in load_file(Path(after) / WEIGHTS))
    assert torch.equal(latents(before, images), latents(after, images)) and difference(before, after) is None
    query = "encoder.mid_block.attentions.0.to_q.weight"
    assert difference(before, changed(tmp_path / "other", scaled(query, 1.5), tmp_path / "vae")) is not None


@pytest.mark.parametrize(
    "first, second, told",
    [
        ("none", "none:channels=3:shift=0:scale=2.0", None),
        ("none:channels=1", "none", "channels: 3, not 1"),
        ("none:channels=1", "none:channels=1:scale=1.42", "shift and scale 0.0 and 1.42, not 0.0 and 2.0"),
        ("none:shift=-0.4", "none", "shift and scale 0.0 and 2.0, not -0.4 and 2.0"),
        ("digits", "none", "made from pixels, not latents of an encoder"),
        ("digits", "stabilityai/sd-vae-ft-ema", None),
        ("stabilityai/sd-vae-ft-mse", "stabilityai/sd-vae-ft-ema", None),
    ],
)
def test_pixels_and_what_is_not_here(first, second, told):
    assert difference(first, second) == told


def test_a_codec_in_a_folder_is_that_of_its_name(tmp_path):
    load_vae("none:channels=1").save_pretrained(tmp_path / "gray")
    assert difference("none:channels=1", tmp_path / "gray") is None
    assert difference(tmp_path / "gray", "none:channels=1:shift=0.5") is not None


def test_a_damaged_folder_tells_nothing(tmp_path):
    weights = Path(changed(tmp_path / "vae", CHANGES["the encoder"])) / WEIGHTS
    assert difference("digits", tmp_path / "vae") is not None
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert difference("digits", tmp_path / "vae") is None
