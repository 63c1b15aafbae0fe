"""Writing and verifying latent caches: ``python -m sit.latents encode`` and ``verify``.

The images are cut into chunks. Of those that are left, each of n processes takes every n-th, and notes it in its own
journal, with its checksum, once it is on the disk. An encoding that died continues from the journals, on any number of
processes, and makes chunks anew that are not as they were noted; on the same kind of device it ends in the same bytes.
The manifest is written last, after everything was read back and compared.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import time
import zlib
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from diffusers import AutoencoderKL
from tqdm import tqdm

from sit.data.dataset import ImageData
from sit.data.factory import open_images
from sit.latents.arguments import SAME, Encode, Verify
from sit.latents.cache import (
    MANIFEST,
    PLAN,
    CachedLatents,
    Manifest,
    checksum_of_labels,
    in_todays_words,
)
from sit.latents.spread import evenly_spaced, note_spread, spread
from sit.latents.vae import broadcast, encode_images, load_vae
from sit.utils.checksums import sealed, unsealed
from sit.utils.device import process_state
from sit.utils.errors import UserError
from sit.utils.files import LOCK, atomic_write, clear_dead, explain_os_errors, reserve
from sit.utils.lock import locked
from sit.utils.reading import reading
from sit.utils.targets import check_room

NOTE = re.compile(r"chunk (\d+) of (\d+) done(?: ([0-9a-f]{8}))?")
"""a line of a journal: the last part, the CRC-32 of the chunk's entries, is not in journals of version 0.1.0"""

KEPT = "journal-kept.txt"
"""the journal of what earlier starts of an encoding have left"""

LOOKED_AT = 1024
"""entries that are compared with their images where an encoding goes on and the images have changed"""


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
        if state.is_main_process:
            _clear_journals(config.out)
        return config.out
    left: list[list[int]] = [[]]
    if state.is_main_process:
        _prepare(config.out, manifest, plan)
        left = [_keep_intact_chunks(config, manifest, images, vae)]
    if state.num_processes > 1:
        broadcast_object_list(left)
    mine = left[0][state.process_index :: state.num_processes]
    _encode_chunks(config, manifest, images, vae, mine[:stop_after])
    if state.is_main_process and stop_after is None:
        # looked up in the journals, not waited for at a barrier: those give up after minutes, and nodes differ by more
        total = len(_chunks(manifest, config.chunk))
        while len(_noted(config.out, total)) < total:
            time.sleep(1)
        _finish(config.out, manifest, images, config.chunk)
    return config.out


NOT_ASKED_FOR = ("data", "vae", "rows_per_checksum", "checksums", "labels_checksum", "vae_class", "spread")
"""the first two may have been moved, the fingerprint covers the class, and the others are found out by the encoding"""


def _resumable(out: Path, manifest: Manifest, plan: dict[str, object]) -> bool:
    """Raise UserError unless ``out`` can be begun or gone on with; True where it is finished already."""
    clear_dead(out)
    finished = (out / MANIFEST).is_file()
    if finished:
        there, wanted = asdict(Manifest.read(out / MANIFEST)), asdict(manifest)
    elif (out / PLAN).is_file():
        with reading(out / PLAN, f"remove {out} and start again"):
            written, has_checksum = unsealed((out / PLAN).read_bytes())
            if has_checksum != ("checksums" in written):
                raise ValueError("not as it was written")
            there, wanted = in_todays_words(written), json.loads(json.dumps(plan))
    elif out.exists() and (not out.is_dir() or any(entry.name != LOCK for entry in out.iterdir())):
        raise UserError(f"`out={out}` exists and holds no latent cache; choose a new folder")
    else:
        return False
    for name, value in wanted.items():
        if name in NOT_ASKED_FOR or (name == "contents" and (not finished or not there.get(name))):
            continue  # an image may have been mended since: _of_other_images looks
        if there.get(name) != value:
            raise UserError(
                f"`out={out}` holds an encoding with another {name.replace('_', ' ')} "
                f"({_short(there.get(name))} there, {_short(value)} asked for); choose a new folder or remove it"
            )
    return finished


def _short(value: object) -> str:
    return text if len(text := str(value)) < 40 else text[:37] + "..."


