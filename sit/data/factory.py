"""From what ``--data`` says to a data set."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sit.data.dataset import ImageData, Source
from sit.data.digits import Digits
from sit.data.folder import FolderSource, only_tars
from sit.data.hub import HubSource
from sit.data.tar import TarSource
from sit.data.torchvision import _TORCHVISION, TorchvisionSource
from sit.utils.errors import UserError


def open_images(spec: str, image_size: int | None = None) -> ImageData:
    """Open the data set that ``--data spec`` names.

    Args:
        spec: ``digits`` (all 1,797), ``digits:train`` or ``digits:heldout`` (:func:`digits_split`), a folder with one
            subfolder a class, or one of the sources listed by ``sit.data.tar``.
        image_size: side in pixels; None for the source's own (32 for digits, 256 for folders).

    Raises:
        UserError: no such data, no class subfolders, no images, or they can't be read.
    """
    if image_size is not None and image_size < 1:
        raise UserError(f"--image-size {image_size} must be positive")
    kind, _, rest = spec.partition(":")
    if kind == "digits":
        return ImageData(Digits(rest or "all"), image_size)
    if kind in SOURCES and rest and not Path(spec).exists():
        return ImageData(SOURCES[kind](rest), image_size)
    path = Path(spec)
    if spec.lower().endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")) and path.is_file():
        raise UserError(f"--data {spec} is compressed, which forbids random access; uncompress it to a .tar first")
    if (spec.lower().endswith(".tar") and path.is_file()) or only_tars(path):
        return ImageData(TarSource(spec), image_size)
    return ImageData(FolderSource(spec), image_size)


SOURCES: dict[str, Callable[[str], Source]] = {
    kind: (lambda folder, kind=kind: TorchvisionSource(kind, folder)) for kind in _TORCHVISION
} | {"datasets": HubSource}
