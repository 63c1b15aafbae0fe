"""Train the small VAE of the embedded digits, measure it on held-out digits and write it with its README.

    python -m sit.assets.make_digits_vae --output-dir sit/assets/digits-vae

Trained on the 1,437 digits of ``digits:train``. Loss: absolute error, the same of the image's finite differences
(sharp edges), and a KL term. Noise of a random level is added to the latents that the decoder sees in training, so
that the small errors a diffusion model makes don't show, and the encoder spreads what it says over all channels.
"""

from __future__ import annotations

import json
import math
import platform
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from diffusers import AutoencoderKL
from sklearn.svm import SVC
from tqdm import trange

from sit.data import ImageData, open_images, shrink_digits
from sit.errors import door
from sit.files import atomic_folder
from sit.latents import DIGITS_VAE, decode, encode_moments, latent_shape, load_vae, sample_posterior, scaling, to_unit
from sit.randomness import generator


@dataclass
class Config:
    """Everything that decides the weights."""

    output_dir: Path = DIGITS_VAE
    """replaced by the new VAE"""
    steps: int = 900
    batch_size: int = 64
    lr: float = 3e-3
    kl_weight: float = 3e-3
    """weight of the KL divergence, a mean over latent elements, beside a mean absolute error over pixels"""
    edge_weight: float = 1.0
    latent_noise: float = 0.5
    """the decoder is trained with noise of up to this many standard deviations of the latents"""
    widths: tuple[int, ...] = (8, 24, 48)
    seed: int = 0


def build(widths: tuple[int, ...]) -> AutoencoderKL:
    """32×32 RGB → 4×8×8 latents; convolutions only, so any multiple of 4 works as a size."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
        mid_block_add_attention=False,
    )


def warp(images: torch.Tensor, source: torch.Generator) -> torch.Tensor:
    """Half of the images turned, scaled, sheared and shifted a little: 1,437 digits alone are soon known by heart."""
    count = len(images)
    angle, shear, *moves = (torch.rand(6, count, generator=source) - 0.5).unbind()
    angle, shear = angle * 0.5, shear * 0.3
    scale_x, scale_y, shift_x, shift_y = 1 + moves[0] * 0.3, 1 + moves[1] * 0.3, moves[2] * 0.25, moves[3] * 0.25
    rows = [
        torch.stack([scale_x * angle.cos(), -angle.sin() + shear, shift_x], dim=1),
        torch.stack([angle.sin(), scale_y * angle.cos(), shift_y], dim=1),
    ]
    grid = F.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
    moved = F.grid_sample(images + 1, grid, mode="bicubic", align_corners=False).clamp(0, 2) - 1
    return torch.where(torch.rand(count, 1, 1, 1, generator=source) < 0.5, moved, images)


def edges(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return images.diff(dim=-1), images.diff(dim=-2)


def train(vae: AutoencoderKL, images: torch.Tensor, config: Config) -> None:
    """Fit ``vae`` to ``images`` (n, 3, 32, 32) in [−1, 1]."""
    source = generator(config.seed, "digits-vae")
    optimizer = torch.optim.AdamW(vae.parameters(), lr=config.lr, betas=(0.9, 0.99), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, config.steps, pct_start=0.1)
    bar = trange(config.steps, desc="digits VAE")
    for step in bar:
        chosen = torch.randint(len(images), (config.batch_size,), generator=source)
        real = warp(images[chosen], source).contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(real).latent_dist
        level = config.latent_noise * torch.rand(len(real), 1, 1, 1, generator=source) * posterior.mean.detach().std()
        noise = torch.randn(2, *posterior.mean.shape, generator=source)
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


@torch.no_grad()
def centre_latents(vae: AutoencoderKL, images: torch.Tensor) -> None:
    """Fold each latent channel's mean and relative spread into the 1×1 convolutions around the latents.

    After it every channel has mean 0 and the same standard deviation over ``images``, whose inverse becomes the
    config's ``scaling_factor``; what the VAE computes from image to image is unchanged.
    """
    mean, std = encode_moments(vae, images)
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


def pixels(data: ImageData) -> torch.Tensor:
    return to_unit(torch.stack([data[index][0] for index in range(len(data))]))


def measure(vae: AutoencoderKL) -> dict[str, float]:
    """Reconstruction of the held-out digits from posterior samples, with and without noise on the latents."""
    fitted, heldout = open_images("digits:train"), open_images("digits:heldout")
    real = np.stack([np.asarray(heldout.picture(index)) for index in range(len(heldout))])
    judge = SVC(C=10).fit(shrink_digits(np.stack([np.asarray(x) for x in fitted.source.images])) / 16, fitted.labels)
    named = judge.predict(shrink_digits(real) / 16)
    mean, std = encode_moments(vae, pixels(heldout))
    source = generator(0, "measure")
    latents = sample_posterior(mean, std, torch.randn(mean.shape, generator=source), vae.config)
    figures = {"svm_accuracy_on_real": float((named == heldout.labels).mean())}
    figures |= {"latent_std": float(latents.std()), "posterior_std": float(std.mean()) * scaling(vae.config)[1]}
    for level in (0.0, 0.1, 0.2, 0.3, 0.5):
        made = decode(vae, latents + level * torch.randn(latents.shape, generator=source)).numpy()
        mse = float(np.square((made.astype(np.float64) - real) / 255).mean())
        again = judge.predict(shrink_digits(made) / 16)
        suffix = f"_noise_{level}" if level else ""
        figures |= {
            f"mse{suffix}": mse,
            f"psnr_db{suffix}": 10 * math.log10(1 / mse),
            f"svm_agreement{suffix}": float((again == named).mean()),
        }
    return figures


README = """# The digits' VAE

