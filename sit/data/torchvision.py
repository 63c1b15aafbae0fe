"""Data sets that torchvision reads: FashionMNIST, CIFAR-10, ImageNet."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sit.data.dataset import hash_contents, hash_names
from sit.utils.errors import UserError, first_line

TORCHVISION: dict[str, tuple[str, int, dict[str, Any]]] = {
    "fashion-mnist": ("FashionMNIST", 28, {"train": True}),
    "fashion-mnist-test": ("FashionMNIST", 28, {"train": False}),
    "cifar10": ("CIFAR10", 32, {"train": True}),
    "cifar10-test": ("CIFAR10", 32, {"train": False}),
    "imagenet": ("ImageNet", 256, {"split": "train"}),
    "imagenet-val": ("ImageNet", 256, {"split": "val"}),
}
"""Kind → torchvision's class, the side in pixels, and the arguments that choose the part."""

TEST_SETS = {"fashion-mnist": "fashion-mnist-test", "cifar10": "cifar10-test", "imagenet": "imagenet-val"}
"""Kind → the kind of its test set."""


class TorchvisionSource:
    """One of :data:`TORCHVISION` as torchvision keeps it in a folder; never downloads.

    Raises:
        UserError: there is no such folder, or the set in it is not whole.
    """

    def __init__(self, kind: str, folder: str) -> None:
        from torchvision import datasets

        maker, self.native_size, part = TORCHVISION[kind]
        self.name, self.folder = f"{kind}:{folder}", folder
        self.test_set = f"{TEST_SETS[kind]}:{folder}" if kind in TEST_SETS else None
        self._place = f"{kind}:{os.path.realpath(folder)}"
        if not Path(folder).is_dir():
            raise UserError(f"`data={self.name}`: no such folder {folder}")
        if "split" in part and not (Path(folder) / part["split"]).is_dir():
            raise UserError(f"`data={self.name}`: no unpacked images there; give ImageNet's .tar file itself as `data`")
        try:
            self.data = getattr(datasets, maker)(folder, **part)
        except (RuntimeError, OSError, EOFError, ValueError) as error:
            how = f"python -c \"import torchvision; torchvision.datasets.{maker}('{folder}', download=True)\""
            mend = "put it and the devkit there" if maker == "ImageNet" else f"fetch it by: {how}"
            raise UserError(
                f"`data={self.name}`: torchvision's {maker} is not whole there ({first_line(error)}); {mend}"
            ) from error
        self.classes = [name if isinstance(name, str) else name[0] for name in self.data.classes]
        self.labels = np.asarray(self.data.targets, dtype=np.int64)

    def read(self, index: int) -> Image.Image:
        return self.data[index][0]

    def describe(self, index: int) -> str:
        return f"number {index} in {self.folder}"

    def place(self, index: int) -> str:
        return f"{self._place} {index}"

    def fingerprint(self) -> str:
        return hash_names([self.name.partition(":")[0].encode()], self.labels)

    def source_files(self) -> Iterable[Path]:
        if hasattr(self.data, "samples"):
            return (Path(path) for path, _ in self.data.samples)
        inside = getattr(self.data, "raw_folder", None) or Path(self.folder) / self.data.base_folder
        return sorted(path for path in Path(inside).iterdir() if path.is_file())

    def contents(self) -> str:
        if hasattr(self.data, "data"):  # in memory, all of one size
            return hash_contents(self, (), lambda index: np.asarray(self.data.data[index]).tobytes())
        paths = [Path(path) for path, _ in self.data.samples]
        return hash_contents(self, (path.stat().st_size for path in paths), lambda index: paths[index].read_bytes())
