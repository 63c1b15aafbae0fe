"""A disk without room: one line, and what was made is kept and named. Limits on the size of files stand in for it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from processes import Forked

from sit.sampling.images import ImageBatch
from sit.sampling.writer import writing_samples
from sit.utils.errors import UserError

LIMITED = """
import json, os, resource, sys
from pathlib import Path
import numpy as np, torch
from sit.sampling.images import ImageBatch
from sit.sampling.writer import writing_samples
from sit.utils.errors import UserError

place, count = Path(sys.argv[1]), 6
noise = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8))
noise[1:4] = 0  # three small PNGs after a large one
told = {}
for limit in map(int, sys.argv[2:]):
    process = os.fork()
    if process == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            with writing_samples(place / str(limit), count, (32, 32)) as writer:
                for i in range(count):
                    if i == 4 and limit == 30_000:
                        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
                    writer.add(ImageBatch(torch.tensor([i]), torch.tensor([i]), noise[i : i + 1]))
                writer.save_grid([], 3, weights="")
            said = ""
        except UserError as error:
            said = str(error)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        (place / f"{limit}.txt").write_text(said)
        os._exit(0)
    told[limit] = os.waitpid(process, 0)[1]
print(json.dumps(told))
"""
SIZES = [0, 100, 2000, 10_000, 18_000, 22_000, 30_000, 10**6]
"""bytes that a file may have; the npz takes 22.6 KB, and a PNG of noise 3 KB"""


@pytest.fixture(scope="module")
def limited(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("limited")
    (place / "program.py").write_text(LIMITED)
    said, errors = Forked(place / "program.py", place, *SIZES).communicate()
    assert said and set(json.loads(said).values()) == {0}, f"no process may die of a signal: {errors}"
    return place


@pytest.mark.parametrize("size", SIZES[:6])
def test_no_room_is_seen_before_anything_is_made(limited, size):
    said = (limited / f"{size}.txt").read_text()
    assert (
        said.startswith("the limit on the size of files is reached")
        and str(limited / str(size)) in said
        and "\n" not in said
    )
    assert not (limited / str(size)).exists() and not (limited / f"{size}-unfinished").exists()


def test_what_was_made_before_the_disk_was_full_is_kept_and_named(limited):
    said, kept = (limited / "30000.txt").read_text(), limited / "30000-unfinished"
    assert said == (
        f"the disk was full after 4 of 6 samples, which are kept as PNGs in {kept}; {limited / '30000'} was not written"
    )
    assert sorted(path.name for path in kept.iterdir()) == [f"{number:06d}.png" for number in range(4)]
    for path in kept.iterdir():
        Image.open(path).load()


def test_with_room_all_is_there_and_nothing_else(limited):
    folder = limited / "1000000"
    assert sorted(path.name for path in folder.iterdir())[-2:] == ["grid.png", "samples.npz"]
    with np.load(folder / "samples.npz") as archive:
        assert archive["arr_0"].shape == (6, 32, 32, 3) and archive["arr_1"].tolist() == list(range(6))
        for number, image in enumerate(archive["arr_0"]):
            assert np.array_equal(image, np.asarray(Image.open(folder / f"{number:06d}.png")))
    assert (folder / "samples.npz").stat().st_size < 22_000, "the room that was taken and not needed is given back"
    assert not [path for path in limited.iterdir() if path.name.endswith(".tmp")]


def test_more_samples_than_any_disk_holds(tmp_path):
    with (
        pytest.raises(UserError, match="has .* left, and 1,000,000,000 samples take 3150 TB: make room"),
        writing_samples(tmp_path / "out", 10**9, (1024, 1024)),
    ):
        raise AssertionError
    assert not list(tmp_path.iterdir())


def test_an_error_of_another_kind_keeps_nothing(tmp_path):
    batch = ImageBatch(torch.tensor([0]), torch.tensor([0]), torch.zeros(1, 8, 8, 3, dtype=torch.uint8))
    with pytest.raises(UserError, match="mistake"), writing_samples(tmp_path / "out", 2, (8, 8)) as writer:
        writer.add(batch)
        raise UserError("mistake")
    assert not list(tmp_path.iterdir())
