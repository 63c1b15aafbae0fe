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

from sit.checkpoint.load import load_for_sampling
from sit.checkpoint.published import FileHints
from sit.sampling.config import SamplerConfig
from sit.sampling.images import (
    SampleWriter,
    balanced_labels,
    check_labels,
    height_and_width,
    latent_shape_for,
    sample_images,
)
from sit.utils.cli import one_line_errors
from sit.utils.compile import WORTH_IT, compile_for_sampling, should_compile
from sit.utils.device import pick_device
from sit.utils.errors import UserError, entry_point
from sit.utils.files import atomic_folder
from sit.utils.image_grid import labeled_grid, save_png
from sit.utils.precision import Precision, for_sampling

GRID_LIMIT = 100
"""images in the grid at most"""


@dataclass
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


def sample(arguments: Arguments) -> None:
    if arguments.num_samples is not None and arguments.num_samples < 1:
        raise UserError(f"--num-samples must be at least 1, not {arguments.num_samples}")
    if arguments.batch_size < 1:
        raise UserError(f"--batch-size must be at least 1, not {arguments.batch_size}")
    device, size = pick_device(arguments.device), height_and_width(arguments.image_size)
    loaded = load_for_sampling(
        arguments.ckpt,
        vae=arguments.vae,
        device=device,
        dtype=for_sampling(arguments.precision, device),
        image_size=size,
        **vars(arguments.published),
    )
    every = range(loaded.model.config.num_classes)
    labels = check_labels(arguments.labels, len(every)) or list(every if arguments.num_samples else every[:10])
    count = arguments.num_samples or 4 * len(labels)
    folder = Path(arguments.out or f"samples/{time.strftime('%Y%m%d-%H%M%S')}-seed{arguments.seed}")
    indices = torch.arange(count)
    evaluations = math.ceil(count / arguments.batch_size) * arguments.sampler.steps
    if should_compile(arguments.compile, loaded.device, print, evaluations >= WORTH_IT):
        compile_for_sampling(loaded.model)
    latent_shape_for(loaded, size)  # a size that doesn't fit is told before anything is made

    with (
        atomic_folder(folder) as place,
        tqdm(total=count, desc="sample", unit="image", unit_scale=True, dynamic_ncols=True) as bar,
    ):
        writer = SampleWriter(place, count, keep=arguments.num_samples is not None)

        def on_step(step: int, total: int | None, latents: torch.Tensor, t: float | torch.Tensor) -> None:
            """Advance by this step's share of the images that are made together; adaptive solvers tell no total."""
            if total is not None:
                bar.update(min(len(latents) / total, count - bar.n))

        for batch in sample_images(
            loaded,
            indices,
            balanced_labels(indices.tolist(), labels),
            seed=arguments.seed,
            config=arguments.sampler,
            image_size=size,
            batch_size=arguments.batch_size,
            on_step=on_step,
        ):
            writer.add(batch)
            bar.update(writer.done - bar.n)
        names = loaded.info.label_names
        shown = writer.labels[:GRID_LIMIT].tolist()
        captions = [names[label] if label < len(names) else str(label) for label in shown]
        columns = min(len(labels), 10)
        save_png(labeled_grid(writer.images[:GRID_LIMIT], captions, columns), place / "grid.png")
        writer.finish()
    print(f"grid:    {folder / 'grid.png'}")
    if arguments.num_samples is not None:
        print(f"samples: {folder / 'samples.npz'} and {count} PNGs")


@entry_point
def main() -> None:
    with one_line_errors():
        arguments = tyro.cli(Arguments, prog="sample.py")
    sample(arguments)
