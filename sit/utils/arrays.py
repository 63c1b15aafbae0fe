"""Reading ``.npy`` and ``.npz`` files that may hold anything: what an array is, is known before it is unpacked.

NumPy allocates what a header promises, and unpacks what a zip file promises.
"""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from sit.utils.errors import UserError
from sit.utils.reading import reading
from sit.utils.sizes import size_text

_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
_PACKED = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}
"""how NumPy packs the members of an npz"""


@dataclass(frozen=True)
class Form:
    """What the header of an array says, without the array."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the array alone."""
        return math.prod(self.shape) * self.dtype.itemsize


def npz_forms(path: Path) -> dict[str, Form]:
    """The arrays of an npz by name, of which only the headers are read.

    Raises:
        UserError: it is no npz, cut off, encrypted or packed in another way than NumPy does, or a header promises more
            or less than there is.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    with reading(path, "it is not a complete npz file"):
        with path.open("rb") as file:
            if file.read(6) == b"\x93NUMPY":
                raise UserError(f"{path} is a single array; give an npz file with arr_0, or with mu and sigma")
        with zipfile.ZipFile(path) as archive:
            return {_name(member): _member_form(archive, member) for member in archive.infolist()}


def read_npz(path: Path, names: Collection[str]) -> dict[str, np.ndarray]:
    """The arrays of those names that an npz has, read whole and compared with their checksums.

    Look at :func:`npz_forms` first: this unpacks whatever the names mean, as long as the memory holds it.

    Raises:
        UserError: as :func:`npz_forms`, an array is damaged, or the memory can't hold it.
    """
    forms = npz_forms(path)
    found = {}
    with reading(path, "it is not a complete npz file"), zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if (name := _name(member)) not in names:
                continue
            if forms[name].nbytes > (free := free_memory()):
                raise UserError(
                    f"{path}: {name} takes {size_text(forms[name].nbytes)} of memory, and {size_text(free)} are free"
                )
            with archive.open(member) as file:
                found[name] = np.lib.format.read_array(file, allow_pickle=False)
                if file.read(1):  # at its end the checksum is compared
                    raise ValueError(f"{name} is longer than its header says")
    return found


def read_npy(path: Path, mmap: bool = False) -> np.ndarray:
    """The array of an npy file, mapped read-only with ``mmap``.

    Raises:
        UserError: it can't be read, is no such file, or has more or fewer bytes than its header says.
    """
    with reading(path):
        with path.open("rb") as file:
            form = _read_form(file)
            there = os.fstat(file.fileno()).st_size - file.tell()
        if there != form.nbytes:
            raise UserError(f"{path} has {there:,} bytes of an array of {form.nbytes:,}: it is cut off or damaged")
        return np.load(path, mmap_mode="r" if mmap else None, allow_pickle=False)


def free_memory() -> int:
    """Bytes that can be allocated without swapping; a large number where the system doesn't say."""
    told = Path("/proc/meminfo")
    for line in told.read_text().splitlines() if told.is_file() else ():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return 1 << 62


def _name(member: zipfile.ZipInfo) -> str:
    return member.filename.removesuffix(".npy")


def _member_form(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Form:
    if member.flag_bits & 1:
        raise UserError(f"{archive.filename}: {member.filename} is encrypted; save it without a password")
    if member.compress_type not in _PACKED:
        raise UserError(f"{archive.filename}: {member.filename} is compressed in a way that NumPy doesn't read")
    with archive.open(member) as file:
        form = _read_form(file)
        if file.tell() + form.nbytes != member.file_size:
            raise ValueError(f"{member.filename} has {member.file_size} bytes, and its header promises {form.nbytes}")
    return form


def _read_form(file: IO[bytes]) -> Form:
    version = np.lib.format.read_magic(file)
    if version not in _HEADERS:
        raise ValueError(f"an array file of version {version}")
    shape, _, dtype = _HEADERS[version](file)
    if dtype.hasobject or any(side < 0 for side in shape):
        raise ValueError("it has no plain numbers")
    return Form(tuple(shape), dtype)
