"""Autoencoders in latent diffusion's layout, as VA-VAE (f16d32) is published, to diffusers' layout.

The layout is that of the latent-diffusion repository (arXiv 2112.10752): ``encoder.down.0.block.0.…``, ``decoder.up``,
``quant_conv``; in a training checkpoint under ``state_dict``, beside the losses' and the foundation model's weights.
LightningDiT (arXiv 2501.01423) scales VA-VAE's latents channel by channel, by a file of its own: ``latents_stats.pt``
with ``mean`` and ``std`` of shape (1, 32, 1, 1).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from sit.checkpoint.arguments import ConvertVAE
from sit.checkpoint.weights_file import read_tensors
from sit.latents.vae import scaling
from sit.utils.errors import UserError, first_line
from sit.utils.files import atomic_folder

PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
"""where the keys of the autoencoder itself begin"""

GROUPS = 32
"""of every GroupNorm in this layout"""

RULES = (
    (r"^(encoder|decoder)\.norm_out\.", r"\1.conv_norm_out."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"\.down\.(\d+)\.downsample\.", r".down_blocks.\1.downsamplers.0."),
    (r"\.up\.(\d+)\.upsample\.", r".up_blocks.\1.upsamplers.0."),
    (r"\.(down|up)\.(\d+)\.block\.", r".\1_blocks.\2.resnets."),
    (r"\.(down|up)\.(\d+)\.attn\.", r".\1_blocks.\2.attentions."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"(\.attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(\.attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
    (r"(\.attentions\.\d+)\.proj_out\.", r"\1.to_out.0."),
)
"""(pattern, replacement) from the published keys to diffusers', but for the order of the decoder's levels"""


def convert_vae(options: ConvertVAE) -> Path:
    """Write the VAE that ``options`` names as a diffusers folder, and return it.

    Raises:
        UserError: a file can't be read or is none of this layout, the statistics don't fit it, or the target exists.
    """
    if options.target.exists():
        raise UserError(f"{options.target} exists already; it is not overwritten")
    if not math.isfinite(options.scaling_factor) or options.scaling_factor == 0:
        raise UserError(f"`scaling_factor={options.scaling_factor}` must be a finite number other than 0")
    vae = ldm_vae(read_tensors(options.source), str(options.source))
    vae.register_to_config(scaling_factor=options.scaling_factor)
    if options.latents_stats is not None:
        mean, std = read_statistics(options.latents_stats, vae.config["latent_channels"])
        vae.register_to_config(latents_mean=mean, latents_std=std)
    try:
        scaling(vae.config)
    except ValueError as error:
        raise UserError(f"`latents_stats={options.latents_stats}`: {error}") from error
    with atomic_folder(options.target) as place:
        vae.save_pretrained(place)
    return options.target


def ldm_vae(state: Mapping[str, torch.Tensor], name: str) -> AutoencoderKL:
    """The autoencoder of a state dict in latent diffusion's layout; its size is told by the shapes.

    Args:
        state: weights by key; those of other parts are left out.
        name: of the file, for messages.

    Raises:
        UserError: weights are missing, or of other shapes than this layout has.
    """
    plain = {key.removeprefix("first_stage_model."): value for key, value in state.items()}
    plain = {key: value for key, value in plain.items() if key.startswith(PARTS)}
    try:
        vae = AutoencoderKL(**_config(plain))
        levels = len(vae.config["block_out_channels"])
        vae.load_state_dict({_key(key, levels): _value(key, value) for key, value in plain.items()})
    except (KeyError, RuntimeError, ValueError, IndexError) as error:
        raise UserError(f"{name} is no autoencoder in latent diffusion's layout ({first_line(error)})") from error
    return vae.eval()


def _config(state: Mapping[str, torch.Tensor]) -> dict:
    """Arguments of diffusers' ``AutoencoderKL``, from the shapes of published weights."""
    levels = 1 + max(int(found[1]) for key in state if (found := re.match(r"encoder\.down\.(\d+)\.", key)))
    layers = 1 + max(int(found[1]) for key in state if (found := re.match(r"encoder\.down\.0\.block\.(\d+)\.", key)))

    def attends(side: str, level: int) -> bool:
        return any(key.startswith(f"{side}.{level}.attn.") for key in state)

    channels = [len(state[f"encoder.down.{level}.block.0.conv1.weight"]) for level in range(levels)]
    down = ["AttnDownEncoderBlock2D" if attends("encoder.down", n) else "DownEncoderBlock2D" for n in range(levels)]
    up = ["AttnUpDecoderBlock2D" if attends("decoder.up", n) else "UpDecoderBlock2D" for n in reversed(range(levels))]
    return dict(
        latent_channels=state["decoder.conv_in.weight"].shape[1],
        block_out_channels=tuple(channels),
        layers_per_block=layers,
        down_block_types=tuple(down),
        up_block_types=tuple(up),
        norm_num_groups=GROUPS,
        use_quant_conv="quant_conv.weight" in state,
        use_post_quant_conv="post_quant_conv.weight" in state,
    )


def _key(name: str, levels: int) -> str:
    """diffusers' name of a published weight; its decoder's levels begin at the smallest."""
    for pattern, replacement in RULES:
        name = re.sub(pattern, replacement, name)
    return re.sub(r"\.up_blocks\.(\d+)\.", lambda found: f".up_blocks.{levels - 1 - int(found[1])}.", name)


def _value(name: str, value: torch.Tensor) -> torch.Tensor:
    """A weight as diffusers has it: attention's 1×1 convolutions are linear layers."""
    is_attention = re.search(r"\.attn(_1|\.\d+)\.(q|k|v|proj_out)\.weight$", name)
    return (value[:, :, 0, 0] if is_attention else value).float()


def read_statistics(path: Path, channels: int) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel of unscaled latents, from LightningDiT's ``latents_stats.pt``.

    Raises:
        UserError: the file can't be read, or doesn't hold ``channels`` of both.
    """
    tensors = read_tensors(path)
    found = [tensors.get(name) for name in ("mean", "std")]
    if any(part is None or part.numel() != channels for part in found):
        raise UserError(f"{path} must hold `mean` and `std` of {channels} channels; it has {', '.join(tensors)}")
    mean, std = (part.double().flatten().tolist() for part in found)
    return mean, std
