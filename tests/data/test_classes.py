"""Which folders are taken for classes, and tars that are cut where tarfile sees an end."""

from __future__ import annotations

import logging
import tarfile

import pytest
from PIL import Image

from sit.data import factory
from sit.data.factory import open_images
from sit.data.folder import has_classes, only_tars
from sit.metrics.image_sets import open_samples
from sit.utils.errors import UserError


def put(*parts) -> None:
    path = parts[0].joinpath(*parts[1:])
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path)


def tar_of(folder, inside):
    """What ``tar cf x.tar`` makes of a folder, as GNU tar does."""
    path = folder.with_suffix(".tar")
    with tarfile.open(path, "w") as archive:
        archive.add(folder, arcname=inside)
    return path


@pytest.fixture
def classes(tmp_path):
    for name in "abc":
        put(tmp_path / "set", name, "0.png")
    return tmp_path / "set"


def test_a_folder_around_the_classes_is_looked_through(classes, tmp_path):
    plain = open_images(str(classes), 8)
    (tmp_path / "around").mkdir()
    classes.rename(tmp_path / "around" / "set")
    for spec in (tmp_path / "around", tar_of(tmp_path / "around", "."), tar_of(tmp_path / "around", "one/two/three")):
        found = open_images(str(spec), 8)
        assert found.classes == ["a", "b", "c"] and found.labels.tolist() == [0, 1, 2]
        assert found.fingerprint() == plain.fingerprint() and found[2][0].shape == (3, 8, 8)
    assert open_samples(str(tmp_path / "around"), 8).class_names == ["a", "b", "c"]


def test_one_class_stays_one(tmp_path):
    put(tmp_path / "deep", "faces", "part", "0.png")
    put(tmp_path / "flat", "faces", "0.png")
    put(tmp_path / "mixed", "faces", "0.png")
    put(tmp_path / "mixed", "faces", "more", "1.png")
    put(tmp_path / "mixed", "faces", "others", "2.png")
    for name in ("deep", "flat", "mixed"):
        assert open_images(str(tmp_path / name), 8).classes == ["faces"]


def test_images_at_any_depth_below_several_classes(tmp_path):
    put(tmp_path / "set", "animals", "cat", "0.png")
    put(tmp_path / "set", "animals", "dog", "0.png")
    put(tmp_path / "set", "vehicles", "car", "0.png")
    assert open_images(str(tmp_path / "set"), 8).classes == ["animals", "vehicles"]


def test_parts_of_a_data_set_are_not_its_classes(classes, tmp_path):
    (tmp_path / "both").mkdir()
    classes.rename(tmp_path / "both" / "train")
    put(tmp_path / "both", "val", "a", "1.png")
    put(tmp_path / "both", "val", "b", "1.png")
    for spec in (tmp_path / "both", tar_of(tmp_path / "both", "."), tar_of(tmp_path / "both", "both")):
        with pytest.raises(
            UserError, match=f"`data={spec}` holds .*train, .*val, which look like parts of one data set"
        ):
            open_images(str(spec), 8)
    assert open_images(str(tmp_path / "both" / "train"), 8).classes == ["a", "b", "c"]


@pytest.mark.parametrize("inside", ["x.png", "sub/x.png"])
def test_a_part_without_classes_is_a_part_too(classes, tmp_path, inside):
    """As a competition's data has it: train/ of classes, test/ of images alone."""
    (tmp_path / "both").mkdir()
    classes.rename(tmp_path / "both" / "train")
    put(tmp_path / "both", "test", inside)
    for spec in (tmp_path / "both", tar_of(tmp_path / "both", "."), tar_of(tmp_path / "both", "both")):
        with pytest.raises(UserError, match="holds .*test, .*train, which look like parts .*give one of them, or "):
            open_images(str(spec), 8)
    put(tmp_path / "both", "bus", "0.png")
    assert open_images(str(tmp_path / "both"), 8).classes == ["bus", "test", "train"], "no part is named bus"


def test_tars_of_classes_are_like_folders_of_classes(classes, tmp_path):
    """Where they are parts, too, in folders around, and with one that has no image."""
    plain = open_images(str(classes), 8)
    for folder in ("tars", "parts/train", "parts/val", "around/set"):
        (tmp_path / folder).mkdir(parents=True)
        for name in "abc":
            tar_of(classes / name, ".").rename(tmp_path / folder / f"{name}.tar")
    for spec in (tar_of(tmp_path / "tars", "."), tar_of(tmp_path / "around", "."), tmp_path / "tars"):
        found = open_images(str(spec), 8)
        assert found.classes == ["a", "b", "c"] and found.fingerprint() == plain.fingerprint()
    with pytest.raises(UserError, match="holds train, val, which look like parts of one data set"):
        open_images(str(tar_of(tmp_path / "parts", ".")), 8)
    with tarfile.open(tmp_path / "tars" / "d.tar", "w"):
        pass
    for spec in (tmp_path / "tars", tar_of(tmp_path / "tars", "."), tar_of(tmp_path / "tars", "one")):
        with pytest.raises(UserError, match=f"`data={spec}`: class (one/)?d has no images; fill it or remove it"):
            open_images(str(spec), 8)


def test_a_class_without_images_is_named_in_tars_too(classes):
    (classes / "empty").mkdir()
    (classes / "a" / "notes").mkdir()
    for spec in (classes, tar_of(classes, "."), tar_of(classes, "in/set")):
        with pytest.raises(UserError, match=r"empty has no images; fill it or remove it"):
            open_images(str(spec), 8)
    (classes / "empty").rename(classes / ".empty")
    assert open_images(str(tar_of(classes, ".")), 8).classes == ["a", "b", "c"]


