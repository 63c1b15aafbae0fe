"""From images to features in restartable chunks, shared among all processes."""

from __future__ import annotations

import contextlib
import json
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from tqdm import tqdm

from sit.data.digits import shrink_digits
from sit.metrics.classifier import LabelClassifier
from sit.metrics.features import Extractor
from sit.metrics.image_sets import Images
from sit.utils.device import process_state
from sit.utils.errors import UserError
from sit.utils.files import atomic_write
from sit.utils.lock import locked

CHUNK = 512
"""images whose features are written together: what a restart repeats at most, for each process"""


def extract(
    images: Images,
    extractor: Extractor,
    work: Path,
    *,
    device: torch.device,
    batch_size: int,
    description: str = "features",
    keep_images: bool = False,
    classifier: LabelClassifier | None = None,
) -> dict[str, np.ndarray] | None:
    """Features of all images, made by all processes together.

    Args:
        images: which.
        extractor: what makes the features.
        work: a folder in which finished chunks of :data:`CHUNK` images are kept; they are not made again.
        device: where features are made.
        batch_size: images at a time.
        description: what the progress bar says.
        keep_images: keep the images in ``work`` too, for :func:`pack_samples`.
        classifier: what predicts the images' classes; None for no predictions.

    Returns:
        On the main process the outputs of the extractor, (N, …) float32 each, and ``small`` (N, 64) for the SVM of
        digits, and ``predicted`` (N,), the classes that ``classifier`` predicts; None on the others.

    Raises:
        UserError: ``work`` is of another evaluation, or an image can't be read.
    """
    state = process_state()
    if state.is_main_process:
        what = {
            "images": images.identity or images.name,
            "count": len(images),
            "features": extractor.identity,
            "kept": keep_images,
            "classifier": classifier.identity if classifier else "",
        }
        _claim(work, what)
    state.wait_for_everyone()
    starts = list(range(0, len(images), CHUNK))[state.process_index :: state.num_processes]
    bar = tqdm(
        total=sum(min(CHUNK, len(images) - start) for start in starts),
        desc=description,
        unit="image",
        dynamic_ncols=True,
        disable=not state.is_main_process,
    )
    for start in starts:
        numbers, path = np.arange(start, min(start + CHUNK, len(images))), _chunk(work, start)
        if path.is_file():
            bar.update(len(numbers))
            continue
        parts: dict[str, list[np.ndarray]] = {}
        for first in range(0, len(numbers), batch_size):
            pixels = images.batch(numbers[first : first + batch_size])
            found = extractor(pixels.to(device))
            if extractor.name == "digits":
                _check_shrinkable(pixels, images.name)
                found["small"] = shrink_digits(pixels.numpy())
            if classifier is not None:
                found["predicted"] = classifier(pixels.to(device)).cpu().numpy()
            if keep_images:
                found["images"] = pixels.permute(0, 2, 3, 1).numpy()
            for name, values in found.items():
                parts.setdefault(name, []).append(values)
            bar.update(len(pixels))
        with atomic_write(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, **{name: np.concatenate(values) for name, values in parts.items()})
    bar.close()
    state.wait_for_everyone()
    return _gather(work, len(images)) if state.is_main_process else None


def _gather(work: Path, count: int) -> dict[str, np.ndarray]:
    """All chunks of ``count`` images, joined, without the images themselves."""
    chunks = []
    for start in range(0, count, CHUNK):
        with np.load(_chunk(work, start)) as archive:
            chunks.append({name: archive[name] for name in archive if name != "images"})
    return {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}


def pack_samples(work: Path, images: Images, out: Path) -> None:
    """Write the images that :func:`extract` kept in ``work`` to an ADM-style npz, a chunk at a time.

    Raises:
        UserError: ``out`` can't be written.
    """
    with atomic_write(out) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        header_written = False
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            for start in range(0, len(images), CHUNK):
                with np.load(_chunk(work, start)) as chunk:
                    pixels = np.ascontiguousarray(chunk["images"])
                if not header_written:
                    shape = (len(images), *pixels.shape[1:])
                    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(file, header)
                    header_written = True
                file.write(pixels.tobytes())
        if images.labels is not None:
            with archive.open("arr_1.npy", "w") as file:
                np.lib.format.write_array(file, np.asarray(images.labels[: len(images)], dtype=np.int64))


def _check_shrinkable(pixels: torch.Tensor, name: str) -> None:
    height, width = pixels.shape[-2:]
    if height != width or height % 8:
        raise UserError(f"{name}: digits must be square with sides that are multiples of 8, not {height}x{width}")


def _chunk(work: Path, start: int) -> Path:
    return work / f"features-{start:08d}.npz"


def _claim(work: Path, what: dict) -> None:
    """Make ``work`` this evaluation's.

    Raises:
        UserError: it is another's already.
    """
    note = work / "evaluation.json"
    if note.is_file():
        begun = json.loads(note.read_text())
        if begun != what:
            raise UserError(f"`work_dir={work}` is of another evaluation ({begun['images']}): choose another folder")
    else:
        with atomic_write(note) as temporary:
            temporary.write_text(json.dumps(what))


class WorkDirectory:
    """The folder of the chunks: the one that was named, which stays, or a temporary one, shared by all processes."""

    def __init__(self, named: str | None) -> None:
        self.named = named

    def __enter__(self) -> Path:
        state = process_state()
        place = [self.named]
        self.held = contextlib.ExitStack()
        if self.named is None and state.is_main_process:
            place = [self.held.enter_context(tempfile.TemporaryDirectory(prefix="eval-"))]
        elif state.is_main_process:
            self.held.enter_context(locked(self.named, "work_dir"))
        if state.num_processes > 1:
            broadcast_object_list(place)
        return Path(place[0])

    def __exit__(self, *exception) -> None:
        self.held.close()
