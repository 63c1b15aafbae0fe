"""Images: the embedded digits, folders with one subfolder a class, and the sources of :mod:`sit.data.tar`.

``open_images(spec, image_size)`` answers a map-style dataset of (uint8 tensor (3, H, W), int label), cropped and
resized as ADM does it (guided-diffusion's evaluation and training images). A source knows where images lie; the
crop is the same for all of them.
"""

from __future__ import annotations

import hashlib
from typing import Protocol

import numpy as np
import torch
from PIL import Image

from sit.utils.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff")


CROP = "adm-centre"  # written into manifests: another crop gives other latents


class BadImage(UserError):
    """An image that can't be read. Survives DataLoader workers, which wrap the message in a traceback's text."""

    def __init__(self, message: str) -> None:
        super().__init__(message.rpartition("BadImage: ")[2].strip())


class Source(Protocol):
    """Where images lie. Sources are picklable, and reading is safe in forked or spawned workers."""

    name: str
    classes: list[str]
    labels: np.ndarray  # (count,) int64
    native_size: int  # the side used when no image size is asked for

    def read(self, index: int) -> Image.Image: ...

    def describe(self, index: int) -> str: ...

    def fingerprint(self) -> str: ...


class ImageData(torch.utils.data.Dataset):
    """A source's images at one size.

    Attributes:
        name: the spec it was opened by.
        classes: label names, in the order of the labels.
        labels: (count,) int64, known without reading an image.
        image_size: side of the square images in pixels.
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
            BadImage: the file is missing, cut off or no image; the message names it.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        try:
            with self.source.read(index) as image:
                return center_crop(image.convert("RGB"), self.image_size)
        except UserError:
            raise
        except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
            reason = "not an image" if isinstance(error, Image.UnidentifiedImageError) else str(error)
            raise BadImage(
                f"corrupt image {self.source.describe(index)} in --data {self.name} ({reason}); repair or remove it"
            ) from error

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        pixels = np.array(self.image(int(index)), dtype=np.uint8)
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous(), int(self.labels[index])

    def fingerprint(self) -> str:
        """Hash of which images these are, in which order and with which labels (not of their pixels)."""
        return self.source.fingerprint()


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The central square of ``image`` at ``size`` × ``size`` pixels, matching ADM's (guided-diffusion).

    The image is halved with a box filter while its shorter side is at least twice ``size``, brought by bicubic
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
