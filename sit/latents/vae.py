"""The way between pixels and latents: one of diffusers' autoencoders, its posterior, and its scaling.

``AutoencoderKL`` in annotations stands for all of them (:mod:`sit.latents.autoencoders`) and for
:class:`~sit.latents.pixels.PixelCodec`.

Latents everywhere in the project are *scaled*: (z − shift) · scaling_factor with the numbers of the VAE's config, so
that their standard deviation is about one (latent diffusion, arXiv 2112.10752, section G). A config with
``latents_mean`` and ``latents_std`` scales each channel by itself: (z − mean) · scaling_factor / std, as diffusers'
Stable Diffusion XL pipelines do. Only the moments that the encoder gives, and the cache on disk, are unscaled.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from safetensors import safe_open

from sit.latents.autoencoders import (
    check_sizes,
    check_takes_images,
    codec_class,
    downsampling,
    posterior,
    with_defaults,
)
from sit.latents.pixels import is_pixels, pixel_codec
from sit.utils.device import execution_device
from sit.utils.errors import UserError, first_line
from sit.utils.hub import quiet_hub
from sit.utils.weight_files import folder_weights, variant_of
from sit.utils.workers import Tell, computes_apart, run_apart

PerChannel = float | tuple[float, ...]
"""One number for all channels of a latent, or one for each."""

DIGITS_VAE = Path(__file__).parents[1] / "assets" / "digits-vae"


class NotFinite(UserError):
    """Numbers that are to become an image, and are NaN or infinite."""


def load_vae(
    name: str | Path | None, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> AutoencoderKL:
    """Load a VAE, or what stands in its place, frozen and in evaluation mode.

    Args:
        name: None or ``digits`` for the small one of this repository; ``none`` for pixels without a VAE
            (:func:`sit.latents.pixels.pixel_codec`); a local folder (a VAE's, or a diffusers pipeline's with ``vae/``
            in it); or a Hub name such as ``stabilityai/sd-vae-ft-ema``.
        device: where to put it.
        dtype: precision it runs in; moments and images come out the same way.

    Raises:
        UserError: there is none at ``name``, it is damaged, or it can't be downloaded.
    """
    if is_pixels(name):
        codec = pixel_codec(str(name)).eval()
        return torch.nn.Module.to(codec, device=device, dtype=dtype)  # ModelMixin.to warns without need
    folder = vae_folder(name)
    if folder.is_dir():
        vae = _from_pretrained(str(folder), name, dtype, {"local_files_only": True})
    elif folder.is_absolute() or len(folder.parts) != 2 or folder.parts[0] in (".", ".."):
        raise UserError(f"`vae={name}`: no such folder, and not a Hub name like stabilityai/sd-vae-ft-ema")
    else:
        vae = _from_pretrained(str(name), name, dtype, {})
    return vae.to(device=device, memory_format=torch.channels_last).eval().requires_grad_(False)


def empty_vae(name: str | Path | None) -> AutoencoderKL | None:
    """A VAE's shapes without its weights: on the meta device, from the config of a folder; nothing is downloaded.

    Args:
        name: as for :func:`load_vae`.

    Returns:
        The VAE, or None if there is no such folder.

    Raises:
        UserError: the folder is no VAE's, or its config is damaged.
    """
    if is_pixels(name):
        return pixel_codec(str(name))
    folder = vae_folder(name)
    if not folder.is_dir():
        return None
    with _explained(name, "is the folder whole?"), torch.device("meta"):
        config = _load_config(str(folder), name, {"local_files_only": True})
        vae = codec_class(config).from_config(config)
        check_takes_images(vae)
        return vae


def vae_folder(name: str | Path | None) -> Path:
    """The folder with the VAE's ``config.json``, if ``name`` is a folder; else ``name`` as it is.

    Raises:
        UserError: the folder has none, nor a ``vae/`` that has one.
    """
    folder = DIGITS_VAE if name is None or str(name) == "digits" else Path(name)
    if folder.is_dir() and not (folder / "config.json").is_file():
        folder = folder / "vae"
        if not (folder / "config.json").is_file():
            raise UserError(
                f"`vae={name}`: neither config.json nor vae/config.json in this folder; give a VAE's folder"
            )
    return folder


@contextlib.contextmanager
def _explained(name: object, mend: str) -> Iterator[None]:
    """Turn what the Hub's client, safetensors and diffusers raise, each kinds of their own, into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"`vae={name}` can't be loaded ({first_line(error)}); {mend}") from error


