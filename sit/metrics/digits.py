"""Classifiers of digits: a small one whose features stand in for Inception's, and an independent SVM.

Distances on these features are for comparing runs on the embedded data with each other. They are not comparable
with Inception's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from torch_fidelity.feature_extractor_base import FeatureExtractorBase

from sit.data.digits import digits_arrays, digits_split, shrink_digits

WEIGHTS = Path(__file__).parents[1] / "assets" / "digits-classifier" / "model.safetensors"
FEATURES = 64
DIGITS = tuple("0123456789")
EXTRACTOR = "digits-classifier"
"""the extractor's name, for torch-fidelity's reports and for registering it there"""


class DigitsClassifier(nn.Module):
    """A convolutional network from gray digits (B, 1, 32, 32) in [-1, 1] to features (B, 64) and logits (B, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1, stride=2), nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1, stride=2), nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1, stride=2), nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64 * 4 * 4, FEATURES), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(FEATURES, 10)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.body(images)
        return features, self.head(features)


def to_gray(images: torch.Tensor) -> torch.Tensor:
    """uint8 RGB (B, 3, H, W) to gray (B, 1, 32, 32) float32 in [-1, 1]."""
    gray = images.float().mean(dim=1, keepdim=True) / 127.5 - 1
    return gray if gray.shape[-1] == 32 else F.interpolate(gray, size=(32, 32), mode="bilinear", antialias=True)


class DigitsFeatureExtractor(FeatureExtractorBase):
    """The committed classifier as torch-fidelity calls feature extractors: ``features`` (64) and ``logits`` (10)."""

    def __init__(self, name: str = EXTRACTOR, features_list: tuple[str, ...] = ("features",), **kwargs) -> None:
        super().__init__(name, list(features_list))
        self.classifier = DigitsClassifier()
        self.classifier.load_state_dict(load_file(kwargs.get("feature_extractor_weights_path") or WEIGHTS))
        self.requires_grad_(False)
        self.eval()

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return "features", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "logits" if metric == "isc" else "features"

    @staticmethod
    def can_be_compiled() -> bool:
        return False

    @staticmethod
    def get_dummy_input_for_compile() -> torch.Tensor:
        return torch.zeros(1, 3, 32, 32, dtype=torch.uint8)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        features, logits = self.classifier(to_gray(images))
        both = {"features": features, "logits": logits}
        return tuple(both[name] for name in self.features_list)


@dataclass(frozen=True)
class ClassAccuracy:
    """Whether an SVM fitted on real digits names the class that a sample was asked to be.

    Attributes:
        hits: (N,) bool, of each sample.
        held_out: its accuracy on real digits that it was not fitted on, in [0, 1].
    """

    hits: np.ndarray
    held_out: float


def as_digits(labels: np.ndarray, names: Sequence[str]) -> np.ndarray | None:
    """The digits (N,) that labels (N,) mean by their classes' names, or as they are without names.

    Returns:
        None if a class is named otherwise, or a label without a name is no digit.
    """
    digits = np.arange(10)
    if names:
        if not all(name in DIGITS for name in names):
            return None
        digits = np.array([int(name) for name in names])
    if len(labels) and labels.max() >= len(digits):
        return None
    return digits[labels]


def class_accuracy(small: np.ndarray, labels: np.ndarray) -> ClassAccuracy:
    """Classify labeled samples by scikit-learn's RBF SVM, fitted on the real 8×8 digits of ``digits:train``.

    Args:
        small: (N, 64) the samples' 8×8 area averages, as :func:`sit.data.digits.shrink_digits` makes them.
        labels: (N,) the digits asked for.
    """
    from sklearn.svm import SVC

    real, classes = digits_arrays()
    real = shrink_digits(real)
    fitted, held_out = digits_split()
    svm = SVC(C=10, gamma="scale").fit(real[fitted], classes[fitted])
    return ClassAccuracy(
        hits=svm.predict(small) == labels,
        held_out=float(svm.score(real[held_out], classes[held_out])),
    )
