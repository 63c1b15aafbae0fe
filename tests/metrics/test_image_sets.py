"""Images to be evaluated: replaced in place, of several sizes, and some of them."""

from __future__ import annotations

import io
import json
import os
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from processes import Connected

from sit.data.digits import digits_arrays
from sit.metrics import cli as eval_fid
from sit.metrics.extraction import Found, Wanted, extract
from sit.metrics.image_sets import Images, drawn, open_samples
from sit.metrics.packing import pack
from sit.utils.errors import UserError

CPU = torch.device("cpu")
SHADES = (10, 200)


class Mean:
    """A reader of one number an image: its mean gray."""

    name, about = "mean", {"features": "mean"}

    def __call__(self, images: torch.Tensor) -> dict[str, np.ndarray]:
        return {"features": images.float().mean((1, 2, 3))[:, None].numpy()}


def gray(shade: int, side: int = 8) -> np.ndarray:
    return np.full((side, side, 3), shade, np.uint8)


def bmp(shade: int, side: int = 8) -> bytes:
    """An uncompressed file: whatever the shade, it has the same size."""
    stream = io.BytesIO()
    Image.fromarray(gray(shade, side)).save(stream, "BMP")
    return stream.getvalue()


# ---------------------------------------------------------------- replaced in place


def make_files(place: Path, shade: int) -> None:
    for name in ("a/1.bmp", "a/2.bmp", "b/1.bmp"):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(bmp(shade))


def make_tar(place: Path, shade: int) -> None:
    place.mkdir(exist_ok=True)
    with tarfile.open(place / "0.tar", "w") as archive:
        for name in ("a/1.bmp", "b/1.bmp"):
            member = tarfile.TarInfo(name)
            member.size = len(bmp(shade))
            archive.addfile(member, io.BytesIO(bmp(shade)))


def make_lmdb(place: Path, shade: int) -> None:
    lmdb = pytest.importorskip("lmdb", reason="the lmdb library is not installed: pip install lmdb")
    from sit.data.lmdb import _OPEN

    if opened := _OPEN.pop(os.path.realpath(place), None):  # as a new program would find it
        opened[1].close()
    with lmdb.open(str(place), map_size=1 << 20) as environment, environment.begin(write=True) as transaction:
        for key in (b"8-0", b"8-1"):
            transaction.put(key, bmp(shade))


def make_fashion_mnist(place: Path, shade: int) -> None:
    raw = place / "FashionMNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    for part in ("train", "t10k"):
        for name, array in (("images-idx3", np.full((5, 28, 28), shade)), ("labels-idx1", np.arange(5))):
            sides = b"".join(side.to_bytes(4, "big") for side in array.shape)
            header = bytes([0, 0, 8, array.ndim]) + sides
            (raw / f"{part}-{name}-ubyte").write_bytes(header + array.astype(np.uint8).tobytes())


def make_hub_set(place: Path, shade: int) -> None:
    """Parquet files with the paths alone of files that lie beside them."""
    datasets = pytest.importorskip("datasets")
    make_files(place, shade)
    if not (place / "train.parquet").exists():
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["x", "y"])})
        rows = {"image": [str(place / "a/1.bmp"), str(place / "b/1.bmp")], "label": [0, 1]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(place / "train.parquet")


def make_registered(place: Path, shade: int) -> None:
    """What torch-fidelity's registered sets read: a folder of torchvision's inside torch hub's."""
    folder = place / "fidelity_datasets" / "set"
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "images.npy", np.full((3, 3, 8, 8), shade, np.uint8))


class Registered(torch.utils.data.Dataset):
    base_folder = "set"

    def __init__(self, root: str, download: bool) -> None:
        self.images = torch.from_numpy(np.load(Path(root) / self.base_folder / "images.npy"))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.images[index]


KINDS: dict[str, tuple[Callable[[Path, int], None], int | None]] = {
    "{}": (make_files, 8),
    "flat:{}": (make_files, 8),
    "{}/0.tar": (make_tar, 8),
    "webdataset:{}": (make_tar, 8),
    "lmdb:{}": (make_lmdb, None),
    "fashion-mnist:{}": (make_fashion_mnist, None),
    "fashion-mnist-test:{}": (make_fashion_mnist, None),
    "{}/train.parquet": (make_hub_set, 8),
    "registered": (make_registered, None),
}
"""what is named → what makes it, of one shade of gray, and the side that it is cropped to"""


