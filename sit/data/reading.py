"""Which files of a folder are images, and how one becomes RGB: the same for training, encoding and evaluation."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from sit.utils.errors import UserError, first_line

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff")
"""Endings of the files, in folders and tars, that are taken for images."""

ONE_CLASS = "images"
"""the class of images that have none"""


class BadImage(UserError):
    """An image that can't be read. Survives DataLoader workers, which wrap the message in a traceback's text."""

    def __init__(self, message: str) -> None:
        super().__init__(message.rpartition("BadImage: ")[2].strip())


def is_image_name(name: str) -> bool:
    """Whether a file of this name is taken for an image: by its ending, and it is not hidden."""
    return name.lower().endswith(EXTENSIONS) and not name.startswith(".")


def image_files(root: Path, inside: str = "") -> list[bytes]:
    """The images at any depth below ``root/inside``, as paths from ``root``, sorted.

    Names that begin with a dot are left out, folders and files. Links are followed.

    Raises:
        OSError: a folder can't be read.
        UserError: a link leads to a folder that it lies in, so that there is no end to what is below it.
    """
    found = []
    _check_link(root, inside)

    def refuse(error: OSError) -> None:
        raise error

    for folder, subfolders, names in os.walk(root / inside, followlinks=True, onerror=refuse):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        there = os.path.relpath(folder, root)
        for name in subfolders:
            _check_link(root, os.path.join(there, name))
        found += [os.fsencode(os.path.normpath(os.path.join(there, name))) for name in names if is_image_name(name)]
    return sorted(found)


def _check_link(root: Path, folder: str) -> None:
    """Raise UserError if ``root/folder`` is a link to a folder on the way to it, from ``root`` or from the top."""
    link = root / folder
    if link.is_symlink():
        for above in (*(root / parent for parent in Path(folder).parents), *root.resolve().parents):
            if os.path.samefile(link, above):
                raise UserError(f"the link {link} leads back to {above}, in which it lies; remove it")


def read_rgb(opened: Callable[[], Image.Image], where: str) -> Image.Image:
    """The image that ``opened`` opens, as RGB with 8 bits. Its EXIF rotation is not applied, as ADM's reader does not.

    Raises:
        BadImage: it is missing, cut off, no image, or of numbers whose range is not known; ``where`` names it.
    """
    try:
        with opened() as image:
            return to_rgb(image)
    except UserError:
        raise
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        reason = "not an image" if isinstance(error, Image.UnidentifiedImageError) else first_line(error)
        raise BadImage(f"corrupt image {where} ({reason}); repair or remove it") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB with 8 bits a channel; gray of 16 bits is scaled by 1/257, which Pillow itself would clip.

    Raises:
        ValueError: pixels are 32-bit integers or floating-point numbers, whose white could be anything.
    """
    sixteen_bits = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    if sixteen_bits:
        values = np.asarray(image).astype(np.float64) / 257
        image = Image.fromarray(values.round().astype(np.uint8))
    elif image.mode in ("I", "F"):
        kind = {"I": "32-bit integers", "F": "floating-point numbers"}[image.mode]
        raise ValueError(f"its pixels are {kind}, of which none is known to be white: save it with 8 or 16 bits")
    return image.convert("RGB")
