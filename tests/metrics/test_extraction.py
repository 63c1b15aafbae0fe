"""Features on disk: nothing but sums and a few rows of a long reference, a restart in the middle, damaged files."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import Connected

from sit.metrics import extraction
from sit.metrics.extraction import Wanted, extract
from sit.metrics.image_sets import Images
from sit.metrics.moments import GroupSums, Moments
from sit.metrics.sums import about, merge
from sit.metrics.work_folder import WorkDirectory
from sit.utils.errors import UserError

ROOT = Path(__file__).parents[2]
MAKING = dict(device=torch.device("cpu"), batch_size=10)


class Numbered(Images):
    """Images of 2 × 2 pixels that are drawn by their number; they note which were made."""

    name = "numbered"

    def __init__(self, count: int, stop_at: int | None = None) -> None:
        self.count, self.stop_at, self.made = count, stop_at, []

    def batch(self, numbers: np.ndarray) -> torch.Tensor:
        if self.stop_at is not None and self.stop_at in numbers:
            raise KeyboardInterrupt
        self.made += numbers.tolist()
        pixels = [np.random.default_rng(int(number)).integers(0, 256, (3, 2, 2)) for number in numbers]
        return torch.from_numpy(np.stack(pixels).astype(np.uint8))


class Flat:
    """A reader whose features are the pixels."""

    def __init__(self, name: str = "flat") -> None:
        self.name, self.about = name, {"features": name}

    def __call__(self, images: torch.Tensor) -> dict[str, np.ndarray]:
        return {"features": images.flatten(1).float().numpy()}


def everything(count: int) -> np.ndarray:
    return Numbered(count).batch(np.arange(count)).flatten(1).numpy().astype(np.float64)


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    monkeypatch.setattr(extraction, "CHUNK", 16)
    monkeypatch.setattr(extraction, "PARTIAL", 2)


def test_sums_by_group_are_those_of_all_features(tmp_path):
    features, group = everything(100), np.arange(100) % 3
    found = extract(Numbered(100), [Wanted(Flat(), group)], tmp_path, **MAKING)["flat"]
    np.testing.assert_array_equal(found.rows("features")["features"], features)
    sums = found.sums["features"]
    assert sums.counts.tolist() == [34, 33, 33]
    for number in range(3):
        ours, expected = sums.without(sums.pooled(), number), Moments.of(features[group != number])
        np.testing.assert_allclose(ours.mu, expected.mu, rtol=1e-12)
        np.testing.assert_allclose(ours.sigma, expected.sigma, rtol=1e-9, atol=1e-9)


def test_of_a_reference_only_sums_and_the_chosen_rows_are_kept(tmp_path):
    features, chosen = everything(200), np.array([3, 17, 18, 190])
    found = extract(Numbered(200), [Wanted(Flat(), keep=chosen)], tmp_path, **MAKING)["flat"]
    np.testing.assert_array_equal(found.rows()["features"], features[chosen])
    np.testing.assert_allclose(found.sums["features"].moments().sigma, np.cov(features, rowvar=False), rtol=1e-9)
    assert len(list(tmp_path.rglob("rows-*.npz"))) == 3 and not list(tmp_path.rglob("partial-*"))
    stored = sum(len(np.load(path)["features"]) for path in tmp_path.rglob("rows-*.npz"))
    assert stored == len(chosen)


def test_a_reference_that_is_stopped_goes_on_from_its_partial_sums(tmp_path):
    """After 5 chunks of 16, of which 4 are in the sums on disk."""
    nothing = [Wanted(Flat(), keep=np.array([], dtype=np.int64))]
    with pytest.raises(KeyboardInterrupt):
        extract(Numbered(200, stop_at=85), nothing, tmp_path, **MAKING)
    images = Numbered(200)
    found = extract(images, nothing, tmp_path, **MAKING)["flat"]
    assert images.made == list(range(64, 200))
    np.testing.assert_allclose(found.sums["features"].moments().sigma, np.cov(everything(200), rowvar=False), rtol=1e-9)
    assert found.sums["features"].counts.tolist() == [200]
    again = Numbered(200)
    same = extract(again, nothing, tmp_path, **MAKING)["flat"]
    assert not again.made and np.array_equal(same.sums["features"].products, found.sums["features"].products)


def damages(content: bytes) -> dict[str, bytes]:
    middle = len(content) // 2
    return {
        "empty": b"",
        "cut": content[:middle],
        "flipped": content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :],
        "text": b"no archive at all",
        "other": b"PK\x03\x04" + content[4:middle],
    }


@pytest.mark.parametrize("kind", ["empty", "cut", "flipped", "text", "other"])
def test_a_damaged_chunk_is_made_anew_and_counted_once(tmp_path, kind):
    whole = extract(Numbered(40), [Wanted(Flat())], tmp_path, **MAKING)["flat"]
    rows, products = whole.rows()["features"], whole.sums["features"].products
    (path,) = tmp_path.rglob("rows-00000016.npz")
    path.write_bytes(damages(path.read_bytes())[kind])
    images = Numbered(40)
    found = extract(images, [Wanted(Flat())], tmp_path, **MAKING)["flat"]
    assert images.made == list(range(16, 32))
    np.testing.assert_array_equal(found.rows()["features"], rows)
    np.testing.assert_array_equal(found.sums["features"].products, products)


@pytest.mark.parametrize("kind", ["empty", "cut", "flipped", "text", "other"])
@pytest.mark.parametrize("name", ["sums.npz", "about.json"])
def test_damaged_sums_and_notes_are_made_anew(tmp_path, kind, name):
    whole = extract(Numbered(40), [Wanted(Flat())], tmp_path, **MAKING)["flat"]
    path = whole.folder / name
    content = path.read_bytes()
    path.write_bytes(damages(content)[kind])
    images = Numbered(40)
    found = extract(images, [Wanted(Flat())], tmp_path, **MAKING)["flat"]
    assert not images.made  # the rows are there
    np.testing.assert_allclose(found.sums["features"].products, whole.sums["features"].products, rtol=1e-12)
    assert found.sums["features"].counts.tolist() == [40]
    if name == "about.json":
        assert path.read_bytes() == content


def test_damaged_partial_sums_cost_their_chunks(tmp_path):
    nothing = [Wanted(Flat(), keep=np.array([], dtype=np.int64))]
    with pytest.raises(KeyboardInterrupt):
        extract(Numbered(100, stop_at=70), nothing, tmp_path, **MAKING)
    (path,) = tmp_path.rglob("partial-*.npz")
    path.write_bytes(path.read_bytes()[:-100])
    found = extract(Numbered(100), nothing, tmp_path, **MAKING)["flat"]
    assert found.sums["features"].counts.tolist() == [100]


def test_images_are_made_once_for_all_readers_and_again_only_for_a_new_one(tmp_path):
    images = Numbered(40)
    first = extract(images, [Wanted(Flat("one")), Wanted(Flat("two"))], tmp_path, **MAKING)
    assert images.made == list(range(40)) and set(first) == {"one", "two"}
    images.made.clear()
    (tmp_path / first["one"].folder / "rows-00000032.npz").unlink()
    extract(images, [Wanted(Flat("one")), Wanted(Flat("two"))], tmp_path, **MAKING)
    assert images.made == list(range(32, 40))
    images.made.clear()
    extract(images, [Wanted(Flat("one")), Wanted(Flat("three"))], tmp_path, **MAKING)
    assert images.made == list(range(40))


def test_sums_about_another_origin():
    features, group = everything(50), np.arange(50) % 2
    sums = GroupSums.of(features, group)
    other = GroupSums.empty(2, features.shape[1], np.full(features.shape[1], 1e4))
    other.add(features, group)
    moved = about(sums, other.origin)
    for name in ("counts", "sums", "products"):
        np.testing.assert_allclose(getattr(moved, name), getattr(other, name), rtol=1e-12)
    halves = [{"f": GroupSums.of(part)} for part in (features[:20], features[20:])]
    np.testing.assert_allclose(merge(halves)["f"].moments().sigma, np.cov(features, rowvar=False), rtol=1e-10)


def test_a_failure_keeps_what_a_temporary_folder_has_and_names_it(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(UserError, match="the disk is full; what was made is kept in (.*): the same .*`work_dir=\\1`"):
        with WorkDirectory(None) as work:
            extract(Numbered(20), [Wanted(Flat())], work, **MAKING)
            raise UserError("the disk is full")
    (kept,) = tmp_path.iterdir()
    images = Numbered(20)
    with WorkDirectory(str(kept)) as work:
        extract(images, [Wanted(Flat())], work, **MAKING)
    assert not images.made
    for stop in (None, UserError("nothing was made yet"), KeyboardInterrupt()):
        before = set(tmp_path.iterdir())
        with pytest.raises(type(stop)) if stop else WorkDirectory(None):
            with WorkDirectory(None):
                if stop:
                    raise stop
        assert set(tmp_path.iterdir()) == before


TOGETHER = """
import os, signal, sys
from pathlib import Path
import numpy as np
import torch
sys.path.insert(0, str(Path({tests!r})))
from metrics.test_extraction import Flat, Numbered, everything
from sit.metrics import extraction
from sit.metrics.extraction import Wanted, extract
from sit.metrics.work_folder import WorkDirectory
from sit.utils.device import process_state
from sit.utils.errors import UserError

