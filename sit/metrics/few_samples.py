"""An evaluation on few samples, to watch a run by while it trains: rough, and the same each time."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import gather_object

from sit.checkpoint.load import Loaded
from sit.latents.vae import NotFinite, downsampling
from sit.metrics.arguments import FeatureWeights, default_features
from sit.metrics.evaluate import Against, measure
from sit.metrics.features import get_extractors
from sit.metrics.generated import GeneratedImages
from sit.metrics.statistics_files import open_reference
from sit.metrics.work_folder import WorkDirectory
from sit.sampling.config import SamplerConfig
from sit.utils.errors import UserError


class FewSamples:
    """Evaluates networks on the same few samples' noise and labels, against one reference.

    Args:
        reference: images or statistics, as `reference` of eval_fid.py takes them.
        count: how many samples.
        config: the sampler.
        seed: of the samples.
        image_size: side that a reference of images is cropped to.
        device: where features are made.

    Raises:
        UserError: the reference or the features can't be had.
    """

    def __init__(
        self, reference: str, count: int, config: SamplerConfig, *, seed: int, image_size: int, device: torch.device
    ) -> None:
        self.count, self.config, self.seed = count, config, seed
        opened = open_reference(reference, image_size, None, device)
        try:
            extractors = get_extractors((default_features(reference),), device, FeatureWeights())
        except UserError as error:  # training has no setting for another place of theirs
            raise UserError(str(error).partition(", or name them")[0]) from error
        self.against = Against(opened, extractors, None, device)

    def __call__(self, loaded: Loaded, work: Path) -> dict[str, float]:
        """The metrics by name, such as ``fid`` and ``precision``; every process must call it, the main one gets them.

        Raises:
            NotFinite: a sample is NaN or infinite; in every process.

        Args:
            loaded: the network in evaluation mode, with its VAE.
            work: a folder that keeps the reference's features for the next time.
        """
        samples = _BlackIfNotFinite(loaded, self.count, seed=self.seed, config=self.config)
        with WorkDirectory(str(work)) as place:
            measured = measure(samples, self.against, place)
            failed = any(gather_object([samples.failed]))
            numbers = [] if measured is None or failed else measured.report().numbers
            if measured is not None:
                shutil.rmtree(measured.place)
        if failed:
            raise NotFinite("the samples are not finite")
        return {plain_name(number.name): number.value for number in numbers}


class _BlackIfNotFinite(GeneratedImages):
    """Samples that are black where they are not finite, so that no process leaves the others waiting.

    Attributes:
        failed: whether some are.
    """

    failed = False

    def batch(self, numbers: np.ndarray) -> torch.Tensor:
        try:
            return super().batch(numbers)
        except NotFinite:
            self.failed = True
            side = downsampling(self.loaded.vae)
            return torch.zeros(len(numbers), 3, *(side * length for length in self.shape[1:]), dtype=torch.uint8)


def plain_name(name: str) -> str:
    """A number's name in small letters, without the features that it is on: ``FID (digits …)`` is ``fid``."""
    return re.sub(r"\W+", "_", name.partition(" (")[0].lower())
