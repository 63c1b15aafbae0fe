"""An evaluation: images to features in restartable chunks over all processes, features to a report."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from sit.metrics import distances
from sit.metrics.classifier import Judge
from sit.metrics.digits import class_accuracy
from sit.metrics.distances import Moments
from sit.metrics.extraction import WorkDirectory, extract, pack_samples
from sit.metrics.features import Extractor
from sit.metrics.image_sets import Images, Statistics
from sit.metrics.report import Number, Report
from sit.utils.errors import UserError

REFERENCE_IMAGES = 10_000
"""reference images that precision, recall and KID use at most (ADM's suite)"""


def evaluate(
    samples: Images,
    reference: Images | Statistics,
    extractor: Extractor,
    *,
    device: torch.device,
    batch_size: int = 64,
    work_dir: str | None = None,
    save: Path | None = None,
    judge: Judge | None = None,
    real: dict[str, np.ndarray] | None = None,
) -> Report | None:
    """All numbers that the samples, the reference and the features allow.

    Every process of a launch calls it; the main one gets the report, the others None. With ``save``, the samples are
    kept in that npz; without it they never touch the disk. With ``judge`` and labeled samples, it says how often a
    sample shows its class. ``real`` are the reference's features, where :func:`extract` has made them already.

    Raises:
        UserError: too few images, or statistics of other features.
    """
    distances.enough(len(samples), 2, "a Fréchet distance")
    real_images = reference if isinstance(reference, Images) else reference.images
    with WorkDirectory(work_dir) as work:
        if real is None and real_images is not None:
            distances.enough(len(real_images), 2, "a Fréchet distance")
            real = extract(real_images, extractor, work / "reference", device, batch_size, "reference")
        keep = save is not None
        found = extract(samples, extractor, work / "samples", device, batch_size, "samples", keep, judge)
        if found is not None and keep:
            pack_samples(work / "samples", samples, save)
    if found is None:
        return None
    report = Report(samples.name, len(samples), reference.name, extractor.label)
    report.numbers = list(_numbers(found, real, reference, samples, extractor, judge))
    return report


def _numbers(
    found: dict[str, np.ndarray],
    real: dict[str, np.ndarray] | None,
    reference: Images | Statistics,
    samples: Images,
    extractor: Extractor,
    judge: Judge | None,
) -> Iterator[Number]:
    features = found["features"]
    on = "" if extractor.name == "inception" else f" ({extractor.name} features)"
    frechet_on = "" if extractor.name == "inception" else f" ({extractor.label})"
    moments = reference.features if isinstance(reference, Statistics) else Moments.of(real["features"])
    if len(moments.mu) != features.shape[1]:
        raise UserError(
            f"{reference.name} has statistics of {len(moments.mu)} features, and {extractor.name} has "
            f"{features.shape[1]}: they were made with other features, see --features"
        )
    if len(features) >= 10 * distances.GROUPS:
        value, error = distances.frechet_with_error(features, moments)
        yield Number(f"FID{frechet_on}", value, error, "jackknife over samples")
        infinite, error = distances.frechet_at_infinity(features, moments)
        yield Number(f"FID at infinity{frechet_on}", infinite, error, "extrapolated over 1/N; error of the fit")
    else:
        value = distances.frechet_distance(Moments.of(features), moments)
        yield Number(f"FID{frechet_on}", value, None, "too few samples for an error")

    if "spatial" in found:
        spatial = None
        if isinstance(reference, Statistics):
            spatial = reference.spatial
        elif real is not None:
            spatial = Moments.of(real["spatial"])
        if spatial is not None and len(features) >= 10 * distances.GROUPS:
            yield Number("sFID", *distances.frechet_with_error(found["spatial"], spatial), "jackknife over samples")
        elif spatial is not None:
            value = distances.frechet_distance(Moments.of(found["spatial"]), spatial)
            yield Number("sFID", value, None, "too few samples for an error")
    if "logits" in found and len(features) >= 10 * distances.GROUPS:
        score, spread = distances.inception_score(found["logits"])
        yield Number(f"Inception score{on}", score, spread, f"spread over {distances.GROUPS} splits")
    if real is not None:
        # drawn at random: the first ones of a folder would be those of its first classes
        chosen = np.random.default_rng(0).permutation(len(real["features"]))[:REFERENCE_IMAGES]
        some = real["features"][np.sort(chosen)]
        if min(len(features), len(some)) > 3:
            precision, recall = distances.precision_recall(features, some)
            binomial = "binomial; k = 3"
            yield Number(f"Precision{on}", precision, distances.share_error(precision, len(features)), binomial)
            yield Number(f"Recall{on}", recall, distances.share_error(recall, len(some)), binomial)
        kid, spread = distances.kernel_distance(features, some)
        yield Number(f"KID{on}", kid, spread, "spread over 100 subsets")
    if "small" in found and judge is None and samples.labels is not None:
        judged = class_accuracy(found["small"], samples.labels[: len(features)])
        how = f"SVM fitted on real digits, held-out accuracy {judged.held_out:.1%}"
        yield Number("Class accuracy", judged.accuracy, distances.share_error(judged.accuracy, len(features)), how)
    elif "named" in found and samples.labels is not None:
        accuracy = float((found["named"] == samples.labels[: len(features)]).mean())
        error = distances.share_error(accuracy, len(features))
        yield Number("Class accuracy", accuracy, error, judge.description)
