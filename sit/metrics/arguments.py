"""What eval_fid.py and ``python -m sit.train_classifier`` take."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from sit.checkpoint.hints import FileHints
from sit.sampling.config import LabelOrder, SamplerConfig, check_guide, check_heeded, height_and_width
from sit.utils.choices import Precision
from sit.utils.errors import UserError
from sit.utils.threads import CpuThreads


@dataclass(frozen=True)
class FeatureWeights:
    """Where the weights are of features that do not come with this repository."""

    inception_weights: str | None = None
    """the Inception weights file; None looks in torch-fidelity's usual place"""
    dinov2_weights: str | None = None
    """a file of timm's DINOv2 weights; None lets timm fetch or find them"""

    def of(self, features: str) -> str | None:
        """The file that is named for these features, if any."""
        return {"inception": self.inception_weights, "dinov2": self.dinov2_weights}.get(features)


def default_features(data: str) -> str:
    """The features for images of ``data``, named as :func:`sit.data.factory.open_images` takes it."""
    return "digits" if data.split(":")[0] == "digits" else "inception"


def check_weights_heeded(weights: FeatureWeights, features: Sequence[str]) -> None:
    """Raise UserError if a file of weights is named, and its features are not among those that are made.

    Args:
        weights: the files.
        features: as :func:`sit.metrics.features.get_extractors` takes them.
    """
    kinds = {name.partition(":")[0] for name in features}
    for one in dataclasses.fields(weights):
        kind, value = one.name.removesuffix("_weights"), getattr(weights, one.name)
        if value is not None and kind not in kinds:
            raise UserError(f"`{one.name}={value}` plays no part without `features={kind}`: leave it out, or give that")


def check_vae_heeded(vae: str | None, *images: str | None) -> None:
    """Raise UserError if a VAE is named, and none of the ``images`` is a latent cache that it could decode."""
    if vae is None:
        return
    from sit.latents.cache import is_cache  # takes NumPy

    if not any(is_cache(place) for place in images if place is not None):
        raise UserError(f"`vae={vae}` plays no part, as nothing is a latent cache: leave it out")


AS_THEY_ARE = (".npz", ".pkl", ".pickle", ".pt")
"""endings of what is never cropped"""


def check_image_size_heeded(size: tuple[int, ...] | int | None, *images: str | None) -> None:
    """Raise UserError if an image size is given, and none of the ``images`` is cropped to it."""
    if size is None:
        return
    from sit.latents.cache import is_cache  # takes NumPy

    for place in filter(None, images):
        path = Path(place)
        if path.suffix not in AS_THEY_ARE and not is_cache(path) and not (path / "samples.npz").is_file():
            return
    said = " ".join(map(str, size)) if isinstance(size, tuple) else size
    raise UserError(
        f"`image_size={said}` plays no part: the images of npz files and latent caches are as they are; leave it out"
    )


@dataclass
class Arguments:
    """Evaluate samples, or the samples that a checkpoint makes, against a reference."""

    reference: str
    """digits, a folder or npz of images, statistics (ADM's npz, EDM2's pkl), or another data set"""
    ckpt: str | None = None
    """a run, a checkpoint or a published file, to sample from"""
    ema: float | None = None
    """relative length of the average to sample with, such as 0.05 or 0.1, reconstructed from the snapshots of a run
    with post-hoc EMA; None takes the weights that the checkpoint stores, its plain moving average"""
    guide: str | None = None
    """autoguidance of --ckpt: a second, worse checkpoint to guide away from by --cfg-scale"""
    samples: str | None = None
    """a folder or npz of samples, or a data set, instead of --ckpt"""
    num_samples: int | None = None
    """how many; None: 50,000 of a checkpoint (1,000 on digits features), all of given samples. Of more given ones they
    are drawn at random, always the same"""
    label_order: LabelOrder = "balanced"
    """the classes of a checkpoint's samples: each as often, or drawn at random as in the papers"""
    seed: int = 0
    """sample i under a seed is the same image however it is made"""
    features: tuple[str, ...] = ()
    """digits, inception, dinov2, classifier:FOLDER; several are made of the same samples. None given takes digits where
    the reference is digits, else inception"""
    batch_size: int = 64
    """images made and evaluated at a time, at most 512"""
    image_size: int | tuple[int, int] | None = None
    """side, or height and width, of a checkpoint's samples, which published files without a positional table don't
    tell, and the side that folders and data sets are cropped to; None: as the network was trained, else as they are"""
    save: str | None = None
    """an npz to keep a checkpoint's samples in; without it they never touch the disk"""
    work_dir: str | None = None
    """keeps what is done: the same command goes on after a crash, and sit.compare reads it. Several may share one"""
    json: str | None = None
    """a file for all the numbers, with the machine, the date and the command"""
    vae: str | None = None
    """a VAE's name on the Hub or folder, instead of the checkpoint's or the latent cache's"""
    classifier: str | None = None
    """a folder of sit.train_classifier, which predicts the samples' classes: class accuracy"""
    training_data: str | None = None
    """images that the network was trained on, to look for copies of them among the samples: a data set, as --reference
    takes it, whose features fit into memory"""
    precision: Precision | None = None
    """of the network; None is tf32 on GPUs, as published, and float32 elsewhere. Features are made in float32"""
    compile: bool | None = None
    """torch.compile the network, on GPUs with CUDA graphs; None does so on GPUs from 1000 network evaluations on"""
    device: str | None = None
    """None takes the accelerator, if there is one"""
    threads: Annotated[CpuThreads, tyro.conf.OmitArgPrefixes] = field(default_factory=CpuThreads)
    weights_files: Annotated[FeatureWeights, tyro.conf.OmitArgPrefixes] = field(default_factory=FeatureWeights)
    published: Annotated[FileHints, tyro.conf.OmitArgPrefixes] = field(default_factory=FileHints)
    sampler: Annotated[SamplerConfig, tyro.conf.OmitArgPrefixes] = field(default_factory=SamplerConfig)

    def __post_init__(self) -> None:
        if (self.ckpt is None) == (self.samples is None):
            raise UserError("give either `ckpt`, to sample from, or `samples`, a folder or npz")
        if self.ckpt is None:
            self._check_nothing_is_made()
            check_vae_heeded(self.vae, self.samples, self.reference, self.training_data)
            check_image_size_heeded(self.image_size, self.samples, self.reference, self.training_data)
        check_weights_heeded(self.weights_files, self.features_made)
        check_heeded(self.sampler)
        check_guide(self.guide, self.sampler)
        _check_counts(self, "num_samples", "batch_size")
        size = height_and_width(self.image_size)
        if self.samples is not None and size is not None and size[0] != size[1]:
            raise UserError(f"`image_size={size[0]} {size[1]}`: `samples` are cropped to squares; give one side")

    @property
    def features_made(self) -> tuple[str, ...]:
        """Those that were named, or the usual ones of the reference."""
        return self.features or (default_features(self.reference),)

    def _check_nothing_is_made(self) -> None:
        """Raise UserError if something is set of how a checkpoint makes samples."""
        for part in (self, self.published, self.sampler):
            for one in dataclasses.fields(part):
                name, value = one.name, getattr(part, one.name)
                if part is self and (name not in OF_MAKING or (name, value) == ("compile", False)):
                    continue  # nothing is compiled, as asked
                if value != one.default:
                    said = " ".join(map(str, value)) if isinstance(value, tuple) else value
                    raise UserError(f"`{name}={said}` is for `ckpt`: samples are as they were made")


