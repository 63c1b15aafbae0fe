"""Data as it lies: flat folders, WebDataset shards, an LMDB, Parquet; held-out images of them."""

from __future__ import annotations

import io
import json
import os
import pickle
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from sit.data.dataset import ImageData
from sit.data.factory import open_images
from sit.data.heldout import in_both
from sit.data.webdataset import expand_braces
from sit.utils.errors import UserError


def picture(seed: int) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, 255, (8, 8, 3), dtype=np.uint8)


def png(seed: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(picture(seed)).save(stream, "PNG")
    return stream.getvalue()


def shows(data: ImageData, seeds: list[int]) -> bool:
    """Whether these are the images of these seeds, in order; 8 pixels are not cropped."""
    return len(data) == len(seeds) and all(
        np.array_equal(data[at][0].numpy().transpose(1, 2, 0), picture(seed)) for at, seed in enumerate(seeds)
    )


def tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


# ---------------------------------------------------------------- flat folders


def test_images_without_subfolders_are_one_class(tmp_path):
    for name, seed in (("b.png", 1), ("a.png", 2), (".hidden.png", 3)):
        (tmp_path / name).write_bytes(png(seed))
    (tmp_path / "notes.txt").write_text("no image")
    data = open_images(str(tmp_path), 8)
    assert data.classes == ["images"] and data.labels.tolist() == [0, 0] and shows(data, [2, 1])


def test_flat_takes_images_at_any_depth_as_one_class(tmp_path, monkeypatch):
    """As FFHQ lies: 00000/00000.png … 69000/69999.png."""
    for number in (0, 1, 1000):
        (tmp_path / f"{number // 1000 * 1000:05d}").mkdir(exist_ok=True)
        (tmp_path / f"{number // 1000 * 1000:05d}" / f"{number:05d}.png").write_bytes(png(number))
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "x.png").write_bytes(png(9))
    assert open_images(str(tmp_path), 8).classes == ["00000", "01000"]
    data = open_images(f"flat:{tmp_path}", 8)
    assert data.classes == ["images"] and data.labels.tolist() == [0] * 3 and shows(data, [0, 1, 1000])
    assert in_both(open_images(str(tmp_path), 8), data, np.array([2])) == [2]
    with pytest.raises(UserError, match=f"`data=flat:{tmp_path}/no`: no such folder"):
        open_images(f"flat:{tmp_path}/no", 8)
    monkeypatch.setattr("sit.data.folder._classes_and_files", None)  # a listing more, of maybe a million files
    assert len(open_images(f"flat:{tmp_path}", 8)) == 3


# ---------------------------------------------------------------- WebDataset


def test_flat_takes_all_images_of_tars_as_one_class(tmp_path):
    """Those in class tars too, with labels or dots in their names or without."""
    inner = tmp_path / "n1.tar"
    tar(inner, {"deep/b.png": png(1)})
    members = {"n0.part/a.b.png": png(0), "n1.tar": inner.read_bytes(), "top.png": png(2), "top.cls": b"1"}
    tar(tmp_path / "all.tar", members)
    data = open_images(f"flat:{tmp_path}/all.tar", 8)
    assert data.classes == ["images"] and data.labels.tolist() == [0, 0, 0] and shows(data, [0, 1, 2])
    (tmp_path / "tars").mkdir()
    inner.rename(tmp_path / "tars" / "n1.tar")
    (tmp_path / "all.tar").rename(tmp_path / "tars" / "n0.tar")
    assert len(open_images(f"flat:{tmp_path}/tars", 8)) == 4
    tar(tmp_path / "tars" / "n0.tar", {"a.txt": b""})
    (tmp_path / "tars" / "n1.tar").unlink()
    with pytest.raises(UserError, match=f"`data=flat:{tmp_path}/tars` has no images"):
        open_images(f"flat:{tmp_path}/tars", 8)


def test_braces_as_a_shell_expands_them():
    assert expand_braces("a-{008..011}.tar") == ["a-008.tar", "a-009.tar", "a-010.tar", "a-011.tar"]
    assert expand_braces("{x,y}/{0..2}.tar") == ["x/0.tar", "x/1.tar", "x/2.tar", "y/0.tar", "y/1.tar", "y/2.tar"]
    assert expand_braces("{10..8}") == ["10", "9", "8"] and expand_braces("plain.tar") == ["plain.tar"]


