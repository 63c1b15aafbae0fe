"""Pixels without a VAE: a codec with an AutoencoderKL's surface whose latents are the image's own channels.

It has an encoder's posterior (of no spread), a decoder and a config, so whatever takes a VAE takes it. An image of H×W
pixels is a latent of the same H×W: 256 tokens for 32×32 pixels in patches of 2.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput

from sit.utils.errors import UserError
from sit.utils.options import check_options, parse_entry

NAME = "none"
"""what a codec is called where a VAE is asked for; options may follow, as a mixer's: ``none:channels=1``"""


class PixelCodec(ModelMixin, ConfigMixin):
    """The way between pixels and scaled pixels, with the surface of diffusers' ``AutoencoderKL``.

    Args:
        latent_channels: 3 for RGB as it is; 1 for gray, (R + 2G + B) / 4, which is decoded as RGB of three like
            channels. Those weights are exact in every precision, so a gray image comes back as it was.
        scaling_factor: latents are (x − shift_factor) · scaling_factor of pixels x in [−1, 1]. 2, the default, gives
            unit spread to images of standard deviation 0.5, which EDM (arXiv 2206.00364) takes for all data.
        shift_factor: what is subtracted, the images' mean.
        block_out_channels: one level, which halves nothing.

    Raises:
        ValueError: other channels, or constants that do not scale.
    """

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 3,
        scaling_factor: float = 2.0,
        shift_factor: float = 0.0,
        block_out_channels: tuple[int, ...] = (1,),
    ) -> None:
        super().__init__()
        if latent_channels not in (1, 3):
            raise ValueError(f"pixels are of 1 or 3 channels, not {latent_channels}")
        if not 0 < scaling_factor < math.inf or not math.isfinite(shift_factor):
            raise ValueError(
                f"pixels need a positive scale and a finite shift, not {scaling_factor:g} and {shift_factor:g}"
            )
        if len(block_out_channels) != 1:
            raise ValueError(f"pixels are of one level, not {len(block_out_channels)}")
        weights = torch.eye(3) if latent_channels == 3 else torch.tensor([[0.25, 0.5, 0.25]])
        self.register_buffer("to_channels", weights)

    def encode(self, x: torch.Tensor) -> AutoencoderKLOutput:
        """Pixels (B, 3, H, W) in [−1, 1] to a posterior on (B, c, H, W) of standard deviation zero."""
        mean = (x[:, None] * self.to_channels.to(x.dtype)[:, :, None, None]).sum(2)
        moments = torch.cat([mean, torch.zeros_like(mean)], dim=1)
        return AutoencoderKLOutput(latent_dist=DiagonalGaussianDistribution(moments, deterministic=True))

    def decode(self, z: torch.Tensor) -> DecoderOutput:
        """Unscaled latents (B, c, H, W) to RGB (B, 3, H, W)."""
        return DecoderOutput(sample=z.expand(-1, 3, -1, -1))


def is_pixels(name: str | Path | None) -> bool:
    """Whether a VAE's name means no VAE, ``none`` with or without options, whatever folders there are."""
    return isinstance(name, str) and name.partition(":")[0] == NAME


def pixel_codec(name: str) -> PixelCodec:
    """The codec of ``none`` or ``none:channels=1:shift=-0.4:scale=1.4``, any of the three options left out.

    Raises:
        UserError: another option, or a value that does not scale.
    """
    what = f"`vae={name}`"
    _, options = parse_entry(name, what)
    check_options(options, _codec, what)
    try:
        return _codec(**options)
    except ValueError as error:
        raise UserError(f"{what}: {error}") from error


def _codec(channels: int = 3, shift: float = 0.0, scale: float = 2.0) -> PixelCodec:
    return PixelCodec(latent_channels=channels, scaling_factor=float(scale), shift_factor=float(shift))