def _load_config(source: str, name: object, options: dict[str, Any]) -> dict[str, Any]:
    config = AutoencoderKL.load_config(source, **options)
    try:
        codec_class(config)
    except ValueError as error:
        raise UserError(f"`vae={name}`: {error}; give a VAE's folder") from error
    check_sizes(config)
    scaling(with_defaults(config))
    return config


def is_on_hub(name: str | Path) -> bool:
    """Whether a VAE's name is one on the Hub: neither one that comes with this package nor a folder here."""
    return str(name) != "digits" and not is_pixels(name) and not Path(name).is_dir()


def _check_shapes(source: str, vae: AutoencoderKL) -> None:
    """Raise ValueError if a folder's weights are not of the shapes that its config says, before any memory is taken.

    Weights in another form than safetensors are left to diffusers.
    """
    own = {name: tuple(tensor.shape) for name, tensor in vae.state_dict().items()}
    for path in sorted(Path(source).glob("diffusion_pytorch_model*.safetensors")):
        with safe_open(path, "pt") as file:
            for key in set(file.keys()) & own.keys():
                if (shape := tuple(file.get_slice(key).get_shape())) != own[key]:
                    raise ValueError(f"its weights and its config.json don't fit: {key} is of shape {shape}")


def _from_pretrained(source: str, name: object, dtype: torch.dtype, options: dict[str, Any]) -> AutoencoderKL:
    mend = "is the folder whole?" if options else "download it where there is a network and give its folder"
    with _explained(name, mend), quiet_hub():
        config = _load_config(source, name, options)
        made = codec_class(config)
        with torch.device("meta"):
            empty = made.from_config(config)
        check_takes_images(empty)
        if options:
            _check_shapes(source, empty)
            options = options | {"variant": _variant(Path(source))}
        vae, found = made.from_pretrained(
            source, output_loading_info=True, low_cpu_mem_usage=False, torch_dtype=dtype, **options
        )
    if found["missing_keys"]:
        raise UserError(f"`vae={name}`: the weights lack {found['missing_keys'][0]}; is the folder whole?")
    return vae


def _variant(folder: Path) -> str | None:
    """The variant of a folder's weights (``fp16``) if it has no others; weights that are not safetensors have none."""
    if not any(folder.glob("diffusion_pytorch_model*.safetensors")):
        return None
    return variant_of(folder_weights(folder)[0].name)


def check_channels(vae: AutoencoderKL, vae_name: str, channels: int, network: str) -> None:
    """Raise UserError unless the VAE's latents have the channels of the network, which messages call ``network``."""
    if vae.config["latent_channels"] != channels:
        raise UserError(
            f"`vae={vae_name}` has latents of {vae.config['latent_channels']} channels, and {network} has {channels}: "
            "give the VAE that it was trained with"
        )


def latent_shape(vae: AutoencoderKL, image_size: int) -> tuple[int, int, int]:
    """(channels, height, width) of the latent of a square image.

    Raises:
        UserError: the VAE's downsampling doesn't divide ``image_size``.
    """
    factor = downsampling(vae)
    if image_size < factor or image_size % factor:
        raise UserError(f"`image_size={image_size}` must be a multiple of {factor}, the VAE's downsampling")
    return vae.config.latent_channels, image_size // factor, image_size // factor