def test_shards_with_labels_as_text_and_as_json(tmp_path):
    """Labels, order and pixels are those that were written; what is hidden or beside the images is no image."""
    cls, named, bare = (tmp_path / kind for kind in ("cls", "json", "bare"))
    for folder in (cls, named, bare):
        folder.mkdir()
    labels = [2, 0, 2, 1]
    for shard in range(2):
        rows = [(n, labels[n]) for n in (2 * shard, 2 * shard + 1)]
        tar(cls / f"s-{shard:03d}.tar", {
            name: content for n, label in rows for name, content in
            ((f"{n:04d}.cls", f"{label}\n".encode()), (f"{n:04d}.png", png(n)), (f"._{n:04d}.png", b"x"),
             (f"{n:04d}.json", json.dumps({"class_name": "abc"[label], "label": 0, "caption": "…"}).encode()))
        })  # fmt: skip
        tar(named / f"s-{shard:03d}.tar", {
            name: content for n, label in rows for name, content in
            ((f"./in/{n}.png", png(n)), (f"./in/{n}.json", json.dumps({"label": label}).encode()))
        })  # fmt: skip
        tar(bare / f"s-{shard:03d}.tar", {f"{n}.png": png(n) for n, _ in rows} | {"0.txt": b"a caption"})
    for spec in (f"{cls}/s-{{000..001}}.tar", f"webdataset:{cls}", f"webdataset:{cls}/s-{{000,001}}.tar"):
        data = open_images(spec, 8)
        assert data.classes == ["a", "b", "c"] and data.labels.tolist() == labels and shows(data, range(4))
    again = pickle.loads(pickle.dumps(data))
    assert shows(again, range(4)) and again.contents() == data.contents()
    data = open_images(f"webdataset:{named}", 8)
    assert data.classes == ["0", "1", "2"] and data.labels.tolist() == labels and shows(data, range(4))
    data = open_images(f"webdataset:{bare}/s-001.tar", 8)
    assert data.classes == ["images"] and data.labels.tolist() == [0, 0] and shows(data, [2, 3])
    assert in_both(open_images(f"webdataset:{bare}", 8), data, np.arange(2)) == [0, 1]


@pytest.mark.parametrize(
    "note, name",
    [({"class_name": "cat"}, "cat"), ({"class_name": "cat", "label": "a word"}, "cat"), ({"class_name": 7}, "0")],
)
def test_a_class_is_named_beside_a_label_whatever_else_is_there(tmp_path, note, name):
    members = {"1.png": png(1), "1.cls": b"0", "1.json": json.dumps(note).encode()}
    for number, order in enumerate((members, dict(reversed(members.items())))):
        tar(tmp_path / f"{number}.tar", order)
        if note.get("label") is None or not number:
            assert open_images(f"webdataset:{tmp_path}/{number}.tar", 8).classes == [name]


@pytest.mark.parametrize(
    "members, words",
    [
        ({"1.png": b"", "1.cls": b"cat"}, "1.cls in .* is no number"),
        ({"1.png": b"", "1.cls": b"-3"}, "has the label '-3'"),
        ({"1.png": b"", "1.json": b'{"label": "cat"}'}, "has the label 'cat'"),
        ({"1.png": b"", "1.cls": b"3", "2.png": b""}, "1.png has a label and 2.png has none"),
        ({"1.png": b"", "1.jpg": b""}, "two images for 1"),
        ({"1.txt": b"", "1.cls": b"3"}, "no images in its shards"),
        ({"1.json": b"[" * 100_000, "1.png": b""}, "1.json in .* is no JSON"),
        ({"1.png": b"", "IMG.1.png": b"", "IMG.2.png": b""}, "IMG.1.png in .* would be left out.* give flat:.*s.tar, "),
        ({"1.png": b"", "1.json": b'{"label": 0, "class_name": "a"}', "2.png": b"",
          "2.json": b'{"label": 0, "class_name": "b"}'}, "label 0 is a and b"),
    ],
)  # fmt: skip
def test_shards_that_do_not_serve(tmp_path, members, words):
    tar(tmp_path / "s.tar", members)
    with pytest.raises(UserError, match=words) as caught:
        open_images(f"webdataset:{tmp_path}/s.tar")
    assert f"`data=webdataset:{tmp_path}/s.tar`" in str(caught.value)


def test_other_images_of_a_sample_may_stand_beside_it(tmp_path):
    members = {"1.png": png(1), "1.seg.png": b"", "1.cls": b"0", "2.seg.jpg": b"", "2.png": png(2), "2.cls": b"0"}
    tar(tmp_path / "s.tar", members)
    assert shows(open_images(f"webdataset:{tmp_path}/s.tar", 8), [1, 2])


