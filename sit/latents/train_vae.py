"""Train a small VAE for small images, which the published VAEs don't fit:

    python -m sit.train_vae --data fashion-mnist:FOLDER --out vaes/fashion-mnist

Loss: the absolute error of the image, that of its finite differences (for sharp edges), and a KL term. In training,
noise of a random level is added to the decoder's input: the decoder learns to ignore the small errors of a diffusion
model, and the encoder to use all channels.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from tqdm import trange

from sit.data.dataset import ImageData
from sit.data.factory import open_images
from sit.latents.arguments import VAEArguments, VAEConfig
from sit.latents.vae import (
    decode,
    downsampling,
    encode_moments,
    fixed_batch,
    latent_shape,
    load_vae,
    sample_posterior,
    scaling,
    to_unit,
)
from sit.utils.device import pick_device
from sit.utils.errors import UserError
from sit.utils.files import atomic_folder, refuse_used
from sit.utils.random import generator

MOST_PIXELS = 2**26
"""of the images that are measured on, all together: a thousand of 256 × 256"""
NOISE_LEVELS = (0.0, 0.1, 0.2, 0.3, 0.5)
"""standard deviations of the noise on scaled latents at which reconstructions are measured"""


def build(widths: tuple[int, ...], image_size: int) -> AutoencoderKL:
    """An AutoencoderKL of RGB images with 4 latent channels; convolutions only, so that other sizes work too."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=image_size,
        mid_block_add_attention=False,
    )


