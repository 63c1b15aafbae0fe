"""Classifiers that this repository trains (``python -m sit.train_classifier``), for features and labels.

A classifier is a folder: ``config.json`` (a timm architecture, its arguments, what it was trained on and how well it
does) and ``model.safetensors``. Distances on its features compare runs on the same data; they are not comparable with
Inception's.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from sit.metrics.identity import About
from sit.utils.errors import UserError, first_line
from sit.utils.fingerprint import weights_fingerprint
from sit.utils.json_text import json_text

CONFIG, WEIGHTS = "config.json", "model.safetensors"


@dataclass(frozen=True)
class ClassifierConfig:
    """What a classifier is: timm's name and arguments, the data it was trained on, and its held-out accuracy."""

    architecture: str
    arguments: dict[str, Any]
    image_size: int
    classes: list[str]
    data: str = ""
    heldout: str = ""
    accuracy: float | None = None
    settings: dict[str, Any] = field(default_factory=dict)


class Classifier(nn.Module):
    """A timm network that takes uint8 images (B, 3, H, W), resized to its size, to (features (B, D), logits (B, K))."""

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.config = config
        self.network = timm.create_model(config.architecture, num_classes=len(config.classes), **config.arguments)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        side = self.config.image_size
        images = images.float() / 127.5 - 1
        if images.shape[-2:] != (side, side):
            images = F.interpolate(images, size=(side, side), mode="bilinear", antialias=True)
        features = self.network.forward_head(self.network.forward_features(images), pre_logits=True)
        return features, self.network.get_classifier()(features)


def save_classifier(classifier: Classifier, folder: Path) -> None:
    """Write its config and weights into ``folder``."""
    (folder / CONFIG).write_text(json_text(asdict(classifier.config), indent=2) + "\n")
    save_file(classifier.network.state_dict(), folder / WEIGHTS)


def load_classifier(folder: str) -> Classifier:
    """Read a classifier's folder, for inference.

    Raises:
        UserError: it is none, or is damaged.
    """
    place = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (place / name).is_file():
            mend = "python -m sit.train_classifier makes one"
            raise UserError(f"{folder} is no classifier of sit.train_classifier: it has no {name}; {mend}")
    try:
        classifier = Classifier(ClassifierConfig(**json.loads((place / CONFIG).read_text())))
        classifier.network.load_state_dict(load_file(place / WEIGHTS))
    except (ValueError, TypeError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder} can't be read as a classifier ({first_line(error)}); train it again") from error
    return classifier.eval().requires_grad_(False)


@dataclass(frozen=True)
class LabelClassifier:
    """A classifier that predicts the classes of samples, independent of the features that distances are on.

    Attributes:
        classifier: the network.
        folder: where it was read from.
        labels: the samples' label of each of its classes, which may stand in another order there.
    """

    classifier: Classifier
    folder: str
    labels: tuple[int, ...]

    @classmethod
    def load(
        cls, folder: str, device: torch.device, classes: int | None = None, names: Sequence[str] = ()
    ) -> LabelClassifier:
        """Read the classifier in ``folder``, for samples of ``classes`` classes (None: of an unknown number).

        Args:
            folder: written by :func:`save_classifier`.
            device: where it works.
            classes: the samples'.
            names: their names in the order of the labels, by which its own are found; empty if they are unknown.

        Raises:
            UserError: there is no classifier, or it knows other classes.
        """
        classifier = load_classifier(folder).to(device)
        known = list(classifier.config.classes)
        if classes is not None and len(known) != classes:
            differ = f"knows {len(known)} classes, and the samples have {classes}"
            raise UserError(f"`classifier={folder}` {differ}: train one on their data")
        if not names:
            return cls(classifier, folder, tuple(range(len(known))))
        if foreign := sorted(set(known) ^ set(names)):
            differ = f"knows other classes than the samples have ({', '.join(foreign[:6])} are of one alone)"
            raise UserError(f"`classifier={folder}` {differ}: train one on their data")
        return cls(classifier, folder, tuple(list(names).index(name) for name in known))

    @functools.cached_property
    def about(self) -> About:
        """What tells its predictions from others': its weights, its input's size, and the labels."""
        config = self.classifier.config
        prepared = f"{config.architecture} {config.arguments}, images of {config.image_size} pixels"
        weights = weights_fingerprint(self.classifier)
        return {"features": "classifier", "weights": weights, "preparation": prepared, "labels": self.labels}

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """The predicted labels (B,) int64 of images (B, 3, H, W) uint8, in the samples' order of classes."""
        predicted = self.classifier(images)[1].argmax(dim=1)
        return torch.tensor(self.labels, device=predicted.device)[predicted]

    @property
    def description(self) -> str:
        """What a report says of it: its architecture, its folder and its held-out accuracy."""
        config = self.classifier.config
        accuracy = "unknown" if config.accuracy is None else f"{config.accuracy:.1%}"
        return f"{config.architecture} of {self.folder}, held-out accuracy {accuracy}"
