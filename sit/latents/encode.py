"""Writing and verifying latent caches: ``python -m sit.latents encode`` and ``verify``.

The images are cut into chunks. Of those that are left, each of n processes takes every n-th, and notes it in its own
journal once it is on the disk. An encoding that died continues from the journals, on any number of processes; on the
same kind of device it ends in the same bytes. The manifest is written last.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from accelerate import PartialState
from diffusers import AutoencoderKL
from tqdm import tqdm

from sit.data.dataset import ImageData
from sit.data.factory import open_images
from sit.latents.cache import MANIFEST, PLAN, SHARD_SIZE, CachedLatents, Manifest, in_todays_words
from sit.latents.vae import encode_images, load_vae
from sit.utils.cli import one_line_errors
from sit.utils.device import leave_processes, process_state
from sit.utils.errors import UserError, entry_point
from sit.utils.files import LOCK, atomic_write, explain_os_errors
from sit.utils.lock import locked

NOTE = re.compile(r"chunk (\d+) of (\d+) done")


@dataclass
class Encode:
    """Encode a data set into a latent cache; started again after a crash, it continues where it stopped."""

    out: Path
    """folder of the cache"""
    data: str = "digits"
    """digits, a folder with one subfolder a class, ImageNet's tar, or another source (see sit.data.factory)"""
    vae: str = "digits"
    """digits, a VAE's folder, or a Hub name such as stabilityai/sd-vae-ft-ema"""
    image_size: int | None = None
    """side in pixels; the source's own if not given (folders and tars 256, digits 32)"""
    flip: bool = True
    """also encode every image flipped left to right, for training with flips"""
    batch_size: int = 32
    """images given to the VAE at once"""
    workers: int = 2
    """processes, for each encoding one, that read and crop images"""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """what the VAE computes in"""
    chunk: int = 512
    """images between two notes in the journal: the most that a crash costs each process"""
    shard_size: int = SHARD_SIZE
    """images in one file"""


@dataclass
class Verify:
    """Encode a random subset of a cache's images again and compare."""

    cache: Annotated[Path, tyro.conf.Positional]
    """folder of the cache"""
    data: str | None = None
    """where the images are now, if they were moved"""
    vae: str | None = None
    """where the VAE is now, if it was moved"""
    samples: int = 64
    seed: int = 0
    tolerance: float = 0.02
    """largest root-mean-square difference of an entry, in units of the latents' standard deviation"""


def encode(config: Encode, stop_after: int | None = None) -> Path:
    """Write the cache that ``config`` asks for; every process of the launch calls this.

    Args:
        config: what to encode, by which VAE, and where to.
        stop_after: end each process after so many chunks, unfinished (for tests).

    Returns:
        The folder of the cache.

    Raises:
        UserError: a source, VAE or image can't be read, the disk is (or would be) full, or ``out`` holds another.
    """
    state = process_state()
    for name in ("batch_size", "chunk", "shard_size"):
        if getattr(config, name) < 1:
            raise UserError(f"`{name}={getattr(config, name)}` must be positive")
    if config.workers < 0:
        raise UserError(f"`workers={config.workers}` must not be negative")
    if config.out.is_file():
        raise UserError(f"`out={config.out}` exists and holds no latent cache; choose a new folder")
    with locked(config.out, "out") if state.is_main_process else contextlib.nullcontext():
        return _encode(config, state, stop_after)


def _encode(config: Encode, state: PartialState, stop_after: int | None) -> Path:
    """What :func:`encode` does while the folder is its own."""
    images = open_images(config.data, config.image_size)
    vae = load_vae(config.vae, state.device, getattr(torch, config.precision))
    manifest = Manifest.describe(images, vae, config.vae, config.flip, config.shard_size)
    plan = asdict(manifest) | {"chunk": config.chunk, "batch_size": config.batch_size}
    finished = _resumable(config.out, manifest, plan)
    state.wait_for_everyone()  # nobody may write before all have looked
    if finished:
        return config.out
    if state.is_main_process:
        _prepare(config.out, manifest, plan)
    state.wait_for_everyone()
    left = _chunks_left(config.out, len(images), config.chunk)
    mine = left[state.process_index :: state.num_processes]
    state.wait_for_everyone()
    _encode_chunks(config, manifest, images, vae, mine[:stop_after])
    if state.is_main_process and stop_after is None:
        # looked up in the journals, not waited for at a barrier: those give up after minutes, and nodes differ by more
        while _chunks_left(config.out, len(images), config.chunk):
            time.sleep(1)
        _finish(config.out, manifest, images)
    return config.out