def edges(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Finite differences of images (B, 3, H, W): (B, 3, H, W − 1) along rows, (B, 3, H − 1, W) along columns."""
    return images.diff(dim=-1), images.diff(dim=-2)


def fit(
    vae: AutoencoderKL, draw: Callable[[torch.Generator], torch.Tensor], config: VAEConfig, source: torch.Generator
) -> None:
    """Train ``vae`` in place, on its device.

    Args:
        vae: the network.
        draw: returns a batch (B, 3, H, W) in [−1, 1], chosen by the generator that it is given.
        config: the optimization.
        source: CPU generator of all random numbers.
    """
    optimizer = torch.optim.AdamW(vae.parameters(), lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4)
    rise = 0.1 if config.steps > 10 else 0.05  # a tenth of ten steps is a rise that the scheduler divides by zero for
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.learning_rate, config.steps, pct_start=rise)
    bar = trange(config.steps, desc="VAE", dynamic_ncols=True)
    for step in bar:
        real = draw(source).to(vae.device).contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(real).latent_dist
        level = torch.rand(len(real), 1, 1, 1, generator=source).to(vae.device)
        level = config.latent_noise * level * posterior.mean.detach().std()
        noise = torch.randn(2, *posterior.mean.shape, generator=source).to(vae.device)
        made = vae.decode(posterior.mean + posterior.std * noise[0] + level * noise[1]).sample
        error = (made - real).abs().mean()
        edge_error = sum((a - b).abs().mean() for a, b in zip(edges(made), edges(real), strict=True))
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        loss = error + config.edge_weight * edge_error + config.kl_weight * kl
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            bar.set_postfix(error=f"{error:.4f}", kl=f"{kl:.3f}", std=f"{posterior.std.mean():.3f}")


def moments(vae: AutoencoderKL, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`sit.latents.vae.encode_moments`, of any number of images: as many at once as suit their side."""
    chunks = images.split(fixed_batch(images.shape[-1], 64, vae.device))
    mean, std = (torch.cat(part) for part in zip(*(encode_moments(vae, chunk) for chunk in chunks), strict=True))
    return mean, std


@torch.no_grad()
def center_latents(vae: AutoencoderKL, images: torch.Tensor) -> None:
    """Fold each latent channel's mean and relative spread into the 1×1 convolutions around the latents.

    Afterwards every channel has mean 0 and the same standard deviation over ``images`` (n, 3, H, W) float in [−1, 1],
    whose inverse becomes the config's ``scaling_factor``. Reconstructions stay what they were.
    """
    mean, std = moments(vae, images)
    offset = mean.mean(dim=(0, 2, 3))
    spread = (mean.var(dim=(0, 2, 3)) + std.square().mean(dim=(0, 2, 3))).sqrt()
    common = float(spread.mean())
    gain, channels = common / spread, len(offset)
    before, after = vae.quant_conv, vae.post_quant_conv
    before.bias[:channels] = (before.bias[:channels] - offset) * gain
    before.weight[:channels] *= gain[:, None, None, None]
    before.bias[channels:] += 2 * gain.log()
    after.bias += (after.weight[:, :, 0, 0] * offset).sum(dim=1)
    after.weight /= gain[None, :, None, None]
    vae.register_to_config(scaling_factor=round(1 / common, 4))


def pixels(data: ImageData, indices: np.ndarray | range | None = None) -> torch.Tensor:
    """Images of a data set, all if ``indices`` is None, as (n, 3, H, W) float32 in [−1, 1]."""
    return to_unit(torch.stack([data[index][0] for index in (range(len(data)) if indices is None else indices)]))


def reconstructions(vae: AutoencoderKL, images: torch.Tensor) -> tuple[dict[float, torch.Tensor], dict[str, float]]:
    """Posterior samples of images (n, 3, H, W) in [−1, 1], decoded with each of :data:`NOISE_LEVELS` on the latents.

    Returns:
        uint8 images (n, H, W, 3) for each level; and ``latent_std``, the standard deviation of the scaled latents, with
        ``posterior_std``, what the posterior alone has of it.
    """
    mean, std = moments(vae, images)
    source = generator(0, "measure")
    latents = sample_posterior(mean.cpu(), std.cpu(), torch.randn(mean.shape, generator=source), vae.config)
    figures = {"latent_std": float(latents.std()), "posterior_std": float(std.mean()) * scaling(vae.config)[1]}
    made = {}
    for level in NOISE_LEVELS:
        noise = torch.randn(latents.shape, generator=source)
        made[level] = decode(vae, latents + level * noise).cpu()
    return made, figures


def psnr(real: np.ndarray, made: np.ndarray) -> float:
    """Peak signal-to-noise ratio of uint8 images, in decibels."""
    return 10 * math.log10(1 / np.square((made.astype(np.float64) - real) / 255).mean())


README = """# A small VAE of {data}

diffusers' `AutoencoderKL`, {parameters:,} parameters: {side}×{side} RGB → {shape} latents. Trained by

    {command}

Measured on {count} held-out images: posterior samples decoded to uint8.

| noise added to the scaled latents | PSNR |
|---|---|
{rows}

Latents: standard deviation {latent_std:.3f} after scaling, of which the posterior's own is {posterior_std:.3f}.
"""


def train(arguments: VAEArguments) -> None:
    """Train a VAE as ``arguments`` say, measure it on held-out images and write it with its README.

    Raises:
        UserError: the output folder is in use or can't be made, an image can't be read, or the VAE diverged.
    """
    refuse_used(arguments.out, "out", but=None)
    with atomic_folder(arguments.out) as folder:  # before the training, which a folder that can't be made would lose
        said = _train(arguments, folder)
    print("\n".join(said))


def _train(arguments: VAEArguments, folder: Path) -> list[str]:
    """What :func:`train` does, into a folder that is there; the lines that it ends with."""
    data = open_images(arguments.data, arguments.image_size)
    fitted = np.arange(len(data))
    if arguments.heldout is None:
        if len(data) < 2:
            raise UserError(f"`data={arguments.data}` has one image, which is held out: give more, or `heldout`")
        fitted, heldout = fitted[fitted % 100 != 0], pixels(data, fitted[::100][: _at_most(1000, data)])
    else:
        other = open_images(arguments.heldout, data.image_size)
        heldout = pixels(other, np.linspace(0, len(other) - 1, min(len(other), _at_most(1000, other))).astype(int))
    device = pick_device(arguments.device)
    torch.manual_seed(arguments.seed)
    vae = build(arguments.widths, data.image_size).to(device, memory_format=torch.channels_last).train()
    shape = latent_shape(vae, data.image_size)

    def draw(source: torch.Generator) -> torch.Tensor:
        return pixels(data, fitted[torch.randint(len(fitted), (arguments.batch_size,), generator=source).numpy()])

    source = generator(arguments.seed, "vae")
    fit(vae, draw, arguments, source)
    some = fitted[torch.randint(len(fitted), (min(_at_most(2000, data), len(fitted)),), generator=source).numpy()]
    if not all(tensor.isfinite().all() for tensor in vae.state_dict().values()):
        raise UserError(f"the VAE diverged at `learning_rate={arguments.learning_rate:g}`: take a lower one")
    center_latents(vae.eval(), pixels(data, some))
    vae.save_pretrained(folder)
    made, figures = reconstructions(load_vae(folder, device), heldout)
    real = heldout.add(1).mul(127.5).round().permute(0, 2, 3, 1).numpy()
    rows = [f"| {level or 'none'} | {psnr(real, images.numpy()):.1f} dB |" for level, images in made.items()]
    text = README.format(
        data=arguments.data, parameters=sum(p.numel() for p in vae.parameters()), side=data.image_size,
        shape="×".join(map(str, shape)), command="python -m sit.train_vae " + " ".join(sys.argv[1:]),
        count=len(heldout), rows="\n".join(rows), **figures,
    )  # fmt: skip
    (folder / "README.md").write_text(text)
    what = f"train on its latents by --vae {arguments.out} (downsampling {downsampling(vae)})"
    return [*rows, f"written to {arguments.out}; {what}"]


def _at_most(count: int, data: ImageData) -> int:
    """``count`` images, or as many as have :data:`MOST_PIXELS` together."""
    return max(1, min(count, MOST_PIXELS // data.image_size**2))