diffusers' `AutoencoderKL`, {parameters:,} parameters (float16, {megabytes:.2f} MB): 32×32 RGB → 4×8×8 latents.
Trained on the 1,437 digits of `digits:train` only, in {minutes:.1f} minutes on {threads} CPU threads, by

    {command}

Measured on the 360 held-out digits, posterior samples decoded to uint8 (values 0…1). *Agreement*: how often an
RBF SVM, fitted on the real 8×8 training digits (held-out accuracy {svm_accuracy_on_real:.1%}), names the 8×8 area
average of the reconstruction as it names the original's.

| noise added to the scaled latents | MSE | PSNR | agreement |
|---|---|---|---|
{rows}

Latents: standard deviation {latent_std:.3f} after scaling, of which the posterior's own is {posterior_std:.3f}.
Everything that decided the weights: `{settings}`.
"""


def write(vae: AutoencoderKL, config: Config, seconds: float) -> dict[str, float]:
    """Save ``vae`` (float16) with its README in place of ``config.output_dir``; answers the figures."""
    parameters = sum(parameter.numel() for parameter in vae.parameters())
    command = "python -m sit.assets.make_digits_vae " + " ".join(sys.argv[1:])
    with atomic_folder(config.output_dir.with_name(config.output_dir.name + ".new")) as folder:
        vae.half().save_pretrained(folder)
        figures = measure(load_vae(folder))
        rows = [
            f"| {level or 'none'} | {figures['mse' + end]:.5f} | {figures['psnr_db' + end]:.1f} dB |"
            f" {figures['svm_agreement' + end]:.1%} |"
            for level, end in ((level, f"_noise_{level}" if level else "") for level in (0, 0.1, 0.2, 0.3, 0.5))
        ]
        settings = {name: value for name, value in vars(config).items() if name != "output_dir"}
        size = (folder / "diffusion_pytorch_model.safetensors").stat().st_size / 1e6
        text = README.format(
            parameters=parameters, megabytes=size, minutes=seconds / 60, threads=torch.get_num_threads(),
            command=command.strip(), rows="\n".join(rows), settings=json.dumps(settings), **figures,
        )  # fmt: skip
        (folder / "README.md").write_text(text)
    shutil.rmtree(config.output_dir, ignore_errors=True)
    config.output_dir.with_name(config.output_dir.name + ".new").rename(config.output_dir)
    return figures


@door
def main() -> None:
    config = tyro.cli(Config, description=__doc__)
    torch.manual_seed(config.seed)
    vae = build(config.widths).to(memory_format=torch.channels_last).train()
    assert latent_shape(vae, 32) == (4, 8, 8)
    images = pixels(open_images("digits:train"))
    started = time.time()
    train(vae, images, config)
    centre_latents(vae.eval(), images)
    figures = write(vae, config, time.time() - started)
    print(json.dumps({name: round(value, 5) for name, value in figures.items()}, indent=1), platform.machine())
    print(f"written to {config.output_dir}")


if __name__ == "__main__":
    main()