def to_unit(images: torch.Tensor) -> torch.Tensor:
    """uint8 pixels → float32 in [−1, 1]; shape kept."""
    return images.to(torch.float32).div_(127.5).sub_(1.0)


@torch.no_grad()
def encode_moments(vae: AutoencoderKL, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Posterior of the encoder, unscaled.

    Args:
        vae: any that :func:`load_vae` gives, in any precision.
        images: (B, 3, H, W) float in [−1, 1], H and W multiples of :func:`downsampling`.

    Returns:
        mean and standard deviation, each (B, c, H/f, W/f) float32 where the VAE computes.

    Raises:
        ValueError: H or W is no such multiple.
    """
    factor = downsampling(vae)
    if images.shape[-1] % factor or images.shape[-2] % factor:
        raise ValueError(
            f"image sides {tuple(images.shape[-2:])} must be multiples of {factor}, the VAE's downsampling"
        )
    mean, std = posterior(vae, images.to(device=execution_device(vae), dtype=vae.dtype))
    return mean.float(), std.float()


def sample_posterior(
    mean: torch.Tensor, std: torch.Tensor, noise: torch.Tensor, config: Mapping[str, Any]
) -> torch.Tensor:
    """A scaled latent: mean + std · noise, scaled as ``vae.config`` says. Shapes and device of ``mean``; float32."""
    return scale_latents(mean.float() + std.float() * noise, scaling(config))


def scaling(config: Mapping[str, Any]) -> tuple[PerChannel, PerChannel]:
    """(shift, scale) of a VAE's config, by which a latent is (z − shift) · scale; (0, 1) where it names none.

    Raises:
        ValueError: a number is not finite, or would divide by zero; or there are two shifts.
    """
    factor, shift = config.get("scaling_factor", 1.0), config.get("shift_factor") or 0.0
    mean, std = config.get("latents_mean"), config.get("latents_std")
    numbers = [factor, shift, *(mean or ()), *(std or ())]
    if any(isinstance(n, bool) or not isinstance(n, (int, float)) or not math.isfinite(n) for n in numbers):
        raise ValueError(f"its scaling is {factor}, {shift}, {mean}, {std}, which are no finite numbers")
    if factor == 0 or (std and min(map(abs, std)) == 0):
        raise ValueError("its scaling divides by zero")
    if not mean and not std:
        return float(shift), float(factor)
    channels = config.get("latent_channels", len(mean or std))
    if any(part and len(part) != channels for part in (mean, std)):
        raise ValueError(f"its latents_mean and latents_std are not of {channels} channels")
    if mean and shift:
        raise ValueError("it has both a shift_factor and latents_mean")
    shifts = tuple(map(float, mean)) if mean else (float(shift),) * channels
    return shifts, tuple(float(factor) / part for part in std) if std else (float(factor),) * channels


def broadcast(value: PerChannel, like: torch.Tensor) -> float | torch.Tensor:
    """A number as it is; numbers for each channel as float32 (c, 1, 1) on the device of ``like``."""
    if not isinstance(value, tuple):
        return value
    return torch.tensor(value, dtype=torch.float32, device=like.device)[:, None, None]


def scale_latents(latents: torch.Tensor, shift_scale: tuple[PerChannel, PerChannel]) -> torch.Tensor:
    """Unscaled latents (B, c, h, w) → (z − shift) · scale."""
    shift, scale = (broadcast(value, latents) for value in shift_scale)
    return (latents - shift) * scale


def unscale_latents(latents: torch.Tensor, shift_scale: tuple[PerChannel, PerChannel]) -> torch.Tensor:
    """Scaled latents (B, c, h, w) → z / scale + shift, which the decoder takes."""
    shift, scale = (broadcast(value, latents) for value in shift_scale)
    return latents / scale + shift


def encode_images(vae: AutoencoderKL, images: torch.Tensor, batch_size: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 images (B, 3, H, W) → mean and std as :func:`encode_moments`.

    On one device and number of threads, bitwise the same for one image in any batch, given ``batch_size``.
    """
    device = execution_device(vae)
    size = fixed_batch(images.shape[-1], batch_size, device)
    moments = [encode_moments(vae, to_unit(chunk.to(device))) for chunk in _padded_chunks(images, size)]
    mean, std = (torch.cat(part)[: len(images)] for part in zip(*moments, strict=True))
    return mean, std


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: torch.Tensor, batch_size: int = 8) -> torch.Tensor:
    """Scaled latents (B, c, h, w) → images (B, H, W, 3) uint8 on the CPU, as clamp(127.5·x + 128, 0, 255) (SiT).

    On one device, bitwise the same for one latent in any batch, given ``batch_size``: convolutions of another batch
    size may round differently, so the last chunk is filled up. Large images are decoded in smaller chunks. On a CPU
    the chunks of a small VAE are shared among threads, whatever their number; a large one rounds by their number.

    Raises:
        NotFinite: a pixel is NaN or infinite, which uint8 would show as black or white.
        UserError: the latents are not of the VAE's channels.
    """
    if latents.shape[1] != vae.config.latent_channels:
        raise UserError(
            f"these latents have {latents.shape[1]} channels, and the VAE takes {vae.config.latent_channels}; give "
            "the one that they belong to as `vae`"
        )
    factor, shift_scale = downsampling(vae), scaling(vae.config)
    height, width = latents.shape[-2] * factor, latents.shape[-1] * factor
    device = execution_device(vae)
    size = fixed_batch(width, batch_size, device)

    def decoded(chunk: torch.Tensor, _tell: Tell | None = None) -> torch.Tensor:
        unscaled = unscale_latents(chunk.to(device=device, dtype=torch.float32), shift_scale)
        pixels = vae.decode(unscaled.to(vae.dtype)).sample.float()
        if not pixels.isfinite().all():
            source = "the VAE" if unscaled.isfinite().all() else "the sampler"
            raise NotFinite(f"{source} gives numbers that are not finite, so there is no image to show")
        return (127.5 * pixels + 128).clamp(0, 255).permute(0, 2, 3, 1).to(torch.uint8).cpu()

    images = [torch.empty(0, height, width, 3, dtype=torch.uint8)]
    chunks = _padded_chunks(latents, size)
    if computes_apart(vae, size, height * width, device):
        images += run_apart([partial(decoded, chunk) for chunk in chunks])
    else:
        images += map(decoded, chunks)
    return torch.cat(images)[: len(latents)]


