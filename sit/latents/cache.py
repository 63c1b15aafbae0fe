"""The latent cache on disk: posterior moments of every image and of the flipped image, memory-mapped.

A folder with::

    manifest.json        what was encoded, by which VAE, and checksums of the rest and of itself; written last, so a
                         folder without it is not a cache yet
    labels.npy           (count,) int64
    moments-00000.npy    (at most ``shard_size``, sides, 2, c, h, w) float16: sides are the image and the flipped
                         image, 2 are mean and standard deviation, unscaled

The moments of one side of one image are contiguous (16 KB at 4×32×32), so that random access reads no others.
:mod:`sit.latents.encode` writes it; :class:`CachedLatents` serves it to :func:`sit.training.loader.training_batches`.
"""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections.abc import Iterator
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

import numpy as np

from sit.latents.arguments import SHARD_SIZE
from sit.utils.arrays import read_npy
from sit.utils.checksums import crc32_of_file, sealed, unsealed
from sit.utils.errors import UserError
from sit.utils.reading import reading, typed

if TYPE_CHECKING:  # opening a cache takes NumPy alone: torch would add half a gigabyte and seconds to looking into one
    import torch
    from diffusers import AutoencoderKL

    from sit.data.dataset import ImageData
    from sit.latents.datasets import Batch


MANIFEST = "manifest.json"
PLAN = "encoding.json"
"""the manifest to be, while the encoding runs"""
FORMAT = 1
READ_WHOLE = 4 << 30
"""bytes of a cache that are compared with their checksums wherever it is used, in a few seconds; more are left to
``python -m sit.latents verify``"""
CONTENTS = ("files", "contents", "count", "classes", "image_size", "crop", "flipped", "vae_fingerprint", "precision")
"""what tells two caches apart; what else is in the manifest follows from it, or is a name"""


@dataclass
class Manifest:
    """What a cache holds. Two encodings with equal manifests hold the same entries."""

    data: str
    """what the argument ``data`` said"""
    files: str
    """fingerprint of the list of images and their labels"""
    count: int
    classes: list[str]
    image_size: int
    """side of the images in pixels"""
    crop: str
    flipped: bool
    """whether the flipped images are in it"""
    vae: str
    """what the argument ``vae`` said"""
    vae_fingerprint: str
    """hash of the VAE's weights and scaling"""
    precision: str
    """what the VAE computed in"""
    scaling_factor: float | tuple[float, ...]
    """one number, or one for each channel"""
    shift_factor: float | tuple[float, ...]
    downsampling: int
    latent_shape: tuple[int, int, int]
    shard_size: int
    contents: str = ""
    """hash of the images' sizes and of the bytes of some; this and what follows is not in caches of version 0.1.0"""
    rows_per_checksum: int = 0
    checksums: list[int] = field(default_factory=list)
    """CRC-32 of the entries of so many images after each other"""
    labels_checksum: int = 0
    """CRC-32 of the labels, as little-endian int64"""
    vae_class: str = ""
    """diffusers' class of the VAE"""
    spread: float = 0.0
    """standard deviation of the scaled latents, measured on some of them; 0 where it was not"""
    format: int = FORMAT

    @classmethod
    def describe(
        cls, images: ImageData, vae: AutoencoderKL, vae_name: str, flipped: bool, shard_size: int = SHARD_SIZE
    ) -> Manifest:
        """The manifest of what encoding ``images`` by ``vae`` gives."""
        from sit.data.dataset import CROP
        from sit.latents.vae import downsampling, latent_shape, scaling, vae_fingerprint

        shift, scale = scaling(vae.config)
        return cls(
            data=images.name, files=images.fingerprint(), count=len(images), classes=images.classes,
            image_size=images.image_size, crop=CROP, flipped=flipped, vae=vae_name,
            vae_fingerprint=vae_fingerprint(vae), precision=str(vae.dtype).removeprefix("torch."),
            scaling_factor=scale, shift_factor=shift, downsampling=downsampling(vae),
            latent_shape=latent_shape(vae, images.image_size), shard_size=shard_size, contents=images.contents(),
            vae_class=type(vae).__name__,
        )  # fmt: skip

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Read ``manifest.json``.

        Raises:
            UserError: the file can't be read or is no manifest of this format.
        """
        with reading(path, "encode the cache again"):
            values, has_checksum = unsealed(path.read_bytes())
            if (said := values.get("format")) != FORMAT:
                raise UserError(f"{path} is of format {said}, and this version reads {FORMAT}; encode again")
            values = in_todays_words(values)
            if has_checksum != ("checksums" in values):
                raise ValueError("not as it was written")
            hints = get_type_hints(cls)
            needed = {entry.name for entry in fields(cls) if entry.default is entry.default_factory is MISSING}
            known = hints.keys() & values.keys() | needed
            made = cls(**typed({name: values[name] for name in known}, hints, path))
            if min(made.count, made.shard_size, *made.latent_shape) < 1:
                raise ValueError("sizes below 1")
            return made

    def text(self) -> str:
        return sealed(asdict(self))

    def shards(self) -> list[tuple[str, tuple[int, ...]]]:
        """(file name, shape of its array), in order."""
        rest = (1 + self.flipped, 2, *self.latent_shape)
        starts = range(0, self.count, self.shard_size)
        return [
            (f"moments-{number:05d}.npy", (min(self.shard_size, self.count - start), *rest))
            for number, start in enumerate(starts)
        ]

    def pieces(self, rows: range) -> Iterator[tuple[str, int, int, range]]:
        """The parts of shards that hold ``rows``: (file name, bytes from their first to its end, bytes, ``rows``)."""
        for number, (name, shape) in enumerate(self.shards()):
            first, row_bytes = number * self.shard_size, int(np.prod(shape[1:])) * 2
            part = range(max(rows.start, first), min(rows.stop, first + shape[0]))
            if part:
                yield name, (first + shape[0] - part.start) * row_bytes, len(part) * row_bytes, part

    def checksum(self, folder: Path, rows: range) -> int:
        """The CRC-32 of the entries of ``rows`` as they are on the disk now.

        Raises:
            OSError: a shard is missing or can't be read.
        """
        crc = 0
        for name, before_end, length, _ in self.pieces(rows):
            crc = crc32_of_file(folder / name, [((folder / name).stat().st_size - before_end, length)], crc)
        return crc


def in_todays_words(values: dict[str, Any]) -> dict[str, Any]:
    """A manifest or plan with today's words where version 0.1.0 wrote others."""
    if "mirrored" in values:
        values = {"flipped" if name == "mirrored" else name: value for name, value in values.items()}
    return values | {"crop": "adm-center"} if values.get("crop") == "adm-centre" else values


