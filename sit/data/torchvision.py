"""Data sets that torchvision reads: FashionMNIST, CIFAR-10, ImageNet."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from sit.data.dataset import hash_names
from sit.utils.errors import UserError


class TorchvisionSource:
    """FashionMNIST, CIFAR-10 or ImageNet as torchvision keeps them in a folder; never downloads."""

    def __init__(self, kind: str, folder: str) -> None:
        from torchvision import datasets

        base, _, part = kind.partition("-test") if kind != "imagenet-val" else ("imagenet", "", "val")
        train = kind == base
        self.name, self.folder = f"{kind}:{folder}", folder
        if not Path(folder).is_dir():
            raise UserError(f"--data {self.name}: no such folder {folder}")
        if base == "imagenet" and not (Path(folder) / ("train" if train else "val")).is_dir():
            raise UserError(f"--data {self.name}: no unpacked images there; give ImageNet's .tar file itself to --data")
        maker = {"fashion-mnist": "FashionMNIST", "cifar10": "CIFAR10", "imagenet": "ImageNet"}[base]
        self.native_size = {"fashion-mnist": 28, "cifar10": 32, "imagenet": 256}[base]
        choice = {"split": "train" if train else "val"} if base == "imagenet" else {"train": train}
        try:
            self.data = getattr(datasets, maker)(folder, **choice)
        except (RuntimeError, OSError, EOFError, ValueError) as error:
            how = f"python -c \"import torchvision; torchvision.datasets.{maker}('{folder}', download=True)\""
            mend = "put it and the devkit there" if base == "imagenet" else f"fetch it by: {how}"
            reason = str(error).splitlines()[0]
            raise UserError(
                f"--data {self.name}: torchvision's {maker} is not whole there ({reason}); {mend}"
            ) from error
        self.classes = [name if isinstance(name, str) else name[0] for name in self.data.classes]
        self.labels = np.asarray(self.data.targets, dtype=np.int64)

    def read(self, index: int) -> Image.Image:
        return self.data[index][0]

    def describe(self, index: int) -> str:
        return f"number {index} in {self.folder}"

    def fingerprint(self) -> str:
        return hash_names([self.name.partition(":")[0].encode()], self.labels)


_TORCHVISION = ("fashion-mnist", "fashion-mnist-test", "cifar10", "cifar10-test", "imagenet", "imagenet-val")
