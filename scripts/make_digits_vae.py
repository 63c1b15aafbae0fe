"""Train the small VAE of the embedded digits, measure it on held-out digits and write it with its README.

    python scripts/make_digits_vae.py --output-dir sit/assets/digits-vae

Trained on the 1,437 digits of ``digits:train`` by the code of ``python -m sit.train_vae``. Besides the PSNR, it is
measured how often an SVM, fitted on real digits, classifies a reconstruction as its original.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from diffusers import AutoencoderKL
from replacing import refuse_others
from sklearn.svm import SVC

from sit.data.digits import shrink_digits
from sit.data.factory import open_images
from sit.latents.train_vae import NOISE_LEVELS, VAEConfig, build, center_latents, fit, pixels, psnr, reconstructions
from sit.latents.vae import DIGITS_VAE, latent_shape, load_vae
from sit.utils.errors import entry_point
from sit.utils.files import replaced_folder
from sit.utils.random import generator

TITLE = "# The digits' VAE"
FILES = ("README.md", "config.json", "diffusion_pytorch_model.safetensors")


@dataclass
class Config(VAEConfig):
    """Everything that decides the weights."""

    output_dir: Path = DIGITS_VAE
    """a new folder, or a digits' VAE made before, which the new one replaces"""


def warp(images: torch.Tensor, source: torch.Generator) -> torch.Tensor:
    """Half of the images rotated, scaled, sheared and shifted a little, against overfitting on 1,437 digits.

    Images (n, 3, H, W) in [−1, 1]; the same shape and range come back.
    """
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


def measure(vae: AutoencoderKL) -> dict[str, float]:
    """Reconstruction of the held-out digits from posterior samples, with and without noise on the latents."""
    fitted, heldout = open_images("digits:train"), open_images("digits:heldout")
    real = np.stack([np.asarray(heldout.image(index)) for index in range(len(heldout))])
    classifier = SVC(C=10).fit(
        shrink_digits(np.stack([np.asarray(x) for x in fitted.source.images])) / 16, fitted.labels
    )
    named = classifier.predict(shrink_digits(real) / 16)
    made, figures = reconstructions(vae, pixels(heldout))
    figures["svm_accuracy_on_real"] = float((named == heldout.labels).mean())
    for level, images in made.items():
        again = classifier.predict(shrink_digits(images.numpy()) / 16)
        figures[f"psnr_db_{level}"] = psnr(real, images.numpy())
        figures[f"svm_agreement_{level}"] = float((again == named).mean())
    return figures


README = """{title}

diffusers' `AutoencoderKL`, {parameters:,} parameters (float16, {megabytes:.2f} MB): 32×32 RGB → 4×8×8 latents.
Trained on the 1,437 digits of `digits:train` only, in {minutes:.1f} minutes on {threads} CPU threads, by

    {command}

Measured on the 360 held-out digits, posterior samples decoded to uint8. *Agreement*: how often an
RBF SVM, fitted on the real 8×8 training digits (held-out accuracy {svm_accuracy_on_real:.1%}), names the 8×8 area
average of the reconstruction as it names the original's.

| noise added to the scaled latents | PSNR | agreement |
|---|---|---|
{rows}

Latents: standard deviation {latent_std:.3f} after scaling, of which the posterior's own is {posterior_std:.3f}.
Everything that decided the weights: `{settings}`.
"""


def write(vae: AutoencoderKL, config: Config, seconds: float) -> dict[str, float]:
    """Save ``vae`` (float16) with its README in place of ``config.output_dir``; returns the figures."""
    parameters = sum(parameter.numel() for parameter in vae.parameters())
    command = "python scripts/make_digits_vae.py " + " ".join(sys.argv[1:])
    with replaced_folder(config.output_dir) as folder:
        vae.half().save_pretrained(folder)
        figures = measure(load_vae(folder))
        rows = [
            f"| {level or 'none'} | {figures[f'psnr_db_{level}']:.1f} dB | {figures[f'svm_agreement_{level}']:.1%} |"
            for level in NOISE_LEVELS
        ]
        settings = {name: value for name, value in vars(config).items() if name != "output_dir"}
        size = (folder / FILES[-1]).stat().st_size / 1e6
        text = README.format(
            title=TITLE, parameters=parameters, megabytes=size, minutes=seconds / 60, threads=torch.get_num_threads(),
            command=command.strip(), rows="\n".join(rows), settings=json.dumps(settings), **figures,
        )  # fmt: skip
        (folder / "README.md").write_text(text)
    return figures


@entry_point
def main() -> None:
    config = tyro.cli(Config, description=__doc__)
    refuse_others(config.output_dir, TITLE, FILES)
    torch.manual_seed(config.seed)
    vae = build(config.widths, 32).to(memory_format=torch.channels_last).train()
    assert latent_shape(vae, 32) == (4, 8, 8)
    images = pixels(open_images("digits:train"))

    def draw(source: torch.Generator) -> torch.Tensor:
        return warp(images[torch.randint(len(images), (config.batch_size,), generator=source)], source)

    started = time.time()
    fit(vae, draw, config, generator(config.seed, "digits-vae"))
    center_latents(vae.eval(), images)
    figures = write(vae, config, time.time() - started)
    print(json.dumps({name: round(value, 5) for name, value in figures.items()}, indent=1), platform.machine())
    print(f"written to {config.output_dir}")


if __name__ == "__main__":
    main()
