"""sample.py's command line: from a checkpoint to images on disk."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
import tyro
from tqdm import tqdm

from sit.checkpoint.load import Loaded, load_for_sampling
from sit.checkpoint.published import FileHints
from sit.latents.vae import decode
from sit.sampling.config import OnStep, SamplerConfig
from sit.sampling.images import (
    ImageBatch,
    balanced_labels,
    check_finite,
    check_labels,
    height_and_width,
    latent_shape_for,
)
from sit.sampling.sampler import generate
from sit.sampling.writer import SampleWriter
from sit.utils.cli import one_line_errors
from sit.utils.compile import WORTH_IT, compile_for_sampling, should_compile
from sit.utils.device import pick_device
from sit.utils.errors import UserError, entry_point
from sit.utils.files import atomic_folder
from sit.utils.precision import Precision, for_sampling


@dataclass(frozen=True)
class Arguments:
    """Sample images from a checkpoint; the network, its VAE and its classes are read from it."""

    ckpt: str
    """a run's folder (its newest whole checkpoint), a checkpoint's folder, or a published .pt file"""
    out: str | None = None
    """new folder for the images; None makes one under samples/"""
    num_samples: int | None = None
    """how many images, kept as single PNGs and in samples.npz; None makes only a grid of four of each label"""
    labels: tuple[int, ...] = ()
    """classes to sample, in turn; none given means all (for the grid: the first ten)"""
    seed: int = 0
    """sample i under a seed is the same image however many are made at a time"""
    batch_size: int = 64
    """images made at a time"""
    image_size: int | tuple[int, int] | None = None
    """side, or height and width; None as the network was trained (some published files don't tell: give it then)"""
    vae: str | None = None
    """a VAE's name on the Hub or folder, instead of the checkpoint's"""
    precision: Precision | None = None
    """of the network; None is tf32 on GPUs, as published, and float32 elsewhere. The sampler integrates in float32"""
    compile: bool | None = None
    """torch.compile the network, on GPUs with CUDA graphs; None does so on GPUs from 1000 network evaluations on"""
    device: str | None = None
    """None takes the accelerator, if there is one"""
    published: Annotated[FileHints, tyro.conf.OmitArgPrefixes] = field(default_factory=FileHints)
    sampler: Annotated[SamplerConfig, tyro.conf.OmitArgPrefixes] = field(default_factory=SamplerConfig)

    def __post_init__(self) -> None:
        for name in ("num_samples", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"`{name}` must be at least 1, not {value}")


def sample(arguments: Arguments) -> None:
    """Sample images from a checkpoint into a new folder, and print where they are."""
    loaded = load(arguments)
    labels = labels_in_turn(arguments, loaded)
    count = arguments.num_samples or 4 * len(labels)
    indices, wanted = torch.arange(count), balanced_labels(range(count), labels)
    shape = latent_shape_for(loaded, height_and_width(arguments.image_size))
    compile_if_worth_it(arguments, loaded, count)
    folder = Path(arguments.out or f"samples/{time.strftime('%Y%m%d-%H%M%S')}-seed{arguments.seed}")

    with atomic_folder(folder) as place, progress_bar(count) as bar:
        writer = SampleWriter(place, count, keep=arguments.num_samples is not None)
        for done, latents in generate(
            loaded.model,
            loaded.transport,
            indices,
            wanted,
            seed=arguments.seed,
            config=arguments.sampler,
            latent_shape=shape,
            device=loaded.device,
            batch_size=arguments.batch_size,
            on_step=advancing(bar, count),
        ):
            check_finite(loaded, latents, done, wanted[done], seed=arguments.seed, config=arguments.sampler)
            writer.add(ImageBatch(done, wanted[done], decode(loaded.vae, latents).cpu()))
            bar.update(writer.done - bar.n)
        writer.save_grid(loaded.info.label_names, columns=min(len(labels), 10))
        writer.finish()

    print(f"grid:    {folder / 'grid.png'}")
    if arguments.num_samples is not None:
        print(f"samples: {folder / 'samples.npz'} and {count} PNGs")


def load(arguments: Arguments) -> Loaded:
    """The checkpoint on its device, in its precision."""
    device = pick_device(arguments.device)
    return load_for_sampling(
        arguments.ckpt,
        vae=arguments.vae,
        device=device,
        dtype=for_sampling(arguments.precision, device),
        image_size=height_and_width(arguments.image_size),
        **vars(arguments.published),
    )


def labels_in_turn(arguments: Arguments, loaded: Loaded) -> list[int]:
    """The classes asked for; without any, all of them, or the first ten for a grid alone."""
    every = range(loaded.model.config["num_classes"])
    return check_labels(arguments.labels, len(every)) or list(every if arguments.num_samples else every[:10])


def compile_if_worth_it(arguments: Arguments, loaded: Loaded, count: int) -> None:
    """Compile the network as ``compile`` says; None compiles it if it is evaluated often enough."""
    evaluations = math.ceil(count / arguments.batch_size) * arguments.sampler.steps
    if should_compile(arguments.compile, loaded.device, print, evaluations >= WORTH_IT):
        compile_for_sampling(loaded.model)


def progress_bar(count: int) -> tqdm:
    """A bar that counts images."""
    return tqdm(total=count, desc="sample", unit="image", unit_scale=True, dynamic_ncols=True)


def advancing(bar: tqdm, count: int) -> OnStep:
    """Adds a step's share of the images made together to a bar of ``count``; adaptive solvers tell no total."""

    def on_step(step: int, total: int | None, latents: torch.Tensor, t: float | torch.Tensor) -> None:
        if total is not None:
            bar.update(min(len(latents) / total, count - bar.n))

    return on_step


@entry_point
def main() -> None:
    with one_line_errors():
        arguments = tyro.cli(Arguments, prog="sample.py")
    sample(arguments)
