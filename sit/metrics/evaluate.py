"""An evaluation: images to features in restartable chunks over all processes, features to a report."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from sit.metrics import distances
from sit.metrics.classifier import LabelClassifier
from sit.metrics.digits import class_accuracy
from sit.metrics.distances import Moments
from sit.metrics.extraction import WorkDirectory, extract, pack_samples
from sit.metrics.features import Extractor
from sit.metrics.image_sets import Images, Statistics
from sit.metrics.report import Number, Report
from sit.utils.errors import UserError

REFERENCE_IMAGES = 10_000
"""reference images that precision, recall and KID use at most (ADM's suite)"""

ENOUGH_FOR_ERRORS = 10 * distances.GROUPS
"""samples from which on a Fréchet distance gets an error and is extrapolated, and there is an inception score"""


def evaluate(
    samples: Images,
    reference: Images | Statistics,
    extractor: Extractor,
    *,
    device: torch.device,
    batch_size: int = 64,
    work_dir: str | None = None,
    save: Path | None = None,
    classifier: LabelClassifier | None = None,
    real: dict[str, np.ndarray] | None = None,
) -> Report | None:
    """All numbers that the samples, the reference and the features allow.

    Every process of a launch calls it with the same arguments.

    Args:
        samples: the images to evaluate.
        reference: images, or ADM statistics, of the distribution that they should have.
        extractor: what makes the features that distances are measured on.
        device: where features are made.
        batch_size: images whose features are made at a time.
        work_dir: a folder for finished chunks, from which the same evaluation goes on; None keeps nothing.
        save: an npz to keep the samples in; without it they never touch the disk.
        classifier: predicts the classes of labeled samples; digits have an SVM where it is None.
        real: the reference's features, where :func:`extract` has made them already.

    Returns:
        The report on the main process, None on the others.

    Raises:
        UserError: too few images, statistics of other features, or a ``work_dir`` of another evaluation.
    """
    distances.enough(len(samples), 2, "a Fréchet distance")
    real_images = reference if isinstance(reference, Images) else reference.images
    making = dict(device=device, batch_size=batch_size)
    with WorkDirectory(work_dir) as work:
        if real is None and real_images is not None:
            distances.enough(len(real_images), 2, "a Fréchet distance")
            real = extract(real_images, extractor, work / "reference", description="reference", **making)
        keep = dict(keep_images=save is not None, classifier=classifier)
        found = extract(samples, extractor, work / "samples", description="samples", **making, **keep)
        if found is not None and save is not None:
            pack_samples(work / "samples", samples, save)
    if found is None:
        return None
    on = "" if extractor.name == "inception" else f" ({extractor.name} features)"
    numbers = list(_frechet_numbers(found, real, reference, extractor))
    if "logits" in found and len(samples) >= ENOUGH_FOR_ERRORS:
        score, spread = distances.inception_score(found["logits"])
        numbers.append(Number(f"Inception score{on}", score, spread, f"spread over {distances.GROUPS} splits"))
    if real is not None:
        numbers += _neighborhood_numbers(found["features"], real["features"], on)
    if samples.labels is not None:
        numbers += _class_accuracy(found, samples.labels[: len(samples)], classifier)
    return Report(samples.name, len(samples), reference.name, extractor.label, numbers)


def _frechet_numbers(
    found: dict[str, np.ndarray],
    real: dict[str, np.ndarray] | None,
    reference: Images | Statistics,
    extractor: Extractor,
) -> Iterator[Number]:
    """FID, its extrapolation to infinitely many samples where there are enough, and sFID where it can be had."""
    on = "" if extractor.name == "inception" else f" ({extractor.label})"
    features = found["features"]
    moments = reference.features if isinstance(reference, Statistics) else Moments.of(real["features"])
    if len(moments.mu) != features.shape[1]:
        raise UserError(
            f"{reference.name} has statistics of {len(moments.mu)} features, and {extractor.name} has "
            f"{features.shape[1]}: they were made with other features, see `features`"
        )
    yield _frechet(f"FID{on}", features, moments)
    if len(features) >= ENOUGH_FOR_ERRORS:
        infinite, error = distances.frechet_at_infinity(features, moments)
        yield Number(f"FID at infinity{on}", infinite, error, "extrapolated over 1/N; error of the fit")
    if "spatial" in found:
        spatial = reference.spatial if isinstance(reference, Statistics) else Moments.of(real["spatial"])
        if spatial is not None:
            yield _frechet("sFID", found["spatial"], spatial)


def _frechet(name: str, features: np.ndarray, reference: Moments) -> Number:
    if len(features) < ENOUGH_FOR_ERRORS:
        value = distances.frechet_distance(Moments.of(features), reference)
        return Number(name, value, None, "too few samples for an error")
    return Number(name, *distances.frechet_with_error(features, reference), "jackknife over samples")


def _neighborhood_numbers(features: np.ndarray, real: np.ndarray, on: str) -> Iterator[Number]:
    """Precision, recall and KID of features (N, D) against the reference's (M, D)."""
    # drawn at random: the first ones of a folder would be those of its first classes
    chosen = np.random.default_rng(0).permutation(len(real))[:REFERENCE_IMAGES]
    some = real[np.sort(chosen)]
    if min(len(features), len(some)) > 3:
        precision, recall = distances.precision_recall(features, some)
        how = "binomial; k = 3"
        yield Number(f"Precision{on}", precision, distances.share_error(precision, len(features)), how)
        yield Number(f"Recall{on}", recall, distances.share_error(recall, len(some)), how)
    kid, spread = distances.kernel_distance(features, some)
    yield Number(f"KID{on}", kid, spread, "spread over 100 subsets")


def _class_accuracy(
    found: dict[str, np.ndarray], labels: np.ndarray, classifier: LabelClassifier | None
) -> Iterator[Number]:
    """How often a sample shows the class of its label (N,), by the classifier that was given or by digits' SVM."""
    if classifier is not None:
        accuracy, how = float((found["predicted"] == labels).mean()), classifier.description
    elif "small" in found:
        by_svm = class_accuracy(found["small"], labels)
        accuracy, how = by_svm.accuracy, f"SVM fitted on real digits, held-out accuracy {by_svm.held_out:.1%}"
    else:
        return
    yield Number("Class accuracy", accuracy, distances.share_error(accuracy, len(labels)), how)
