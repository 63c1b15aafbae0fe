"""What ``python -m sit.latents`` and ``python -m sit.train_vae`` take."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from sit.utils.errors import UserError
from sit.utils.threads import CpuThreads

SHARD_SIZE = 2**17
"""images in one file: 4 GiB at 4×32×32, ten files for ImageNet"""
SAME = 0.02
"""of the latents' standard deviations: another device's rounding, and float16's, come to far less"""


@dataclass
class Encode:
    """Encode a data set into a latent cache; started again after a crash, it continues where it stopped."""

    out: Path
    """folder of the cache"""
    data: str = "digits"
    """digits, a folder with one subfolder a class, ImageNet's tar, or another source (see sit.data.factory)"""
    vae: str = "digits"
    """digits, none (pixels), a VAE's folder, or a Hub name such as stabilityai/sd-vae-ft-ema"""
    image_size: int | None = None
    """side in pixels; the source's own if not given (folders and tars 256, digits 32)"""
    flip: bool = True
    """also encode every image flipped left to right, for training with flips"""
    batch_size: int = 32
    """images given to the VAE at once"""
    workers: int = 2
    """processes, for each encoding one, that read and crop images"""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """what the VAE computes in"""
    chunk: int = 512
    """images between two notes in the journal: the most that a crash costs each process"""
    shard_size: int = SHARD_SIZE
    """images in one file"""
    threads: Annotated[CpuThreads, tyro.conf.OmitArgPrefixes] = field(default_factory=CpuThreads)


@dataclass
class Verify:
    """Compare all checksums of a cache, then encode a random subset of its images again and compare."""

    cache: Annotated[Path, tyro.conf.Positional]
    """folder of the cache"""
    data: str | None = None
    """where the images are now, if they were moved"""
    vae: str | None = None
    """where the VAE is now, if it was moved"""
    images: int = 64
    """so many entries, drawn at random"""
    seed: int = 0
    tolerance: float = SAME
    """largest root-mean-square difference of an entry, in units of the latents' standard deviation"""
    threads: Annotated[CpuThreads, tyro.conf.OmitArgPrefixes] = field(default_factory=CpuThreads)


@dataclass
class Measure:
    """Measure the mean and standard deviation of a data set's latents before they are shifted and scaled."""

    data: str = "digits"
    """digits, a folder with one subfolder a class, ImageNet's tar, or another source (see sit.data.factory)"""
    vae: str = "none"
    """none or none:channels=1 for pixels; or a VAE's name or folder"""
    image_size: int | None = None
    """side in pixels; the source's own if not given (folders and tars 256, digits 32)"""
    images: int = 10_000
    """so many, drawn at random, or all if there are fewer"""
    seed: int = 0
    threads: Annotated[CpuThreads, tyro.conf.OmitArgPrefixes] = field(default_factory=CpuThreads)


@dataclass
class VAEConfig:
    """Everything that decides the weights, besides the data."""

    steps: int = 900
    batch_size: int = 64
    learning_rate: float = 3e-3
    kl_weight: float = 3e-3
    """weight of the KL divergence (mean over latent elements) against the absolute error (mean over pixels)"""
    edge_weight: float = 1.0
    """weight of the finite differences' absolute error against the image's"""
    latent_noise: float = 0.5
    """the decoder is trained with noise of up to this many standard deviations of the latents"""
    widths: tuple[int, ...] = (8, 24, 48)
    """channels at each resolution, the image's first; each after it halves the side"""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"`{name}={getattr(self, name)}` must be positive")
        for name in ("kl_weight", "edge_weight", "latent_noise"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"`{name}={getattr(self, name)}` must be 0 or more")
        if not self.widths or any(width < 4 or width % 4 for width in self.widths):
            raise UserError(f"`widths={' '.join(map(str, self.widths))}`: they must be multiples of 4")


@dataclass
class VAEArguments(VAEConfig):
    """Train a small VAE on a data set and write it as a diffusers folder, with a README of how well it reconstructs."""

    data: str = "digits:train"
    """images: digits, a folder with one subfolder a class, a tar, or another source (see sit.data.factory)"""
    heldout: str | None = None
    """images to measure it on; None takes every hundredth one of `data`, which are then not trained on"""
    image_size: int | None = None
    """side in pixels; None for the source's own"""
    out: Path = Path("vaes/new")
    """new folder"""
    device: str | None = None
    """None takes the accelerator, if there is one"""
    threads: Annotated[CpuThreads, tyro.conf.OmitArgPrefixes] = field(default_factory=CpuThreads)
