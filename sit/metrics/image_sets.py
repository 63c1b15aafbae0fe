"""Where images to be evaluated come from: folders, npz files, latent caches, data sets."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch_fidelity.registry import DATASETS_REGISTRY

from sit.data.dataset import center_crop
from sit.data.factory import open_images
from sit.data.folder import has_classes, only_tars
from sit.data.heldout import keyed_order
from sit.data.reading import EXTENSIONS, image_files, read_rgb
from sit.data.tar import is_tar
from sit.latents.cache import MANIFEST, CachedLatents, is_cache
from sit.latents.vae import decode, load_vae, scale_latents, vae_fingerprint
from sit.metrics.identity import About, hash_numbers
from sit.utils.arrays import Form, npz_forms, read_npz
from sit.utils.errors import UserError, first_line
from sit.utils.fingerprint import stamp


class Images:
    """Images that can be had by number: ``len``, ``batch(numbers)`` → (b, 3, H, W) uint8, and labels, if known.

    Attributes:
        name: what to call them.
        count: how many there are.
        labels: (count,) integers, or None.
        classes: how many classes there are; None if unknown.
        class_names: their names in the order of the labels; empty if unknown.
        note: what a report must say of them; None if nothing.
        source: where they come from, for whoever reads a work folder; it tells nothing apart.
    """

    name: str
    count: int
    note: str | None = None
    source: dict[str, Any] = {}
    labels: np.ndarray | None = None
    classes: int | None = None
    class_names: Sequence[str] = ()

    def __len__(self) -> int:
        return self.count

    @property
    def about(self) -> About:
        """What tells them from others, their number aside."""
        return {"images": self.name}

    @property
    def size(self) -> tuple[int, int] | None:
        """Their (height, width) in pixels; None if unknown."""
        return None

    def batch(self, numbers: np.ndarray) -> torch.Tensor:
        raise NotImplementedError


class SomeImages(Images):
    """Some of other images, by their numbers (n,), in that order, with their labels."""

    def __init__(self, images: Images, numbers: np.ndarray) -> None:
        self.images, self.numbers = images, numbers
        self.name, self.count, self.note, self.source = images.name, len(numbers), images.note, images.source
        self.labels = None if images.labels is None else images.labels[numbers]
        self.classes, self.class_names = images.classes, images.class_names

    @property
    def about(self) -> About:
        return self.images.about | {"numbers": hash_numbers(self.numbers)}

    @property
    def size(self) -> tuple[int, int] | None:
        return self.images.size

    def batch(self, numbers: np.ndarray) -> torch.Tensor:
        return self.images.batch(self.numbers[numbers])


def drawn(images: Images, count: int | None) -> Images:
    """``count`` of some images, drawn at random, always the same ones, and of each class its share; None takes all.

    The first ones would not do: those of class folders, or of an npz sorted by class, are of the first classes alone.

    Raises:
        UserError: there are fewer.
    """
    if count is None or count == len(images):
        return images
    if count > len(images):
        raise UserError(f"`num_samples={count}`: {images.name} has only {len(images)} images")
    labels = np.zeros(len(images), dtype=np.int64) if images.labels is None else images.labels
    return SomeImages(images, np.sort(keyed_order(labels, "samples")[:count]))


class ArrayImages(Images):
    """The ``arr_0`` of an ADM-style npz: (N, H, W, 3) uint8; ``arr_1``, if it is there, has the labels."""

    def __init__(self, path: Path, array: np.ndarray, labels: np.ndarray | None) -> None:
        self.name, self.count, self.array, self.labels = str(path), len(array), array, labels

    @functools.cached_property
    def about(self) -> About:
        return {"images": self.name, "files": stamp(self.name)}

    @property
    def size(self) -> tuple[int, int]:
        height, width = self.array.shape[1:3]
        return height, width

    def batch(self, numbers: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(self.array[numbers]).permute(0, 3, 1, 2)


class ReadImages(Images):
    """Images that are read one at a time, cropped to ``image_size`` or, if it is None, all of one size as they are."""

    image_size: int | None

    def read(self, number: int) -> Image.Image:
        """Image ``number`` as RGB."""
        raise NotImplementedError

    def describe(self, number: int) -> str:
        """Which one image ``number`` is, for messages."""
        raise NotImplementedError

    def pixels(self, number: int) -> np.ndarray:
        """Image ``number`` as (H, W, 3) uint8, cropped as training data are."""
        image = self.read(number)
        return np.array(image if self.image_size is None else center_crop(image, self.image_size))

    @functools.cached_property
    def shape(self) -> tuple[int, ...]:
        """The shape of the first image, which all must have, in whichever batch and process they are read."""
        return self.pixels(0).shape

    @property
    def size(self) -> tuple[int, int]:
        height, width = self.shape[:2]
        return height, width

    def batch(self, numbers: np.ndarray) -> torch.Tensor:
        arrays = [self.pixels(int(number)) for number in numbers]
        for number, array in zip(numbers.tolist(), arrays, strict=True):
            if array.shape != self.shape:
                one, other = (f"{width} x {height}" for height, width, _ in (array.shape, self.shape))
                sizes = f"{self.describe(number)} has {one} pixels, {self.describe(0)} {other}"
                raise UserError(
                    f"the images of {self.name} are of different sizes: crop them by `image_size` ({sizes})"
                )
        return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


class FileImages(ReadImages):
    """The images of a folder, in the order of their names, whatever subfolders they are in.

    Args:
        folder: which.
        image_size: side that they are cropped to, as training data are; None takes them as they are, all of one size.
    """

    def __init__(self, folder: Path, image_size: int | None = None) -> None:
        self.name, self.image_size = str(folder), image_size
        try:
            found = [folder / os.fsdecode(name) for name in image_files(folder)]
        except OSError as error:
            raise UserError(f"{folder} can't be read: {error.strerror}: {error.filename}") from error
        # the labeled overview that sample.py leaves among the samples is none of them
        self.paths = sorted(path for path in found if path.name != "grid.png")
        if not self.paths:
            raise UserError(f"{folder} has no images ({', '.join(EXTENSIONS)} are looked for)")
        self.count = len(self.paths)
        if image_size is None and has_classes(folder):
            self.note = f"the subfolders of {folder} are not taken for classes, as no image size is given"

    @functools.cached_property
    def about(self) -> About:
        return {"images": self.name, "size": self.image_size, "files": stamp(*self.paths)}

    def read(self, number: int) -> Image.Image:
        return read_rgb(functools.partial(Image.open, self.paths[number]), self.describe(number))

    def describe(self, number: int) -> str:
        return str(self.paths[number])


class DataImages(Images):
    """A data set as :func:`sit.data.factory.open_images` names it, cropped to a size."""

    def __init__(self, spec: str, image_size: int | None) -> None:
        self.data = open_images(spec, image_size)
        self.name, self.count, self.labels = spec, len(self.data), np.asarray(self.data.labels)
        self.classes, self.class_names = len(self.data.classes), self.data.classes

    @functools.cached_property
    def about(self) -> About:
        size, listed = self.data.image_size, self.data.fingerprint()
        files = list(self.data.source_files()) or [self.name]  # embedded images have a name alone
        return {"images": self.name, "size": size, "list": listed, "files": stamp(*files)}

    @property
    def size(self) -> tuple[int, int]:
        return self.data.image_size, self.data.image_size

    def batch(self, numbers: np.ndarray) -> torch.Tensor:
        return torch.stack([self.data[int(number)][0] for number in numbers])


class RegisteredImages(ReadImages):
    """A data set that torch-fidelity knows by name, such as ``cifar10-train``, from its usual place or downloaded.

    ``image_size`` is the side that its images are cropped to; None takes them as they are.
    """

    def __init__(self, name: str, image_size: int | None = None) -> None:
        root = Path(torch.hub.get_dir()).parent / "fidelity_datasets"
        try:
            self.data = DATASETS_REGISTRY[name](str(root), True)
        except Exception as error:  # torchvision's downloaders raise whatever they meet
            mend = f"put torchvision's files into {root}"
            raise UserError(f"the data set {name} can't be had ({first_line(error)}): {mend}") from error
        self.name, self.count, self.image_size = name, len(self.data), image_size
        self.folder = root / getattr(self.data, "base_folder", "")  # torchvision's name of a set's own folder

    @functools.cached_property
    def about(self) -> About:
        return {"images": self.name, "size": self.image_size, "files": stamp(self.folder)}

    def read(self, number: int) -> Image.Image:
        return Image.fromarray(self.data[number].permute(1, 2, 0).numpy())

    def describe(self, number: int) -> str:
        return f"number {number}"


class CacheImages(Images):
    """The images of a latent cache, decoded by its VAE from the posterior means: what a perfect generator could give.

    Args:
        folder: the cache.
        vae: its VAE; None takes the one that its manifest names.
        device: where the VAE decodes.

    Raises:
        UserError: the cache is damaged, or the VAE is not the one that made it.
    """

    def __init__(self, folder: str, vae: str | None = None, device: torch.device | str = "cpu") -> None:
        cache = CachedLatents(folder, argument=None)
        name = vae or cache.manifest.vae
        self.vae = load_vae(name, device)
        cache.check(self.vae, name)
        self.cache, self.name, self.count, self.labels = cache, folder, len(cache), np.asarray(cache.labels)
        self.classes, self.class_names = len(cache.classes), cache.classes

    @functools.cached_property
    def about(self) -> About:
        return {
            "images": self.name,
            "VAE": vae_fingerprint(self.vae),
            "list": self.cache.manifest.files,
            "files": stamp(self.cache.folder / MANIFEST),
        }

    @property
    def size(self) -> tuple[int, int]:
        return self.cache.manifest.image_size, self.cache.manifest.image_size

    def batch(self, numbers: np.ndarray) -> torch.Tensor:
        mean = torch.from_numpy(self.cache.moments(numbers, np.zeros(len(numbers), dtype=bool)))[:, 0].float()
        return decode(self.vae, scale_latents(mean, self.cache.scaling)).permute(0, 3, 1, 2)


def open_samples(
    spec: str, image_size: int | None = None, vae: str | None = None, device: torch.device | str = "cpu"
) -> Images:
    """Open images: an npz with ``arr_0``, a folder of images, a latent cache, or a data set, as
    :func:`sit.data.factory.open_images` or torch-fidelity's registry names it.

    Args:
        spec: which.
        image_size: side that the images of folders and data sets are cropped to; None takes a folder's as they are,
            and a data set's at its own size (256 for tar files). An npz's and a latent cache's are always as they are.
        vae: the VAE of a latent cache; None takes the one that its manifest names.
        device: where a latent cache is decoded.

    Raises:
        UserError: there is no such thing, or it is of a wrong form.
    """
    if image_size is not None and image_size < 1:
        raise UserError(f"`image_size={image_size}` must be positive")
    path = Path(spec)
    if path.suffix == ".npz":
        return images_of(path, npz_forms(path))
    if is_cache(path):
        return CacheImages(spec, vae, device)
    if path.is_dir():
        packed = path / "samples.npz"
        if packed.is_file():
            return open_samples(str(packed))
        if only_tars(path) or (image_size is not None and has_classes(path)):
            return DataImages(spec, image_size)
        return FileImages(path, image_size)
    if not path.exists() and spec in DATASETS_REGISTRY:
        return RegisteredImages(spec, image_size)
    if path.is_file() and not (is_tar(spec) or path.suffix == ".parquet"):
        raise UserError(f"{spec} is no npz: give an npz with the images as arr_0, a folder of images, or a data set")
    if path.is_file() or spec.split(":")[0] == "digits" or ":" in spec:
        return DataImages(spec, image_size)
    raise UserError(f"{spec}: no such folder, npz file or data set")


def images_of(path: Path, forms: Mapping[str, Form]) -> ArrayImages:
    """The images of an npz, unpacked once its headers are known to be those of images."""
    if "arr_0" not in forms:
        raise UserError(f"{path} has no arr_0 with images; it has {', '.join(forms) or 'nothing'}")
    images, labels = forms["arr_0"], forms.get("arr_1")
    if images.dtype != np.uint8 or len(images.shape) != 4 or images.shape[-1] != 3 or not images.nbytes:
        raise UserError(f"{path}: arr_0 must be uint8 images of shape (N, H, W, 3), not {images.dtype} {images.shape}")
    if labels is not None and labels.shape and labels.shape[0] != images.shape[0]:
        raise UserError(f"{path}: arr_1 has {labels.shape[0]} labels for {images.shape[0]} images")
    if labels is not None and (len(labels.shape) != 1 or labels.dtype.kind not in "iu"):
        raise UserError(f"{path}: arr_1 must be whole numbers of shape (N,), not {labels.dtype} {labels.shape}")
    arrays = read_npz(path, ("arr_0", "arr_1"))
    if labels is not None and (least := arrays["arr_1"].min()) < 0:
        raise UserError(f"{path}: arr_1 has the label {least}, which is no class: leave arr_1 out if there are none")
    return ArrayImages(path, arrays["arr_0"], arrays.get("arr_1"))
