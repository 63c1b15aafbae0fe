"""A classifier's classes are the samples' by name, in whatever order it learned them."""

from __future__ import annotations

import pytest
import torch

from sit.metrics.classifier import Classifier, ClassifierConfig, LabelClassifier, save_classifier
from sit.utils.errors import UserError

CPU = torch.device("cpu")


def test_classes_are_found_by_name(tmp_path):
    """The classifier knows a, b, c in this order, and predicts each of some images."""
    torch.manual_seed(0)
    images = torch.randint(0, 256, (40, 3, 32, 32), dtype=torch.uint8)
    network = Classifier(ClassifierConfig("test_resnet", {}, 32, ["a", "b", "c"])).eval()
    with torch.no_grad():
        network.network.get_classifier().bias.sub_(network(images)[1].mean(0))
        names = ["c", "a", "b"]
        expected = [names.index("abc"[row.argmax()]) for row in network(images)[1]]
    assert len(set(expected)) == 3, "or any order would do"
    save_classifier(network, tmp_path)
    found = LabelClassifier.load(str(tmp_path), CPU, 3, names)
    assert found(images).tolist() == expected
    assert found.about != LabelClassifier.load(str(tmp_path), CPU, 3).about


def test_other_names_are_refused(classifier_of_three):
    with pytest.raises(UserError, match=r"knows other classes than the samples have \(c, d are of one alone\)"):
        LabelClassifier.load(classifier_of_three, CPU, 3, ["a", "b", "d"])