def _prepare(out: Path, manifest: Manifest, plan: dict[str, object]) -> None:
    """Write the plan, then make the shards that are not there, zeros of their full length with room on the disk.

    The plan comes first: a folder without it is not taken for an encoding. A shard of the right length is never
    replaced: it may hold chunks.
    """
    rest = {name: shape for name, shape in manifest.shards() if not _is_shard(out / name, shape)}
    with explain_os_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        need = sum(_bytes(shape) for shape in rest.values())
        check_room(out, need, "out", "the latents")
        if not (out / PLAN).is_file():
            with atomic_write(out / PLAN) as temporary:
                temporary.write_text(sealed(plan))
        for name, shape in rest.items():
            with atomic_write(out / name) as temporary:
                header = _header(shape)
                reserve(temporary, header, len(header) + _bytes(shape))
        for name, shape in manifest.shards():
            if not _has_header(out / name, shape):
                with open(out / name, "r+b") as shard:
                    shard.write(_header(shape))


def _bytes(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64)) * 2


def _header(shape: tuple[int, ...]) -> bytes:
    """What stands before the numbers in an npy file of float16."""
    content = io.BytesIO()
    np.lib.format.write_array_header_1_0(content, {"descr": "<f2", "fortran_order": False, "shape": shape})
    return content.getvalue()


def _is_shard(path: Path, shape: tuple[int, ...]) -> bool:
    return path.is_file() and path.stat().st_size == len(_header(shape)) + _bytes(shape)


def _has_header(path: Path, shape: tuple[int, ...]) -> bool:
    with open(path, "rb") as shard:
        return shard.read(len(_header(shape))) == _header(shape)


def _chunks(manifest: Manifest, chunk: int) -> list[range]:
    """The entries of each chunk."""
    starts = range(0, manifest.count, chunk)
    return [range(start, min(start + chunk, manifest.count)) for start in starts]


def _noted(out: Path, total: int) -> dict[int, set[str]]:
    """The chunks that journals note, and the checksums noted of each: none by version 0.1.0."""
    found: dict[int, set[str]] = {}
    for journal in out.glob("journal-*.txt"):
        notes = (NOTE.fullmatch(line) for line in journal.read_text(errors="replace").split("\n"))
        for note in notes:
            if note and int(note[2]) == total and int(note[1]) < total:
                found.setdefault(int(note[1]), set()).update([note[3]] if note[3] else [])
    return found


def _intact(out: Path, manifest: Manifest, chunk: int) -> dict[int, int]:
    """The CRC-32 of each noted chunk that is on the disk as it was noted."""
    chunks, shapes = _chunks(manifest, chunk), dict(manifest.shards())
    intact = {}
    for number, sums in sorted(_noted(out, len(chunks)).items()):
        with contextlib.suppress(OSError, ValueError):  # its shard is gone or cut off
            if not all(_has_header(out / name, shapes[name]) for name, *_ in manifest.pieces(chunks[number])):
                continue
            crc = manifest.checksum(out, chunks[number])
            if not sums or f"{crc:08x}" in sums:
                intact[number] = crc
    return intact


def _keep_intact_chunks(config: Encode, manifest: Manifest, images: ImageData, vae: AutoencoderKL) -> list[int]:
    """Put the notes of all intact chunks into one journal, and return the numbers of the other chunks, to be made."""
    out, chunks = config.out, _chunks(manifest, config.chunk)
    total, intact = len(chunks), _intact(out, manifest, config.chunk)
    if changed := len(_noted(out, total)) - len(intact):
        print(f"{out}: {changed} chunks are not as they were written and are encoded again", flush=True)
    if intact and unsealed((out / PLAN).read_bytes())[0].get("contents") != manifest.contents:
        others = _of_other_images(out, manifest, {number: chunks[number] for number in intact}, images, vae)
        looked_at = sum(_looked_at(chunks[number], len(intact)) for number in intact)
        print(
            f"{out}: images have changed since: {looked_at} of {sum(len(chunks[number]) for number in intact)} entries "
            f"were compared with theirs, and {len(others)} of {len(intact)} chunks are encoded again; `verify` of the "
            "finished cache compares more",
            flush=True,
        )
        intact = {number: crc for number, crc in intact.items() if number not in others}
    before = list(out.glob("journal-*.txt"))
    if intact:
        with atomic_write(out / KEPT) as temporary:
            temporary.write_text("".join(_note(number, total, crc) for number, crc in intact.items()))
    for journal in before:
        if journal.name != KEPT or not intact:
            journal.unlink()
    return [number for number in range(total) if number not in intact]


