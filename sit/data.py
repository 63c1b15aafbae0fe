"""Images: the embedded digits, folders with one subfolder a class, and the sources of :mod:`sit.sources`.

``open_images(spec, image_size)`` answers a map-style dataset of (uint8 tensor (3, H, W), int label), cropped and
resized as ADM does it (guided-diffusion's evaluation and training images). A source knows where pictures lie; the
crop is the same for all of them.
"""

from __future__ import annotations

import functools
import hashlib
import os
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image

from sit.errors import UserError

DIGITS_SIZE = 32
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff")
CROP = "adm-centre"  # written into manifests: another crop gives other latents


class BadImage(UserError):
    """A picture that can't be read. Survives DataLoader workers, which wrap the message in a traceback's text."""

    def __init__(self, message: str) -> None:
        super().__init__(message.rpartition("BadImage: ")[2].strip())


class Source(Protocol):
    """Where pictures lie. Sources are picklable, and reading is safe in forked or spawned workers."""

    name: str
    classes: list[str]
    labels: np.ndarray  # (count,) int64
    native_size: int  # the side used when no image size is asked for

    def read(self, index: int) -> Image.Image: ...

    def describe(self, index: int) -> str: ...

    def fingerprint(self) -> str: ...


class ImageData(torch.utils.data.Dataset):
    """A source's pictures at one size.

    Attributes:
        name: the spec it was opened by.
        classes: label names, in the order of the labels.
        labels: (count,) int64, known without reading a picture.
        image_size: side of the square pictures in pixels.
    """

    def __init__(self, source: Source, image_size: int | None = None) -> None:
        self.source = source
        self.name = source.name
        self.classes = list(source.classes)
        self.labels = source.labels
        self.image_size = int(image_size or source.native_size)

    def __len__(self) -> int:
        return len(self.labels)

    def picture(self, index: int) -> Image.Image:
        """Picture ``index`` as RGB, cropped to ``image_size``.

        Raises:
            BadImage: the file is missing, cut off or no image; the message names it.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"picture {index} of {len(self)}")
        try:
            with self.source.read(index) as image:
                return centre_crop(image.convert("RGB"), self.image_size)
        except UserError:
            raise
        except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
            reason = "not an image" if isinstance(error, Image.UnidentifiedImageError) else str(error)
            raise BadImage(
                f"corrupt image {self.source.describe(index)} in --data {self.name} ({reason}); repair or remove it"
            ) from error

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        pixels = np.array(self.picture(int(index)), dtype=np.uint8)
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous(), int(self.labels[index])

    def fingerprint(self) -> str:
        """Hash of which pictures these are, in which order and with which labels (not of their pixels)."""
        return self.source.fingerprint()


def open_images(spec: str, image_size: int | None = None) -> ImageData:
    """Open the data set that ``--data spec`` names.

    Args:
        spec: ``digits`` (all 1,797), ``digits:train`` or ``digits:heldout`` (:func:`digits_split`), a folder with one
            subfolder a class, or one of the sources listed by ``sit.sources``.
        image_size: side in pixels; None for the source's own (32 for digits, 256 for folders).

    Raises:
        UserError: no such data, no class subfolders, no images, or they can't be read.
    """
    if image_size is not None and image_size < 1:
        raise UserError(f"--image-size {image_size} must be positive")
    kind, _, rest = spec.partition(":")
    if kind == "digits":
        return ImageData(Digits(rest or "all"), image_size)
    from sit.sources import SOURCES, TarSource  # it needs this module

    if kind in SOURCES and rest and not Path(spec).exists():
        return ImageData(SOURCES[kind](rest), image_size)
    path = Path(spec)
    if spec.lower().endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")) and path.is_file():
        raise UserError(f"--data {spec} is compressed, which forbids random access; uncompress it to a .tar first")
    if (spec.lower().endswith(".tar") and path.is_file()) or only_tars(path):
        return ImageData(TarSource(spec), image_size)
    return ImageData(FolderSource(spec), image_size)


def only_tars(folder: Path) -> bool:
    """Whether a folder is a data set of one tar a class: it has tars, and no class subfolders."""
    try:
        return (
            folder.is_dir() and any(folder.glob("*.tar")) and not any(_is_class(entry) for entry in os.scandir(folder))
        )
    except OSError:
        return False  # FolderSource says why


def has_classes(folder: Path) -> bool:
    """Whether a folder is a data set of one subfolder a class: it has such, and no pictures beside them.

    Raises:
        UserError: it can't be read.
    """
    try:
        entries = list(os.scandir(folder))
    except OSError as error:
        raise UserError(f"{folder} can't be read: {error.strerror}") from error
    return any(map(_is_class, entries)) and not any(entry.name.lower().endswith(EXTENSIONS) for entry in entries)


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """The central square of ``image`` at ``size`` × ``size`` pixels, matching ADM's (guided-diffusion).

    The picture is halved with a box filter while its shorter side is at least twice ``size``, brought by bicubic
    interpolation to a shorter side of ``size``, and cut.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def hash_names(names: object, labels: np.ndarray) -> str:
    """Fingerprint of a list of names (an iterable of bytes) and their labels."""
    digest = hashlib.blake2b(digest_size=16)
    for name in names:
        digest.update(name + b"\0")
    digest.update(np.ascontiguousarray(labels, dtype="<i8").tobytes())
    return digest.hexdigest()


# ---------------------------------------------------------------- folders