extraction.CHUNK, extraction.PARTIAL = 16, 2
state, folder = process_state(), Path(sys.argv[1])
making = dict(device=torch.device("cpu"), batch_size=10)

# each process in a folder of its own, as on two machines that share no disk
os.chdir(folder / str(state.process_index))
try:
    with WorkDirectory("work"):
        raise AssertionError("nobody noticed")
except UserError as error:
    assert "process 1 doesn't see the work folder work of process 0" in str(error), error

wanted = [Wanted(Flat(), np.arange(200) % 3, keep=np.arange(0, 200, 5))]
with WorkDirectory(None) as work:
    found = extract(Numbered(200), wanted, work, **making)
assert (found is not None) == state.is_main_process
if found:
    sums = found["flat"].sums["features"]
    np.savez(folder / f"{{state.num_processes}}.npz", **vars(sums))
"""


@pytest.mark.distributed
def test_two_processes_add_up_what_one_does_and_miss_a_disk_that_is_not_shared(tmp_path):
    for number in range(2):
        (tmp_path / str(number)).mkdir()
    (tmp_path / "program.py").write_text(TOGETHER.format(tests=str(ROOT / "tests")))
    Connected(2, tmp_path / "program.py", tmp_path).output()
    with np.load(tmp_path / "2.npz") as two:
        one = GroupSums.of(everything(200), np.arange(200) % 3)
        ours = GroupSums(*(two[name] for name in ("counts", "sums", "products", "origin")))
    moved = about(one, ours.origin)
    np.testing.assert_array_equal(ours.counts, moved.counts)
    np.testing.assert_allclose(ours.products, moved.products, rtol=1e-12)
    np.testing.assert_allclose(ours.sums, moved.sums, atol=1e-9)


KILLED = """
import os, signal, sys
from pathlib import Path
import numpy as np, torch
sys.path.insert(0, str(Path({tests!r})))
from metrics.test_extraction import Flat, Numbered
from sit.metrics import extraction
from sit.metrics.extraction import Wanted, extract