def test_shards_are_not_taken_for_one_tar_a_class(tmp_path):
    for ending in ("json", "CLS", "cls"):
        for number in range(2):
            tar(tmp_path / f"s-{number}.tar", {"in/1.png": png(1), f"in/1.{ending}": b"0"})
        for spec in (tmp_path, tmp_path / "s-0.tar"):
            with pytest.raises(UserError, match=f"holds WebDataset shards .*: give webdataset:{spec}"):
                open_images(str(spec))
    tar(tmp_path / "notes.tar", {"in/1.png": png(1), "in/about.json": b"{}"})
    assert open_images(str(tmp_path / "notes.tar"), 8).classes == ["in"], "what lies beside no image is no label"
    with pytest.raises(UserError, match="s-2.tar can't be read: No such file"):
        open_images(f"{tmp_path}/s-{{0..2}}.tar")
    (tmp_path / "s-1.tar").write_bytes((tmp_path / "s-1.tar").read_bytes()[:1500])
    with pytest.raises(UserError, match="s-1.tar can't be read as an uncompressed tar"):
        open_images(f"webdataset:{tmp_path}")


# ---------------------------------------------------------------- LMDB


class Environment(dict):
    """What is used of the library's environments and transactions, in memory: keys in order."""

    def begin(self, write=False, buffers=False):
        return self

    def cursor(self):
        return iter(sorted(self.items()))

    def put(self, key, value):
        self[key] = value

    def close(self):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None


@pytest.fixture(params=["stand-in", "the library"])
def lmdb(request, monkeypatch):
    if request.param == "the library":
        return pytest.importorskip("lmdb", reason="the lmdb library is not installed: pip install lmdb")
    made: dict[str, Environment] = {}
    module = ModuleType("lmdb")
    module.open = lambda path, **options: made.setdefault(str(path), Environment())
    monkeypatch.setitem(sys.modules, "lmdb", module)
    return module


def write(lmdb, path: Path, values: dict[bytes, bytes]) -> None:
    path.mkdir()
    with lmdb.open(str(path), map_size=1 << 24).begin(write=True) as transaction:
        for key, value in values.items():
            transaction.put(key, value)


def test_an_lmdb_as_ffhqs(tmp_path, lmdb):
    values = {f"{side}-{n:05d}".encode(): png(side + n) for side in (8, 16) for n in (1, 0, 2)} | {b"length": b"3"}
    write(lmdb, tmp_path / "ffhq.lmdb", values)
    data = open_images(f"lmdb:{tmp_path}/ffhq.lmdb@8")
    assert data.classes == ["images"] and data.labels.tolist() == [0] * 3 and data.image_size == 8
    assert shows(data, [8, 9, 10])
    largest = open_images(f"lmdb:{tmp_path}/ffhq.lmdb", 8)
    assert shows(largest, [16, 17, 18]) and not in_both(data, largest, np.arange(3))
    assert largest.fingerprint() != data.fingerprint() and len({data.contents(), largest.contents()}) == 2
    again = pickle.loads(pickle.dumps(data))
    assert shows(again, [8, 9, 10]) and again.contents() == data.contents()
    with pytest.raises(UserError, match="no images of side 32; it has 8, 16"):
        open_images(f"lmdb:{tmp_path}/ffhq.lmdb@32")
    write(lmdb, tmp_path / "ffhq@16", values)
    assert shows(open_images(f"lmdb:{tmp_path}/ffhq@16@8"), [8, 9, 10])
    assert shows(open_images(f"lmdb:{tmp_path}/ffhq@16", 8), [16, 17, 18]), "a side is not named, so the largest"


def test_an_lmdb_is_read_in_a_fork_too(tmp_path, lmdb):
    write(lmdb, tmp_path / "lmdb", {b"a": png(1), b"b": png(2)})
    data = open_images(f"lmdb:{tmp_path}/lmdb", 8)
    assert shows(data, [1, 2])
    child = os.fork()
    if not child:
        os._exit(0 if shows(data, [1, 2]) else 1)
    assert os.waitpid(child, 0)[1] == 0 and shows(data, [1, 2])


def test_an_lmdb_with_other_keys_and_one_without_images(tmp_path, lmdb):
    write(lmdb, tmp_path / "plain", {b"b": png(1), b"a": png(2)})
    assert shows(open_images(f"lmdb:{tmp_path}/plain", 8), [2, 1])
    with pytest.raises(UserError, match="its keys name no sides; leave out @8"):
        open_images(f"lmdb:{tmp_path}/plain@8")
    write(lmdb, tmp_path / "numbers", {b"a": b"1"})
    with pytest.raises(UserError, match="no encoded images"):
        open_images(f"lmdb:{tmp_path}/numbers")


def test_without_the_library_one_line_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(UserError, match=f"`data=lmdb:{tmp_path}` needs the lmdb library; install it by: pip"):
        open_images(f"lmdb:{tmp_path}")
    with pytest.raises(UserError, match="no such file or folder"):
        open_images(f"lmdb:{tmp_path}/no")


# ---------------------------------------------------------------- Parquet


