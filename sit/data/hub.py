"""Data sets of the ``datasets`` library, saved to disk or on the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from sit.data.dataset import hash_names
from sit.data.reading import BadImage
from sit.utils.errors import UserError, first_line


class HubSource:
    """A set of the ``datasets`` library with one column of images and one of class labels.

    Args:
        name: a folder that ``save_to_disk`` wrote, or a name on the Hub; ``@split`` may follow, else ``train``.

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
        where, _, split = name.partition("@")
        self._identity = self.name
        try:
            if Path(where).is_dir() and any((Path(where) / n).exists() for n in ("state.json", "dataset_dict.json")):
                data = datasets.load_from_disk(where)
                data = data[split or "train"] if isinstance(data, datasets.DatasetDict) else data
                self._identity = data._fingerprint  # kept in the folder, so that this may be moved
            else:
                data = datasets.load_dataset(where, split=split or "train")
        except Exception as error:  # the library and the Hub's client raise many kinds
            raise UserError(
                f"`data={self.name}` can't be loaded ({first_line(error)}); check its name and split"
            ) from error
        columns = {
            kind: [column for column, feature in data.features.items() if isinstance(feature, kind)]
            for kind in (datasets.Image, datasets.ClassLabel)
        }
        for kind, found in columns.items():
            if len(found) != 1:
                raise UserError(f"`data={self.name}` must have one {kind.__name__} column and has {found or 'none'}")
        (image_column,), (label_column,) = columns.values()
        self.data, self.column = data.select_columns([image_column]), image_column
        self.classes = list(data.features[label_column].names)
        self.labels = np.asarray(data.with_format("numpy", columns=[label_column])[label_column], dtype=np.int64)
        if len(self.labels) == 0 or self.labels.min() < 0:
            raise UserError(f"`data={self.name}` has no labeled rows in this split; choose another by @split")

    def read(self, index: int) -> Image.Image:
        image = self.data[index][self.column]
        if image is None:
            raise BadImage(f"row {index} of `data={self.name}` has no image; remove it")
        return image

    def describe(self, index: int) -> str:
        return f"row {index}"

    def fingerprint(self) -> str:
        return hash_names([self._identity.encode()], self.labels)
