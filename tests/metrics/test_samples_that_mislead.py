"""What an evaluation says of samples whose numbers would mislead, as those of another size or of the reference."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sit.data.digits import digits_arrays
from sit.metrics.arguments import Arguments, ReferenceArguments
from sit.metrics.estimate import Estimate
from sit.metrics.evaluate import Against, _check_heeded, _number, evaluate
from sit.metrics.features import get_extractor
from sit.metrics.image_sets import open_samples
from sit.metrics.report import Report
from sit.utils.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.repeat(digits_arrays()[0][:240, ..., None], 3, axis=-1)


def packed(path: Path, images: np.ndarray, labels: np.ndarray | None = None) -> str:
    np.savez(path, arr_0=images, **({} if labels is None else {"arr_1": labels}))
    return str(path)


def report_of(samples: str, reference: str) -> Report:
    return evaluate(open_samples(samples), open_samples(reference), get_extractor("digits", CPU), device=CPU)


def test_samples_of_another_size_than_the_references(tmp_path, images):
    reference = packed(tmp_path / "reference.npz", images[:100])
    small = packed(tmp_path / "small.npz", images[100:])
    assert not report_of(small, reference).notes
    large = packed(tmp_path / "large.npz", images[100:].repeat(2, axis=1).repeat(2, axis=2))
    height, width = images.shape[1:3]
    (note,) = report_of(large, reference).notes
    assert note.startswith(f"the samples have {2 * height} x {2 * width} pixels and the reference {height} x {width}")


def test_samples_that_are_there_twice_and_those_of_the_reference(tmp_path, images):
    reference = packed(tmp_path / "reference.npz", images[:100])
    twice = packed(tmp_path / "twice.npz", np.concatenate([images[100:150]] * 2))
    assert report_of(twice, reference).notes == [
        "only 50 of the 100 samples differ from one another, which no ± allows for"
    ]
    mixed = packed(tmp_path / "mixed.npz", images[70:170])
    assert report_of(mixed, reference).notes == ["30 of the 100 samples are images of the reference, pixel for pixel"]


def test_an_error_that_is_rounding_is_none():
    number = _number("FID", Estimate(37.4, (37.4, 37.4 + 1e-13, 37.4)), {})
    assert number.error is None and "the same in every group" in number.how
    assert _number("FID", Estimate(37.4, (37.0, 38.0, 37.4)), {}).error > 0


def test_labels_that_are_no_classes(tmp_path, images):
    bad = packed(tmp_path / "bad.npz", images[:100], np.arange(100) - 1)
    with pytest.raises(UserError, match="bad.npz: arr_1 has the label -1, which is no class: leave arr_1 out"):
        open_samples(bad)
    classifier = SimpleNamespace(folder="mine", labels=tuple(range(10)))
    against = Against(open_samples("digits:heldout"), [], classifier, CPU)
    _check_heeded(open_samples(packed(tmp_path / "good.npz", images[:100], np.arange(100) % 10)), against)
    beyond = open_samples(packed(tmp_path / "beyond.npz", images[:100], np.arange(100) % 10 + 1))
    with pytest.raises(UserError, match="`classifier=mine` knows the classes 0 to 9, and .*beyond.npz has .*class 10"):
        _check_heeded(beyond, against)


def test_a_file_that_holds_no_images_is_named_with_what_would(tmp_path, images):
    np.save(tmp_path / "a.npy", images)
    with pytest.raises(UserError, match=f"^{tmp_path}/a.npy is no npz: give an npz with the images as arr_0, a folder"):
        open_samples(f"{tmp_path}/a.npy")


def test_an_image_size_that_crops_nothing(tmp_path, images):
    npz = packed(tmp_path / "a.npz", images[:10])
    with pytest.raises(UserError, match="`image_size=16` plays no part: the images of npz files"):
        Arguments(reference=npz, samples=npz, image_size=16)
    Arguments(reference="digits", samples=npz, image_size=16)
    with pytest.raises(UserError, match="`image_size=16` plays no part"):
        ReferenceArguments(data=npz, out=tmp_path / "b.npz", image_size=16)


def test_features_with_commas_between_them():
    with pytest.raises(UserError, match="`features=digits,inception`: unknown; .*several have spaces between them"):
        get_extractor("digits,inception", CPU)
