"""Images: the digits' enlargement, ADM's crop, folders, tar files, other sources, and what is said of bad ones."""

from __future__ import annotations

import hashlib
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader

from sit.data.dataset import center_crop
from sit.data.digits import digits_arrays, digits_split, enlarge_digits, shrink_digits
from sit.data.factory import open_images
from sit.data.heldout import in_both, keyed_order
from sit.data.reading import BadImage
from sit.utils.errors import UserError


def draw_image(seed: int, width: int = 20, height: int = 14) -> Image.Image:
    return Image.fromarray(np.random.RandomState(seed).randint(0, 255, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for label, name in enumerate(("b_second", "a_first")):
        inside = tmp_path / "images" / name / "deeper"
        inside.mkdir(parents=True)
        for number in (2, 0, 1):
            draw_image(10 * label + number).save(inside / f"{number}.png")
    (tmp_path / "images" / "a_first" / "notes.txt").write_text("no image")
    return tmp_path / "images"


def test_digits_are_sklearns_in_order_and_shrink_back():
    data, real = open_images("digits"), load_digits()
    assert len(data) == 1797 and data.classes == [str(n) for n in range(10)]
    assert np.array_equal(data.labels, real.target)
    images = np.stack([data[index][0].numpy() for index in range(100)])
    assert images.shape == (100, 3, 32, 32) and images.dtype == np.uint8
    assert np.abs(shrink_digits(images) - real.data[:100]).max() < 1.0  # of 16
    assert np.allclose(shrink_digits(images), shrink_digits(images.transpose(0, 2, 3, 1)))
    assert open_images("digits", 64)[3][0].shape == (3, 64, 64)


def test_every_digit_is_enlarged_as_it_is_alone():
    """Among them the first and last of a part of those that are enlarged together."""
    small, (large, labels) = load_digits().images, digits_arrays()
    assert large.shape == (1797, 32, 32) and np.array_equal(labels, load_digits().target)
    for number in (0, 127, 128, 1791, 1792, 1796):
        assert np.array_equal(large[number], enlarge_digits(small[number : number + 1])[0])


def test_digits_split_is_a_partition_of_every_class():
    train, heldout = digits_split()
    assert sorted([*train, *heldout]) == list(range(1797)) and len(heldout) == 360
    labels = load_digits().target
    assert np.array_equal(open_images("digits:heldout").labels, labels[heldout])
    assert np.array_equal(open_images("digits:train").labels, labels[train])
    assert np.bincount(labels[heldout]).min() >= 20


def test_every_beginning_of_the_keyed_order_has_the_classes_in_their_proportions():
    labels = np.repeat(np.arange(4), [60, 30, 9, 1])[np.random.RandomState(0).permutation(100)]
    order = keyed_order(labels)
    assert sorted(order) == list(range(100)) and np.array_equal(order, keyed_order(labels))
    for count in range(1, 101):
        found = np.bincount(labels[order[:count]], minlength=4)
        assert np.abs(found - count * np.array([0.6, 0.3, 0.09, 0.01])).max() <= 1.5
    members = order[labels[order] == 0]
    assert np.abs(np.corrcoef(members, np.arange(60))[0, 1]) < 0.3  # shuffled


def test_an_image_of_two_sources_is_known_by_its_place(folder, tmp_path):
    (tmp_path / "again").symlink_to(folder)
    data = open_images(str(folder), 8)
    assert in_both(data, open_images(str(tmp_path / "again"), 8), np.array([1, 4])) == [1, 4]
    digits = [open_images(name) for name in ("digits", "digits:train", "digits:heldout")]
    assert [image.source.test_set for image in (*digits, data)] == [None, "digits:heldout", None, None]
    assert len(in_both(digits[0], digits[2], np.arange(360))) == 360
    assert not in_both(digits[1], digits[2], np.arange(360))


def reference_crop(pixels: np.ndarray, size: int) -> np.ndarray:
    """ADM's crop where only halving acts: means of columns, then of rows, each rounded half up, then the middle."""
    while min(pixels.shape[:2]) >= 2 * size:
        pixels = (pixels[:, 0::2] + pixels[:, 1::2] + 1) // 2
        pixels = (pixels[0::2] + pixels[1::2] + 1) // 2
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


def test_crop_by_halving_is_the_block_mean():
    image = draw_image(1, width=88, height=64)
    assert np.array_equal(np.asarray(center_crop(image, 16)), reference_crop(np.asarray(image, dtype=int), 16))


@pytest.mark.parametrize(
    ("width", "height", "size"), [(50, 31, 16), (31, 50, 16), (500, 7, 16), (16, 16, 16), (17, 40, 33)]
)
def test_crop_gives_the_size_from_any_shape(width, height, size):
    assert center_crop(draw_image(2, width, height), size).size == (size, size)


def test_crop_of_a_line_takes_no_more_than_its_middle():
    """Its whole would be resized to 24 gigabytes; what the middle becomes is what the resized whole has there."""
    long = np.random.RandomState(3).randint(0, 255, (2, 30000, 3), dtype=np.uint8)
    found = np.asarray(center_crop(Image.fromarray(long), 512)).astype(int)
    middle = Image.fromarray(long[:, 15000 - 31 : 15000 + 31])  # of a ratio that is resized as a whole
    assert found.shape == (512, 512, 3) and np.abs(found - np.asarray(center_crop(middle, 512))).max() <= 1
    upright = center_crop(Image.fromarray(long.transpose(1, 0, 2)), 512)
    assert np.array_equal(found, np.asarray(upright).transpose(1, 0, 2))


def test_crop_keeps_the_middle():
    image = Image.new("RGB", (90, 30))
    image.paste((255, 255, 255), (30, 0, 60, 30))
    assert np.asarray(center_crop(image, 30)).min() == 255


def test_folder_lists_classes_and_files_in_order(folder):
    data = open_images(str(folder), 8)
    assert data.classes == ["a_first", "b_second"] and data.labels.tolist() == [0, 0, 0, 1, 1, 1]
    expected = np.asarray(center_crop(draw_image(11), 8)).transpose(2, 0, 1)
    assert np.array_equal(data[1][0].numpy(), expected) and data[1][1] == 0
    again = open_images(str(folder), 16)
    assert data.fingerprint() == again.fingerprint()
    (folder / "b_second" / "deeper" / "1.png").rename(folder / "b_second" / "deeper" / "3.png")
    assert open_images(str(folder), 8).fingerprint() != data.fingerprint()


def test_gray_palette_and_transparent_images_become_rgb(tmp_path):
    (tmp_path / "one").mkdir()
    for mode in ("L", "P", "RGBA", "1", "CMYK"):
        draw_image(3).convert(mode).save(tmp_path / "one" / f"{mode}.{'jpg' if mode == 'CMYK' else 'png'}")
    assert all(image.shape == (3, 8, 8) for image, _ in open_images(str(tmp_path), 8))


@pytest.mark.parametrize("workers", [0, 1])
def test_corrupt_image_is_named_also_from_a_worker(folder, workers):
    victim = folder / "b_second" / "deeper" / "1.png"
    victim.write_bytes(victim.read_bytes()[:200])
    data, message = open_images(str(folder), 8), ""
    try:  # not pytest.raises: it keeps the traceback, and with it the loader, whose end then takes five seconds
        list(DataLoader(data, batch_size=2, num_workers=workers))
    except BadImage as error:
        message = str(error)
    assert str(victim) in message and "\n" not in message and "Traceback" not in message


def test_text_named_as_image_and_a_vanished_file_are_named(folder):
    data = open_images(str(folder), 8)
    (folder / "a_first" / "deeper" / "0.png").write_text("hello")
    (folder / "a_first" / "deeper" / "1.png").unlink()
    for index in (0, 1):
        with pytest.raises(UserError, match=f"{index}.png"):
            data[index]


def test_what_is_said_of_folders_that_do_not_serve(tmp_path, folder):
    empty = tmp_path / "empty"
    empty.mkdir()
    (folder / "c_third").mkdir()
    file = tmp_path / "file.txt"
    file.write_text("x")
    for spec, words in [
        (tmp_path / "missing", "no such folder"),
        (empty, "has no images in it"),
        (folder, "c_third"),
        (file, "is a file"),
        ("digits:other", "digits:heldout"),
    ]:
        with pytest.raises(UserError, match=words) as caught:
            open_images(str(spec), 8)
        assert f"`data={spec}`" in str(caught.value)
    with pytest.raises(UserError, match="`image_size=0` must be positive"):
        open_images("digits", 0)


def tar_of(entries: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, content in entries.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def as_bytes(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def test_tars_give_what_the_folder_gives(tmp_path, folder):
    plain = open_images(str(folder), 8)
    content = {
        name: {f"{number}.png": as_bytes(draw_image(10 * label + number)) for number in (2, 0, 1)}
        for label, name in enumerate(("b_second", "a_first"))
    }
    outer, folders, per_class = tmp_path / "train.tar", tmp_path / "folders.tar", tmp_path / "tars"
    outer.write_bytes(tar_of({f"{name}.tar": tar_of(files) for name, files in content.items()}))
    folders.write_bytes(tar_of({f"./{c}/{name}": data for c, files in content.items() for name, data in files.items()}))
    per_class.mkdir()
    for name, files in content.items():
        (per_class / f"{name}.tar").write_bytes(tar_of(files))
    fingerprints = set()
    for path in (outer, folders, per_class):
        data = open_images(str(path), 8)
        assert data.classes == plain.classes and np.array_equal(data.labels, plain.labels)
        for (a, _), (b, _) in zip(DataLoader(data, num_workers=1), DataLoader(plain), strict=True):
            assert torch.equal(a, b)
        fingerprints.add(data.fingerprint())
    assert len(fingerprints) == 1


def test_hidden_files_of_tars_are_no_images(tmp_path):
    """Such as ``._a.png``, which macOS puts beside ``a.png``."""
    image = as_bytes(draw_image(0))
    (tmp_path / "train.tar").write_bytes(
        tar_of({"n1.tar": tar_of({"a.png": image, "._a.png": b"x"}), "n2/b.png": image, "n2/._b.png": b"x"})
    )
    data = open_images(str(tmp_path / "train.tar"), 8)
    assert data.labels.tolist() == [0, 1] and data.source.names.tolist() == [b"n1/a.png", b"n2/b.png"]


def test_bad_tars(tmp_path):
    good = tar_of({"n1.tar": tar_of({"a.png": as_bytes(draw_image(0))}), "n2.tar": tar_of({"b.png": b"not an image"})})
    tar = tmp_path / "train.tar"
    tar.write_bytes(good)
    with pytest.raises(BadImage, match=r"n2/b\.png in .*train\.tar"):
        open_images(str(tar), 8)[1]
    lying = tar_of({"n1.tar": tar_of({"a.png": b"x" * 3000})[:2000], "n2.tar": tar_of({"b.png": b"y"})})
    for content in (good[:700], good[:1500], good[:5000], good[: len(good) // 2 + 700], lying, b"nonsense" * 200):
        tar.write_bytes(content)
        with pytest.raises(UserError, match="train.tar can't be read as an uncompressed tar"):
            open_images(str(tar), 8)
    (tmp_path / "t.tar.gz").write_bytes(b"x")
    with pytest.raises(UserError, match="compressed"):
        open_images(str(tmp_path / "t.tar.gz"), 8)
    tar.write_bytes(tar_of({"a.png": as_bytes(draw_image(0))}))
    with pytest.raises(UserError, match="no images in class folders"):
        open_images(str(tar), 8)


def test_torchvision_sets(tmp_path):
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    pixels = np.random.RandomState(0).randint(0, 255, (5, 28, 28), dtype=np.uint8)
    for name, shape, content in [
        ("images-idx3", (5, 28, 28), pixels),
        ("labels-idx1", (5,), np.arange(5, dtype=np.uint8)),
    ]:
        header = bytes([0, 0, 8, len(shape)]) + b"".join(int(side).to_bytes(4, "big") for side in shape)
        for part in ("train", "t10k"):
            (raw / f"{part}-{name}-ubyte").write_bytes(header + content.tobytes())
    data = open_images(f"fashion-mnist:{tmp_path}")
    assert data.image_size == 28 and data.labels.tolist() == [0, 1, 2, 3, 4] and len(data.classes) == 10
    assert np.array_equal(data[3][0][1].numpy(), pixels[3])
    assert data.source.test_set == f"fashion-mnist-test:{tmp_path}"
    test = open_images(data.source.test_set, 32)
    assert test[0][0].shape == (3, 32, 32) and test.source.test_set is None
    assert in_both(data, data, np.array([4, 2])) == [2, 4] and not in_both(data, test, np.arange(5))
    for spec in (f"cifar10:{tmp_path}", f"cifar10:{tmp_path / 'none'}", f"imagenet:{tmp_path}"):
        with pytest.raises(UserError, match=spec):
            open_images(spec)


def test_sets_of_the_datasets_library(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["x", "y"])})
    rows = {"img": [draw_image(n) for n in range(4)], "label": [0, 1, 1, 0]}
    made = datasets.Dataset.from_dict(rows, features=features)
    made.save_to_disk(tmp_path / "set")
    data = open_images(f"datasets:{tmp_path / 'set'}", 8)
    assert data.classes == ["x", "y"] and data.labels.tolist() == [0, 1, 1, 0]
    assert np.array_equal(data[2][0].numpy().transpose(1, 2, 0), np.asarray(center_crop(draw_image(2), 8)))
    (tmp_path / "set").rename(tmp_path / "moved")
    moved = open_images(f"datasets:{tmp_path / 'moved'}", 8)
    assert moved.fingerprint() == data.fingerprint()
    made.select([1, 0, 3, 2]).map(lambda row: {"label": 1 - row["label"]}).save_to_disk(tmp_path / "other")
    other = open_images(f"datasets:{tmp_path / 'other'}", 8)
    assert np.array_equal(other.labels, data.labels) and other.fingerprint() != data.fingerprint()
    assert in_both(data, data, np.array([3])) == [3] and not in_both(data, other, np.arange(4))
    for splits, asked, expected in [
        (("train", "test"), "", "test"),
        (("train", "test", "validation"), "@train", "validation"),
        (("train", "test"), "@test", None),
        (("train", "extra"), "", None),
    ]:
        place = tmp_path / "_".join(splits)
        datasets.DatasetDict({split: made for split in splits}).save_to_disk(place)
        source = open_images(f"datasets:{place}{asked}", 8).source
        assert source.test_set == (expected and f"datasets:{place}@{expected}")
    with pytest.raises(UserError, match="it has the splits train, extra, and no test"):
        open_images(f"datasets:{place}@test", 8)
    with pytest.raises(UserError, match="it was saved without splits: leave @test out"):
        open_images(f"datasets:{tmp_path / 'moved'}@test", 8)
    with monkeypatch.context() as patch:
        patch.setattr(datasets, "load_dataset", lambda name, split: made)
        hub = open_images("datasets:someone/something@test", 8)
    named = b"datasets:someone/something@test\0" + np.array([0, 1, 1, 0], dtype="<i8").tobytes()
    assert hub.fingerprint() == hashlib.blake2b(named, digest_size=16).hexdigest()
    made.remove_columns("label").save_to_disk(tmp_path / "bare")
    with pytest.raises(UserError, match="ClassLabel"):
        open_images(f"datasets:{tmp_path / 'bare'}", 8)
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(UserError, match="pip install datasets"):
        open_images("datasets:someone/something", 8)
