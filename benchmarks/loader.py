"""How fast cached latents are delivered, against one file an image.

    python benchmarks/loader.py

Both read the same 32×32×4 latents (mean and standard deviation of image and flipped image, random float16) from a warm
page cache, through the same DataLoader, order and draws: the permutation, flips, the posterior sample, x0, t and the
dropout draw, all keyed by (seed, j). Only where the moments come from differs: the memory-mapped cache, or one .npy
file an image. Rounds alternate; medians are shown. Then a cache of ImageNet's size, of sparse files, is opened.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from checks import at_least_one

from sit.latents.cache import CachedLatents, Manifest
from sit.latents.datasets import Batch, TrainingData, scaled_sample
from sit.training.loader import training_batches
from sit.utils.cli import one_line_errors
from sit.utils.errors import entry_point
from sit.utils.record import machine, write_record
from sit.utils.tables import markdown_table
from sit.utils.timing import once


@dataclass
class Arguments:
    """Time the loader."""

    count: int = 20_000
    """entries; 32 KB each, twice (cache and files)"""
    batch_size: int = 256
    batches: int = 160
    """batches of a round"""
    rounds: int = 5
    workers: int = 2
    large: int = 1_281_167
    """entries of a sparse cache that is opened; ImageNet's"""
    folder: Path | None = None
    """where the temporary files go; the system's temporary folder if not given"""
    json: Path | None = None
    """file for all numbers"""

    def __post_init__(self) -> None:
        at_least_one(self, "count", "batch_size", "batches", "rounds", "large")


class FilePerImage:
    """The same moments, one .npy file an image: what encoding scripts often leave."""

    def __init__(self, folder: Path, cache: CachedLatents) -> None:
        self.folder, self.flip, self.scaling = folder, True, cache.scaling
        self.name, self.classes, self.labels, self.latent_shape = (
            "files",
            cache.classes,
            cache.labels,
            cache.latent_shape,
        )

    def fetch(
        self, indices: np.ndarray, flipped: np.ndarray, noise: torch.Tensor, out: torch.Tensor | None = None
    ) -> Batch:
        moments = [
            np.load(self.folder / f"{index:07d}.npy")[int(side)] for index, side in zip(indices, flipped, strict=True)
        ]
        return {"latents": scaled_sample(torch.from_numpy(np.stack(moments)), noise, self.scaling, out)}

    def finish(self, batch: Batch) -> Batch:
        return batch


def make(folder: Path, count: int, classes: int = 1000, sparse: bool = False) -> Path:
    """A cache of ``count`` entries of random numbers, or (``sparse``) of nothing."""
    manifest = Manifest(
        data="synthetic", files="", count=count, classes=[str(n) for n in range(classes)], image_size=256, crop="",
        flipped=True, vae="", vae_fingerprint="", precision="float32", scaling_factor=0.18215, shift_factor=0.0,
        downsampling=8, latent_shape=(4, 32, 32), shard_size=2**17,
    )  # fmt: skip
    folder.mkdir()
    source = np.random.default_rng(0)
    for name, shape in manifest.shards():
        array = np.lib.format.open_memmap(folder / name, mode="w+", dtype=np.float16, shape=shape)
        for start in [] if sparse else range(0, shape[0], 1000):
            array[start : start + 1000] = source.standard_normal(array[start : start + 1000].shape, dtype=np.float32)
    np.save(folder / "labels.npy", np.arange(count) % classes)
    (folder / "manifest.json").write_text(manifest.text())
    return folder


def samples_per_second(data: TrainingData, arguments: Arguments, seed: int) -> float:
    """Steady delivery to this process: the workers' start and first batches are not counted."""
    batches = training_batches(data, seed, arguments.batch_size, workers=arguments.workers)

    def take(count: int) -> None:
        for batch in itertools.islice(batches, count):
            assert batch["latents"].shape == (arguments.batch_size, 4, 32, 32)

    take(10 * max(1, arguments.workers))
    return arguments.batches * arguments.batch_size / once(lambda: take(arguments.batches), torch.device("cpu"))


OPEN = """
import time
started = time.perf_counter()
import json, psutil, sys
import numpy as np
from sit.latents.cache import CachedLatents
imported = time.perf_counter()
cache = CachedLatents(sys.argv[1])
opened = time.perf_counter()
cache.moments(np.random.default_rng(0).integers(0, len(cache), 1000), np.zeros(1000, dtype=bool))
print(json.dumps({"entries": len(cache), "import_seconds": round(imported - started, 3), "open_seconds":
    round(opened - imported, 3), "resident_mb": psutil.Process().memory_info().rss / 1e6}))
"""


def open_large(folder: Path, count: int) -> dict[str, float]:
    """Opening a sparse cache of ``count`` entries and reading 1,000 at random, in a process of its own (no torch)."""
    path = make(folder, count, sparse=True)
    ended = subprocess.run([sys.executable, "-c", OPEN, str(path)], capture_output=True, text=True, check=True)
    return json.loads(ended.stdout)


@entry_point
def main() -> None:
    with one_line_errors():
        arguments = tyro.cli(Arguments, prog="benchmarks/loader.py")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        cache = CachedLatents(make(Path(temporary) / "cache", arguments.count), flip=True)
        files = Path(temporary) / "files"
        files.mkdir()
        for index in range(arguments.count):
            np.save(files / f"{index:07d}.npy", cache.shards[0][index])
        cases = {"latent cache": cache, "one file an image": FilePerImage(files, cache)}
        one, other = (next(training_batches(data, 0, 8)) for data in cases.values())
        assert all(torch.equal(one[name], other[name]) for name in one)
        figures: dict[str, list[float]] = {name: [] for name in cases}
        for number in range(arguments.rounds + 1):
            for name, data in cases.items():
                speed = samples_per_second(data, arguments, seed=number)
                if number:  # the first round warms the page cache
                    figures[name].append(speed)
        large = open_large(Path(temporary) / "large", arguments.large)
    setting = f"{arguments.workers} workers, batches of {arguments.batch_size}, load average {os.getloadavg()[0]:.1f}"
    print(f"{machine('cpu')}; {setting}\n")
    rows = [
        [name, f"{statistics.median(speeds):,.0f} ({min(speeds):,.0f} … {max(speeds):,.0f})"]
        for name, speeds in figures.items()
    ]
    ratio = statistics.median(a / b for a, b in zip(*figures.values(), strict=True))
    rows.append(["ratio, round by round", f"{ratio:.2f}"])
    print(markdown_table(["", f"samples/s, median of {arguments.rounds} rounds"], rows))
    print("\nsparse cache:", large)
    if arguments.json:
        write_record(arguments.json, "cpu", {"samples_per_second": figures, "sparse_cache": large})


if __name__ == "__main__":
    main()