def test_parquet_files_of_the_hub(tmp_path):
    datasets = pytest.importorskip("datasets", reason="the datasets library is not installed: pip install datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["x", "y"])})
    rows = {"image": [Image.fromarray(picture(n)) for n in range(3)], "label": [0, 1, 1]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train-00000-of-00001.parquet")
    for spec in ("train-00000-of-00001.parquet", "train-*.parquet"):
        data = open_images(f"{tmp_path}/{spec}", 8)
        assert data.classes == ["x", "y"] and data.labels.tolist() == [0, 1, 1] and shows(data, range(3))


def test_parquet_is_known_by_what_is_in_it(tmp_path, monkeypatch):
    """Moved files are the same images under any spelling of their path; other images of the same labels are not."""
    datasets = pytest.importorskip("datasets", reason="the datasets library is not installed: pip install datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["x", "y"])})
    for folder, seeds in (("pq", (1, 2, 3, 4)), ("others", (5, 6, 7, 8))):
        (tmp_path / folder).mkdir()
        for part in range(2):
            rows = {"image": [{"bytes": png(n), "path": None} for n in seeds[2 * part :][:2]], "label": [0, 1]}
            made = datasets.Dataset.from_dict(rows, features=features)
            made.to_parquet(tmp_path / folder / f"train-0000{part}-of-00002.parquet")
    monkeypatch.chdir(tmp_path)

    def told(spec: str) -> tuple[str, str, str]:
        source = open_images(spec, 8).source
        return source.fingerprint(), source.contents(), source.place(1)

    one, all_of_them = told("pq/train-00000-of-00002.parquet"), told("pq/*.parquet")
    assert told(f"{tmp_path}/pq/train-00000-of-00002.parquet@train") == one
    assert told("pq/../pq/train-*.parquet@train") == told(f"{tmp_path}/pq/*.parquet") == all_of_them
    data, again = (open_images(spec, 8) for spec in ("pq/*.parquet", f"{tmp_path}/pq/*.parquet"))
    assert in_both(data, again, np.array([3, 1])) == [1, 3], "held-out images are known whatever the spelling"
    known = [one, all_of_them, told("others/*.parquet"), told("others/train-00000-of-00002.parquet")]
    known += [told("pq/train-00001-of-00002.parquet"), told("pq/*.parquet@train[:2]")]
    for values in zip(*known, strict=True):
        assert len(set(values)) == len(known)
    (tmp_path / "pq").rename(tmp_path / "moved")
    assert told("moved/*.parquet") == all_of_them and told("moved/train-00000-of-00002.parquet") == one


def test_an_at_in_the_name_of_a_folder_is_no_split(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="the datasets library is not installed: pip install datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["x", "y"])})
    made = {
        split: datasets.Dataset.from_dict(
            {"image": [Image.fromarray(picture(n)) for n in seeds], "label": [0, 1]}, features=features
        )
        for split, seeds in (("train", (0, 1)), ("test", (2, 3)))
    }
    (tmp_path / "us@er").mkdir()
    made["train"].to_parquet(tmp_path / "us@er" / "a.parquet")
    datasets.DatasetDict(made).save_to_disk(tmp_path / "us@er" / "saved")
    monkeypatch.chdir(tmp_path)
    for spec, seeds in (
        ("us@er/a.parquet", [0, 1]),
        ("us@er/a.parquet@train[:1]", [0]),
        ("us@er/*.parquet@train", [0, 1]),
        ("datasets:us@er/saved", [0, 1]),
        ("datasets:us@er/saved@test", [2, 3]),
        ("datasets:us@er/saved@test[1:]", [3]),
        ("datasets:us@er/saved@train[:50%]", [0]),
    ):
        assert shows(open_images(spec, 8), seeds), spec
    assert open_images("datasets:us@er/saved@train[:50%]").source.test_set == "datasets:us@er/saved@test"
    for split in ("val", "val[:1]"):
        with pytest.raises(UserError, match=r"it has the splits train, test, and no val"):
            open_images(f"datasets:us@er/saved@{split}")
    with pytest.raises(UserError, match="saved@test.*can't be loaded"):
        open_images("datasets:us@er/saved@test[:x]")


def test_parquet_goes_to_the_datasets_library(tmp_path, monkeypatch):
    """Where it is not installed one line says so; where it is, it is asked for these files."""
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="a.parquet` needs the datasets library"):
        open_images(f"{tmp_path}/a.parquet")
    asked = []

    def load_dataset(*names, **options):
        asked.append((names, options))
        raise RuntimeError("enough")

    module = ModuleType("datasets")
    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    with pytest.raises(UserError, match="can't be loaded .*enough"):
        open_images(f"{tmp_path}/a-*.parquet@train[1:]")
    assert asked == [(("parquet",), dict(data_files=f"{tmp_path}/a-*.parquet", split="train[1:]"))]
    for split in ("test", "train2", "validation[:3]"):
        with pytest.raises(UserError, match="Parquet files have no splits: leave @.* out"):
            open_images(f"{tmp_path}/a-*.parquet@{split}")
