"""What sample.py takes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import tyro

from sit.checkpoint.hints import FileHints
from sit.sampling.config import LabelOrder, SamplerConfig, check_guide, check_heeded
from sit.utils.choices import Precision
from sit.utils.errors import UserError
from sit.utils.threads import CpuThreads


@dataclass(frozen=True)
class Arguments:
    """Sample images from a checkpoint; the network, its VAE and its classes are read from it."""

    ckpt: str
    """a run's folder (its newest whole checkpoint), a checkpoint's folder, or a published .pt file"""
    ema: float | None = None
    """relative length of the average to sample with, such as 0.05 or 0.1, reconstructed from the snapshots of a run
    with post-hoc EMA; None takes the weights that the checkpoint stores, its plain moving average"""
    guide: str | None = None
    """autoguidance: a second, worse checkpoint, such as an earlier one of the run, to guide away from by --cfg-scale,
    instead of from the network without the label"""
    out: str | None = None
    """new folder for the images, or for the noise; None makes one under samples/"""
    num_samples: int | None = None
    """how many images, kept as single PNGs and in samples.npz; None makes only a grid of four of each label"""
    labels: tuple[str, ...] = ()
    """classes to sample, by number or name, with spaces or commas between (a numeral that is a class's name is that
    class); none given means all (for the grid: the first ten)"""
    label_order: LabelOrder = "balanced"
    """each of the classes as often, in turn, or drawn at random as in the papers"""
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
    threads: Annotated[CpuThreads, tyro.conf.OmitArgPrefixes] = field(default_factory=CpuThreads)
    reverse: bool = False
    """take the images of --data back to the noise that the ODE makes them from"""
    likelihood: bool = False
    """the log-density of the images of --data along the ODE, in latents; it takes them back to noise too"""
    data: str | None = None
    """for --reverse and --likelihood: images, as train.py takes its data; --num-samples of them, evenly, or all"""
    probes: int = 1
    """random directions by which the likelihood estimates the divergence"""
    published: Annotated[FileHints, tyro.conf.OmitArgPrefixes] = field(default_factory=FileHints)
    sampler: Annotated[SamplerConfig, tyro.conf.OmitArgPrefixes] = field(default_factory=SamplerConfig)

    def __post_init__(self) -> None:
        for name in ("num_samples", "batch_size", "probes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"`{name}` must be at least 1, not {value}")
        check_heeded(self.sampler)
        check_guide(self.guide, self.sampler)
        if self.inverts and (self.data is None or self.sampler.sampler != "ode"):
            raise UserError(
                f"`{'likelihood' if self.likelihood else 'reverse'}` works along the ODE, on images: give "
                "`sampler=ode` and `data`"
            )
        if not self.inverts and self.data is not None:
            raise UserError(f"`data={self.data}` is for `reverse` and `likelihood`: give one of them")
        if self.inverts and (self.labels or self.image_size is not None):
            raise UserError("`labels` and `image_size` are those of `data`, as the network was trained: leave them out")
        if self.probes != 1 and not self.likelihood:
            raise UserError(
                f"`probes={self.probes}` plays no part without `likelihood`: give that too, or leave it out"
            )
        for name, without in (("compile", (None, False)), ("label_order", ("balanced",))):
            if self.inverts and getattr(self, name) not in without:
                mode = "likelihood" if self.likelihood else "reverse"
                raise UserError(f"`{name}={getattr(self, name)}` plays no part with `{mode}`: leave it out")

    @property
    def inverts(self) -> bool:
        """Whether images are taken back to noise, instead of being made."""
        return self.reverse or self.likelihood
