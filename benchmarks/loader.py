"""How fast cached latents are delivered, against one file an image.

    python benchmarks/loader.py

Both read the same 32×32×4 latents (mean, standard deviation and mirror image, random float16) from a warm page cache,
through the same DataLoader, order and draws: the permutation, flips, the posterior sample, x0, t and the dropout draw,
all keyed by (seed, j). Only where the moments come from differs: the memory-mapped cache, or one .npy file an image.
Rounds alternate; medians are shown. Then a cache of ImageNet's size, of sparse files, is opened.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

from sit.latents.cache import CachedLatents, Manifest
from sit.latents.datasets import Batch, TrainingData, scale_posterior
from sit.training.loader import training_batches


@dataclass
class Config:
    count: int = 20_000
    """entries; 32 KB each, twice (cache and files)"""
    batch_size: int = 256
    batches: int = 160
    """batches of a round"""
    rounds: int = 5
    workers: int = 2
    folder: Path | None = None
    """where the temporary files go; the system's temporary folder if not given"""


class FilePerImage:
    """The same moments, one .npy file an image: what encoding scripts often leave."""

    def __init__(self, folder: Path, cache: CachedLatents) -> None:
        self.folder, self.flips, self.scaling = folder, True, cache.scaling
        self.name, self.classes, self.labels, self.latent_shape = (
            "files",
            cache.classes,
            cache.labels,
            cache.latent_shape,
        )

    def fetch(self, indices: np.ndarray, mirrored: np.ndarray, noise: torch.Tensor) -> Batch:
        moments = [
            np.load(self.folder / f"{index:07d}.npy")[int(side)] for index, side in zip(indices, mirrored, strict=True)
        ]
        scale_posterior(torch.from_numpy(np.stack(moments)), noise, self.scaling)
        return {}

    def finish(self, batch: Batch) -> Batch:
        return batch


def make(folder: Path, count: int, classes: int = 1000, sparse: bool = False) -> Path:
    """A cache of ``count`` entries of random numbers, or (``sparse``) of nothing."""
    manifest = Manifest(
        data="synthetic", files="", count=count, classes=[str(n) for n in range(classes)], image_size=256, crop="",
        mirrored=True, vae="", vae_fingerprint="", precision="float32", scaling_factor=0.18215, shift_factor=0.0,
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


def samples_per_second(data: TrainingData, config: Config, seed: int) -> float:
    """Steady delivery to this process: the workers' start and first batches are not counted."""
    batches = training_batches(data, seed, config.batch_size, workers=config.workers)
    for _ in itertools.islice(batches, 10 * max(1, config.workers)):
        pass
    started = time.perf_counter()
    for batch in itertools.islice(batches, config.batches):
        assert batch["latents"].shape == (config.batch_size, 4, 32, 32)
    return config.batches * config.batch_size / (time.perf_counter() - started)


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


def open_large(folder: Path) -> dict[str, float]:
    """Opening a sparse cache of 1,281,167 entries and reading 1,000 at random, in a process of its own (no torch)."""
    path = make(folder, 1_281_167, sparse=True)
    ended = subprocess.run([sys.executable, "-c", OPEN, str(path)], capture_output=True, text=True, check=True)
    return json.loads(ended.stdout)


def main() -> None:
    config = tyro.cli(Config, description=__doc__)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=config.folder) as temporary:
        cache = CachedLatents(make(Path(temporary) / "cache", config.count), flips=True)
        files = Path(temporary) / "files"
        files.mkdir()
        for index in range(config.count):
            np.save(files / f"{index:07d}.npy", cache.shards[0][index])
        cases = {"latent cache": cache, "one file an image": FilePerImage(files, cache)}
        one, other = (next(training_batches(data, 0, 8)) for data in cases.values())
        assert all(torch.equal(one[name], other[name]) for name in one)
        figures: dict[str, list[float]] = {name: [] for name in cases}
        for number in range(config.rounds + 1):
            for name, data in cases.items():
                speed = samples_per_second(data, config, seed=number)
                if number:  # the first round warms the page cache
                    figures[name].append(speed)
        for name, speeds in figures.items():
            median = statistics.median(speeds)
            print(
                f"{name:20} {median:10,.0f} samples/s   ({min(speeds):,.0f} … {max(speeds):,.0f}, {len(speeds)} rounds)"
            )
        ratio = statistics.median(a / b for a, b in zip(*figures.values(), strict=True))
        print(f"ratio, round by round: {ratio:.2f}")
        print("sparse cache of ImageNet's size:", open_large(Path(temporary) / "large"))
    print(f"{config.workers} workers, batches of {config.batch_size}, load average {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