@pytest.mark.parametrize("spec", KINDS)
def test_images_that_are_replaced_in_place_are_read_again(tmp_path, monkeypatch, spec):
    """The same names, labels and sizes in bytes; the means are known."""
    from torch_fidelity.registry import DATASETS_REGISTRY

    monkeypatch.setitem(DATASETS_REGISTRY, "registered", Registered)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "data" / "hub"))
    (make, size), place = KINDS[spec], tmp_path / "data"

    def means() -> np.ndarray:
        images = open_samples(spec.format(place), size)
        found = extract(images, [Wanted(Mean())], tmp_path / "work", device=CPU, batch_size=2)
        return found["mean"].rows("features")["features"].ravel()

    for time, shade in enumerate(SHADES):
        make(place, shade)
        for path in place.rglob("*"):
            if path.suffix != ".parquet" or not time:  # it stays as it is
                os.utime(path, ns=(0, 10**9 * (1 + time)))  # clocks of disks are coarse
        np.testing.assert_array_equal(means(), shade, err_msg=spec)
    before = len(list((tmp_path / "work").iterdir()))
    means()
    assert len(list((tmp_path / "work").iterdir())) == before == 2, "what is unchanged is not made again"


def test_what_is_beside_an_lmdbs_data_does_not_count(tmp_path):
    """Every reader writes the lock file."""
    make_lmdb(tmp_path / "set", 1)
    before = open_samples(f"lmdb:{tmp_path / 'set'}").about
    (tmp_path / "set" / "lock.mdb").write_bytes(b"another reader")
    assert open_samples(f"lmdb:{tmp_path / 'set'}").about == before


# ---------------------------------------------------------------- of several sizes


def write_mixed(place: Path, small: int, large: int) -> None:
    """Files of 8 pixels, and after them in the order of the names files of 16."""
    place.mkdir()
    for number in range(small + large):
        (place / f"{number:04}.bmp").write_bytes(bmp(number % 256, 8 if number < small else 16))


@pytest.mark.parametrize("batch_size", [6, 4, 1])
def test_images_of_two_sizes_are_refused_wherever_batches_begin(tmp_path, batch_size):
    """Six of each: batches of six are of one size each."""
    write_mixed(tmp_path / "mixed", 6, 6)
    images = open_samples(str(tmp_path / "mixed"))
    with pytest.raises(
        UserError, match=r"mixed are of different sizes: crop .*6.bmp has 16 x 16 pixels, .*0.bmp 8 x 8"
    ):
        extract(images, [Wanted(Mean())], tmp_path / "work", device=CPU, batch_size=batch_size)
    cropped = open_samples(f"flat:{tmp_path / 'mixed'}", 8)
    assert extract(cropped, [Wanted(Mean())], tmp_path / "work", device=CPU, batch_size=batch_size)


def test_registered_images_of_two_sizes_are_refused(monkeypatch):
    from torch_fidelity.registry import DATASETS_REGISTRY

    mixed = [torch.zeros(3, side, side, dtype=torch.uint8) for side in (8, 8, 4)]
    monkeypatch.setitem(DATASETS_REGISTRY, "mixed", lambda root, download: mixed)
    images = open_samples("mixed")
    assert images.batch(np.array([1])).shape == (1, 3, 8, 8)
    for numbers in ([2], [0, 2]):
        with pytest.raises(
            UserError, match="mixed are of different sizes: .*number 2 has 4 x 4 pixels, number 0 8 x 8"
        ):
            images.batch(np.array(numbers))


@pytest.mark.distributed
def test_each_process_knows_the_size_of_the_first_image(tmp_path):
    """The second process reads the second chunk alone, which is of one size."""
    write_mixed(tmp_path / "mixed", 512, 8)
    (tmp_path / "program.py").write_text(READS)
    with pytest.raises(Exception, match="are of different sizes"):
        Connected(2, tmp_path / "program.py", tmp_path).output()


READS = """
import sys
from pathlib import Path
import torch
from sit.metrics.extraction import Pixels, Wanted, extract
from sit.metrics.image_sets import open_samples

folder = Path(sys.argv[1])
images = open_samples(str(folder / "mixed"))
extract(images, [Wanted(Pixels(), summed=False)], folder / "work", device=torch.device("cpu"), batch_size=64)
"""