def fixed_batch(side: int, most: int, device: torch.device) -> int:
    """How many images of ``side`` pixels the VAE computes at once: at most ``most``, fewer for large ones."""
    return max(1, min(most, 2 ** (19 if device.type == "cpu" else 22) // side**2))


def _padded_chunks(rows: torch.Tensor, size: int) -> Iterator[torch.Tensor]:
    """``rows`` in chunks of exactly ``size`` rows, the last one filled with zeros."""
    for chunk in rows.split(size) if len(rows) else ():
        missing = size - len(chunk)
        yield torch.cat([chunk, chunk.new_zeros(missing, *chunk.shape[1:])]) if missing else chunk


def vae_fingerprint(vae: AutoencoderKL, dtype: torch.dtype | None = None) -> str:
    """Hash of the VAE's weights, scaling and class, the same whether it was loaded in float32 or bfloat16.

    Args:
        vae: of any dtype.
        dtype: the hash that the VAE has when it is loaded in this: float16's rounding is still seen in bfloat16.
    """
    digest = hashlib.blake2b(repr(scaling(vae.config)).encode(), digest_size=16)
    if type(vae).__name__ not in ("AutoencoderKL", "PixelCodec"):  # those are in files of earlier versions
        digest.update(type(vae).__name__.encode())
    for name, tensor in sorted(vae.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} ".encode())
        rounded = tensor.detach().to("cpu", dtype).to(torch.bfloat16).clone(memory_format=torch.contiguous_format)
        digest.update(rounded.view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
