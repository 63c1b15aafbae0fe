"""Links in folders and in tars are followed, to files and to no end: none is left out without a word."""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sit.data.factory import open_images
from sit.data.reading import image_files
from sit.utils.errors import UserError


def put(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.RandomState(seed).randint(0, 255, (8, 8, 3), dtype=np.uint8)).save(path, "PNG")


def link(path: Path, target: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


@pytest.fixture
def linked(tmp_path) -> Path:
    """Three classes, of which one file in two is a link of some kind."""
    root = tmp_path / "set"
    put(root / "cat" / "1.png", 1)
    put(root / "cat" / "deep" / "er" / "2.png", 2)
    put(root / ".store" / "a1b2c3", 3)  # as git-annex and the Hub's cache have it
    (root / "bird").mkdir()
    os.link(root / "cat" / "1.png", root / "bird" / "1.png")
    os.link(root / "cat" / "1.png", root / "cat" / "again.png")
    link(root / "bird" / "2.png", "../cat/deep/er/2.png")
    link(root / "dog" / "1.png", "../bird/1.png")  # to what is a hard link itself
    link(root / "dog" / "2.png", "../bird/2.png")  # to a link
    link(root / "dog" / "3.png", ".././.store/a1b2c3")
    link(root / "dog" / "notes.txt", "/dev/null")
    link(root / "dog" / ".way", "../cat/deep")
    link(root / "dog" / "4.png", ".way/er/2.png")  # through a link to a folder
    return root


def pixels(data) -> np.ndarray:
    return np.stack([data[index][0].numpy() for index in range(len(data))])


def by_gnu_tar(root: Path, *names: str) -> Path:
    path = root.parent / f"{root.name}-{len(names)}.tar"
    if shutil.which("tar") is None:
        pytest.skip("there is no tar command")
    subprocess.run(["tar", "cf", path, "-C", root, *names], check=True)
    return path


def by_tarfile(root: Path) -> Path:
    path = root.with_suffix(".tar")
    with tarfile.open(path, "w") as archive:
        archive.add(root, arcname="inside/it")
    return path


@pytest.mark.parametrize(
    "pack", [by_tarfile, lambda root: by_gnu_tar(root, "."), lambda root: by_gnu_tar(root, ".", ".")]
)
def test_a_tar_with_links_gives_what_its_folder_gives(linked, pack):
    folder, tar = open_images(str(linked), 8), open_images(str(pack(linked)), 8)
    assert folder.classes == tar.classes == ["bird", "cat", "dog"]
    assert folder.labels.tolist() == tar.labels.tolist() == [0, 0, 1, 1, 1, 2, 2, 2, 2]
    assert np.array_equal(pixels(folder), pixels(tar))
    assert folder.fingerprint() == tar.fingerprint() and folder.contents() == tar.contents()


def test_links_to_the_tars_of_classes_and_in_them(linked, tmp_path):
    (tmp_path / "tars").mkdir()
    for name in ("cat", "bird"):
        put(tmp_path / name / "1.png", len(name))
        link(tmp_path / name / "2.png", "1.png")
        subprocess.run(["tar", "cf", tmp_path / "tars" / f"{name}.tar", "-C", tmp_path / name, "."], check=True)
    link(tmp_path / "tars" / "dog.tar", "cat.tar")
    for spec in (tmp_path / "tars", by_gnu_tar(tmp_path / "tars", "bird.tar", "cat.tar", "dog.tar")):
        data = open_images(str(spec), 8)
        assert data.classes == ["bird", "cat", "dog"] and data.labels.tolist() == [0, 0, 1, 1, 2, 2]
        of = pixels(data)
        assert np.array_equal(of[::2], of[1::2]) and np.array_equal(of[2:4], of[4:])
        assert not np.array_equal(of[0], of[2])


def test_shards_with_links_keep_their_order(tmp_path):
    shard = tmp_path / "shard"
    for number in (1, 3):
        put(shard / f"{number}.png", number)
        (shard / f"{number}.cls").write_text("0")
    link(shard / "2.png", "3.png")
    link(shard / "2.cls", "1.cls")
    path = by_gnu_tar(shard, *(f"{number}.{ending}" for number in (1, 2, 3) for ending in ("png", "cls")))
    data = open_images(f"webdataset:{path}", 8)
    assert data.source.names.tolist() == [b"1.png", b"2.png", b"3.png"] and data.labels.tolist() == [0, 0, 0]
    assert np.array_equal(pixels(data)[1], pixels(data)[2])


@pytest.mark.parametrize(
    ("kind", "name", "target", "words"),
    [
        (tarfile.SYMTYPE, "cat/2.png", "../../elsewhere/2.png", "which is no file in the tar; .* with -h"),
        (tarfile.SYMTYPE, "cat/2.PNG", "/data/2.png", "which is no file in the tar"),
        (tarfile.SYMTYPE, "cat/2.png", "cat/1.png", "which is no file in the tar"),  # from its own folder
        (tarfile.LNKTYPE, "cat/2.png", "1.png", "which is no file in the tar; .* with --hard-dereference"),
        (tarfile.SYMTYPE, "cat/2.png", "2.png", "which is no file in the tar"),
        (tarfile.SYMTYPE, "cat/2.png", ".", "a folder, whose images would be left out"),
        (tarfile.SYMTYPE, "dog", "./cat", "a folder, whose images would be left out; .* with -h"),
        (tarfile.SYMTYPE, "cat/up", "..", "a folder, whose images would be left out"),
        (tarfile.SYMTYPE, "dog.tar", "cat.tar", "which is no file in the tar"),
        (tarfile.SYMTYPE, "dog", "/elsewhere/dog", "which is no file in the tar; .* with -h"),
    ],
)
def test_links_that_leave_images_out_are_named(tmp_path, kind, name, target, words):
    put(tmp_path / "1.png", 1)
    path = tmp_path / "a.tar"

    def pack(name: str) -> None:
        with tarfile.open(path, "w") as archive:
            archive.add(tmp_path / "1.png", arcname="./cat/1.png")
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            archive.addfile(member, io.BytesIO())

    pack(f"./{name}")
    with pytest.raises(UserError, match=f"{path}: the link {name} leads to {target}, {words}"):
        open_images(str(path), 8)
    pack(f".hidden/{name}")
    assert len(open_images(str(path), 8)) == 1


def test_links_between_folders_are_followed_once(tmp_path):
    root = tmp_path / "set"
    put(root / "cat" / "1.png", 1)
    put(tmp_path / "elsewhere" / "dog" / "2.png", 2)
    link(root / "cat" / "sibling", "../dog")
    link(root / "dog", "../elsewhere/dog")
    link(tmp_path / "elsewhere" / "dog" / "more", "../others")
    put(tmp_path / "elsewhere" / "others" / "3.png", 3)
    names = [b"cat/1.png", b"cat/sibling/2.png", b"cat/sibling/more/3.png", b"dog/2.png", b"dog/more/3.png"]
    assert image_files(root) == names
    assert open_images(str(root), 8).labels.tolist() == [0, 0, 0, 1, 1]


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("cat/deep/er/up", "../../.."),
        ("cat/self", "."),
        ("all", "."),
        ("cat/above", "../../.."),
        ("cat/deep/loop", "../../../elsewhere"),
    ],
)
@pytest.mark.parametrize("spec", ["{}/in/set", "{}/way", ".", "flat:{}/in/set"])
def test_a_link_back_to_where_it_lies_is_named(tmp_path, monkeypatch, name, target, spec):
    """There would be no end with two of them. What is said serves: without the links named there are two images."""
    root, named = tmp_path / "in" / "set", []
    put(root / "cat" / "deep" / "er" / "1.png", 1)
    put(root / "dog" / "1.png", 1)
    link(tmp_path / "in" / "elsewhere" / "on", "../set/cat")
    link(root / name, target)
    link(root / "dog" / "second", "..")
    link(tmp_path / "way", "in/set")
    monkeypatch.chdir(root)
    spec = spec.format(tmp_path)
    while len(named) < 2:
        with pytest.raises(UserError) as caught:
            open_images(spec, 8)
        said = re.fullmatch("the link (.*) leads back to (.*), in which it lies; remove it", str(caught.value))
        assert os.path.samefile(*said.groups())
        assert Path(said[1]).parts.count(Path(said[1]).name) == 1, "where it is met first"
        named.append(os.path.basename(said[1]))
        os.unlink(said[1])
    assert sorted(named) == sorted(["on" if name.endswith("loop") else os.path.basename(name), "second"])
    assert len(open_images(spec, 8)) == 2