def checksum_of_labels(labels: np.ndarray) -> int:
    """The CRC-32 of labels as little-endian int64."""
    return zlib.crc32(np.ascontiguousarray(labels, dtype="<i8"))


def is_cache(folder: str | Path) -> bool:
    """Whether ``folder`` is a latent cache, whole or still being encoded."""
    return (Path(folder) / MANIFEST).is_file() or (Path(folder) / PLAN).is_file()


class CachedLatents:
    """A cache opened for training, a :class:`~sit.latents.datasets.TrainingData`.

    Opening reads the labels and maps the rest.

    Args:
        folder: written by ``python -m sit.latents encode``.
        flip: flip at random.
        argument: what messages call the folder; None for its path alone.

    Raises:
        UserError: it is no cache, not finished, damaged, or holds no flipped images for ``flip``.
    """

    def __init__(self, folder: str | Path, flip: bool = False, argument: str | None = "data") -> None:
        self.folder, self.name, self.flip = Path(folder), str(folder), flip
        self.said = f"`{argument}={folder}`" if argument else self.name
        if not (self.folder / MANIFEST).is_file():
            if (self.folder / PLAN).is_file():
                raise UserError(f"{self.said} is a latent cache not yet finished; start its encoding again to go on")
            raise UserError(f"{self.said} is no latent cache: it has no {MANIFEST}")
        self.manifest = Manifest.read(self.folder / MANIFEST)
        if flip and not self.manifest.flipped:
            raise UserError(f"`flip` needs the flipped images, and {self.said} was encoded without; encode it again")
        self.classes, self.latent_shape = self.manifest.classes, self.manifest.latent_shape
        self.scaling = (self.manifest.shift_factor, self.manifest.scaling_factor)
        self.labels = self._map("labels.npy", (self.manifest.count,), np.int64, mmap_mode=None)
        if self.manifest.count < 1 or self.labels.min() < 0 or self.labels.max() >= len(self.classes):
            raise UserError(f"{self.said}: labels.npy has labels outside its {len(self.classes)} classes; encode again")
        if self.manifest.checksums and checksum_of_labels(self.labels) != self.manifest.labels_checksum:
            raise UserError(f"{self.said}: labels.npy is damaged; encode again")
        self._open()

    def _open(self) -> None:
        self.shards = [self._map(name, shape, np.float16) for name, shape in self.manifest.shards()]

    def _map(self, name: str, shape: tuple[int, ...], dtype: type, mmap_mode: str | None = "r") -> np.ndarray:
        try:
            array = read_npy(self.folder / name, mmap=mmap_mode is not None)
        except UserError as error:
            raise UserError(f"{self.said}: {name} is missing or damaged ({error}); encode it again") from error
        if array.shape != shape or array.dtype != dtype:
            raise UserError(f"{self.said}: {name} doesn't match {MANIFEST}; encode it again")
        return array

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "shards"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        return self.manifest.count

    def contents(self) -> str:
        """Hash of what was encoded: which images, how large, by which VAE."""
        told = asdict(self.manifest)
        told = {name: told[name] for name in CONTENTS}
        return hashlib.blake2b(json.dumps(told, sort_keys=True).encode(), digest_size=16).hexdigest()

    def check_entries(self) -> None:
        """Raise UserError unless every entry is as it was encoded; all are read."""
        if damaged := next(self.damaged_rows(), None):
            rows = f"entries {damaged.start} to {damaged.stop - 1}"
            raise UserError(f"{self.said}: {rows} are damaged; remove it and encode again")

    def damaged_rows(self) -> Iterator[range]:
        """The entries whose checksums are not those of the encoding; all are read. Caches of 0.1.0 have none."""
        step = self.manifest.rows_per_checksum
        for number, expected in enumerate(self.manifest.checksums):
            rows = range(number * step, min((number + 1) * step, len(self)))
            if self.manifest.checksum(self.folder, rows) != expected:
                yield rows

    def moments(self, indices: np.ndarray, flipped: np.ndarray) -> np.ndarray:
        """(b,) indices and (b,) bool → (b, 2, c, h, w) float16, mean and standard deviation, unscaled."""
        out = np.empty((len(indices), 2, *self.latent_shape), dtype=np.float16)
        shards, rows = np.divmod(indices, self.manifest.shard_size)
        for place, (shard, row, side) in enumerate(zip(shards.tolist(), rows.tolist(), flipped.tolist(), strict=True)):
            out[place] = self.shards[shard][row, int(side)]
        return out

    def fetch(
        self, indices: np.ndarray, flipped: np.ndarray, noise: torch.Tensor, out: torch.Tensor | None = None
    ) -> Batch:
        import torch

        from sit.latents.datasets import scaled_sample

        return {"latents": scaled_sample(torch.from_numpy(self.moments(indices, flipped)), noise, self.scaling, out)}

    def finish(self, batch: Batch) -> Batch:
        return batch

    def check(self, vae: AutoencoderKL, vae_name: str, image_size: int | None = None) -> None:
        """Raise UserError unless these latents are those of ``vae`` and of images of ``image_size`` pixels.

        The entries of caches up to :data:`READ_WHOLE` bytes are compared with their checksums too.

        Args:
            vae: its weights and scaling must be those of the cache's, in float32 or in the precision of the cache.
            vae_name: for messages.
            image_size: None for the cache's own.
        """
        import torch

        from sit.latents.vae import scaling, vae_fingerprint

        made = self.manifest
        if image_size is not None and image_size != made.image_size:
            raise UserError(
                f"{self.said} holds latents of {made.image_size}-pixel images, not `image_size={image_size}`; "
                f"give `image_size={made.image_size}` or encode again"
            )
        shift, scale = scaling(vae.config)
        if (shift, scale) != (made.shift_factor, made.scaling_factor):
            raise UserError(
                f"{self.said} was made by `vae={made.vae}`, scaling {made.scaling_factor} and shift "
                f"{made.shift_factor}; `vae={vae_name}` has {scale} and {shift}; give the same or encode again"
            )
        if vae_fingerprint(vae, getattr(torch, made.precision)) != made.vae_fingerprint:
            raise UserError(
                f"{self.said} was made by `vae={made.vae}`, whose weights are not those of `vae={vae_name}`; "
                "give the same VAE or encode again"
            )
        if sum(2 * math.prod(shape) for _, shape in made.shards()) <= READ_WHOLE:
            self.check_entries()
