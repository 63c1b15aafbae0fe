"""Evaluate samples against a reference: ``python eval_fid.py --ckpt RUN --reference digits``.

``accelerate launch eval_fid.py …`` uses all GPUs; ``eval_fid.py reference --data … --out stats.npz`` makes a reference.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from accelerate import PartialState

from sit.checkpoint.load import load_for_sampling
from sit.checkpoint.published import FileHints
from sit.metrics.classifier import LabelClassifier
from sit.metrics.evaluate import evaluate
from sit.metrics.features import FeatureWeights, default_features, get_extractor
from sit.metrics.image_sets import GeneratedImages, open_reference, open_samples
from sit.metrics.reference import make_reference
from sit.sampling.config import SamplerConfig
from sit.sampling.images import height_and_width
from sit.utils.cli import one_line_errors
from sit.utils.compile import WORTH_IT, compile_for_sampling, should_compile
from sit.utils.device import leave_processes, pick_device, process_state
from sit.utils.errors import UserError, entry_point
from sit.utils.files import atomic_write
from sit.utils.precision import Precision, for_sampling


@dataclass
class Arguments:
    """Evaluate samples, or the samples that a checkpoint makes, against a reference."""

    reference: str
    """digits, a folder or npz of images, ADM statistics (npz with mu and sigma), or another data set"""
    ckpt: str | None = None
    """a run, a checkpoint or a published file, to sample from"""
    samples: str | None = None
    """a folder or npz of samples, or a data set, instead of --ckpt"""
    num_samples: int | None = None
    """how many; None: 50,000 of a checkpoint (1,000 on digits features), all of given samples"""
    label_order: Literal["balanced", "uniform"] = "balanced"
    """the classes of a checkpoint's samples: each as often, or drawn at random"""
    seed: int = 0
    """sample i under a seed is the same image however it is made"""
    features: str | None = None
    """digits, inception, dinov2, classifier:FOLDER; None takes digits where the reference is digits, else inception"""
    batch_size: int = 64
    """images made and evaluated at a time"""
    image_size: int | tuple[int, int] | None = None
    """side, or height and width, of a checkpoint's samples, which published files without a positional table don't
    tell, and the side that folders and data sets are cropped to; None: as the network was trained, else as they are"""
    save: str | None = None
    """an npz to keep a checkpoint's samples in; without it they never touch the disk"""
    work_dir: str | None = None
    """keeps what is done, so that the same command goes on after a crash"""
    json: str | None = None
    """a file for all the numbers"""
    vae: str | None = None
    """a VAE's name on the Hub or folder, instead of the checkpoint's or the latent cache's"""
    classifier: str | None = None
    """a folder of sit.train_classifier, which predicts the samples' classes: class accuracy"""
    precision: Precision | None = None
    """of the network; None is tf32 on GPUs, as published, and float32 elsewhere. Features are made in float32"""
    compile: bool | None = None
    """torch.compile the network, on GPUs with CUDA graphs; None does so on GPUs from 1000 network evaluations on"""
    device: str | None = None
    """None takes the accelerator, if there is one"""
    weights_files: Annotated[FeatureWeights, tyro.conf.OmitArgPrefixes] = field(default_factory=FeatureWeights)
    published: Annotated[FileHints, tyro.conf.OmitArgPrefixes] = field(default_factory=FileHints)
    sampler: Annotated[SamplerConfig, tyro.conf.OmitArgPrefixes] = field(default_factory=SamplerConfig)

    def __post_init__(self) -> None:
        if (self.ckpt is None) == (self.samples is None):
            raise UserError("give either `ckpt`, to sample from, or `samples`, a folder or npz")
        _check_counts(self, "num_samples", "batch_size")
        if self.save is not None and (Path(self.save).suffix != ".npz" or Path(self.save).exists()):
            raise UserError(f"`save={self.save}` must be a new file that ends in .npz")
        size = height_and_width(self.image_size)
        if self.samples is not None and size is not None and size[0] != size[1]:
            raise UserError(f"`image_size={size[0]} {size[1]}`: `samples` are cropped to squares; give one side")


