"""Folders of image files, one subfolder a class."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import Image

from sit.data.dataset import hash_names
from sit.data.reading import EXTENSIONS, image_files
from sit.utils.errors import UserError


def only_tars(folder: Path) -> bool:
    """Whether a folder is a data set of one tar a class: it has tars and no class subfolders."""
    try:
        return (
            folder.is_dir() and any(folder.glob("*.tar")) and not any(_is_class(entry) for entry in os.scandir(folder))
        )
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
    return any(map(_is_class, entries)) and not any(entry.name.lower().endswith(EXTENSIONS) for entry in entries)


class FolderSource:
    """A folder with one subfolder a class, sorted by name as torchvision's ``ImageFolder``; images at any depth.

    Raises:
        UserError: there is no such folder, it can't be read, or a class has no images.
    """

    native_size = 256

    def __init__(self, folder: str) -> None:
        self.name = folder
        self.root = Path(folder)
        if not self.root.exists():
            raise UserError(f"`data={folder}`: no such folder (the embedded data is named digits)")
        if not self.root.is_dir():
            raise UserError(f"`data={folder}` is a file; give a folder with one subfolder a class")
        if (self.root / "manifest.json").is_file():
            raise UserError(f"`data={folder}` is a latent cache; images are needed here")
        try:
            self.classes = sorted(entry.name for entry in os.scandir(self.root) if _is_class(entry))
            files = [image_files(self.root, name) for name in self.classes]
        except OSError as error:
            raise UserError(f"`data={folder}` can't be read: {error.strerror}: {error.filename}") from error
        if not self.classes:
            raise UserError(f"`data={folder}` has no subfolders; put the images of each class into one subfolder")
        if not any(files):
            raise UserError(f"`data={folder}` has no images in its subfolders ({', '.join(EXTENSIONS)} are looked for)")
        for name, inside in zip(self.classes, files, strict=True):
            if not inside:
                raise UserError(f"`data={folder}`: class subfolder {name} has no images; fill it or remove it")
        self.labels = np.repeat(np.arange(len(files), dtype=np.int64), [len(inside) for inside in files])
        # one array, not a million str objects: forked workers would copy those page by page as they count references
        self.paths = np.array([path for inside in files for path in inside], dtype=np.bytes_)

    def read(self, index: int) -> Image.Image:
        return Image.open(self.root / os.fsdecode(bytes(self.paths[index])))

    def describe(self, index: int) -> str:
        return str(self.root / os.fsdecode(bytes(self.paths[index])))

    def fingerprint(self) -> str:
        return hash_names((bytes(path) for path in self.paths), self.labels)


def _is_class(entry: os.DirEntry) -> bool:
    return entry.is_dir() and not entry.name.startswith(".")
