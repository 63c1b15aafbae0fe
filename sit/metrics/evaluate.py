"""An evaluation: images to features by all processes, and on the main process features to a report.

The two halves are apart: :func:`measure` makes what is missing in a work folder, together with all other processes;
what it returns, :class:`Measured`, has the numbers made when they are asked for. A program that evaluates many
checkpoints measures all of them first, lets the other processes go, and then makes the numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import broadcast_object_list

from sit.metrics import distances, neighbors
from sit.metrics.by_class import ClassShare, shares_by_class
from sit.metrics.classifier import LabelClassifier
from sit.metrics.digits import as_digits, class_accuracy
from sit.metrics.distances import RootedMoments
from sit.metrics.estimate import Estimate, jackknife_groups, of_mean
from sit.metrics.extraction import Digests, Found, Pixels, Wanted, extract, folder_of
from sit.metrics.features import Extractor
from sit.metrics.identity import About, Identity, hash_arrays, hash_numbers, short_hash
from sit.metrics.image_sets import Images, SomeImages
from sit.metrics.moments import Moments
from sit.metrics.packing import pack_samples
from sit.metrics.paired import ROUNDING
from sit.metrics.report import NUMBERS, Number, Report
from sit.metrics.statistics_files import Statistics
from sit.metrics.work_folder import WorkDirectory
from sit.utils.device import process_state
from sit.utils.errors import UserError
from sit.utils.files import atomic_write

REFERENCE_IMAGES = 10_000
"""reference images that precision, recall and KID use at most (ADM's suite)"""


@dataclass(frozen=True)
class Against:
    """What samples are evaluated with, the same for all of them.

    Attributes:
        reference: images, or statistics, of the distribution that samples should have.
        extractors: what makes the features that distances are measured on.
        classifier: predicts the classes of labeled samples; digits have an SVM where it is None.
        device: where features are made, and distances.
        batch_size: images whose features are made at a time.
        training: images that samples may be copies of; None looks for none.
    """

    reference: Images | Statistics
    extractors: Sequence[Extractor]
    classifier: LabelClassifier | None
    device: torch.device
    batch_size: int = 64
    training: Images | None = None

    @property
    def about(self) -> About:
        """What tells numbers of the same samples apart."""
        return {
            "reference": self.reference.about,
            "reference images": REFERENCE_IMAGES,
            "features": [extractor.about for extractor in self.extractors],
            "classifier": self.classifier.about if self.classifier else None,
            "training": self.training.about if self.training else None,
            "version": NUMBERS,
        }


def evaluate(
    samples: Images,
    reference: Images | Statistics,
    extractor: Extractor,
    *,
    device: torch.device,
    batch_size: int = 64,
    work_dir: str | None = None,
    classifier: LabelClassifier | None = None,
) -> Report | None:
    """All numbers that the samples, the reference and the features allow.

    Every process of a launch calls it with the same arguments.

    Args:
        samples: the images to evaluate.
        reference: images, or statistics, of the distribution that they should have.
        extractor: what makes the features that distances are measured on.
        device: where features are made.
        batch_size: images whose features are made at a time.
        work_dir: a folder for what is made, from which the same evaluation goes on; None keeps nothing.
        classifier: predicts the classes of labeled samples; digits have an SVM where it is None.

    Returns:
        The report on the main process, None on the others.

    Raises:
        UserError: too few images, or statistics of other features.
    """
    against = Against(reference, [extractor], classifier, device, batch_size)
    with WorkDirectory(work_dir) as work:
        measured = measure(samples, against, work)
        return measured.report() if measured is not None else None


def measure(samples: Images, against: Against, work: Path, *, save: Path | None = None) -> Measured | None:
    """Make the features of the samples and of the reference, as far as the work folder doesn't have them.

    Every process of a launch calls it with the same arguments.

    Args:
        samples: the images to evaluate.
        against: what they are evaluated with.
        work: the work folder.
        save: an npz to write the samples to, too.

    Returns:
        What the numbers are made of, on the main process; None on the others.

    Raises:
        UserError: too few images, statistics of other features, or a full disk.
    """
    distances.enough(len(samples), 2, "a Fréchet distance")
    _check_heeded(samples, against)
    labels = samples.labels
    group = jackknife_groups(len(samples), labels)
    place = folder_of(samples, work, "samples")
    names = list(samples.class_names)
    notes = [note for note in (samples.note, _other_size(samples, against.reference)) if note]
    measured = Measured(samples.name, len(samples), labels, group, against, place, names, notes)
    if save is None and _agreed(measured.kept() is not None):
        return measured if process_state().is_main_process else None

    making = dict(device=against.device, batch_size=against.batch_size)
    measured.real = _measure_reference(against, work)
    if against.training is not None:
        every = [Wanted(reader, summed=False) for reader in (*against.extractors, Digests())]
        measured.training = extract(against.training, every, work, description="training", **making)
    wanted = [Wanted(extractor, group) for extractor in against.extractors]
    wanted.append(Wanted(Digests(), summed=False))
    if against.classifier is not None:
        wanted.append(Wanted(_Predictions(against.classifier), summed=False))
    if save is not None:
        wanted.append(Wanted(Pixels(), summed=False))
    found = extract(samples, wanted, work, description="samples", **making)
    if found is None:
        return None
    measured.found = found
    if save is not None:
        pack_samples(found[Pixels.name], len(samples), labels, save)
    return measured


def _check_heeded(samples: Images, against: Against) -> None:
    """Raise UserError unless the classifier has labels to predict, and the training images neighbors of their own."""
    if against.classifier is not None and samples.labels is None:
        named = f"`classifier={against.classifier.folder}`"
        mend = "leave it out, or give an npz with arr_1, or class folders and their `image_size`"
        raise UserError(f"{named} predicts classes, and {samples.name} has no labels: {mend}")
    if against.classifier is not None and (most := samples.labels.max()) >= (known := len(against.classifier.labels)):
        named = f"`classifier={against.classifier.folder}`"
        raise UserError(f"{named} knows the classes 0 to {known - 1}, and {samples.name} has samples of class {most}")
    if against.training is not None:
        distances.enough(len(against.training), 2, f"`training_data={against.training.name}`: a search for copies")


def _measure_reference(against: Against, work: Path) -> dict[str, Found]:
    """The features of the reference: sums of all of its images, and the rows of some for precision, recall and KID."""
    reference = against.reference
    images = reference if isinstance(reference, Images) else reference.images
    if isinstance(reference, Statistics):
        for extractor in against.extractors:
            reference.of(extractor)  # refused before anything is sampled
    if images is None:
        return {}
    if images is reference:
        distances.enough(len(images), 2, "a Fréchet distance")
    # drawn at random: the first ones of a folder would be those of its first classes
    chosen = np.sort(np.random.default_rng(0).permutation(len(images))[:REFERENCE_IMAGES])
    if images is reference:
        wanted = [Wanted(extractor, keep=chosen) for extractor in against.extractors]
    else:  # its moments are known
        images = SomeImages(images, chosen)
        wanted = [Wanted(extractor, summed=False) for extractor in against.extractors]
    wanted.append(Wanted(Digests(), summed=False))
    making = dict(device=against.device, batch_size=against.batch_size)
    return extract(images, wanted, work, description="reference", **making) or {}


def _other_size(samples: Images, reference: Images | Statistics) -> str | None:
    """What a report says of samples of another size than the reference's; None if they are alike, or it is unknown."""
    images = reference if isinstance(reference, Images) else reference.images
    if images is None or None in (samples.size, images.size) or samples.size == images.size:
        return None
    own, other = (f"{height} x {width}" for height, width in (samples.size, images.size))
    return f"the samples have {own} pixels and the reference {other}: features tell sharpness too; see `image_size`"


def _agreed(here: bool) -> bool:
    """What the main process says, in all of them."""
    told = [here]
    if process_state().num_processes > 1:
        broadcast_object_list(told)
    return told[0]


class _Predictions:
    """A classifier as a reader: ``predicted`` (B,) int64."""

    name = "predictions"  # an extractor may be called classifier

    def __init__(self, classifier: LabelClassifier) -> None:
        self.classifier, self.about = classifier, classifier.about

    def __call__(self, images: torch.Tensor) -> dict[str, np.ndarray]:
        return {"predicted": self.classifier(images).cpu().numpy()}


@dataclass
class Measured:
    """What the numbers of some samples are made of, in a work folder.

    Attributes:
        name: the samples'.
        count: how many.
        labels: (count,) their classes; None if unknown.
        group: (count,) the groups of the errors; None where there are too few for one.
        against: what they are evaluated with.
        place: the samples' folder in the work folder.
        class_names: by label; empty if unknown.
        notes: what the report must say of the samples.
        found: what the extractors and the classifier made of the samples; None where the numbers are there already.
        real: what the extractors made of the reference's images.
        training: what they made of the training images.
    """

    name: str
    count: int
    labels: np.ndarray | None
    group: np.ndarray | None
    against: Against
    place: Path
    class_names: list[str]
    notes: Sequence[str] = ()
    found: dict[str, Found] | None = None
    real: dict[str, Found] | None = None
    training: dict[str, Found] | None = None

    @property
    def path(self) -> Path:
        """The file of the finished numbers."""
        return self.place / f"numbers-{short_hash(self.against.about)}.json"

    def kept(self) -> Report | None:
        """The numbers, if they are made already and can be read."""
        try:
            return Report.from_json(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def report(self) -> Report:
        """All numbers: those that are there, or made now and kept.

        Raises:
            UserError: the statistics are of other features, or the disk is full.
        """
        report = self.kept() if self.found is None else None
        if report is None:
            report = self._make()
            with atomic_write(self.path) as temporary:
                temporary.write_text(report.to_json(), encoding="utf-8")
        report.samples = self.name  # the same samples may be known by another path
        return report

    def _make(self) -> Report:
        reference, extractors = self.against.reference, self.against.extractors
        numbers: list[Number] = []
        notes: list[str] = []
        by_class: dict[str, list[ClassShare]] = {}
        notes += [*self.notes, *self._same_pixels()]
        for extractor in extractors:
            numbers += self._numbers_of(extractor, by_class)
            note = reference.note(extractor) if isinstance(reference, Statistics) else None
            notes += [note] if note else []
        numbers += self._class_accuracy(by_class, notes)
        notes += self._too_few()
        labels = "; ".join(extractor.label for extractor in extractors)
        report = Report(self.name, self.count, reference.name, labels, numbers, notes)
        report.by_class, report.class_names = by_class, self.class_names
        return report

    def _numbers_of(self, extractor: Extractor, by_class: dict[str, list[ClassShare]]) -> Iterator[Number]:
        """FID, its extrapolation, sFID, inception score, precision, recall, density, coverage and KID, as far as they
        can be had."""
        on = "" if extractor.name == "inception" else f" ({extractor.name} features)"
        full = "" if extractor.name == "inception" else f" ({extractor.label})"
        basis = {"features": Identity(extractor.label, short_hash(extractor.about))}
        against = basis | {"reference": self._reference_identity(extractor)}
        found = self.found[extractor.name]
        features, spatial = self._reference_moments(extractor)
        rooted = RootedMoments.of(features)
        fid = distances.frechet(found.sums["features"], rooted)
        yield _number(f"FID{full}", fid, against)
        if fid.replicates:
            infinite = distances.frechet_at_infinity(found.sums["features"], rooted, fid)
            yield _number(f"FID at infinity{full}", infinite, against, "extrapolated over 1/N")
        if "spatial" in found.sums and spatial is not None:
            yield _number("sFID", distances.frechet(found.sums["spatial"], RootedMoments.of(spatial)), against)
        rows = found.rows("features", "logits")
        if "logits" in rows:
            shuffled = distances.sorted_by_class(rows["logits"].argmax(axis=1))
            how = "shuffled for its splits, as the samples lie sorted by class" if shuffled else ""
            yield _number(f"Inception score{on}", distances.inception_score(rows["logits"], self.group), basis, how)
        if self.real:
            real = self.real[extractor.name].rows("features")["features"]
            near = self._neighborhood_numbers(rows["features"], real, on, by_class)
            yield from (replace(number, basis=against) for number in near)
        if self.training:
            training = self.training[extractor.name].rows("features")["features"]
            hits, real_share = neighbors.copies(rows["features"], training, device=self.against.device)
            how = f"{real_share:.1%} of the {len(training):,} training images are so among themselves"
            copied = basis | {"training images": Identity(self.against.training.name, _pixels_hash(self.training))}
            yield _number(f"Copies{on}", of_mean(hits, self.group), copied, how)

    def _reference_identity(self, extractor: Extractor) -> Identity:
        """The reference as far as an extractor's numbers are of it: its moments where it has them, and its images."""
        reference, images = self.against.reference, _pixels_hash(self.real) if self.real else ""
        if not isinstance(reference, Statistics):
            return Identity(reference.name, images)
        part = reference.of(extractor)
        every = [part.features] + ([part.spatial] if part.spatial is not None else [])
        moments = hash_arrays(*(array for one in every for array in (one.mu, one.sigma)))
        return Identity(reference.name, short_hash({"moments": moments, "images": images}))

    def _reference_moments(self, extractor: Extractor) -> tuple[Moments, Moments | None]:
        """The reference's moments of features and of spatial features, of as many dimensions as the samples'."""
        reference, found = self.against.reference, self.found[extractor.name]
        if isinstance(reference, Statistics):
            part = reference.of(extractor)
            features, spatial = part.features, part.spatial
        else:
            sums = self.real[extractor.name].sums
            features = sums["features"].moments()
            spatial = sums["spatial"].moments() if "spatial" in sums else None
        dimensions = found.sums["features"].sums.shape[1]
        if len(features.mu) != dimensions:
            raise UserError(
                f"{reference.name} has statistics of {len(features.mu)} features, and {extractor.name} has "
                f"{dimensions}: they were made with other features, see `features`"
            )
        return features, spatial

    def _neighborhood_numbers(
        self, features: np.ndarray, real: np.ndarray, on: str, by_class: dict[str, list[ClassShare]]
    ) -> Iterator[Number]:
        """Numbers of features (N, D) against some of the reference's (M, D); none where there are too few of either."""
        device = self.against.device
        if min(len(features), len(real)) <= neighbors.K_DENSITY:
            return
        estimates, within = neighbors.neighborhoods(features, real, self.group, device=device)
        if self.labels is not None:
            by_class[f"precision{on}"] = shares_by_class(within, self.labels)
        for name, estimate in estimates.items():
            k = neighbors.K if name in ("precision", "recall") else neighbors.K_DENSITY
            yield _number(f"{name.capitalize()}{on}", estimate, {}, f"k = {k}", has_error=name in neighbors.MEANS)
        kid = distances.kernel_distance(features, real, self.group, device=_with_float64(device))
        few = "reference images" if self.group is not None else "samples"
        yield _number(f"KID{on}", kid, {}, few=few)

    def _same_pixels(self) -> Iterator[str]:
        """What a report says of samples that are there twice, or are images of the reference or of the training."""
        digests = self.found[Digests.name].rows("digest")["digest"]
        if (distinct := len(np.unique(digests))) < self.count:
            yield f"only {distinct:,} of the {self.count:,} samples differ from one another, which no ± allows for"
        for found, whose in ((self.real, "the reference"), (self.training, "the training data")):
            if found:
                known = np.isin(digests, found[Digests.name].rows("digest")["digest"]).sum()
                if known:
                    yield f"{known:,} of the {self.count:,} samples are images of {whose}, pixel for pixel"

    def _too_few(self) -> Iterator[str]:
        """What a report says where numbers of nearest neighbors are left out."""
        if not self.real:
            return
        needed, kept = neighbors.K_DENSITY + 1, len(next(iter(self.real.values())).kept)
        if min(self.count, kept) < needed:
            counts = f"{self.count} samples and {kept} images of the reference"
            yield f"precision, recall, density, coverage and KID need {needed} of each, and there are {counts}"

    def _class_accuracy(self, by_class: dict[str, list[ClassShare]], notes: list[str]) -> Iterator[Number]:
        """How often a sample shows the class of its label, by the classifier that was given or by digits' SVM."""
        classifier = self.against.classifier
        if self.labels is None:
            return
        if classifier is not None:
            predicted = self.found[_Predictions.name].rows("predicted")["predicted"]
            hits, how, about = predicted == self.labels, classifier.description, classifier.about
        elif "digits" in self.found:
            asked = as_digits(self.labels, self.class_names)
            if asked is None:
                notes.append("no class accuracy: the classes are not named 0 to 9 after the digits that they show")
                return
            by_svm = class_accuracy(self.found["digits"].rows("small")["small"], asked)
            hits, how = by_svm.hits, f"SVM fitted on real digits, held-out accuracy {by_svm.held_out:.1%}"
            about = {"classifier": "SVM fitted on real digits"}
        else:
            return
        by_class["class accuracy"] = shares_by_class(hits, self.labels)
        basis = {"classifier": Identity(how, short_hash(about))}
        yield _number("Class accuracy", of_mean(hits, self.group), basis, how)


def _pixels_hash(found: dict[str, Found]) -> str:
    """A hash of the pixels of all images that readers went through, in their order."""
    return hash_numbers(found[Digests.name].rows("digest")["digest"])


def _number(
    name: str,
    estimate: Estimate,
    basis: dict[str, Identity],
    how: str = "",
    *,
    has_error: bool = True,
    few: str = "samples",
) -> Number:
    error, said = estimate.error, ""
    if has_error and not estimate.replicates:
        said = f"too few {few} for an error"
    elif error is not None and error <= ROUNDING * max(1.0, abs(estimate.value)):
        # a share of all, or of none: how often others would differ is not seen
        error, said = None, "the same in every group of samples, which leaves no error"
    how = "; ".join(filter(None, (how, said)))
    return Number(name, estimate.value, error, how, estimate.replicates, basis)


def _with_float64(device: torch.device) -> torch.device:
    """The device, or the CPU instead of Apple's GPUs, which have no float64."""
    return torch.device("cpu") if device.type == "mps" else device
