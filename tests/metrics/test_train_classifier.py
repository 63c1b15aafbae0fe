"""The trainer of small classifiers, and what the evaluation makes of them, on the digits."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import Connected

from sit.metrics import train_classifier
from sit.metrics.arguments import ClassifierArguments
from sit.metrics.arguments import ClassifierSettings as Settings
from sit.metrics.classifier import LabelClassifier, load_classifier
from sit.metrics.features import get_extractor
from sit.metrics.train_classifier import augment
from sit.utils.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> str:
    folder = str(tmp_path_factory.mktemp("classifiers") / "digits")
    Connected(1, "-m", "sit.train_classifier", "--epochs", "3", "--no-flip", "--out", folder).output()
    return folder


@pytest.mark.slow
def test_a_classifier_learns_and_is_used_by_an_evaluation(classifier, tmp_path):
    config = load_classifier(classifier).config
    assert config.accuracy > 0.8, "it must learn the digits"
    report = tmp_path / "report.json"
    words = ["--samples", "digits:heldout", "--reference", "digits:train", "--features", f"classifier:{classifier}"]
    Connected(1, "eval_fid.py", *words, "--classifier", classifier, "--json", report).output()
    numbers = {number["name"]: number["value"] for number in json.loads(report.read_text())["numbers"]}
    assert numbers["Class accuracy"] == pytest.approx(config.accuracy, abs=1e-6)
    assert any("not comparable with Inception FID" in name for name in numbers)


def test_its_features_are_what_its_logits_are_made_of(classifier):
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    found = get_extractor(f"classifier:{classifier}", CPU)(images)
    head = load_classifier(classifier).network.get_classifier()
    logits = found["features"] @ head.weight.numpy().T + head.bias.numpy()
    np.testing.assert_allclose(logits, found["logits"], rtol=1e-4, atol=1e-4)


def test_metrics_are_named_without_the_path_to_the_classifier(classifier):
    extractor = get_extractor(f"classifier:{classifier}/", CPU)
    architecture = load_classifier(classifier).config.architecture
    assert extractor.label == f"features of the {architecture} in digits, not comparable with Inception FID"
    assert Path(extractor.weights) == Path(classifier), "features of two folders would be taken for the same"


def test_features_that_are_not_finite_are_refused(classifier):
    extractor = get_extractor(f"classifier:{classifier}", CPU)
    next(extractor.network.parameters()).data.fill_(float("nan"))
    with pytest.raises(UserError, match="features of the .* in digits, .*: some are NaN or infinite"):
        extractor(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


def test_a_classifier_that_diverges_is_not_written(tmp_path, monkeypatch):
    def diverge(classifier, *_):
        next(classifier.parameters()).data.fill_(float("nan"))

    monkeypatch.setattr(train_classifier, "fit", diverge)
    with pytest.raises(UserError, match="the classifier diverged at `learning_rate=0.004`: take a lower one"):
        train_classifier.train(ClassifierArguments(out=str(tmp_path / "out"), learning_rate=4e-3))
    assert not (tmp_path / "out").exists()


def test_what_is_no_classifier_is_refused(classifier, tmp_path):
    with pytest.raises(UserError, match="has no config.json"):
        load_classifier(str(tmp_path))
    with pytest.raises(UserError, match="knows 10 classes, and the samples have 3"):
        LabelClassifier.load(classifier, CPU, classes=3)
    with pytest.raises(UserError, match="name its folder"):
        get_extractor("classifier", CPU)
    with pytest.raises(UserError, match="unknown; known features"):
        get_extractor("inception:folder", CPU)


def test_a_shift_is_no_less_than_none():
    with pytest.raises(UserError, match="`shift=-1` must not be negative"):
        Settings(shift=-1)


def test_augmentation_shifts_and_flips():
    image = torch.arange(64, dtype=torch.uint8).reshape(1, 1, 8, 8).expand(64, 3, 8, 8)
    moved = augment(image, Settings(shift=1, flip=False), torch.Generator().manual_seed(0))
    inner = {tuple(one[0, 1:-1, 1:-1].flatten().tolist()) for one in moved}
    windows = {tuple(image[0, 0, r : r + 6, c : c + 6].flatten().tolist()) for r in range(3) for c in range(3)}
    assert inner == windows, "every shift by up to one pixel, and nothing else"
    flipped = augment(image, Settings(shift=0), torch.Generator().manual_seed(0))
    kinds = {tuple(one[0, 0].tolist()) for one in flipped}
    assert kinds == {tuple(range(8)), tuple(range(7, -1, -1))}
