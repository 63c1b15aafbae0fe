"""From images to features: in restartable chunks, by all processes together, with nothing but a chunk in memory."""

from __future__ import annotations

import hashlib
import uuid
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from tqdm import tqdm

from sit.metrics.identity import About, hash_numbers
from sit.metrics.image_sets import Images
from sit.metrics.sums import Sums, add_rows, merge, over_processes, partials, read_sums, save_sums
from sit.metrics.work_folder import folder_for
from sit.utils.device import process_state
from sit.utils.errors import UserError
from sit.utils.files import atomic_write

CHUNK = 512
"""images whose rows are written together: what a restart repeats at most, for each process"""

PARTIAL = 16
"""chunks after which a process writes its sums, where the rows of the images are not kept to make them from"""


class Reader(Protocol):
    """What makes rows of images: an extractor, a classifier, or the images themselves."""

    @property
    def name(self) -> str: ...

    @property
    def about(self) -> About: ...

    def __call__(self, images: torch.Tensor) -> dict[str, np.ndarray]: ...


def row_bytes(reader: Reader, device: torch.device) -> int:
    """How many bytes a reader makes of an image, as it makes of a small black one."""
    rows = reader(torch.zeros(1, 3, 64, 64, dtype=torch.uint8, device=device))
    return sum(values.nbytes for values in rows.values())


class Pixels:
    """The reader that keeps the images themselves: ``images`` (B, H, W, 3) uint8."""

    name = "images"
    about: About = {"features": "images"}

    def __call__(self, images: torch.Tensor) -> dict[str, np.ndarray]:
        return {"images": images.permute(0, 2, 3, 1).cpu().numpy()}


class Digests:
    """The reader that tells images apart by their pixels: ``digest`` (B,) int64, a hash of each."""

    name = "digests"
    about: About = {"features": "digests"}

    def __call__(self, images: torch.Tensor) -> dict[str, np.ndarray]:
        shape = f"{tuple(images.shape[1:])} ".encode()
        hashes = [hashlib.blake2b(shape + image.tobytes(), digest_size=8).digest() for image in images.cpu().numpy()]
        return {"digest": np.frombuffer(b"".join(hashes), dtype="<i8")}


@dataclass(frozen=True)
class Wanted:
    """What is wanted of a set of images.

    Attributes:
        reader: what makes it.
        group: (N,) the group of each image in the sums; None puts all into one.
        keep: (k,) the numbers, rising, of the images whose rows are kept; None keeps all.
        summed: whether sums are wanted at all.
    """

    reader: Reader
    group: np.ndarray | None = None
    keep: np.ndarray | None = None
    summed: bool = True

    @property
    def about(self) -> About:
        """What a folder of it is of: the reader, the groups, and which rows are kept."""
        numbers = {"group": self.group, "keep": self.keep}
        hashes = {name: hash_numbers(array) for name, array in numbers.items() if array is not None}
        return {"reader": self.reader.about, "summed": self.summed} | hashes


