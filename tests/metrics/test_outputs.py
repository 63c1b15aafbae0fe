"""eval_fid.py's outputs: tried before anything is sampled, kept when something fails, several features at once."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sit.data.digits import digits_arrays, digits_split
from sit.metrics import cli as eval_fid
from sit.metrics.features import get_extractor
from sit.metrics.generated import GeneratedImages
from sit.utils.errors import UserError
from sit.utils.targets import check_room, check_target


@pytest.fixture
def evaluate(checkpoint, monkeypatch):
    """Runs eval_fid.py on 24 samples of the tiny checkpoint, and counts the calls that make images."""
    made, batch = [], GeneratedImages.batch
    monkeypatch.setattr(
        GeneratedImages, "batch", lambda self, numbers: made.append(len(numbers)) or batch(self, numbers)
    )

    def run(*words: str | Path) -> None:
        start = [
            "eval_fid.py",
            "--ckpt",
            checkpoint,
            "--num-samples",
            24,
            "--steps",
            2,
            "--reference",
            "digits:heldout",
        ]
        monkeypatch.setattr("sys.argv", list(map(str, [*start, *words])))
        eval_fid.main()

    return SimpleNamespace(run=run, made=made)


def test_places_that_can_not_be_written_are_told_before_sampling(evaluate, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "there.npz").write_text("")
    for words, said in (
        (("--json", tmp_path), f"--json {tmp_path} is a folder: name a file"),
        (("--json", tmp_path / "file" / "a.json"), "a file stands where a folder is needed"),
        (("--save", tmp_path / "a.png"), "must end in .npz"),
        (("--save", tmp_path / "there.npz"), "there.npz exists already; it is not overwritten"),
        (("--save", tmp_path / "file" / "a.npz"), "a file stands where a folder is needed"),
        (("--work-dir", tmp_path / "file"), "a file stands where a folder is needed"),
    ):
        with pytest.raises(SystemExit) as stop:
            evaluate.run(*words)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and said in error and error.count("\n") == 1, error
    assert not evaluate.made


@pytest.mark.parametrize("words", [("--save", "a.npz"), ("--work-dir", "work"), ()])
def test_a_disk_without_room_is_told_before_sampling(evaluate, tmp_path, monkeypatch, capsys, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=1000))
    with pytest.raises(SystemExit):
        evaluate.run(*words)
    flag = words[0] if words else "--work-dir"
    assert f" KB: make room, or choose another disk by {flag}" in capsys.readouterr().err
    assert not evaluate.made and not list(tmp_path.glob("*.npz"))


def test_the_room_that_is_asked_for_is_what_is_taken(evaluate, tmp_path, monkeypatch):
    """Of features and pixels; what another evaluation left in the folder doesn't count as being there."""
    (tmp_path / "work" / "samples-0").mkdir(parents=True)
    np.savez(tmp_path / "work" / "samples-0" / "others.npz", np.zeros(1000))
    asked = []
    monkeypatch.setattr("sit.metrics.run.check_room", lambda folder, needed, argument, what: asked.append(needed))
    evaluate.run("--work-dir", tmp_path / "work", "--save", tmp_path / "a.npz")
    arrays = [dict(np.load(path)) for path in (tmp_path / "work").glob("samples-*/*/rows-*.npz")]
    taken = sum(array.nbytes for file in arrays for array in file.values())
    pixels = 24 * 32 * 32 * 3
    assert asked == [pixels, taken] and pixels < taken