def _resumable(out: Path, manifest: Manifest, plan: dict[str, object]) -> bool:
    """Raise UserError unless ``out`` can be begun or gone on with; True where it is finished already."""
    if (out / MANIFEST).is_file():
        there, wanted = asdict(Manifest.read(out / MANIFEST)), asdict(manifest)
    elif (out / PLAN).is_file():
        try:
            there, wanted = in_todays_words(json.loads((out / PLAN).read_text())), json.loads(json.dumps(plan))
        except (ValueError, AttributeError) as error:
            raise UserError(f"{out / PLAN} is damaged; remove {out} and start again") from error
    elif out.exists() and (not out.is_dir() or any(entry.name != LOCK for entry in out.iterdir())):
        raise UserError(f"`out={out}` exists and holds no latent cache; choose a new folder")
    else:
        return False
    for name, value in wanted.items():
        if there.get(name) != value and name not in ("data", "vae"):  # those two may have been moved
            raise UserError(
                f"`out={out}` holds an encoding with another {name.replace('_', ' ')} "
                f"({_short(there.get(name))} there, {_short(value)} asked for); choose a new folder or remove it"
            )
    return (out / MANIFEST).is_file()


def _short(value: object) -> str:
    return text if len(text := str(value)) < 40 else text[:37] + "..."


def _prepare(out: Path, manifest: Manifest, plan: dict[str, object]) -> None:
    """Make the shards, empty (sparse) but of their full length, then the plan that says so."""
    if (out / PLAN).is_file():
        return
    with explain_os_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        need = sum(int(np.prod(shape)) * 2 for _, shape in manifest.shards())
        free = shutil.disk_usage(out).free
        if need > free:
            raise UserError(
                f"`out={out}`: the cache needs {need / 1e6:,.0f} MB and the disk has {free / 1e6:,.0f} MB free"
            )
        for name, shape in manifest.shards():
            with atomic_write(out / name) as temporary:
                np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float16, shape=shape).flush()
        with atomic_write(out / PLAN) as temporary:
            temporary.write_text(json.dumps(plan, indent=1))