def _of_other_images(
    out: Path, manifest: Manifest, chunks: Mapping[int, range], images: ImageData, vae: AutoencoderKL
) -> set[int]:
    """The numbers of the chunks with a latent that is not its image's, as far as :data:`LOOKED_AT` entries tell.

    For images that are not what the plan says: one may have been mended since, or all replaced.
    """
    found = set()
    for number, rows in tqdm(chunks.items(), desc="comparing", leave=False):
        few = np.linspace(rows.start, rows.stop - 1, _looked_at(rows, len(chunks))).astype(int)
        for index in few.tolist():
            differences = _differences(vae, manifest, images[index][0], _entry(out, manifest, index))
            if not max(differences) <= SAME:
                found.add(number)
                break
    return found


def _looked_at(rows: range, chunks: int) -> int:
    """How many entries of one of so many chunks are compared."""
    return min(len(rows), max(1, LOOKED_AT // chunks))


def _entry(folder: Path, manifest: Manifest, index: int) -> np.ndarray:
    """An entry (sides, 2, c, h, w) float16 as it is on the disk."""
    name, _ = manifest.shards()[index // manifest.shard_size]
    return np.array(np.load(folder / name, mmap_mode="r")[index % manifest.shard_size])


def _differences(vae: AutoencoderKL, manifest: Manifest, pixels: torch.Tensor, entry: np.ndarray) -> list[float]:
    """How far each side of an ``entry`` (sides, 2, c, h, w) is from what the VAE makes of its image (3, H, W) now.

    Root-mean-square differences, in standard deviations of the latents.
    """
    found = []
    for version, there in zip((pixels, pixels.flip(-1)), torch.from_numpy(entry).float(), strict=False):
        again = torch.stack(encode_images(vae, version[None], 1), dim=1).cpu()[0]
        found.append(float(((again - there) * broadcast(manifest.scaling_factor, again)).square().mean().sqrt()))
    return found


def _note(number: int, total: int, crc: int) -> str:
    return f"chunk {number} of {total} done {crc:08x}\n"


def _encode_chunks(
    config: Encode, manifest: Manifest, images: ImageData, vae: AutoencoderKL, chunks: list[int]
) -> None:
    """Encode this process's chunks in order, noting each once its bytes are on the disk."""
    state = process_state()
    ranges = _chunks(manifest, config.chunk)
    size = config.batch_size
    batches = {
        number: [range(at, min(at + size, ranges[number].stop)) for at in ranges[number][::size]] for number in chunks
    }
    order = [rows for parts in batches.values() for rows in parts]
    loader = torch.utils.data.DataLoader(images, batch_sampler=order, num_workers=config.workers)
    bar = tqdm(total=sum(map(len, order)), desc="encoding", unit="img", disable=not state.is_main_process)
    journal_path = config.out / f"journal-{state.process_index:05d}.txt"
    with contextlib.closing(bar), explain_os_errors(config.out), open(journal_path, "a") as journal:
        journal.write("\n")  # a line that a crash cut off ends here
        source = iter(loader)
        for number, parts in batches.items():
            crc = 0
            for rows in parts:
                content = _entries(vae, next(source)[0], config).tobytes()
                crc = zlib.crc32(content, crc)
                _write_rows(config.out, manifest, rows, content)
                bar.update(len(rows))
            _sync(config.out, manifest, ranges[number])
            journal.write(_note(number, len(ranges), crc))
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


def _write_rows(out: Path, manifest: Manifest, rows: range, content: bytes) -> None:
    # plain writes, not a memory map: nodes that share a network file system would lose each other's parts of a page,
    # and a disk without room would end the process by a signal
    left = memoryview(content)
    for name, before_end, length, _ in manifest.pieces(rows):
        part, left = left[:length], left[length:]
        with open(out / name, "r+b", buffering=0) as shard:
            shard.seek(-before_end, os.SEEK_END)
            while part:
                part = part[shard.write(part) :]


def _sync(out: Path, manifest: Manifest, rows: range) -> None:
    for name, *_ in manifest.pieces(rows):
        with open(out / name, "r+b") as shard:
            os.fsync(shard.fileno())


def _finish(out: Path, manifest: Manifest, images: ImageData, chunk: int) -> None:
    """Read all chunks back and compare them, then write the labels and the manifest."""
    intact, total = _intact(out, manifest, chunk), len(_chunks(manifest, chunk))
    if missing := [number for number in range(total) if number not in intact]:
        raise UserError(
            f"{out}: {len(missing)} of {total} chunks are not on the disk as they were written; start the encoding "
            "again, which makes them anew"
        )
    labels = np.asarray(images.labels, dtype=np.int64)
    whole = replace(
        manifest,
        rows_per_checksum=chunk,
        checksums=[intact[number] for number in range(total)],
        labels_checksum=checksum_of_labels(labels),
    )
    with atomic_write(out / "labels.npy") as temporary, open(temporary, "wb") as file:
        np.save(file, labels)
    whole = replace(whole, spread=_spread(out, whole))
    with atomic_write(out / MANIFEST) as temporary:
        temporary.write_text(whole.text())
    _clear_journals(out)


def _spread(out: Path, manifest: Manifest) -> float:
    """Of some entries on the disk, not flipped; noted where it is far from one."""
    shards = [np.load(out / name, mmap_mode="r") for name, _ in manifest.shards()]
    entries = [shards[at // manifest.shard_size][at % manifest.shard_size, 0] for at in evenly_spaced(manifest.count)]
    measured = spread(torch.from_numpy(np.stack(entries)), (manifest.shift_factor, manifest.scaling_factor))
    note_spread(str(out), measured)
    return measured


def _clear_journals(out: Path) -> None:
    """Delete what only an encoding that goes on needs."""
    for leftover in [out / PLAN, *out.glob("journal-*.txt")]:
        leftover.unlink(missing_ok=True)
    clear_dead(out)


def verify(config: Verify) -> dict[str, float]:
    """Compare all checksums, and a random subset of the cache with what its VAE gives for its images now.

    Returns:
        ``compared`` entries and the ``worst`` root-mean-square difference, in latents' standard deviations.

    Raises:
        UserError: the cache is damaged, its images or its VAE are others now, or an entry differs.
    """
    if config.images < 1:
        raise UserError(f"`images={config.images}` must be positive")
    if config.seed < 0:
        raise UserError(f"`seed={config.seed}` must not be negative")
    if not config.tolerance >= 0:
        raise UserError(f"`tolerance={config.tolerance}` must be 0 or more")
    cache = CachedLatents(config.cache, argument=None)
    made = cache.manifest
    cache.check_entries()
    images = open_images(config.data or made.data, made.image_size)
    if images.fingerprint() != made.files:
        raise UserError(f"`data={images.name}` is not the list of images that {config.cache} was made from")
    if not np.array_equal(cache.labels, images.labels):
        raise UserError(f"{config.cache}: labels.npy is damaged; encode it again")
    device = process_state().device
    vae = load_vae(config.vae or made.vae, device, getattr(torch, made.precision))
    cache.check(vae, str(config.vae or made.vae))
    chosen = np.random.default_rng(config.seed).choice(len(cache), min(config.images, len(cache)), replace=False)
    worst = 0.0
    for index in tqdm(np.sort(chosen).tolist(), desc="verifying", leave=False):
        differences = _differences(vae, made, images[index][0], _entry(config.cache, made, index))
        for flipped, difference in enumerate(differences):
            if not difference <= config.tolerance:
                raise UserError(
                    f"{config.cache}: entry {index} ({images.source.describe(index)}{', flipped' * flipped}) differs "
                    f"from its image's latent by {difference:.3g} standard deviations; encode the cache again"
                )
            worst = max(worst, difference)
    return {"compared": len(chosen), "worst": worst}