def test_a_report_that_can_not_be_written_in_the_end_costs_nothing(evaluate, tmp_path, monkeypatch, capsys):
    """The disk fills up while samples are made: what was made is kept, and the named folder has it all."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    from sit.metrics import run as work

    def full(path, *_):
        raise UserError(f"the disk is full, so {path} was not written")

    monkeypatch.setattr(work, "write_record", full)
    with pytest.raises(SystemExit):
        evaluate.run("--json", tmp_path / "a.json")
    output = capsys.readouterr()
    assert "FID (digits features" in output.out, "the report was printed"
    (kept,) = tmp_path.glob("eval-*")
    assert f"what was made is kept in {kept}: the same command goes on with --work-dir {kept}" in output.err
    monkeypatch.undo()
    assert evaluate.made and list(kept.rglob("numbers-*.json"))


def test_several_features_of_one_pass_of_sampling(evaluate, classifier_of_three, tmp_path):
    both, alone = tmp_path / "both.json", tmp_path / "alone.json"
    evaluate.run("--features", "digits", f"classifier:{classifier_of_three}", "--json", both)
    assert sum(evaluate.made) == 24
    told = json.loads(both.read_text())
    assert f"--json {both}" in told["command"] and "threads" in told["machine"]
    numbers = {number["name"]: number["value"] for number in told["numbers"]}
    for features in ("digits", f"classifier:{classifier_of_three}"):
        evaluate.run("--features", features, "--json", alone)
        for number in json.loads(alone.read_text())["numbers"]:
            assert numbers[number["name"]] == pytest.approx(number["value"], rel=1e-9), number["name"]
    assert len({name for name in numbers if name.startswith("FID (")}) == 2


def test_one_reference_file_has_the_statistics_of_several_features(
    evaluate, classifier_of_three, tmp_path, monkeypatch
):
    features = ["--features", "digits", f"classifier:{classifier_of_three}"]
    stats, reports = tmp_path / "stats.npz", []
    words = ["reference", "--data", "digits:heldout", "--out", str(stats), "--images", "360", *features]
    monkeypatch.setattr("sys.argv", ["eval_fid.py", *words])
    eval_fid.main()
    for reference in ("digits:heldout", stats):
        out = tmp_path / f"{len(reports)}.json"
        evaluate.run("--reference", reference, *features, "--json", out)
        reports.append({n["name"]: n["value"] for n in json.loads(out.read_text())["numbers"]})
    assert reports[0].keys() == reports[1].keys()
    for name, value in reports[0].items():
        assert reports[1][name] == pytest.approx(value, rel=1e-6, abs=1e-9), name


def test_the_checks_leave_nothing_behind(tmp_path):
    check_target(tmp_path / "a.npz", "out", ".npz", new=True)
    assert os.listdir(tmp_path) == []
    free = shutil.disk_usage(tmp_path).free
    check_room(tmp_path / "new" / "deeper", 1, "work_dir", "features")
    with pytest.raises(UserError, match="features take .* GB: make room, or choose another disk by `work_dir`"):
        check_room(tmp_path, 2 * free + 10**9, "work_dir", "features")


def test_copies_of_training_images_and_the_worst_classes(tmp_path, capsys, monkeypatch):
    """Of 40 samples 10, of one class, are training images but for a gray level; distances by NumPy's norm."""
    images, labels = digits_arrays()
    rgb = np.repeat(images[..., None], 3, axis=3)
    train, heldout = digits_split()
    copied = train[labels[train] == 4][:10]
    fresh = heldout[labels[heldout] != 4][:30]
    samples = np.concatenate([rgb[copied] ^ 1, rgb[fresh]])
    np.savez(tmp_path / "samples.npz", arr_0=samples, arr_1=np.concatenate([labels[copied], labels[fresh]]))
    words = ["--samples", tmp_path / "samples.npz", "--reference", "digits:heldout", "--training-data", "digits:train"]
    monkeypatch.setattr("sys.argv", list(map(str, ["eval_fid.py", *words, "--json", tmp_path / "a.json"])))
    eval_fid.main()
    printed, report = capsys.readouterr().out, json.loads((tmp_path / "a.json").read_text())
    copies = next(number for number in report["numbers"] if number["name"].startswith("Copies"))
    of_samples, of_training = (
        get_extractor("digits", torch.device("cpu"))(torch.from_numpy(pixels).permute(0, 3, 1, 2))["features"]
        for pixels in (samples, rgb[train])
    )
    away = np.sort([np.linalg.norm(of_training - one, axis=1) for one in of_samples.astype(np.float64)], axis=1)
    expected = away[:, 0] < 0.5 * away[:, :50].mean(axis=1)
    assert expected[:10].all() and expected.mean() < 0.5
    assert copies["value"] == pytest.approx(expected.mean()) and "1,437 training images" in copies["how"]
    shares = report["by_class"]["class accuracy"]
    assert [one["share"] for one in shares] == sorted(one["share"] for one in shares)
    whole = next(number["value"] for number in report["numbers"] if number["name"] == "Class accuracy")
    assert sum(one["share"] * one["count"] for one in shares) / 40 == pytest.approx(whole)
    assert {one["label"]: one["count"] for one in shares}[4] == 10
    assert "worst classes by precision (digits features): " in printed
