"""Evaluations of too few images, and of what plays no part: one line, a note, and no number that JSON doesn't know."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sit.data.digits import digits_arrays
from sit.metrics import cli as eval_fid
from sit.metrics.arguments import Arguments, FeatureWeights, ReferenceArguments
from sit.metrics.classifier import Classifier, ClassifierConfig, LabelClassifier, load_classifier, save_classifier
from sit.metrics.distances import kernel_distance
from sit.metrics.estimate import jackknife_groups
from sit.metrics.evaluate import Against, measure
from sit.metrics.features import get_extractor
from sit.metrics.image_sets import open_samples
from sit.metrics.neighbors import copies
from sit.metrics.report import Number, Report
from sit.training.run_folder import JsonLinesTracker, read_metrics
from sit.utils.errors import UserError
from sit.utils.json_text import json_text
from sit.utils.record import write_record

CPU = torch.device("cpu")


def strict(text: str) -> dict:
    """What JSON it is; NaN and infinity are none."""

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    return json.loads(text, parse_constant=refuse)


@pytest.fixture
def digits(tmp_path):
    """Writes an npz of so many digits, and answers its name."""

    def write(count: int, labels: bool = False) -> str:
        images, classes = digits_arrays()
        path = tmp_path / f"{count}{'-labeled' * labels}.npz"
        more = {"arr_1": classes[:count]} if labels else {}
        np.savez(path, arr_0=np.repeat(images[:count, :, :, None], 3, axis=3), **more)
        return str(path)

    return write


@pytest.fixture
def run(monkeypatch, capsys):
    """eval_fid.py with these words: what it prints, or the one line that it ends in."""

    def command(*words: object) -> str:
        monkeypatch.setattr(sys, "argv", ["eval_fid.py", *map(str, words), "--features", "digits"])
        try:
            eval_fid.main()
        except SystemExit:
            error = capsys.readouterr().err.strip().splitlines()[-1]
            assert error.startswith("error: ")
            return error
        return capsys.readouterr().out

    return command


@pytest.mark.parametrize(
    "names, told",
    [
        (("0", "1", "2", "3", "4", "5", "6", "7", "8", "9"), True), (("3", "7"), True), (("one", "two"), False),
        (("digits",), False),
    ],
)  # fmt: skip
def test_the_class_accuracy_of_digits_is_of_the_digits_that_classes_are_named_after(run, tmp_path, names, told):
    """The images show what their folders are called, or nothing tells what a folder shows."""
    images, classes = digits_arrays()
    wanted = [int(name) for name in names] if told else list(range(len(names)))
    for digit, name in zip(wanted, names, strict=True):
        (tmp_path / "named" / name).mkdir(parents=True)
        for number in np.flatnonzero(classes == digit)[:6]:
            Image.fromarray(images[number]).resize((32, 32)).save(tmp_path / "named" / name / f"{number}.png")
    out = run("--samples", tmp_path / "named", "--image-size", 32, "--reference", "digits:heldout")
    found = [line for line in out.splitlines() if line.startswith("Class accuracy")]
    if told:
        assert float(found[0].split()[2]) > 0.9
    else:
        assert not found and "no class accuracy: the classes are not named 0 to 9 after the digits" in out


def test_a_share_of_all_samples_has_no_error(digits, run):
    """All groups are alike, which does not tell how often other samples would be."""
    name = digits(60, labels=True)
    out = run("--samples", name, "--reference", name)
    (line,) = (line for line in out.splitlines() if line.startswith("Precision"))
    assert line.split()[-1] and " 1 " in f"{line} " and "±" not in line and "the same in every group" in line


def test_the_inception_score_of_few_samples_has_no_error(digits, run):
    out = run("--samples", digits(30), "--reference", digits(60))
    (line,) = (line for line in out.splitlines() if line.startswith("Inception score"))
    assert "too few samples for an error" in line and "±" not in line


# ---------------------------------------------------------------- too few images


def test_a_training_set_of_one_image_is_refused_before_anything_is_made(digits, run, tmp_path):
    words = ["--samples", digits(50), "--reference", digits(60), "--work-dir", tmp_path / "work"]
    error = run(*words, "--training-data", digits(1))
    assert "--training-data" in error and "needs at least 2 images, and there are 1" in error
    assert not list((tmp_path / "work").rglob("*.npz"))
    with pytest.raises(UserError, match="a search for copies needs at least 2 images, and there are 1"):
        copies(np.ones((3, 2)), np.ones((1, 2)))
    assert "Copies" in run(*words, "--training-data", digits(2))


@pytest.mark.parametrize("count, known", [(3, False), (5, False), (6, True), (39, True), (40, True)])
def test_kid_of_few_reference_images(digits, run, tmp_path, count, known):
    """Without an error below 40, and left out, with its like, below 6."""
    out = tmp_path / "out.json"
    said = run("--samples", digits(80), "--reference", digits(count), "--json", out)
    found = strict(out.read_text())
    by_name = {number["name"].split(" (")[0]: number for number in found["numbers"]}
    assert {"KID", "Precision"} & set(by_name) == ({"KID", "Precision"} if known else set())
    note = f"KID need 6 of each, and there are 80 samples and {count} images of the reference"
    assert (note in said) is not known and "nan" not in said
    if known:
        assert (by_name["KID"]["error"] is None) == (count < 40)
        assert ("too few reference images for an error" in by_name["KID"]["how"]) == (count < 40)


def test_no_size_of_subset_gives_kid_an_error_that_is_not_finite():
    rng = np.random.default_rng(0)
    features, group = rng.normal(size=(60, 4)), jackknife_groups(60)
    for count in (2, 3, 7, 20, 39, 40, 60):
        found = kernel_distance(features, rng.normal(size=(count, 4)), group)
        assert all(map(math.isfinite, (found.value, *found.replicates))) and bool(found.replicates) == (count >= 40)
    with pytest.raises(UserError, match="KID needs at least 2 images, and there are 1"):
        kernel_distance(features, features[:1])


# ---------------------------------------------------------------- JSON


def test_numbers_that_are_not_finite_are_null(tmp_path, monkeypatch):
    strange = {"a": [math.nan, 1.5, (math.inf, "NaN")], "b": {"c": -math.inf, "d": 3}}
    plain = {"a": [None, 1.5, [None, "NaN"]], "b": {"c": None, "d": 3}}
    assert strict(json_text(strange)) == plain
    write_record(tmp_path / "record.json", "cpu", strange)
    assert strict((tmp_path / "record.json").read_text())["a"] == plain["a"]
    rows = JsonLinesTracker(tmp_path / "metrics.jsonl", 0)
    rows.start()
    rows.log({"loss": 0.5, "gradient_norm": math.inf}, step=1)
    rows.finish()
    assert strict((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": 0.5, "gradient_norm": None}
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["loss"] == 0.5
    save_classifier(Classifier(ClassifierConfig("test_resnet", {}, 32, ["a", "b"])), tmp_path)
    strict((tmp_path / "config.json").read_text())
    described = LabelClassifier(load_classifier(str(tmp_path)), "here", (0, 1)).description
    assert described.endswith("of here, held-out accuracy unknown")


def test_a_report_with_a_number_that_is_not_finite_is_made_again():
    report = Report("samples", 3, "reference", "features", [Number("FID", 1.5, 0.25, "", (1.0, 2.0))])
    assert Report.from_json(report.to_json()) == report
    for number in (Number("KID", math.nan), Number("KID", 1.0, math.nan, "", (math.nan, 1.0))):
        report.numbers = [number]
        strict(report.to_json())
        for text in (report.to_json(), json.dumps(json.loads(report.to_json())).replace("null", "NaN")):
            with pytest.raises(ValueError):
                Report.from_json(text)


# ---------------------------------------------------------------- what plays no part


class Untouched(LabelClassifier):
    """A classifier that must not be run."""

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        raise AssertionError("it was run in vain")


def test_a_classifier_of_samples_without_labels_is_refused(digits, classifier_of_three, tmp_path):
    samples, against = open_samples(digits(20)), dict(reference=open_samples("digits"), device=CPU)
    classifier = Untouched(load_classifier(classifier_of_three), classifier_of_three, (0, 1, 2))
    with pytest.raises(UserError, match=r"`classifier=.*` predicts classes, and .*20.npz has no labels: leave it out"):
        measure(samples, Against(extractors=[get_extractor("digits", CPU)], classifier=classifier, **against), tmp_path)
    assert not list(tmp_path.rglob("rows-*"))


def test_class_folders_without_a_size_say_that_their_labels_are_not_read(classifier_of_three, run, tmp_path):
    images, labels = digits_arrays()
    for number in range(30):
        place = tmp_path / "classes" / str(labels[number]) / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[number]).save(place)
    words = ["--samples", tmp_path / "classes", "--reference", "digits"]
    note = f"the subfolders of {tmp_path / 'classes'} are not taken for classes, as no image size is given"
    whole = run(*words)
    assert note in whole and "Class accuracy" not in whole
    assert note in run(*words, "--num-samples", 20), "of some of them too"
    labeled = run(*words, "--image-size", 32)
    assert note not in labeled and "Class accuracy" in labeled
    assert "--image-size" in run(*words, "--classifier", classifier_of_three)


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(weights_files=FeatureWeights(dinov2_weights="no")), "`dinov2_weights=no` .* without `features=dinov2`"),
        (dict(weights_files=FeatureWeights(inception_weights="no")), "`inception_weights=no` .* `features=inception`"),
        (dict(vae="no"), "`vae=no` plays no part, as nothing is a latent cache"),
    ],
)
def test_files_that_nothing_reads_are_refused(settings, words):
    with pytest.raises(UserError, match=words):
        Arguments("digits", samples="a.npz", **settings)
    with pytest.raises(UserError, match=words):
        ReferenceArguments("a.npz", "b.npz", features=("digits",), **settings)


def test_files_that_something_reads_are_taken(tmp_path):
    (tmp_path / "manifest.json").touch()  # a latent cache, as far as this goes
    cache, both = str(tmp_path), FeatureWeights("a", "b")
    features = ("dinov2", "inception")
    assert Arguments("a.npz", samples="b.npz", weights_files=FeatureWeights("a")).features_made == ("inception",)
    for samples, reference, training in ((cache, "b", None), ("a", cache, None), ("a", "b", cache)):
        Arguments(reference, samples=samples, training_data=training, vae="v", features=features, weights_files=both)
    Arguments("digits", ckpt="run", vae="v")
    ReferenceArguments(cache, "b.npz", vae="v", features=features, weights_files=both)


def test_what_nothing_reads_is_told_by_its_flag(digits, run, tmp_path):
    words = ["--samples", digits(20), "--reference", digits(30)]
    for flag in ("--dinov2-weights", "--inception-weights", "--vae"):
        assert f"error: {flag} {Path('/nonexistent')} plays no part" in run(*words, flag, "/nonexistent")