@dataclass
class Found:
    """What a reader made of a set of images, on disk.

    Attributes:
        folder: where its chunks lie.
        kept: the numbers of the images whose rows are there.
        sums: the sums of all images, of what is summed.
    """

    folder: Path
    kept: np.ndarray
    sums: Sums = field(default_factory=dict)

    def rows(self, *names: str) -> dict[str, np.ndarray]:
        """The rows (k, …) of these names, or of all, of the images that were kept, read into memory."""
        parts: dict[str, list[np.ndarray]] = {}
        for chunk in self.chunks():
            for name in names or chunk:
                if name in chunk:
                    parts.setdefault(name, []).append(chunk[name])
        return {name: np.concatenate(arrays) for name, arrays in parts.items()}

    def chunks(self) -> Iterator[dict[str, np.ndarray]]:
        """The rows, a chunk at a time."""
        for start in np.unique(self.kept // CHUNK * CHUNK).tolist():
            with np.load(_chunk(self.folder, start)) as archive:
                yield dict(archive)


def extract(
    images: Images,
    wanted: Sequence[Wanted],
    work: Path,
    *,
    device: torch.device,
    batch_size: int,
    description: str = "images",
) -> dict[str, Found] | None:
    """What readers make of all images, made by all processes together, and an image once for all of them.

    Args:
        images: which.
        wanted: what is wanted of them.
        work: the work folder. What is finished there, by whichever evaluation, is not made again; a chunk that can't
            be read is.
        device: where the readers are.
        batch_size: images at a time.
        description: what the progress bar says, and the first part of the folder's name.

    Returns:
        On the main process what each reader made, by its name; None on the others.

    Raises:
        UserError: an image can't be read, or the disk is full.
    """
    state = process_state()
    place = folder_of(images, work, description)
    tasks = [_Task(folder_for(place, one.reader.name, one.about), one, len(images)) for one in wanted]
    for task in tasks:
        task.look()
    state.wait_for_everyone()  # the folders are there

    starts = list(range(0, len(images), CHUNK))[state.process_index :: state.num_processes]
    total = sum(min(CHUNK, len(images) - start) for start in starts)
    quiet = dict(unit="image", dynamic_ncols=True, disable=not state.is_main_process)
    with tqdm(total=total, desc=description, **quiet) as bar:
        for start in starts:
            numbers = np.arange(start, min(start + CHUNK, len(images)))
            missing = [task for task in tasks if not task.have(start, numbers)]
            if missing:
                _make(missing, images, numbers, device=device, batch_size=batch_size)
            bar.update(len(numbers))
    for task in tasks:
        task.finish()
    return {task.reader.name: task.found for task in tasks} if state.is_main_process else None


def folder_of(images: Images, work: Path, description: str) -> Path:
    """The folder in a work folder of a set of images."""
    return folder_for(work, description, images.about | {"count": len(images)}, images.source)


class _Task:
    """One reader's work on a set of images: what is done of it, and the sums of this process."""

    def __init__(self, folder: Path, wanted: Wanted, count: int) -> None:
        self.folder, self.reader, self.wanted = folder, wanted.reader, wanted
        self.group = np.zeros(count, dtype=np.int64) if wanted.group is None else wanted.group
        self.groups = int(self.group.max()) + 1
        self.kept = np.arange(count) if wanted.keep is None else wanted.keep
        self.found = Found(folder, self.kept)
        self.chunks = range(0, count, CHUNK)
        self.mine: Sums = {}
        self.added: set[int] = set()
        self.name = uuid.uuid4().hex[:12]

    def look(self) -> None:
        """Learn what earlier processes finished: the main process looks, and tells the others."""
        state = process_state()
        self.earlier: Sums = {}
        self.files: list[Path] = []
        told: list[set[int]] = [set()]
        if state.is_main_process and self.wanted.summed:
            whole = read_sums(self.folder / "sums.npz")
            if whole is not None and whole[1] == set(self.chunks):
                self.earlier, covered = whole
            else:
                self.files, self.earlier, covered = partials(self.folder)
            told = [covered]
        if state.num_processes > 1:
            broadcast_object_list(told)
        self.covered: set[int] = told[0]

    def have(self, start: int, numbers: np.ndarray) -> bool:
        """Whether a chunk is done. One whose rows are all there, but not yet in any sums, is added to the sums."""
        here = self._kept_of(numbers)
        if not len(here):
            return start in self.covered or not self.wanted.summed
        rows = _read_rows(_chunk(self.folder, start), len(here))
        if rows is None:
            return False
        if self.wanted.summed and start not in self.covered:
            if len(here) < len(numbers):
                return False
            self._add(start, numbers, rows)
        return True

    def take(self, numbers: np.ndarray, rows: dict[str, np.ndarray]) -> None:
        """Keep the rows of a chunk as far as they are wanted, and add them to the sums unless they are in them."""
        start, here = int(numbers[0]), self._kept_of(numbers)
        if len(here):
            places = here - start
            with atomic_write(_chunk(self.folder, start)) as temporary, open(temporary, "wb") as file:
                np.savez(file, **{name: values[places] for name, values in rows.items()})
        if self.wanted.summed and start not in self.covered:
            self._add(start, numbers, rows)
            if len(self.kept) < len(self.group) and len(self.added) % PARTIAL == 0:
                save_sums(self.folder / f"partial-{self.name}.npz", self.mine, self.added)

    def _add(self, start: int, numbers: np.ndarray, rows: dict[str, np.ndarray]) -> None:
        add_rows(self.mine, rows, self.group[numbers], self.groups)
        self.added.add(start)

    def _kept_of(self, numbers: np.ndarray) -> np.ndarray:
        first, last = np.searchsorted(self.kept, [numbers[0], numbers[-1] + 1])
        return self.kept[first:last]

    def finish(self) -> None:
        """Bring the sums of all processes together, and write them."""
        state = process_state()
        if not self.wanted.summed:
            state.wait_for_everyone()  # all rows are there
            return
        whole = over_processes(self.mine)
        if state.is_main_process:
            self.found.sums = merge([self.earlier, whole])
            if self.covered != set(self.chunks):
                save_sums(self.folder / "sums.npz", self.found.sums, self.chunks)
        state.wait_for_everyone()
        if state.is_main_process:
            for path in [*self.files, *self.folder.glob("partial-*.npz")]:
                path.unlink(missing_ok=True)


def _make(
    tasks: Sequence[_Task], images: Images, numbers: np.ndarray, *, device: torch.device, batch_size: int
) -> None:
    """Make the images of a chunk once, and all readers' rows of them."""
    parts: list[dict[str, list[np.ndarray]]] = [{} for _ in tasks]
    for first in range(0, len(numbers), batch_size):
        pixels = images.batch(numbers[first : first + batch_size])
        given = pixels.to(device)
        for task, collected in zip(tasks, parts, strict=True):
            try:
                found = task.reader(given)
            except UserError as error:
                raise UserError(f"{images.name}: {error}") from error
            for name, values in found.items():
                collected.setdefault(name, []).append(values)
    for task, collected in zip(tasks, parts, strict=True):
        task.take(numbers, {name: np.concatenate(values) for name, values in collected.items()})


def _read_rows(path: Path, count: int) -> dict[str, np.ndarray] | None:
    """The rows of a chunk, if the file is whole and has ``count`` of each."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            rows = dict(archive)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, RuntimeError, TypeError, NotImplementedError):
        return None
    whole = rows and all(values.ndim and len(values) == count for values in rows.values())
    return rows if whole else None


def _chunk(folder: Path, start: int) -> Path:
    return folder / f"rows-{start:08d}.npz"