def test_nothing_is_packed_of_images_of_two_sizes(tmp_path, monkeypatch):
    """As a work folder of an earlier version may have them."""
    monkeypatch.setattr("sit.metrics.extraction.CHUNK", 4)
    for start, side in ((0, 8), (4, 16)):
        np.savez(tmp_path / f"rows-{start:08d}.npz", images=np.stack([gray(1, side)] * 4))
    found, out = Found(tmp_path, np.arange(8)), tmp_path / "out" / "reference.npz"
    with pytest.raises(UserError, match=r"reference.npz can't be made of .* sizes, 8 x 8 and 16 x 16 pixels: crop"):
        pack(out, found, 8, {})
    assert not list(out.parent.iterdir())
    with pytest.raises(ValueError, match="4 images were kept for .*, not 5"):
        pack(out, Found(tmp_path, np.arange(4)), 5, {})
    pack(out, Found(tmp_path, np.arange(4)), 4, {})
    with np.load(out) as archive:
        assert archive["arr_0"].shape == (4, 8, 8, 3)


def test_a_reference_of_two_sizes_is_refused_and_leaves_no_file(tmp_path, monkeypatch, capsys):
    """A chunk of one size, and a chunk of another: the kept images were written below the first one's header."""
    monkeypatch.setattr("sit.metrics.extraction.CHUNK", 8)
    write_mixed(tmp_path / "mixed", 8, 8)
    words = ["reference", "--data", str(tmp_path / "mixed"), "--features", "digits", "--out", str(tmp_path / "out.npz")]
    monkeypatch.setattr(sys, "argv", ["eval_fid.py", *words, "--batch-size", "8"])
    with pytest.raises(SystemExit):
        eval_fid.main()
    assert "mixed are of different sizes: crop them by --image-size" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".npz"] == []


# ---------------------------------------------------------------- some of them


def sorted_by_class(folder: Path, counts: tuple[int, ...]) -> Images:
    """An npz whose image says its class in its first byte and its place in the second."""
    labels = np.repeat(np.arange(len(counts)), counts)
    images = np.zeros((len(labels), 8, 8, 3), np.uint8)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = labels, np.arange(len(labels))
    np.savez(folder / "sorted.npz", arr_0=images, arr_1=labels)
    return open_samples(str(folder / "sorted.npz"))


def told(images: Images) -> tuple[list[int], list[int]]:
    """The classes and places that the pixels tell."""
    corner = images.batch(np.arange(len(images)))[:, :2, 0, 0]
    return corner[:, 0].tolist(), corner[:, 1].tolist()


def test_some_images_are_of_all_classes_and_keep_their_labels(tmp_path):
    images = sorted_by_class(tmp_path, (60, 60, 60, 30))
    some = drawn(images, 70)
    classes, places = told(some)
    assert len(some) == 70 and np.bincount(classes).tolist() == [20, 20, 20, 10]
    assert some.labels.tolist() == classes and len(set(places)) == 70 and places == sorted(places)
    assert max(np.diff(places)) > 6, "at random, not at even distances of three"
    assert told(drawn(images, 70)) == (classes, places) and set(told(drawn(images, 30))[1]) < set(places)
    for all_of_them in (drawn(images, None), drawn(images, 210)):
        assert all_of_them is images
    names = {str(one.about) for one in (images, some, drawn(images, 71))}
    assert len(names) == 3
    with pytest.raises(UserError, match="`num_samples=211`: .*sorted.npz has only 210 images"):
        drawn(images, 211)


def test_some_images_without_labels_are_drawn_at_random(tmp_path):
    """Of a folder in which the first half is black."""
    for number in range(100):
        (tmp_path / f"{number:03}.bmp").write_bytes(bmp(255 * (number >= 50)))
    some = drawn(open_samples(str(tmp_path)), 40)
    white = int((some.batch(np.arange(40))[:, 0, 0, 0] == 255).sum())
    assert some.labels is None and 8 <= white <= 32


def test_the_number_of_given_samples_is_drawn_from_all_classes(tmp_path, monkeypatch, capsys):
    """Digits sorted by class: the first 60 of 300 are of two classes, and far from all digits."""
    images, labels = digits_arrays()
    chosen = np.concatenate([np.flatnonzero(labels == label)[:30] for label in range(10)])
    np.savez(tmp_path / "samples.npz", arr_0=np.repeat(images[chosen][..., None], 3, axis=3), arr_1=labels[chosen])
    words = ["--samples", str(tmp_path / "samples.npz"), "--reference", "digits", "--json", str(tmp_path / "a.json")]
    monkeypatch.setattr(sys, "argv", ["eval_fid.py", *words, "--num-samples", "60"])
    eval_fid.main()
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["sample_count"] == 60
    assert [share["count"] for share in found["by_class"]["class accuracy"]] == [6] * 10
    assert found["numbers"][0]["value"] < 60
