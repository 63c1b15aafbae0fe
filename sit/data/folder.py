"""Folders of image files, one subfolder a class, or all of one class."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from sit.data.classes import check_class_names, check_none_beside, wrapping_folders
from sit.data.dataset import hash_contents, hash_names
from sit.data.reading import EXTENSIONS, ONE_CLASS, image_files, is_image_name
from sit.utils.errors import UserError


def tars_in(folder: Path) -> list[Path]:
    """The tar files of a folder, sorted; hidden ones are left out."""
    return sorted(path for path in folder.glob("*.tar") if not path.name.startswith("."))


def only_tars(folder: Path) -> bool:
    """Whether a folder is a data set of one tar a class: it has tars and no class subfolders."""
    try:
        return folder.is_dir() and bool(tars_in(folder)) and not any(map(_is_class, os.scandir(folder)))
    except OSError:
        return False  # FolderSource says why


def has_classes(folder: Path) -> bool:
    """True for a data set of one subfolder a class: it has such, and no images beside them.

    Raises:
        UserError: it can't be read.
    """
    try:
        entries = list(os.scandir(folder))
    except OSError as error:
        raise UserError(f"{folder} can't be read: {error.strerror}") from error
    return any(map(_is_class, entries)) and not any(map(_is_image, entries))


class FolderSource:
    """A folder with one subfolder a class, sorted by name as torchvision's ``ImageFolder``; images at any depth.

    A folder around the class folders is looked through (:func:`sit.data.classes.wrapping_folders`). A folder of images
    without subfolders is one class.

    Args:
        folder: where.
        flat: take all images below it, at any depth, as one class: FFHQ lies in folders of a thousand each.

    Raises:
        UserError: there is no such folder, it can't be read, a class has no images or a name that is not UTF-8, images
            lie beside the classes, a link leads back to where it lies, or it holds the parts of a data set rather than
            classes.
    """

    native_size = 256
    test_set = None

    def __init__(self, folder: str, flat: bool = False) -> None:
        self.name = f"flat:{folder}" if flat else folder
        self.root, self._real_root = Path(folder), os.path.realpath(folder)
        if not self.root.exists():
            raise UserError(f"`data={self.name}`: no such folder (the embedded data is named digits)")
        if not self.root.is_dir():
            raise UserError(f"`data={self.name}` is a file; give a folder with one subfolder a class")
        if (self.root / "manifest.json").is_file():
            raise UserError(f"`data={self.name}` is a latent cache; images are needed here")
        try:
            self.classes, files = ([], []) if flat else _classes_and_files(self.root, folder)
            if not self.classes:
                self.classes, files = [ONE_CLASS], [image_files(self.root)]
            elif prefix := wrapping_folders((path for inside in files for path in inside), self.name):
                self.root /= os.fsdecode(prefix)
                self.classes, files = _classes_and_files(self.root, folder)
        except OSError as error:
            raise UserError(f"`data={self.name}` can't be read: {error.strerror}: {error.filename}") from error
        if not any(files):
            where = "in it" if self.classes == [ONE_CLASS] else "in its subfolders"
            raise UserError(f"`data={self.name}` has no images {where} ({', '.join(EXTENSIONS)} are looked for)")
        for name, inside in zip(self.classes, files, strict=True):
            if not inside:
                raise UserError(f"`data={self.name}`: class subfolder {name} has no images; fill it or remove it")
        check_class_names(self.classes, self.name)
        self.labels = np.repeat(np.arange(len(files), dtype=np.int64), [len(inside) for inside in files])
        # one array, not a million str objects: forked workers would copy those page by page as they count references
        self.paths = np.array([path for inside in files for path in inside], dtype=np.bytes_)

    def read(self, index: int) -> Image.Image:
        return Image.open(self._path(index))

    def describe(self, index: int) -> str:
        return str(self._path(index))

    def _path(self, index: int) -> Path:
        return self.root / os.fsdecode(bytes(self.paths[index]))

    def place(self, index: int) -> str:
        return f"{self._real_root}/{os.fsdecode(bytes(self.paths[index]))}"

    def fingerprint(self) -> str:
        return hash_names((bytes(path) for path in self.paths), self.labels)

    def source_files(self) -> Iterable[str]:
        root = os.fsencode(self.root)
        return (os.fsdecode(os.path.join(root, bytes(path))) for path in self.paths)

    def contents(self) -> str:
        root = os.fsencode(self.root)
        sizes = (os.stat(os.path.join(root, bytes(path))).st_size for path in self.paths)
        return hash_contents(self, sizes, lambda index: self._path(index).read_bytes())


def _classes_and_files(root: Path, spec: str) -> tuple[list[str], list[list[bytes]]]:
    """The class folders below ``root``, sorted, and the images in each, as paths from ``root``.

    Raises:
        UserError: images lie beside the class folders, or links lead back to where they lie.
        OSError: a folder can't be read.
    """
    entries = list(os.scandir(root))
    classes = sorted(entry.name for entry in entries if _is_class(entry))
    if classes:
        check_none_beside(sorted(entry.name for entry in entries if _is_image(entry)), spec, f"flat:{spec}")
    return classes, [image_files(root, name) for name in classes]


def _is_class(entry: os.DirEntry) -> bool:
    return entry.is_dir() and not entry.name.startswith(".")


def _is_image(entry: os.DirEntry) -> bool:
    return is_image_name(entry.name) and not entry.is_dir()
