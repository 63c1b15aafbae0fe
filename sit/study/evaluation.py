"""The evaluation of a run's checkpoints, from whatever is made of it already."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from sit.checkpoint.find import find_checkpoints
from sit.checkpoint.info import read_info
from sit.checkpoint.integrity import is_complete
from sit.checkpoint.load import Loaded, load_for_sampling
from sit.metrics.arguments import FeatureWeights, check_weights_heeded, default_features
from sit.metrics.classifier import LabelClassifier
from sit.metrics.evaluate import Against, measure
from sit.metrics.features import get_extractor
from sit.metrics.generated import GeneratedImages
from sit.metrics.statistics_files import open_reference
from sit.metrics.work_folder import WorkDirectory
from sit.sampling.images import balanced_labels, sample_images
from sit.study.alike import check_evaluated_alike
from sit.study.config import Evaluation, Study, Way
from sit.study.runs import Run
from sit.training.config import TrainConfig
from sit.training.plan import describe_data
from sit.utils.device import process_state
from sit.utils.errors import UserError
from sit.utils.image_grid import save_png, tile
from sit.utils.precision import for_sampling
from sit.utils.random import key
from sit.utils.threads import use_threads

GRID_ROWS = 2
"""samples of each class in a run's grid"""
GRID_CLASSES = 10
"""classes in it at most"""


def evaluation_seed(config: TrainConfig) -> int:
    """The seed of the samples, derived from the training's: runs that are paired by it share noise and labels."""
    return key(config.seed, "evaluation") % 2**31


def check_evaluation(study: Study, runs: Iterable[Run]) -> None:
    """Open what the runs will be evaluated with, before anything is trained; nothing is measured.

    Raises:
        UserError: the reference, the features or the classifier can't be had, or the classifier knows other classes.
    """
    settings = study.evaluate
    if settings is None:
        return
    device = process_state().device
    of_data = {(run.config.data, run.config.image_size, run.config.vae): run.config for run in runs}
    for config in of_data.values():
        _, classes, _, assumed = describe_data(config)
        _open(settings, config, device, None if assumed else classes, ())


def evaluate_run(
    run: Run, study: Study, steps: list[int], device: torch.device, before: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Evaluate the checkpoints at ``steps``, the last in other ways too, and sample the grid from it.

    Every process of a launch calls it with the same arguments.

    Args:
        run: the run.
        study: its study.
        steps: in rising order.
        device: where samples are made.
        before: an evaluation with fewer steps or ways, of which nothing is made again.

    Returns:
        What the JSON says under ``evaluation``; the numbers are there on the main process only.

    Raises:
        UserError: a checkpoint, the reference, the features or the classifier can't be had, or the last two were others
            for the evaluation ``before``.
    """
    settings = study.evaluate
    if settings is None:
        raise ValueError("the study evaluates nothing")
    have: dict[str, Any] = before or {"steps": {}}
    wanted = [(str(step), step, Way(settings.sampler)) for step in steps]
    wanted += [(name, steps[-1], way) for name, way in settings.others.items()]
    found = have["steps"] | have.get("others", {})
    missing = [one for one in wanted if one[0] not in found]
    needed = {steps[-1], *(step for _, step, _ in missing), *(way.guide_step for *_, way in missing if way.guide_step)}
    checkpoints = {step: place for step, place in find_checkpoints(run.training(study)) if is_complete(place)}
    if absent := [step for step in sorted(needed) if step not in checkpoints]:
        raise UserError(
            f"{run.training(study)} has no checkpoint of step {absent[0]} to evaluate; evaluate it on the machine "
            f"where it was trained, or remove {run.json(study)} to train it again"
        )
    if device.type == "cpu":
        use_threads(run.config.cpu_threads)
    dtype = for_sampling(settings.precision, device)
    against = _against(run, settings, checkpoints[steps[-1]], device)
    with WorkDirectory(str(run.work(study) / "evaluation")) as work:
        if process_state().is_main_process:
            _share(study.out / "work" / "reference", work)
        process_state().wait_for_everyone()
        for name, step, way in missing:
            guide = None if way.guide_step is None else checkpoints[way.guide_step]
            loaded = load_for_sampling(checkpoints[step], ema=way.ema, device=device, dtype=dtype, guide=guide)
            seed = evaluation_seed(run.config)
            samples = GeneratedImages(loaded, settings.num_samples, seed=seed, config=way.sampler)
            measured = measure(samples, against, work)
            report = None if measured is None else measured.report()
            found[name] = [] if report is None else [dataclasses.asdict(number) for number in report.numbers]
        loaded = load_for_sampling(checkpoints[steps[-1]], device=device, dtype=dtype)
        if process_state().is_main_process:
            _share(work, study.out / "work" / "reference")
            _save_grid(run, study, loaded, settings)
    evaluation = {
        "settings": dataclasses.asdict(settings),
        "seed": evaluation_seed(run.config),
        "latent_channels": loaded.model.config.in_channels,
        "parameters": sum(parameter.numel() for parameter in loaded.model.parameters()),
        "steps": have["steps"] | {str(step): found[str(step)] for step in steps},
        "others": have.get("others", {}) | {name: found[name] for name in settings.others},
    }
    check_evaluated_alike(run.json(study), have, evaluation)
    return evaluation


def _against(run: Run, settings: Evaluation, checkpoint: Path, device: torch.device) -> Against:
    """What the samples are evaluated with."""
    info = read_info(checkpoint)
    return _open(settings, run.config, device, info.classes or None, info.label_names)


def _open(
    settings: Evaluation, config: TrainConfig, device: torch.device, classes: int | None, names: Sequence[str]
) -> Against:
    features = settings.features or default_features(settings.reference)
    weights = FeatureWeights(settings.inception_weights, settings.dinov2_weights)
    check_weights_heeded(weights, (features,))
    extractor = get_extractor(features, device, weights.of(features))
    reference = open_reference(settings.reference, config.image_size, device=device)
    classifier = None
    if settings.classifier is not None:
        classifier = LabelClassifier.load(settings.classifier, device, classes, names)
    return Against(reference, [extractor], classifier, device, settings.batch_size)


def _share(source: Path, target: Path) -> None:
    """Have what is finished of the reference in one work folder in another too, as links to the same files.

    Each run has a work folder of its own, as two runs at a time can't hold one; the reference is the same for all.
    """
    for place in source.glob("reference-*"):
        if not (target / place.name).exists():
            target.mkdir(parents=True, exist_ok=True)
            temporary = target / f".{place.name}.{os.getpid()}.tmp"
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.copytree(place, temporary, copy_function=os.link)
            with contextlib.suppress(OSError):  # another run was first
                temporary.rename(target / place.name)
            shutil.rmtree(temporary, ignore_errors=True)


def _save_grid(run: Run, study: Study, loaded: Loaded, settings: Evaluation) -> None:
    """Samples of the first classes, a column each: their noise is the same in all runs of a study."""
    classes = min(GRID_CLASSES, loaded.model.config.num_classes)
    indices = torch.arange(GRID_ROWS * classes)
    labels = balanced_labels(indices.tolist(), range(classes))
    options = dict(seed=0, config=settings.sampler, batch_size=settings.batch_size)
    images = torch.cat([batch.images for batch in sample_images(loaded, indices, labels, **options)]).numpy()
    save_png(Image.fromarray(tile(images, classes, gap=0, fill=0)), run.grid(study))
