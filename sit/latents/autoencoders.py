"""diffusers' autoencoders of images, seen alike: the class of a config, the geometry, and what encoders answer with."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, ModelMixin

from sit.latents.pixels import PixelCodec
from sit.utils.errors import first_line

MOST_LAYERS = 64
"""layers of an autoencoder's block, and blocks, that a config may name"""

LEVELS = ("block_out_channels", "encoder_block_out_channels", "down_block_out_channels")
"""what the classes call the encoder's channels at each level; each level after the first halves the side"""

STATISTICS = ("latents_mean", "latents_std")


def codec_class(config: Mapping[str, Any]) -> type:
    """The class that a config names: one of diffusers' with ``encode`` and ``decode``, or :class:`PixelCodec`.

    Raises:
        ValueError: it is neither.
    """
    name = config.get("_class_name", "AutoencoderKL")
    if name == "PixelCodec":
        return PixelCodec
    found = getattr(diffusers, name, None) if isinstance(name, str) and name.isidentifier() else None
    is_model = isinstance(found, type) and issubclass(found, ModelMixin)
    if not is_model or not all(callable(getattr(found, method, None)) for method in ("encode", "decode")):
        raise ValueError(f"{name} is none of diffusers' autoencoders")
    return found


def with_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config with what it leaves out, as older ones do (Stable Diffusion's), at its class's defaults."""
    parameters = signature(codec_class(config).__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty} | dict(config)


def check_sizes(config: Mapping[str, Any]) -> None:
    """Raise ValueError if a config asks for no levels, or for more levels and layers than any autoencoder has."""
    for name, value in config.items():
        if name in STATISTICS:
            continue
        parts = value if isinstance(value, (list, tuple)) else [value]
        layers = [n for n in parts if "layers" in name and isinstance(n, int)]
        too_many = len(parts) > MOST_LAYERS or max(layers, default=0) > MOST_LAYERS
        if too_many or min(layers, default=0) < 0 or (name in LEVELS and not value):
            raise ValueError(f"its {name} is {str(value)[:40]}")


def downsampling(vae: AutoencoderKL) -> int:
    """Pixels of an image's side per latent's side: 4 for the digits' VAE, 8 for Stable Diffusion's, 32 for DC-AE's.

    Raises:
        ValueError: nothing in its config tells it.
    """
    ratio = vae.config.get("spatial_compression_ratio") or getattr(vae, "spatial_compression_ratio", None)
    if ratio is not None:
        return int(ratio)
    levels = next((vae.config[name] for name in LEVELS if vae.config.get(name)), None)
    if levels is None:
        raise ValueError(f"nothing in the config of a {type(vae).__name__} tells its downsampling")
    return 2 ** (len(levels) - 1)


def posterior(vae: AutoencoderKL, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of the latents that the encoder gives for images (B, 3, H, W) in [−1, 1], unscaled.

    The standard deviation is zero where an encoder answers with the latents themselves (DC-AE, TAESD, VQ).
    """
    answer = vae.encode(images)[0]
    if isinstance(answer, torch.Tensor):
        return answer, torch.zeros_like(answer)
    return answer.mean, answer.std


@torch.no_grad()
def check_takes_images(vae: AutoencoderKL) -> None:
    """Raise ValueError unless an autoencoder on the meta device makes latents of images and images of latents.

    Those of video and sound do not; and a config may say other channels than the encoder gives.
    """
    channels = vae.config.get("latent_channels")
    if not isinstance(channels, int):
        raise ValueError(f"the config of a {type(vae).__name__} has no latent_channels")
    side = 2 * downsampling(vae)
    try:
        latents, _ = posterior(vae, torch.empty(1, 3, side, side, device="meta"))
        shapes = tuple(latents.shape), tuple(vae.decode(latents)[0].shape)
    except Exception as error:  # each network stumbles over another kind
        raise ValueError(f"a {type(vae).__name__} of this config takes no RGB images ({first_line(error)})") from error
    if shapes != ((1, channels, 2, 2), (1, 3, side, side)):
        raise ValueError(
            f"a {type(vae).__name__} of this config makes {shapes[0]} of an RGB image of {side} pixels, and of that "
            f"{shapes[1]}; {(1, channels, 2, 2)} and {(1, 3, side, side)} were expected"
        )
