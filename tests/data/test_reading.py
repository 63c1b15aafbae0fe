"""One reader of images: every command reads the same files of a folder, and makes the same RGB of them."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from PIL import Image

from sit.data.factory import open_images
from sit.data.reading import BadImage, to_rgb
from sit.metrics.image_sets import open_samples


@pytest.fixture
def folder(tmp_path):
    """Two classes of two images each, and names that no reader takes for images."""
    source = np.random.default_rng(0)
    for name in ("cats", "dogs"):
        (tmp_path / "set" / name).mkdir(parents=True)
        for number in range(2):
            pixels = source.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "set" / name / f"{number}.png")
    (tmp_path / "set" / ".ipynb_checkpoints").mkdir()
    copy = (tmp_path / "set" / "cats" / "0.png").read_bytes()
    (tmp_path / "set" / ".ipynb_checkpoints" / "0.png").write_bytes(copy)
    (tmp_path / "set" / "cats" / "._0.png").write_bytes(b"what macOS leaves")
    return tmp_path / "set"


def test_training_and_evaluation_take_the_same_files(folder):
    training = open_images(str(folder), 8)
    for size in (None, 8):
        evaluated = open_samples(str(folder), size)
        assert len(training) == len(evaluated) == 4
        assert torch.equal(evaluated.batch(np.arange(4)), torch.stack([training[index][0] for index in range(4)]))


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_sixteen_bits_are_scaled_by_their_white(folder, suffix):
    values = np.linspace(0, 65535, 64).round().astype(np.uint16).reshape(8, 8)
    for path in (folder / "cats").glob("?.png"):
        path.unlink()
    Image.fromarray(values).save(folder / "cats" / f"deep.{suffix}")
    expected = torch.from_numpy((values / 257).round().astype(np.uint8)).expand(3, 8, 8)
    assert torch.equal(open_images(str(folder), 8)[0][0], expected)
    assert torch.equal(open_samples(str(folder)).batch(np.array([0]))[0], expected)


@pytest.mark.parametrize(("dtype", "words"), [(np.int32, "32-bit integers"), (np.float32, "floating-point numbers")])
def test_pixels_without_a_known_white_are_refused_by_name(folder, dtype, words):
    bad = folder / "cats" / "0.tif"
    (folder / "cats" / "0.png").unlink()
    Image.fromarray(np.ones((8, 8), dtype=dtype)).save(bad)
    for read in (lambda: open_images(str(folder), 8)[0], lambda: open_samples(str(folder)).batch(np.array([0]))):
        with pytest.raises(BadImage, match=f"{bad} .*{words}.*save it with 8 or 16 bits"):
            read()


def test_eight_bits_stay_as_they_are():
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert np.array_equal(np.asarray(to_rgb(Image.fromarray(values)))[..., 1], values)


def test_exif_rotation_is_not_applied(folder):
    """As ADM's reader and torchvision's, and so the published statistics, have it."""
    pixels = np.zeros((8, 8, 3), dtype=np.uint8)
    pixels[0] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(folder / "cats" / "0.png", exif=exif)
    assert open_images(str(folder), 8)[0][0][0, 0].tolist() == [255] * 8
    datasets = pytest.importorskip("datasets", reason="the datasets library is not installed: pip install datasets")
    cell = {"bytes": (folder / "cats" / "0.png").read_bytes(), "path": None}
    path = {"bytes": None, "path": str(folder / "cats" / "0.png")}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["x"])})
    made = datasets.Dataset.from_dict({"image": [cell, path], "label": [0, 0]}, features=features)
    made.save_to_disk(folder.parent / "saved")
    made.to_parquet(folder.parent / "a.parquet")
    for spec in (f"datasets:{folder.parent}/saved", f"{folder.parent}/a.parquet"):
        for image, _ in open_images(spec, 8):
            assert image[0, 0].tolist() == [255] * 8
    assert made[0]["image"].getpixel((0, 7)) != (255, 255, 255), "the library by itself would rotate"


def test_a_folder_that_can_not_be_read_is_named(folder):
    if os.geteuid() == 0:
        pytest.skip("root reads everything")
    (folder / "cats").chmod(0)
    with pytest.raises(Exception, match="cats"):
        open_samples(str(folder))
    (folder / "cats").chmod(0o755)