class FolderSource:
    """A folder with one subfolder a class, sorted by name as torchvision does; pictures at any depth within a class."""

    native_size = 256

    def __init__(self, folder: str) -> None:
        self.name = folder
        self.root = Path(folder)
        if not self.root.exists():
            raise UserError(f"--data {folder}: no such folder (the embedded data is named digits)")
        if not self.root.is_dir():
            raise UserError(f"--data {folder} is a file; give a folder with one subfolder a class")
        if (self.root / "manifest.json").is_file():
            raise UserError(f"--data {folder} is a latent cache; pictures are needed here")
        try:
            self.classes = sorted(entry.name for entry in os.scandir(self.root) if _is_class(entry))
            files = [self._files(name) for name in self.classes]
        except OSError as error:
            raise UserError(f"--data {folder} can't be read: {error.strerror}: {error.filename}") from error
        if not self.classes:
            raise UserError(f"--data {folder} has no subfolders; put the images of each class into one subfolder")
        if not any(files):
            raise UserError(f"--data {folder} has no images in its subfolders ({', '.join(EXTENSIONS)} are looked for)")
        for name, inside in zip(self.classes, files, strict=True):
            if not inside:
                raise UserError(f"--data {folder}: class subfolder {name} has no images; fill it or remove it")
        self.labels = np.repeat(np.arange(len(files), dtype=np.int64), [len(inside) for inside in files])
        # one array, not a million str objects: forked workers would copy those page by page as they count references
        self.paths = np.array([path for inside in files for path in inside], dtype=np.bytes_)

    def _files(self, class_name: str) -> list[bytes]:
        found = []

        def refuse(error: OSError) -> None:
            raise error

        for folder, subfolders, names in os.walk(self.root / class_name, followlinks=True, onerror=refuse):
            subfolders[:] = [name for name in subfolders if not name.startswith(".")]
            inside = os.path.relpath(folder, self.root)
            found += [
                os.fsencode(os.path.join(inside, name))
                for name in names
                if name.lower().endswith(EXTENSIONS) and not name.startswith(".")
            ]
        return sorted(found)

    def read(self, index: int) -> Image.Image:
        return Image.open(self.root / os.fsdecode(bytes(self.paths[index])))

    def describe(self, index: int) -> str:
        return str(self.root / os.fsdecode(bytes(self.paths[index])))

    def fingerprint(self) -> str:
        return hash_names((bytes(path) for path in self.paths), self.labels)


def _is_class(entry: os.DirEntry) -> bool:
    return entry.is_dir() and not entry.name.startswith(".")


# ---------------------------------------------------------------- the embedded digits


class Digits:
    """scikit-learn's 1,797 handwritten digits (UCI, 8×8 grey) as 32×32 RGB; part ``all``, ``train`` or ``heldout``."""

    native_size = DIGITS_SIZE

    def __init__(self, part: str = "all") -> None:
        if part not in ("all", "train", "heldout"):
            raise UserError(f"--data digits:{part}: the parts are digits, digits:train and digits:heldout")
        self.name = "digits" if part == "all" else f"digits:{part}"
        self.classes = [str(digit) for digit in range(10)]
        images, labels = digits_arrays()
        chosen = np.arange(len(labels)) if part == "all" else digits_split()[part == "heldout"]
        self.images, self.labels = images[chosen], labels[chosen]

    def read(self, index: int) -> Image.Image:
        return Image.fromarray(self.images[index])

    def describe(self, index: int) -> str:
        return f"digit {index}"

    def fingerprint(self) -> str:
        return hash_names([self.name.encode()], self.labels)


@functools.cache
def digits_arrays() -> tuple[np.ndarray, np.ndarray]:
    """All digits enlarged: images (1797, 32, 32) uint8 grey, labels (1797,) int64. Do not write into them."""
    from sklearn.datasets import load_digits

    small, labels = load_digits(return_X_y=True)
    return enlarge_digits(small.reshape(-1, 8, 8)), labels.astype(np.int64)


def enlarge_digits(small: np.ndarray) -> np.ndarray:
    """(n, 8, 8) values 0…16 → (n, 32, 32) uint8.

    Bicubic interpolation alone blurs: its 4×4 block means are not the original pixels. The difference is enlarged and
    added back until they are (iterative back-projection, Irani & Peleg 1991), which leaves the strokes sharp and makes
    :func:`shrink_digits` give the original back to within 0.06 of 16 (root mean square).
    """
    enlarge = functools.partial(
        torch.nn.functional.interpolate, size=(DIGITS_SIZE, DIGITS_SIZE), mode="bicubic", antialias=True
    )
    target = torch.from_numpy(small).to(torch.float64).unsqueeze(1) * (255 / 16)
    large = enlarge(target).clamp(0, 255)
    for _ in range(30):
        error = target - torch.nn.functional.avg_pool2d(large, 4)
        large = (large + enlarge(error)).clamp(0, 255)
    return large.round().to(torch.uint8).squeeze(1).numpy()


def shrink_digits(images: np.ndarray) -> np.ndarray:
    """uint8 images (n, 32, 32), (n, 32, 32, 3) or (n, 3, 32, 32) → (n, 64) float64 pixels 0…16, as scikit-learn's.

    The area average over 4×4 blocks of the grey image: what a classifier fitted on the real 8×8 digits is shown.
    """
    images = np.asarray(images, dtype=np.float64)
    if images.ndim == 4:
        images = images.mean(axis=-1 if images.shape[-1] == 3 else 1)
    factor = images.shape[1] // 8
    return images.reshape(-1, 8, factor, 8, factor).mean(axis=(2, 4)).reshape(-1, 64) * (16 / 255)


def digits_split() -> tuple[np.ndarray, np.ndarray]:
    """Indices into the 1,797 digits: (1437 for training, 360 held out), sorted, always the same."""
    order = np.random.RandomState(0).permutation(1797)  # the legacy generator's stream is frozen by NumPy's policy
    return np.sort(order[360:]), np.sort(order[:360])