def test_the_last_of_a_name_in_a_tar_counts(classes):
    """As unpacking leaves it: ``tar -r`` adds the new file and lets the old one be."""
    path = tar_of(classes, ".")
    Image.new("RGB", (8, 8), (0, 0, 255)).save(classes / "b" / "0.png")
    with tarfile.open(path, "a") as archive:
        archive.add(classes / "b" / "0.png", arcname="./b/0.png")
    for spec in (str(path), f"flat:{path}", f"webdataset:{path}"):
        found = open_images(spec, 8)
        assert [found[index][0][2].max().item() for index in range(len(found))] == [0, 255, 0], spec


def test_hidden_folders_are_no_classes(classes, tmp_path):
    """Nor is what lies in them, at any depth; a tar gives what its folder gives."""
    put(classes, ".thumbs", "0.png")
    put(classes, "a", ".thumbs", "0.png")
    put(classes, "b", "more", "1.png")
    put(classes, "._c.png")
    plain = open_images(str(classes), 8)
    assert plain.classes == ["a", "b", "c"] and plain.labels.tolist() == [0, 1, 1, 2]
    for inside in (".", "set", "./set"):
        found = open_images(str(tar_of(classes, inside)), 8)
        assert found.classes == plain.classes and found.labels.tolist() == plain.labels.tolist()
        assert found.fingerprint() == plain.fingerprint()
    tars = tmp_path / "tars"
    tars.mkdir()
    for name in "ab":
        tar_of(classes / name, ".").rename(tars / f"{name}.tar")
    (tars / "._a.tar").write_bytes(b"what macOS leaves")
    found = open_images(str(tars), 8)
    assert found.classes == ["a", "b"] and found.labels.tolist() == [0, 1, 1]


def test_images_beside_the_classes_are_not_left_out(classes, tmp_path):
    (tmp_path / "tars").mkdir()
    tar_of(classes / "a", ".").rename(tmp_path / "tars" / "a.tar")
    put(classes, "._3.png")
    put(tmp_path / "tars", "._3.png")
    assert has_classes(classes) and only_tars(tmp_path / "tars"), "what is hidden lies beside nothing"
    for spec in (classes, tar_of(classes, "."), tmp_path / "tars"):
        open_images(str(spec), 8)
    for number in range(3):
        put(classes, f"{number}.png")
        put(tmp_path / "tars", f"{number}.png")
        more = f" and {number} more lie" if number else " lies"
        for spec, mend in (
            (classes, f", or give flat:{classes}, "),
            (tar_of(classes, "."), f", or give flat:{classes}.tar, "),
            (tmp_path / "tars", "$"),
        ):
            with pytest.raises(UserError, match=f"`data={spec}`: 0.png{more} beside the classes.* elsewhere{mend}"):
                open_images(str(spec), 8)
    assert not has_classes(classes)
    assert open_images(f"flat:{classes}", 8).labels.tolist() == [0] * 6
    assert open_images(f"flat:{classes}.tar", 8).labels.tolist() == [0] * 6
    assert open_images(f"flat:{classes}.tar", 8).fingerprint() == open_images(f"flat:{classes}", 8).fingerprint()
    (tmp_path / "photos" / "notes").mkdir(parents=True)
    put(tmp_path / "photos", "1.png")
    with pytest.raises(UserError, match=f"1.png lies beside the classes.* give flat:{tmp_path}/photos, "):
        open_images(str(tmp_path / "photos"), 8)
    classes.rename(tmp_path / "photos" / "notes" / "set")  # a folder around the classes
    with pytest.raises(UserError, match="1.png lies beside the classes"):
        open_images(str(tmp_path / "photos"), 8)


def test_a_tar_of_absolute_names(classes):
    path = classes.with_suffix(".tar")
    with tarfile.open(path, "w") as archive:
        for file in sorted(classes.rglob("*.png")):
            member = archive.gettarinfo(file)
            member.name = f"/home/me/set/{file.relative_to(classes)}"
            with open(file, "rb") as opened:
                archive.addfile(member, opened)
    assert open_images(str(path), 8).fingerprint() == open_images(str(classes), 8).fingerprint()


def test_what_was_found_is_said_once(classes, caplog, monkeypatch):
    factory.announce.cache_clear()
    with caplog.at_level(logging.WARNING):
        for size in (8, 16):
            open_images(str(classes), size)
        open_images("digits:heldout")
    assert caplog.messages == [
        f"note: {classes}: 3 images in 3 classes",
        "note: digits:heldout: 360 images in 10 classes",
    ]
    caplog.clear()
    factory.announce.cache_clear()
    monkeypatch.setenv("RANK", "1")  # another process of the launch
    open_images(str(classes), 8)
    assert not caplog.messages


def test_a_tar_cut_at_the_edge_of_a_member_is_refused(classes):
    path = tar_of(classes, ".")
    content, edges = path.read_bytes(), []
    with tarfile.open(path) as archive:
        edges = [member.offset for member in archive][1:] + [archive.offset, archive.offset + 512]
    assert len(open_images(str(path), 8)) == 3
    for edge in edges:
        path.write_bytes(content[:edge])
        with pytest.raises(UserError, match="can't be read as an uncompressed tar"):
            open_images(str(path), 8)
    damaged = bytearray(content)
    damaged[edges[-3]] ^= 1  # in the name of the last member, whose header is then none
    path.write_bytes(damaged)
    with pytest.raises(UserError, match="has no end"):
        open_images(str(path), 8)