class Fatal(Numbered):
    def batch(self, numbers):
        if {at} in numbers:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().batch(numbers)

extraction.CHUNK, extraction.PARTIAL = 16, 2
making = dict(device=torch.device("cpu"), batch_size=10)
extract(Fatal(200), [Wanted(Flat(), keep=np.arange(0, 200, 5))], Path(sys.argv[1]), **making)
"""


@pytest.mark.slow
def test_after_a_kill(tmp_path):
    """By the kernel, in the middle of a chunk."""
    (tmp_path / "program.py").write_text(KILLED.format(tests=str(ROOT / "tests"), at=100))
    with pytest.raises(AssertionError, match="exit status -9"):
        Connected(1, tmp_path / "program.py", tmp_path / "work").output()
    wanted = [Wanted(Flat(), keep=np.arange(0, 200, 5))]
    images = Numbered(200)
    found = extract(images, wanted, tmp_path / "work", **MAKING)["flat"]
    assert images.made == list(range(96, 200))
    straight = extract(Numbered(200), wanted, tmp_path / "other", **MAKING)["flat"]
    np.testing.assert_array_equal(found.rows()["features"], straight.rows()["features"])
    moved = about(found.sums["features"], straight.sums["features"].origin)
    np.testing.assert_allclose(moved.products, straight.sums["features"].products, rtol=1e-12)


def test_a_note_says_what_a_folder_is_of(tmp_path):
    found = extract(Numbered(20), [Wanted(Flat())], tmp_path, **MAKING)["flat"]
    said = json.loads((found.folder / "about.json").read_text())
    assert said["about"]["reader"] == {"features": "flat"}
    images = json.loads((found.folder.parent / "about.json").read_text())
    assert images["about"]["images"] == "numbered" and images["about"]["count"] == 20
    assert os.listdir(tmp_path) == [found.folder.parent.name]
