"""Where images may lie besides folders: tar files, torchvision's sets, the ``datasets`` library.

=============================  ================================================================================
``--data``                     what it is
=============================  ================================================================================
``<file>.tar``                 ImageNet's ``ILSVRC2012_img_train.tar`` as downloaded (a tar of one tar a class), or
                               a tar with one folder a class; read in place, nothing is unpacked
``<folder of .tar files>``     one tar a class
``fashion-mnist:<folder>``     torchvision's FashionMNIST; ``fashion-mnist-test:`` for its test part
``cifar10:<folder>``           torchvision's CIFAR-10; ``cifar10-test:``
``imagenet:<folder>``          torchvision's ImageNet, unpacked (``train/`` and the devkit); ``imagenet-val:``
``datasets:<folder or name>``  a set of the ``datasets`` library, saved to disk or on the Hub; ``@split`` may follow,
                               ``train`` if not; needs a column of images and one of class labels
=============================  ================================================================================
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from sit.data.dataset import EXTENSIONS, hash_names
from sit.utils.errors import UserError


class TarSource:
    """Images inside uncompressed tar files, found once by their headers and read by offset.

    A class is a tar (``n01440764.tar``, inside the tar or the folder given) or a folder inside the tar.
    """

    native_size = 256

    def __init__(self, path: str) -> None:
        self.name = path
        self.files = [Path(path)] if Path(path).is_file() else sorted(Path(path).glob("*.tar"))
        found: list[tuple[str, bytes, int, int, int]] = []  # class, name, file, offset, size
        for number, file in enumerate(self.files):
            outer = None if Path(path).is_file() else file.stem
            try:
                with open(file, "rb") as stream:
                    found += [(*entry[:2], number, *entry[2:]) for entry in _images(stream, outer)]
            except tarfile.TarError as error:
                raise UserError(
                    f"--data {path}: {file} can't be read as an uncompressed tar ({error}); unzip or download it again"
                ) from error
            except OSError as error:
                raise UserError(f"--data {path}: {file} can't be read: {error.strerror}") from error
        if not found:
            raise UserError(f"--data {path}: no images in class folders or class tars inside; is it the right file?")
        found.sort(key=lambda entry: entry[:2])
        self.classes = sorted({entry[0] for entry in found})
        number_of = {name: number for number, name in enumerate(self.classes)}
        self.labels = np.array([number_of[entry[0]] for entry in found], dtype=np.int64)
        self.names = np.array([entry[1] for entry in found], dtype=np.bytes_)
        self.places = np.array([entry[2:] for entry in found], dtype=np.int64)
        self._descriptors: dict[tuple[int, int], int] = {}

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_descriptors": {}}

    def read(self, index: int) -> Image.Image:
        file, offset, size = (int(value) for value in self.places[index])
        key = (os.getpid(), file)
        if key not in self._descriptors:
            self._descriptors[key] = os.open(self.files[file], os.O_RDONLY)
        return Image.open(io.BytesIO(os.pread(self._descriptors[key], size, offset)))

    def describe(self, index: int) -> str:
        return f"{os.fsdecode(bytes(self.names[index]))} in {self.files[int(self.places[index, 0])]}"

    def fingerprint(self) -> str:
        return hash_names((bytes(name) for name in self.names), self.labels)


class _Part(io.RawIOBase):
    """A stretch of a file as a file of its own."""

    def __init__(self, stream: io.BufferedReader, offset: int, size: int) -> None:
        self.stream, self.offset, self.size, self.position = stream, offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size}[whence]
        return self.position

    def read(self, size: int = -1) -> bytes:
        left = max(0, self.size - self.position)
        self.stream.seek(self.offset + self.position)
        data = self.stream.read(left if size < 0 else min(size, left))
        self.position += len(data)
        return data


def _images(stream: io.BufferedReader, class_name: str | None) -> Iterator[tuple[str, bytes, int, int]]:
    """(class, name, offset, size) of a tar's images; ``class_name`` None takes it from folders and inner tars."""
    end = os.fstat(stream.fileno()).st_size
    with tarfile.open(fileobj=stream, mode="r:") as archive:
        for member in archive:
            if member.offset_data + member.size > end:
                raise tarfile.ReadError(f"cut off inside {member.name}")
            path = member.name.removeprefix("./")
            if not member.isfile() or os.path.basename(path).startswith("."):
                continue
            if class_name is None and path.lower().endswith(".tar"):
                inner_class = os.path.basename(path)[: -len(".tar")]
                with tarfile.open(fileobj=_Part(stream, member.offset_data, member.size), mode="r:") as inner:
                    for image in inner:
                        if image.offset_data + image.size > member.size:
                            raise tarfile.ReadError(f"cut off inside {member.name}")
                        if image.isfile() and image.name.lower().endswith(EXTENSIONS):
                            name = f"{inner_class}/{os.path.basename(image.name)}"
                            yield inner_class, os.fsencode(name), member.offset_data + image.offset_data, image.size
            elif path.lower().endswith(EXTENSIONS) and (class_name or "/" in path):
                inside = class_name or path.split("/")[0]
                name = f"{class_name}/{path}" if class_name else path
                yield inside, os.fsencode(name), member.offset_data, member.size