def _chunks_left(out: Path, count: int, chunk: int) -> list[int]:
    """Numbers of the chunks that no journal notes."""
    total = -(-count // chunk)
    done: set[int] = set()
    for journal in out.glob("journal-*.txt"):
        notes = (NOTE.fullmatch(line) for line in journal.read_text(errors="replace").split("\n"))
        done |= {int(note[1]) for note in notes if note and int(note[2]) == total}
    return [number for number in range(total) if number not in done]


def _encode_chunks(
    config: Encode, manifest: Manifest, images: ImageData, vae: AutoencoderKL, chunks: list[int]
) -> None:
    """Encode this process's chunks in order, noting each once its bytes are on the disk."""
    state = process_state()
    count, total = len(images), -(-len(images) // config.chunk)
    ranges = {number: range(number * config.chunk, min((number + 1) * config.chunk, count)) for number in chunks}
    batches = {
        number: [range(at, min(at + config.batch_size, whole.stop)) for at in whole[:: config.batch_size]]
        for number, whole in ranges.items()
    }
    order = [rows for parts in batches.values() for rows in parts]
    loader = torch.utils.data.DataLoader(images, batch_sampler=order, num_workers=config.workers)
    bar = tqdm(total=sum(map(len, ranges.values())), desc="encoding", unit="img", disable=not state.is_main_process)
    journal_path = config.out / f"journal-{state.process_index:05d}.txt"
    with contextlib.closing(bar), explain_os_errors(config.out), open(journal_path, "a") as journal:
        journal.write("\n")  # a line that a crash cut off ends here
        source = iter(loader)
        for number, parts in batches.items():
            for rows in parts:
                _write_rows(config.out, manifest, rows, _entries(vae, next(source)[0], config))
                bar.update(len(rows))
            _sync(config.out, manifest, ranges[number])
            journal.write(f"chunk {number} of {total} done\n")
            journal.flush()
            os.fsync(journal.fileno())


def _entries(vae: AutoencoderKL, pixels: torch.Tensor, config: Encode) -> np.ndarray:
    """uint8 (b, 3, H, W) → (b, sides, 2, c, h, w) float16."""
    versions = [pixels, pixels.flip(-1)] if config.flip else [pixels]
    sides = [torch.stack(encode_images(vae, version, config.batch_size), dim=1) for version in versions]
    entries = torch.stack(sides, dim=1).to(torch.float16).cpu()
    if not entries.isfinite().all():
        raise UserError(
            f"`vae={config.vae}` gives values that are not finite in {config.precision}; use `precision=float32`"
        )
    return entries.numpy()


def _pieces(manifest: Manifest, rows: range) -> Iterator[tuple[str, tuple[int, ...], range, int]]:
    """The shards that hold ``rows``: (file name, shape, its part of ``rows``, number of its first row)."""
    for number, (name, shape) in enumerate(manifest.shards()):
        first = number * manifest.shard_size
        part = range(max(rows.start, first), min(rows.stop, first + shape[0]))
        if part:
            yield name, shape, part, first


def _write_rows(out: Path, manifest: Manifest, rows: range, entries: np.ndarray) -> None:
    # plain writes, not a memory map: nodes that share a network file system would lose each other's parts of a page
    for name, shape, part, first in _pieces(manifest, rows):
        row_bytes = int(np.prod(shape[1:])) * 2
        offset = (out / name).stat().st_size - shape[0] * row_bytes + (part.start - first) * row_bytes
        content = memoryview(entries[part.start - rows.start : part.stop - rows.start].tobytes())
        with open(out / name, "r+b", buffering=0) as shard:
            shard.seek(offset)
            while content:
                content = content[shard.write(content) :]


def _sync(out: Path, manifest: Manifest, rows: range) -> None:
    for name, *_ in _pieces(manifest, rows):
        with open(out / name, "r+b") as shard:
            os.fsync(shard.fileno())


def _finish(out: Path, manifest: Manifest, images: ImageData) -> None:
    with atomic_write(out / "labels.npy") as temporary, open(temporary, "wb") as file:
        np.save(file, images.labels)
    with atomic_write(out / MANIFEST) as temporary:
        temporary.write_text(manifest.text())
    for leftover in [out / PLAN, *out.glob("journal-*.txt")]:
        leftover.unlink(missing_ok=True)


def verify(config: Verify) -> dict[str, float]:
    """Compare a random subset of the cache with what its VAE gives for its images now.

    Returns:
        ``compared`` entries and the ``worst`` root-mean-square difference, in latents' standard deviations.

    Raises:
        UserError: the cache is damaged, its images or its VAE are others now, or an entry differs.
    """
    if config.samples < 1:
        raise UserError(f"`samples={config.samples}` must be positive")
    cache = CachedLatents(config.cache)
    made = cache.manifest
    images = open_images(config.data or made.data, made.image_size)
    if images.fingerprint() != made.files:
        raise UserError(f"`data={images.name}` is not the list of images that {config.cache} was made from")
    if not np.array_equal(cache.labels, images.labels):
        raise UserError(f"{config.cache}: labels.npy is damaged; encode it again")
    device = process_state().device
    vae = load_vae(config.vae or made.vae, device, getattr(torch, made.precision))
    cache.check(vae, str(config.vae or made.vae))
    chosen = np.random.default_rng(config.seed).choice(len(cache), min(config.samples, len(cache)), replace=False)
    worst = 0.0
    for index in tqdm(np.sort(chosen).tolist(), desc="verifying", leave=False):
        pixels = images[index][0]
        for flipped in (False, True)[: 1 + made.flipped]:
            version = pixels.flip(-1) if flipped else pixels
            again = torch.stack(encode_images(vae, version[None], 32), dim=1).cpu()[0]
            there = torch.from_numpy(cache.moments(np.array([index]), np.array([flipped]))[0]).float()
            difference = float((again - there).square().mean().sqrt()) * made.scaling_factor
            if not difference <= config.tolerance:
                raise UserError(
                    f"{config.cache}: entry {index} ({images.source.describe(index)}{', flipped' * flipped}) differs "
                    f"from its image's latent by {difference:.3g} standard deviations; encode the cache again"
                )
            worst = max(worst, difference)
    return {"compared": len(chosen), "worst": worst}


@entry_point
def main() -> None:
    """The commands ``python -m sit.latents encode`` and ``verify``."""
    with one_line_errors():
        config = tyro.extras.subcommand_cli_from_dict(
            {"encode": Encode, "verify": Verify}, prog="python -m sit.latents"
        )
    try:
        if isinstance(config, Verify):
            figures = verify(config)
            print(f"{config.cache}: {figures['compared']} entries compared, worst difference {figures['worst']:.2g}")
            return
        out = encode(config)
        if process_state().is_main_process:
            made = CachedLatents(out).manifest
            flags = f"--data {out} --vae {config.vae} --image-size {made.image_size}" + " --flip" * made.flipped
            print(f"latents of {made.count:,} images in {out}; train on them with: {flags}")
    finally:
        leave_processes()