@dataclass
class ReferenceArguments:
    """Make reference statistics in ADM's format: mu, sigma, mu_s, sigma_s and some of the images."""

    data: str
    """a folder or npz of images, a latent cache, or a data set as train.py takes it, tar files too"""
    out: str
    """the npz to write; must not exist"""
    image_size: int | None = None
    """side that folders and data sets are cropped to; None: a folder's images as they are, a data set's own size"""
    features: str = "inception"
    """inception, digits, dinov2 or classifier:FOLDER"""
    images: int = 10_000
    """how many of the images are kept, for precision and recall"""
    vae: str | None = None
    """the VAE of a latent cache; None takes the one that it names"""
    batch_size: int = 64
    """images whose features are made at a time"""
    device: str | None = None
    """None takes the accelerator, if there is one"""
    weights_files: Annotated[FeatureWeights, tyro.conf.OmitArgPrefixes] = field(default_factory=FeatureWeights)

    def __post_init__(self) -> None:
        _check_counts(self, "images", "batch_size")


def _check_counts(arguments: Arguments | ReferenceArguments, *names: str) -> None:
    for name in names:
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"`{name}` must be at least 1, not {value}")


def evaluate_samples(arguments: Arguments) -> None:
    """Evaluate what the arguments name; the main process prints the report and writes it as JSON.

    Raises:
        UserError: something that is named can't be had, or does not fit the rest.
    """
    state = process_state()
    device = pick_device(arguments.device) if arguments.device else state.device
    features = arguments.features or default_features(arguments.reference)

    # the samples, and the side of squares that the reference is cropped to
    if arguments.ckpt is not None:
        count = arguments.num_samples or (1_000 if features == "digits" else 50_000)
        samples, size = _generated(arguments, count, device, state)
    else:
        size = height_and_width(arguments.image_size)
        samples = open_samples(arguments.samples, size and size[0], arguments.vae, device)
        samples.limit(arguments.num_samples)
    side = size[0] if size is not None and size[0] == size[1] else None  # nothing is cropped to a rectangle

    # what they are measured against, and by what
    reference = open_reference(arguments.reference, side, arguments.vae, device)
    extractor = get_extractor(features, device, arguments.weights_files.of(features))
    classifier = None
    if arguments.classifier is not None:
        classifier = LabelClassifier.load(arguments.classifier, device, samples.classes, samples.class_names)

    report = evaluate(
        samples,
        reference,
        extractor,
        device=device,
        batch_size=arguments.batch_size,
        work_dir=arguments.work_dir,
        save=Path(arguments.save) if arguments.save else None,
        classifier=classifier,
    )
    if report is not None:
        print(report)
        if arguments.json:
            with atomic_write(arguments.json) as temporary:
                temporary.write_text(report.to_json())


def _generated(
    arguments: Arguments, count: int, device: torch.device, state: PartialState
) -> tuple[GeneratedImages, tuple[int, int] | None]:
    """The images that the checkpoint makes when they are asked for, and their height and width, if known."""
    size = height_and_width(arguments.image_size)
    loaded = load_for_sampling(
        arguments.ckpt,
        vae=arguments.vae,
        device=device,
        dtype=for_sampling(arguments.precision, device),
        image_size=size,
        **vars(arguments.published),
    )
    evaluations = math.ceil(count / state.num_processes / arguments.batch_size) * arguments.sampler.steps
    if should_compile(arguments.compile, loaded.device, state.print, evaluations >= WORTH_IT):
        compile_for_sampling(loaded.model)
    samples = GeneratedImages(
        loaded,
        count,
        seed=arguments.seed,
        labels=arguments.label_order,
        config=arguments.sampler,
        image_size=size,
        hints=arguments.published,
    )
    return samples, size or loaded.info.image_size


def write_reference(arguments: ReferenceArguments) -> None:
    """Make the reference that the arguments name, and say where it is.

    Raises:
        UserError: the images or the features can't be had, or the file can't be written.
    """
    state = process_state()
    device = pick_device(arguments.device) if arguments.device else state.device
    extractor = get_extractor(arguments.features, device, arguments.weights_files.of(arguments.features))
    images = open_samples(arguments.data, arguments.image_size, arguments.vae, device)
    out, making = Path(arguments.out), dict(device=device, batch_size=arguments.batch_size)
    make_reference(images, extractor, out, keep=arguments.images, **making)
    state.print(f"reference: {arguments.out}")


@entry_point
def main() -> None:
    """Make a reference if the first word is ``reference``, else evaluate."""
    making_reference = sys.argv[1:2] == ["reference"]
    with one_line_errors():
        if making_reference:
            arguments = tyro.cli(ReferenceArguments, prog="eval_fid.py reference", args=sys.argv[2:])
        else:
            arguments = tyro.cli(Arguments, prog="eval_fid.py", description=__doc__)
    try:
        (write_reference if making_reference else evaluate_samples)(arguments)
    finally:
        leave_processes()
