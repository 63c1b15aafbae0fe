"""What eval_fid.py does: samples, given or made by a checkpoint, against a reference; and references."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import PartialState

from sit.checkpoint.load import load_for_sampling
from sit.latents.vae import downsampling
from sit.metrics.arguments import Arguments, ReferenceArguments
from sit.metrics.classifier import LabelClassifier
from sit.metrics.evaluate import Against, measure
from sit.metrics.extraction import Digests, folder_of, row_bytes
from sit.metrics.features import get_extractors
from sit.metrics.generated import GeneratedImages
from sit.metrics.image_sets import Images, drawn, open_samples
from sit.metrics.reference import make_reference
from sit.metrics.statistics_files import open_reference
from sit.metrics.work_folder import WorkDirectory, folder_size
from sit.sampling.config import height_and_width
from sit.utils.compile import WORTH_IT, compile_for_sampling, should_compile
from sit.utils.device import pick_device, process_state
from sit.utils.precision import for_sampling
from sit.utils.record import write_record
from sit.utils.targets import check_room, check_target


def evaluate_samples(arguments: Arguments) -> None:
    """Evaluate what the arguments name; the main process prints the report and writes it as JSON.

    Raises:
        UserError: something that is named can't be had, or does not fit the rest.
    """
    state = process_state()
    device = pick_device(arguments.device) if arguments.device else state.device
    if state.is_main_process:
        _check_targets(arguments)

    # the samples, and the side of squares that the reference is cropped to
    features = arguments.features_made
    if arguments.ckpt is not None:
        count = arguments.num_samples or (1_000 if features == ("digits",) else 50_000)
        samples, size = _generated(arguments, count, device, state)
    else:
        size = height_and_width(arguments.image_size)
        samples = drawn(open_samples(arguments.samples, size and size[0], arguments.vae, device), arguments.num_samples)
    side = size[0] if size is not None and size[0] == size[1] else None  # nothing is cropped to a rectangle

    # what they are measured against, and by what
    reference = open_reference(arguments.reference, side, arguments.vae, device)
    extractors = get_extractors(features, device, arguments.weights_files)
    classifier = None
    if arguments.classifier is not None:
        classifier = LabelClassifier.load(arguments.classifier, device, samples.classes, samples.class_names)
    training = None
    if arguments.training_data is not None:
        training = open_samples(arguments.training_data, side, arguments.vae, device)
    against = Against(reference, extractors, classifier, device, arguments.batch_size, training)

    save = Path(arguments.save) if arguments.save else None
    with WorkDirectory(arguments.work_dir) as work:
        if state.is_main_process:
            _check_rooms(arguments, work, samples, against)
        measured = measure(samples, against, work, save=save)
        if measured is not None:
            report = measured.report()
            print(report)
            if arguments.json:
                write_record(arguments.json, device, asdict(report))


def _check_targets(arguments: Arguments) -> None:
    """Refuse files that can't be written before anything is sampled for them."""
    if arguments.save is not None:
        check_target(arguments.save, "save", ".npz", new=True)
    if arguments.json is not None:
        check_target(arguments.json, "json")


def _check_rooms(arguments: Arguments, work: Path, samples: Images, against: Against) -> None:
    """Refuse disks without room for the features, and for the samples if they are kept."""
    pixels = 0
    if arguments.save is not None and isinstance(samples, GeneratedImages):
        factor = downsampling(samples.loaded.vae)
        pixels = len(samples) * 3 * samples.shape[1] * samples.shape[2] * factor**2
        check_room(Path(arguments.save).parent, pixels, "save", "the samples")
    readers = (*against.extractors, Digests())
    rows = len(samples) * sum(row_bytes(reader, against.device) for reader in readers)
    there = folder_size(folder_of(samples, work, "samples"))
    check_room(work, rows + pixels - there, "work_dir", f"the features of {len(samples):,} images")


def _generated(
    arguments: Arguments, count: int, device: torch.device, state: PartialState
) -> tuple[GeneratedImages, tuple[int, int] | None]:
    """The images that the checkpoint makes when they are asked for, and their height and width, if known."""
    size = height_and_width(arguments.image_size)
    loaded = load_for_sampling(
        arguments.ckpt,
        ema=arguments.ema,
        guide=arguments.guide,
        vae=arguments.vae,
        device=device,
        dtype=for_sampling(arguments.precision, device),
        image_size=size,
        **vars(arguments.published),
    )
    evaluations = math.ceil(count / state.num_processes / arguments.batch_size) * arguments.sampler.steps
    if should_compile(arguments.compile, loaded.device, state.print, evaluations >= WORTH_IT):
        for one in (loaded, *([loaded.guide] if loaded.guide else [])):
            compile_for_sampling(one.model)
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
    if state.is_main_process:
        check_target(arguments.out, "out", ".npz", new=True)
    extractors = get_extractors(arguments.features, device, arguments.weights_files)
    images = open_samples(arguments.data, arguments.image_size, arguments.vae, device)
    making = dict(keep=arguments.images, device=device, batch_size=arguments.batch_size)
    with WorkDirectory(arguments.work_dir) as work:
        make_reference(images, extractors, Path(arguments.out), work, **making)
    state.print(f"reference: {arguments.out}")
