"""An evaluation: images to features in restartable chunks over all processes, features to a report."""

from __future__ import annotations

import json
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from tqdm import tqdm

from sit.checkpoint import Loaded
from sit.data import shrink_digits
from sit.errors import UserError
from sit.files import atomic_write
from sit.integrity import stamp
from sit.metrics import distances
from sit.metrics.classifier import Judge
from sit.metrics.distances import Moments
from sit.metrics.extractors import Extractor
from sit.metrics.sources import Images, Statistics
from sit.published import FileHints
from sit.sampler import SamplerConfig
from sit.sampling import balanced_labels, latent_shape_for, sample_images, uniform_labels

CHUNK = 512
"""images whose features are written together: what a restart repeats at most, for each process"""
REFERENCE_IMAGES = 10_000
"""reference images that precision, recall and KID use at most (ADM's suite)"""


class GeneratedImages(Images):
    """Images that a checkpoint samples when they are asked for: number i under the seed.

    Args:
        loaded: the checkpoint.
        count: how many there are.
        seed: the seed.
        labels: ``balanced`` (every class as often) or ``uniform`` (drawn at random).
        config: the sampler.
        image_size: (height, width); None as the network was trained.
        hints: how a published file was read, which is part of what tells these images from others.

    Raises:
        UserError: the network or its VAE can't make images of that size.
    """

    def __init__(
        self,
        loaded: Loaded,
        count: int,
        seed: int,
        labels: str,
        config: SamplerConfig,
        image_size: tuple[int, int] | None = None,
        hints: FileHints | None = None,
    ) -> None:
        latent_shape_for(loaded, image_size)  # a size that doesn't fit is told before anything is made
        self.classes = loaded.model.config.num_classes
        classes = range(self.classes)
        numbers = range(count)
        drawn = balanced_labels(numbers, classes) if labels == "balanced" else uniform_labels(numbers, classes, seed)
        self.loaded, self.count, self.seed, self.config = loaded, count, seed, config
        self.labels, self.image_size = drawn.numpy(), image_size
        size = f", {image_size[0]} x {image_size[1]} pixels" if image_size else ""
        self.name = f"{loaded.path}, seed {seed}, {labels} labels{size}, {config}"
        place = loaded.path
        read = [place]
        if place.is_dir():  # the weights and what else sampling depends on, but not the training's state
            read = [place / "transformer", place / "transport", *sorted(place.glob("*.safetensors"))]
        files = stamp(*read, loaded.vae_source or "")
        precision = f"{loaded.model.dtype}, products in {torch.get_float32_matmul_precision()} precision"
        self.identity = f"{self.name}, VAE {loaded.vae_source}, {hints or FileHints()}, {precision}, files {files}"

    def batch(self, numbers: np.ndarray) -> torch.Tensor:
        indices = torch.from_numpy(numbers)
        (made,) = sample_images(
            self.loaded,
            indices,
            torch.from_numpy(self.labels[numbers]),
            seed=self.seed,
            config=self.config,
            image_size=self.image_size,
            batch_size=len(numbers),
        )
        return made.images.permute(0, 3, 1, 2)


def extract(
    images: Images,
    extractor: Extractor,
    work: Path,
    device: torch.device,
    batch_size: int,
    description: str,
    keep_images: bool = False,
    judge: Judge | None = None,
) -> dict[str, np.ndarray] | None:
    """Features of all images, made by all processes together.

    What is done is kept in ``work`` in chunks of :data:`CHUNK`, and is not done again. With ``keep_images`` the
    images are kept there too, for :func:`pack_samples`.

    Returns:
        On the main process the outputs of the extractor, (N, …) float32 each, and ``small`` (N, 64) for the digits'
        judge, ``named`` (N,) the classes that ``judge`` sees; None on the others.

    Raises:
        UserError: ``work`` is of another evaluation, or an image can't be read.
    """
    state = PartialState()
    if state.is_main_process:
        what = {
            "images": images.identity or images.name,
            "count": len(images),
            "features": extractor.identity,
            "kept": keep_images,
            "judge": judge.identity if judge else "",
        }
        _claim(work, what)
    state.wait_for_everyone()
    starts = list(range(0, len(images), CHUNK))[state.process_index :: state.num_processes]
    bar = tqdm(
        total=sum(min(CHUNK, len(images) - start) for start in starts),
        desc=description,
        unit="image",
        dynamic_ncols=True,
        disable=not state.is_main_process,
    )
    for start in starts:
        numbers = np.arange(start, min(start + CHUNK, len(images)))
        path = _chunk(work, start)
        if not path.is_file():
            parts: dict[str, list[np.ndarray]] = {}
            for first in range(0, len(numbers), batch_size):
                pixels = images.batch(numbers[first : first + batch_size])
                found = extractor(pixels.to(device))
                if extractor.name == "digits":
                    _check_shrinkable(pixels, images.name)
                    found["small"] = shrink_digits(pixels.numpy())
                if judge is not None:
                    found["named"] = judge(pixels.to(device)).cpu().numpy()
                if keep_images:
                    found["images"] = pixels.permute(0, 2, 3, 1).numpy()
                for name, values in found.items():
                    parts.setdefault(name, []).append(values)
                bar.update(len(pixels))
            with atomic_write(path) as temporary, open(temporary, "wb") as file:
                np.savez(file, **{name: np.concatenate(values) for name, values in parts.items()})
        else:
            bar.update(len(numbers))
    bar.close()
    state.wait_for_everyone()
    if not state.is_main_process:
        return None
    chunks = []
    for start in range(0, len(images), CHUNK):
        with np.load(_chunk(work, start)) as archive:
            chunks.append({name: archive[name] for name in archive if name != "images"})
    return {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}


