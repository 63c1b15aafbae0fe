"""sample.py as a user runs it: grids, PNGs and npz; the same images whatever the batch; nothing half-written."""

from __future__ import annotations

import re
import sys

import numpy as np
import pytest
from PIL import Image

import sample


def run(*arguments: object) -> None:
    before, sys.argv = sys.argv, ["sample.py", *map(str, arguments)]
    try:
        sample.main()
    finally:
        sys.argv = before


def test_a_grid_alone(checkpoint, tmp_path, capsys):
    run("--ckpt", checkpoint, "--steps", 2, "--out", tmp_path / "a")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["grid.png"]
    width, height = Image.open(tmp_path / "a" / "grid.png").size
    assert width > 10 * 64 and height > 4 * 64
    assert "grid.png" in capsys.readouterr().out


def test_files_agree_and_the_batch_size_does_not_matter(checkpoint, tmp_path):
    for batch in (5, 64):
        run("--ckpt", checkpoint, "--steps", 3, "--num-samples", 17, "--labels", 7, 2, "--seed", 3,
            "--cfg-scale", 2, "--batch-size", batch, "--out", tmp_path / str(batch))  # fmt: skip
    with np.load(tmp_path / "5" / "samples.npz") as one, np.load(tmp_path / "64" / "samples.npz") as other:
        assert one["arr_0"].shape == (17, 32, 32, 3) and one["arr_0"].dtype == np.uint8
        assert one["arr_1"].tolist() == [7, 2] * 8 + [7]
        assert np.array_equal(one["arr_0"], other["arr_0"])
        images = one["arr_0"]
    names = sorted(path.name for path in (tmp_path / "5").iterdir())
    assert names == sorted([f"{i:06d}.png" for i in range(17)] + ["grid.png", "samples.npz"])
    for number, image in enumerate(images):
        assert np.array_equal(np.array(Image.open(tmp_path / "5" / f"{number:06d}.png")), image)


def test_another_image_size(checkpoint, tmp_path):
    run("--ckpt", checkpoint, "--steps", 2, "--num-samples", 2, "--image-size", 48, 32, "--out", tmp_path / "a")
    with np.load(tmp_path / "a" / "samples.npz") as archive:
        assert archive["arr_0"].shape == (2, 48, 32, 3)


def test_precision(checkpoint, tmp_path):
    """bfloat16 is near float32 and not the same; one number is the side of a square."""
    images = {}
    for precision in ("float32", "bfloat16"):
        run("--ckpt", checkpoint, "--steps", 3, "--num-samples", 2, "--precision", precision, "--image-size", 48,
            "--out", tmp_path / precision)  # fmt: skip
        with np.load(tmp_path / precision / "samples.npz") as archive:
            images[precision] = archive["arr_0"].astype(float)
    assert images["float32"].shape == (2, 48, 48, 3)
    assert 0 < np.abs(images["float32"] - images["bfloat16"]).mean() < 2


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--steps", "0"], "--steps must be at least 1"),
        (["--steps", "-5"], "--steps must be at least 1"),
        (["--labels", "10"], "--labels 10 is out of range: this network has the classes 0 to 9"),
        (["--device", "cpu", "--precision", "tf32"], "--precision tf32 is for GPUs, and this is cpu"),
        (["--sampler", "magic"], "invalid choice 'magic'"),
        (["--sampler", "ode", "--method", "heun9"], "the methods of --sampler ode are .*dopri5"),
        (["--num-samples", "0"], "--num-samples must be at least 1"),
        (["--batch-size", "0"], "--batch-size must be at least 1"),
        (["--image-size", "30", "32"], "--image-size 30 32: both must be multiples of 8"),
        (["--device", "abacus"], "--device abacus can't be used"),
        (["--cfg-interval", "0.7", "0.2"], "--cfg-interval"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(checkpoint, tmp_path, capsys, arguments, words):
    with pytest.raises(SystemExit) as stop:
        run("--ckpt", checkpoint, "--out", tmp_path / "a", *arguments)
    told = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and told.startswith("error: ")
    assert re.search(words, told), told
    assert not list(tmp_path.iterdir())


def test_a_folder_in_use_is_left_alone(checkpoint, tmp_path, capsys):
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(SystemExit):
        run("--ckpt", checkpoint, "--steps", 2, "--out", tmp_path)
    assert "exists already" in capsys.readouterr().err and (tmp_path / "mine").read_text() == "precious"


def test_missing_and_foreign_checkpoints(tmp_path, capsys):
    (tmp_path / "foreign.pt").write_bytes(b"not a checkpoint")
    for path in (tmp_path / "none", tmp_path / "foreign.pt", tmp_path):
        with pytest.raises(SystemExit) as stop:
            run("--ckpt", path, "--out", tmp_path / "out")
        assert stop.value.code == 2 and str(path) in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
