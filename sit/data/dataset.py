"""The data set of images that every source is made into, and ADM's crop, which is the same for all of them.

A source knows where images lie, one module of this package for each kind; :func:`sit.data.factory.open_images` opens
them by name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image

from sit.data.reading import read_rgb
from sit.utils.errors import UserError

CROP = "adm-center"  # written into manifests: another crop gives other latents

COMPARED = 64
"""images, spread evenly over a data set, of which :func:`hash_contents` reads the bytes"""


LONGEST = 64
"""ratio of an image's sides up to which it is resized as a whole"""


class Source(Protocol):
    """Where images lie. Sources are picklable, and reading is safe in forked or spawned workers.

    Attributes:
        name: the spec it was opened by.
        classes: label names, in the order of the labels.
        labels: (count,) int64.
        native_size: side in pixels where no image size is asked for.
        test_set: the spec of the images that the set's makers hold out of training; None if there are none.
    """

    name: str
    classes: list[str]
    labels: np.ndarray
    native_size: int
    test_set: str | None

    def read(self, index: int) -> Image.Image:
        """Image ``index``, of any size and mode; what Pillow and the file system raise is not caught here."""
        ...

    def describe(self, index: int) -> str:
        """Where image ``index`` lies, for messages."""
        ...

    def place(self, index: int) -> str:
        """What tells image ``index`` from all others, the same in every source of its kind that has it."""
        ...

    def fingerprint(self) -> str:
        """Hash of which images these are, in which order and with which labels (not of their pixels)."""
        ...

    def source_files(self) -> Iterable[str | Path]:
        """The files that the images are read from, by whose sizes and times a change is noticed; none if embedded."""
        ...

    def contents(self) -> str:
        """Hash by which other images under the same names are noticed: :func:`hash_contents`.

        It costs a look at the size of every file, and :data:`COMPARED` reads.

        Raises:
            OSError: a file can't be read.
        """
        ...


class ImageData(torch.utils.data.Dataset):
    """A source's images at one size, map-style: item i is (uint8 tensor (3, H, W), int label).

    Args:
        source: where the images lie.
        image_size: side in pixels; None for the source's own.

    Attributes:
        name: the spec it was opened by.
        classes: label names, in the order of the labels.
        labels: (count,) int64, known without reading an image.
        image_size: side of the square images, in pixels.
    """

    def __init__(self, source: Source, image_size: int | None = None) -> None:
        self.source = source
        self.name = source.name
        self.classes = list(source.classes)
        self.labels = source.labels
        self.image_size = int(image_size or source.native_size)

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> Image.Image:
        """Image ``index`` as RGB, cropped to ``image_size``.

        Raises:
            IndexError: there is no image of that number.
            BadImage: the file is missing, cut off or no image; the message names it.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        where = f"{self.source.describe(index)} in `data={self.name}`"
        return center_crop(read_rgb(lambda: self.source.read(index), where), self.image_size)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        pixels = np.array(self.image(int(index)), dtype=np.uint8)
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous(), int(self.labels[index])

    def batch(self, indices: np.ndarray, flipped: np.ndarray) -> torch.Tensor:
        """The images (b,) as uint8 (b, 3, H, W), those of the bool (b,) ``flipped`` left to right."""
        images, chosen = torch.stack([self[index][0] for index in indices]), torch.from_numpy(flipped)
        images[chosen] = images[chosen].flip(-1)
        return images

    def fingerprint(self) -> str:
        """The source's: hash of the list of images and labels, not of pixels."""
        return self.source.fingerprint()

    def source_files(self) -> Iterable[str | Path]:
        """The source's: the files that the images are read from."""
        return self.source.source_files()

    def contents(self) -> str:
        """The source's: hash of the list, of all sizes, and of the bytes of some images.

        Raises:
            UserError: a file can't be read.
        """
        try:
            return self.source.contents()
        except OSError as error:
            raise UserError(
                f"`data={self.name}`: {error.filename or 'a file'} can't be read ({error.strerror})"
            ) from error


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The central square of ``image`` at ``size`` × ``size`` pixels, as ADM's ``center_crop_arr`` (guided-diffusion).

    The image is halved with a box filter while its shorter side is at least twice ``size``, resized by bicubic
    interpolation to a shorter side of ``size``, and cropped. Of an image more than :data:`LONGEST` times as long as
    wide the middle alone is resized, as the whole would take gigabytes; it may be rounded differently.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    if max(image.size) > LONGEST * min(image.size):
        left, top = ((side - min(image.size)) / 2 for side in image.size)
        box = (left, top, left + min(image.size), top + min(image.size))
        return image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def hash_names(names: Iterable[bytes], labels: np.ndarray) -> str:
    """Fingerprint of a list of names and their labels: blake2b, 32 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=16)
    for name in names:
        digest.update(name + b"\0")
    digest.update(np.ascontiguousarray(labels, dtype="<i8").tobytes())
    return digest.hexdigest()


def hash_contents(source: Source, sizes: Iterable[int], raw: Callable[[int], bytes]) -> str:
    """Hash of a source's fingerprint, of the sizes of all its images, and of the bytes of :data:`COMPARED` of them.

    Args:
        source: which.
        sizes: of the files, in bytes; none where all images have one size.
        raw: gives the stored bytes of image i, as they are before any decoding.
    """
    digest = hashlib.blake2b(source.fingerprint().encode(), digest_size=16)
    digest.update(np.fromiter(sizes, dtype="<i8").tobytes())
    count = len(source.labels)
    for index in sorted(set(np.linspace(0, count - 1, min(count, COMPARED)).round().astype(int).tolist())):
        digest.update(raw(index))
    return digest.hexdigest()
