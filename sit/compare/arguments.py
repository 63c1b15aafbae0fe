"""What ``python -m sit.compare`` takes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from sit.metrics.arguments import FeatureWeights
from sit.sampling.config import LabelOrder, SamplerConfig, check_heeded
from sit.utils.errors import UserError
from sit.utils.threads import CpuThreads

Against = Literal["guidance", "evaluations", "step", "seconds"]


@dataclass
class Arguments:
    """Compare runs on the same data."""

    runs: tyro.conf.Positional[tuple[str, ...]]
    """runs' folders"""
    out: str
    """new folder for the report"""
    reference: str | None = None
    """as eval_fid.py takes it; None takes digits for runs on digits"""
    features: tuple[str, ...] = ()
    """as eval_fid.py takes it; none given takes digits for runs on digits, else inception"""
    classifier: str | None = None
    """a folder of sit.train_classifier, which predicts the samples' classes: class accuracy"""
    at_steps: tuple[int, ...] = ()
    """checkpoints to evaluate, by their step, which every run must have; none given means all that every seed has"""
    ema: float | None = None
    """as sample.py takes it, at every checkpoint; None takes the weights that the checkpoints store"""
    num_samples: int = 1000
    """samples for each checkpoint's metrics"""
    label_order: LabelOrder = "balanced"
    """the classes of the samples: each as often, or drawn at random as in the papers"""
    evaluation_seed: int | None = None
    """of the samples of all runs; None takes each run's own training seed, which an interval over seeds needs"""
    batch_size: int = 64
    """images made and evaluated at a time, also in the measurement of speed"""
    speed_repeats: int = 5
    """rounds of the measurement of speed; 0 leaves it out"""
    work_dir: str | None = None
    """reads what eval_fid.py or this command left there, and keeps what is made: it goes on after a crash"""
    device: str | None = None
    """None takes the accelerator, if there is one"""
    threads: Annotated[CpuThreads, tyro.conf.OmitArgPrefixes] = field(default_factory=CpuThreads)
    weights_files: Annotated[FeatureWeights, tyro.conf.OmitArgPrefixes] = field(default_factory=FeatureWeights)
    sampler: Annotated[SamplerConfig, tyro.conf.OmitArgPrefixes] = field(default_factory=SamplerConfig)

    def __post_init__(self) -> None:
        for name, least in (("num_samples", 1), ("batch_size", 1), ("speed_repeats", 0)):
            if getattr(self, name) < least:
                raise UserError(f"`{name}` must be at least {least}, not {getattr(self, name)}")
        check_heeded(self.sampler)


@dataclass
class CurvesArguments:
    """Draw a metric against guidance, network evaluations, training steps or seconds, from finished evaluations."""

    work_dir: str
    """the work folder of eval_fid.py or sit.compare"""
    out: str
    """new folder for the curves"""
    against: Against = "step"
    """guidance, evaluations (of the network, by the sampler's steps), step or seconds (of training)"""
    metric: str = "FID"
    """the number, by its name before the features that it is on"""
