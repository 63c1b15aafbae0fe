"""What numbers say that they were measured with: content, whatever it is called."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from sit.metrics.classifier import Classifier, ClassifierConfig, LabelClassifier
from sit.metrics.evaluate import Against, measure
from sit.metrics.features import get_extractor
from sit.metrics.identity import Identity
from sit.metrics.image_sets import DataImages, SomeImages

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Metric's beginning → basis, of the same samples against a classifier by seed and so many training images."""
    digits = DataImages("digits", 32)

    def made(seed: int, training: np.ndarray) -> dict[str, dict[str, Identity]]:
        torch.manual_seed(seed)
        classifier = Classifier(ClassifierConfig("test_resnet", {}, 32, list(digits.class_names))).eval()
        against = Against(
            digits,
            [get_extractor("digits", CPU)],
            LabelClassifier(classifier, "the same folder", tuple(range(10))),
            CPU,
            training=SomeImages(digits, training),
        )
        work: Path = tmp_path_factory.mktemp("work")
        report = measure(SomeImages(digits, np.arange(40)), against, work).report()
        return {number.name.partition(" (")[0]: number.basis for number in report.numbers}

    return made


def test_class_accuracy_tells_the_classifier_and_copies_the_training_images(bases):
    usual, again = bases(0, np.arange(100, 200)), bases(0, np.arange(100, 200))
    assert usual == again and set(usual["Class accuracy"]) == {"classifier"}
    assert set(usual["FID"]) == {"features", "reference"} and set(usual["Copies"]) == {"features", "training images"}
    retrained, others = bases(1, np.arange(100, 200)), bases(0, np.arange(101, 201))
    for changed, metric in ((retrained, "Class accuracy"), (others, "Copies")):
        assert {name for name in usual if changed[name] != usual[name]} == {metric}
