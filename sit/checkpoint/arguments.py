"""What ``python -m sit.checkpoint`` takes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from sit.checkpoint.hints import Hints


@dataclass
class Convert:
    """Write a checkpoint in another layout. Weights are never changed in value; there and back is bitwise."""

    source: tyro.conf.Positional[Path]
    """a published .pt or .safetensors file, or a run or checkpoint folder of ours"""
    target: tyro.conf.Positional[Path]
    """what to write: a folder in our layout, else a .pt or .safetensors file; must not exist"""
    layout: Literal["ours", "published", "training", "repa"] = "ours"
    """ours: a diffusers folder. published: the bare state dict of SiT, of ATConv's SiT variant and of the hybrid.
    training: the same inside a training checkpoint (model, ema, args). repa: the bare state dict of ATConv's REPA
    variant"""
    vae: str | None = None
    """in our layout: the VAE to name, a Hub name, or a folder to take in"""
    hints: Annotated[Hints, tyro.conf.arg(name="")] = field(default_factory=Hints)


@dataclass
class Inspect:
    """Print what a file or folder is."""

    path: tyro.conf.Positional[Path]
    """any weights file, checkpoint or run"""
    hints: Annotated[Hints, tyro.conf.arg(name="")] = field(default_factory=Hints)


@dataclass
class ConvertVAE:
    """Write a published autoencoder in latent diffusion's layout, such as VA-VAE's f16d32, as a VAE's folder."""

    source: tyro.conf.Positional[Path]
    """a .pt, .ckpt or .safetensors file with encoder.down.…, decoder.up.…"""
    target: tyro.conf.Positional[Path]
    """folder to write; must not exist"""
    latents_stats: Path | None = None
    """a file with the mean and std of each channel, as LightningDiT's latents_stats.pt; they go into the config"""
    scaling_factor: float = 1.0
    """what latents are multiplied by, beside the statistics; 0.18215 for Stable Diffusion's"""
