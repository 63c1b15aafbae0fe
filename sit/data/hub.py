"""Data sets of the ``datasets`` library, saved to disk, in Parquet files as the Hub has them, or on the Hub."""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sit.data.dataset import hash_contents, hash_names
from sit.data.reading import BadImage
from sit.data.spec import files_of, split_at
from sit.utils.errors import UserError, first_line

TEST_SPLITS = ("validation", "valid", "val", "test")
"""Names of splits that hold images out, the preferred first: the labels of a test split are at times kept secret."""


def _of_footers(files: Iterable[str]) -> str:
    """Hash of the footers of Parquet files: columns, numbers of rows, sizes and extremes of what is in them.

    It stays as it is where files are moved, and other data has another.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name in files:
        with open(name, "rb") as file:
            file.seek(-8, os.SEEK_END)  # the footer's length in four bytes, and PAR1, end the file
            length = int.from_bytes(file.read(4), "little")
            file.seek(-8 - length, os.SEEK_END)
            digest.update(file.read(length))
    return digest.hexdigest()


def _is_train(split: str) -> bool:
    """Whether a split is the one that is taken where none is named, or a slice of it."""
    return re.fullmatch(r"train(\[.*\])?", split or "train") is not None


def _part_of_saved(saved: Any, split: str) -> Any:
    """A split of a saved ``DatasetDict``, or a slice of one, as ``load_dataset`` takes them.

    Raises:
        UserError: there is no such split.
    """
    import datasets

    if split in saved:
        return saved[split]
    if split.partition("[")[0] not in saved:
        raise UserError(f"it has the splits {', '.join(saved)}, and no {split}")
    sizes = {name: len(data) for name, data in saved.items()}
    (part,) = datasets.ReadInstruction.from_spec(split).to_absolute(sizes)
    return saved[part.splitname].select(range(part.from_, part.to))


class HubSource:
    """A set of the ``datasets`` library with one column of images and one of class labels.

    Args:
        name: a folder that ``save_to_disk`` wrote, Parquet files (``a.parquet``, or a pattern such as
            ``data/train-*.parquet``), or a name on the Hub; ``@split`` may follow, else ``train``, and a slice such as
            ``@train[:10%]``. Parquet files are one split, which is named train.

    Raises:
        UserError: the library is not installed, or there is no such set, split or pair of columns.
    """

    native_size = 256

    def __init__(self, name: str) -> None:
        self.name = f"datasets:{name}"
        try:
            import datasets
        except ImportError as error:
            raise UserError(
                f"`data={self.name}` needs the datasets library; install it by: pip install datasets"
            ) from error
        where, split = split_at(name)
        self._identity, self._place = self.name, f"datasets:{where}@{split or 'train'}"
        splits: Iterable[str] = ()
        try:
            if Path(where).is_dir() and any((Path(where) / n).exists() for n in ("state.json", "dataset_dict.json")):
                data = datasets.load_from_disk(where)
                if isinstance(data, datasets.DatasetDict):
                    splits = data.keys()
                elif split:
                    raise UserError(f"it was saved without splits: leave @{split} out")
                data = _part_of_saved(data, split or "train") if splits else data
                self._identity = self._place = data._fingerprint  # kept in the folder, so that this may be moved
            elif where.endswith(".parquet"):
                if not _is_train(split):
                    raise UserError(f"Parquet files have no splits: leave @{split} out, and name the files of one part")
                data = datasets.load_dataset("parquet", data_files=where, split=split or "train")
                if files := files_of(where):  # none if they are elsewhere, as by https:
                    self._identity = self._place = f"parquet:{_of_footers(files)}@{split or 'train'}"
            else:
                data = datasets.load_dataset(where, split=split or "train")
                splits = data.info.splits or ()
        except UserError as error:
            raise UserError(f"`data={self.name}` can't be loaded: {error}") from error
        except Exception as error:  # the library and the Hub's client raise many kinds
            raise UserError(
                f"`data={self.name}` can't be loaded ({first_line(error)}); check its name and split"
            ) from error
        held_out = [name for name in TEST_SPLITS if name in splits]
        self.test_set = f"datasets:{where}@{held_out[0]}" if _is_train(split) and held_out else None
        columns = {
            kind: [column for column, feature in data.features.items() if isinstance(feature, kind)]
            for kind in (datasets.Image, datasets.ClassLabel)
        }
        for kind, found in columns.items():
            if len(found) != 1:
                raise UserError(f"`data={self.name}` must have one {kind.__name__} column and has {found or 'none'}")
        (image_column,), (label_column,) = columns.values()
        self.column, self.mode = image_column, data.features[image_column].mode
        # the library itself would rotate as EXIF says
        self.data = data.select_columns([image_column]).cast_column(image_column, datasets.Image(decode=False))
        self.classes = list(data.features[label_column].names)
        self.labels = np.asarray(data.with_format("numpy", columns=[label_column])[label_column], dtype=np.int64)
        if len(self.labels) == 0 or self.labels.min() < 0:
            raise UserError(f"`data={self.name}` has no labeled rows in this split; choose another by @split")

    def read(self, index: int) -> Image.Image:
        image = Image.open(io.BytesIO(self._bytes(index)))
        return image.convert(self.mode) if self.mode else image

    def _bytes(self, index: int) -> bytes:
        cell = self.data[index][self.column]
        if cell is None:
            raise BadImage(f"row {index} of `data={self.name}` has no image; remove it")
        return cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()

    def describe(self, index: int) -> str:
        return f"row {index}"

    def place(self, index: int) -> str:
        return f"{self._place} {index}"

    def fingerprint(self) -> str:
        return hash_names([self._identity.encode()], self.labels)

    def source_files(self) -> Iterable[str]:
        import pyarrow.compute as compute

        yield from (entry["filename"] for entry in self.data.cache_files)
        cells = self.data.data.column(self.column)
        beside = compute.is_null(compute.struct_field(cells, "bytes"))  # of these the table has the paths alone
        yield from (path.as_py() for path in compute.struct_field(cells, "path").filter(beside) if path.is_valid)

    def contents(self) -> str:
        return hash_contents(self, (), self._bytes)
