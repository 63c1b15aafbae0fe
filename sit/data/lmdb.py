"""Images in an LMDB, as FFHQ's is made: encoded images as values, keys such as ``256-00042``."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sit.data.dataset import hash_contents, hash_names
from sit.data.reading import ONE_CLASS, BadImage
from sit.data.spec import split_at
from sit.utils.errors import UserError, first_line

STARTS = (b"\xff\xd8\xff", b"\x89PNG", b"RIFF", b"BM", b"GIF8")
"""the first bytes of JPEG, PNG, WebP, BMP and GIF, by which an image is told from other values, such as a count"""


_OPEN: dict[str, tuple[int, Any]] = {}
"""path → process and its LMDB"""


def _opened(path: str) -> Any:
    """The one open LMDB of a path in this process, as the library opens none twice; one of before a fork is closed."""
    import lmdb

    process, environment = _OPEN.get(path, (0, None))
    if process != os.getpid():
        if environment is not None:
            environment.close()
        options = dict(readonly=True, lock=False, readahead=False, meminit=False)
        environment = lmdb.open(path, subdir=os.path.isdir(path), **options)
        _OPEN[path] = os.getpid(), environment
    return environment


class LmdbSource:
    """All images of an LMDB, one class, in the order of the keys.

    Keys of the form ``SIDE-NUMBER`` keep each image at several sides (the StyleGAN2 port's ``prepare_data.py``); the
    largest side is taken, or the one that ``@SIDE`` names. Values that are no encoded images are left out.

    Args:
        path: the folder or file of the LMDB; ``@SIDE`` may follow.

    Raises:
        UserError: the library is not installed, or there is no such LMDB, no image in it, or none of that side.
    """

    test_set = None

    def __init__(self, path: str) -> None:
        self.name = f"lmdb:{path}"
        where, side = split_at(path)
        self.path, side = (where, side) if side.isdigit() else (path, "")
        if not Path(self.path).exists():
            raise UserError(f"`data={self.name}`: no such file or folder {self.path}")
        try:
            with self._environment().begin(buffers=True) as transaction:  # of a value, its first page is read
                keys = [bytes(key) for key, value in transaction.cursor() if bytes(value[:4]).startswith(STARTS)]
        except UserError:
            raise
        except Exception as error:  # the library's own kinds, which are not at hand where it is not installed
            raise UserError(f"`data={self.name}` can't be read as an LMDB ({first_line(error)})") from error
        sides = {key: found[1].decode() for key in keys if (found := re.fullmatch(rb"(\d+)-\d+", key))}
        if keys and len(sides) == len(keys):
            side = side or max(sides.values(), key=int)
            known = sorted(set(sides.values()), key=int)
            keys = [key for key in keys if int(sides[key]) == int(side)]
            if not keys:
                raise UserError(f"`data={self.name}` has no images of side {side}; it has {', '.join(known)}")
        elif side:
            raise UserError(f"`data={self.name}`: its keys name no sides; leave out @{side}")
        if not keys:
            raise UserError(f"`data={self.name}` has no encoded images (JPEG, PNG, WebP) among its values")
        self.native_size = int(side) if side and int(side) > 0 else 256
        self.keys = np.array(keys, dtype=object)
        self.classes, self.labels = [ONE_CLASS], np.zeros(len(keys), dtype=np.int64)

    def _environment(self) -> Any:
        try:
            import lmdb  # noqa: F401
        except ImportError as error:
            raise UserError(f"`data={self.name}` needs the lmdb library; install it by: pip install lmdb") from error
        return _opened(os.path.realpath(self.path))

    def _bytes(self, index: int) -> bytes:
        with self._environment().begin() as transaction:
            value = transaction.get(self.keys[index])
        if value is None:
            raise BadImage(f"{self.describe(index)} of `data={self.name}` is gone")
        return bytes(value)

    def read(self, index: int) -> Image.Image:
        return Image.open(io.BytesIO(self._bytes(index)))

    def describe(self, index: int) -> str:
        return f"key {self.keys[index].decode(errors='replace')} in {self.path}"

    def place(self, index: int) -> str:
        return f"{os.path.realpath(self.path)} key {self.keys[index].hex()}"

    def fingerprint(self) -> str:
        return hash_names(self.keys, self.labels)

    def source_files(self) -> Iterable[Path]:
        path = Path(self.path)
        return [path / "data.mdb" if path.is_dir() else path]  # the lock file beside it changes with each reader

    def contents(self) -> str:
        return hash_contents(self, (), self._bytes)