def pack_samples(work: Path, images: Images, out: Path) -> None:
    """Write the images that :func:`extract` kept in ``work`` to an ADM-style npz, a chunk at a time.

    Raises:
        UserError: ``out`` can't be written.
    """
    with atomic_write(out) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        header_written = False
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            for start in range(0, len(images), CHUNK):
                with np.load(_chunk(work, start)) as chunk:
                    pixels = np.ascontiguousarray(chunk["images"])
                if not header_written:
                    shape = (len(images), *pixels.shape[1:])
                    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(file, header)
                    header_written = True
                file.write(pixels.tobytes())
        if images.labels is not None:
            with archive.open("arr_1.npy", "w") as file:
                np.lib.format.write_array(file, np.asarray(images.labels[: len(images)], dtype=np.int64))


def _check_shrinkable(pixels: torch.Tensor, name: str) -> None:
    height, width = pixels.shape[-2:]
    if height != width or height % 8:
        raise UserError(f"{name}: digits must be square with sides that are multiples of 8, not {height}x{width}")


def _chunk(work: Path, start: int) -> Path:
    return work / f"features-{start:08d}.npz"


def _claim(work: Path, what: dict) -> None:
    """Make ``work`` this evaluation's, or make sure that it is."""
    note = work / "evaluation.json"
    if note.is_file():
        begun = json.loads(note.read_text())
        if begun != what:
            raise UserError(f"--work-dir {work} is of another evaluation ({begun['images']}): choose another folder")
    else:
        with atomic_write(note) as temporary:
            temporary.write_text(json.dumps(what))


class WorkDirectory:
    """The folder of the chunks: the one that was named, which stays, or a temporary one, shared by all processes."""

    def __init__(self, named: str | None) -> None:
        self.named = named

    def __enter__(self) -> Path:
        state = PartialState()
        place = [self.named]
        self.temporary = None
        if self.named is None and state.is_main_process:
            self.temporary = tempfile.TemporaryDirectory(prefix="eval-")
            place = [self.temporary.name]
        if state.num_processes > 1:
            broadcast_object_list(place)
        return Path(place[0])

    def __exit__(self, *exception) -> None:
        if self.temporary is not None:
            self.temporary.cleanup()


# ---------------------------------------------------------------------- the report


@dataclass(frozen=True)
class Number:
    """One line of a report.

    Attributes:
        name: the metric, with the features it is on where they are not Inception's.
        value: the number.
        error: its standard error or deviation; None where there is none.
        how: what the error is, or what else must be known.
    """

    name: str
    value: float
    error: float | None = None
    how: str = ""


@dataclass
class Report:
    """What an evaluation found."""

    samples: str
    sample_count: int
    reference: str
    features: str
    numbers: list[Number] = field(default_factory=list)

    def to_json(self) -> str:
        """All of it as JSON."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"

    def __str__(self) -> str:
        width = max(len(number.name) for number in self.numbers)
        lines = [f"{self.sample_count} samples of {self.samples}", f"against {self.reference}; {self.features}"]
        for number in self.numbers:
            error = f" ± {number.error:.4g}" if number.error is not None else ""
            how = f"  ({number.how})" if number.how else ""
            lines.append(f"{number.name:<{width}}  {number.value:.5g}{error}{how}")
        return "\n".join(lines)


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
    kept in that npz; without it they never touch the disk. With ``judge`` and labelled samples, it says how often a
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
        from sit.metrics.digits import class_accuracy

        judged = class_accuracy(found["small"], samples.labels[: len(features)])
        how = f"SVM fitted on real digits, held-out accuracy {judged.held_out:.1%}"
        yield Number("Class accuracy", judged.accuracy, distances.share_error(judged.accuracy, len(features)), how)
    elif "named" in found and samples.labels is not None:
        accuracy = float((found["named"] == samples.labels[: len(features)]).mean())
        error = distances.share_error(accuracy, len(features))
        yield Number("Class accuracy", accuracy, error, judge.description)