OF_MAKING = ("ema", "guide", "label_order", "seed", "precision", "compile")
"""flags of how a checkpoint makes samples, besides those of the sampler and of published files"""


@dataclass
class ReferenceArguments:
    """Make reference statistics in ADM's format: mu, sigma, mu_s, sigma_s and some of the images."""

    data: str
    """a folder or npz of images, a latent cache, or a data set as train.py takes it, tar files too"""
    out: str
    """the npz to write; must not exist"""
    image_size: int | None = None
    """side that folders and data sets are cropped to; None: a folder's images as they are, a data set's own size"""
    features: tuple[str, ...] = ("inception",)
    """inception, digits, dinov2 or classifier:FOLDER, one or several"""
    images: int = 10_000
    """how many of the images are kept, for precision and recall"""
    vae: str | None = None
    """the VAE of a latent cache; None takes the one that it names"""
    batch_size: int = 64
    """images whose features are made at a time, at most 512"""
    work_dir: str | None = None
    """keeps what is done, so that the same command goes on after a crash"""
    device: str | None = None
    """None takes the accelerator, if there is one"""
    threads: Annotated[CpuThreads, tyro.conf.OmitArgPrefixes] = field(default_factory=CpuThreads)
    weights_files: Annotated[FeatureWeights, tyro.conf.OmitArgPrefixes] = field(default_factory=FeatureWeights)

    def __post_init__(self) -> None:
        _check_counts(self, "images", "batch_size")
        check_weights_heeded(self.weights_files, self.features)
        check_vae_heeded(self.vae, self.data)
        check_image_size_heeded(self.image_size, self.data)


def _check_counts(arguments: Arguments | ReferenceArguments, *names: str) -> None:
    for name in names:
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"`{name}` must be at least 1, not {value}")


@dataclass
class ClassifierSettings:
    """What decides the weights, besides the data."""

    architecture: Literal["resnet", "convnext"] = "resnet"
    """which of timm's families, made small"""
    epochs: int = 4
    batch_size: int = 128
    learning_rate: float = 4e-3
    """the highest of AdamW's one-cycle schedule"""
    flip: bool = True
    """flip each image with probability 0.5"""
    shift: int = 2
    """move each image by up to so many pixels"""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"`{name}` must be positive and finite, not {getattr(self, name)}")
        if self.shift < 0:
            raise UserError(f"`shift={self.shift}` must not be negative")


@dataclass
class ClassifierArguments(ClassifierSettings):
    """Train a small classifier on a data set and measure it on another."""

    data: str = "digits:train"
    """images, as `python train.py` takes its data"""
    heldout: str = "digits:heldout"
    """images to measure it on"""
    image_size: int | None = None
    """side in pixels; None for the source's own"""
    out: Path = Path("classifiers/new")
    """new folder"""
    device: str | None = None
    """None takes the accelerator, if there is one"""
    threads: Annotated[CpuThreads, tyro.conf.OmitArgPrefixes] = field(default_factory=CpuThreads)
