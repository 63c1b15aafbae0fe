"""Where images to be evaluated come from: folders, npz files, latent caches, data sets, ADM statistics."""

from __future__ import annotations

import functools
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch_fidelity.registry import DATASETS_REGISTRY

from sit.checkpoint.load import Loaded
from sit.checkpoint.published import FileHints
from sit.data.dataset import center_crop
from sit.data.factory import open_images
from sit.data.folder import has_classes, only_tars
from sit.data.reading import EXTENSIONS, image_files, read_rgb
from sit.latents.cache import MANIFEST, CachedLatents, is_cache
from sit.latents.vae import decode, load_vae
from sit.metrics.distances import Moments
from sit.sampling.config import SamplerConfig
from sit.sampling.images import balanced_labels, latent_shape_for, sample_images, uniform_labels
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
        identity: what tells them from others where the name does not suffice; empty where it does.
    """

    name: str
    identity: str = ""
    count: int
    labels: np.ndarray | None = None
    classes: int | None = None
    class_names: Sequence[str] = ()

    def __len__(self) -> int:
        return self.count

    def limit(self, count: int | None) -> None:
        """Use only the first ``count``.

        Raises:
            UserError: there are fewer.
        """
        if count is None:
            return
        if count > self.count:
            raise UserError(f"`num_samples={count}`: {self.name} has only {self.count} images")
        self.count = count

    def batch(self, numbers: np.ndarray) -> torch.Tensor:
        raise NotImplementedError


class ArrayImages(Images):
    """The ``arr_0`` of an ADM-style npz: (N, H, W, 3) uint8; ``arr_1``, if it is there, has the labels."""

    def __init__(self, path: Path, array: np.ndarray, labels: np.ndarray | None) -> None:
        if array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] != 3 or not len(array):
            raise UserError(
                f"{path}: arr_0 must be uint8 images of shape (N, H, W, 3), not {array.dtype} {array.shape}"
            )
        if labels is not None and len(labels) != len(array):
            raise UserError(f"{path}: arr_1 has {len(labels)} labels for {len(array)} images")
        if labels is not None and (labels.ndim != 1 or labels.dtype.kind not in "iu"):
            raise UserError(f"{path}: arr_1 must be whole numbers of shape (N,), not {labels.dtype} {labels.shape}")
        self.name, self.count, self.array, self.labels = str(path), len(array), array, labels
        self.identity = f"{path}, files {stamp(path)}"

    def batch(self, numbers: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(self.array[numbers]).permute(0, 3, 1, 2)


class FileImages(Images):
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

    @functools.cached_property
    def identity(self) -> str:
        return f"{self.name}, size {self.image_size}, files {stamp(*self.paths)}"

    def batch(self, numbers: np.ndarray) -> torch.Tensor:
        arrays = []
        for number in numbers:
            path = self.paths[number]
            arrays.append(_pixels(read_rgb(functools.partial(Image.open, path), str(path)), self.image_size))
        if len({array.shape for array in arrays}) > 1:
            raise UserError(f"the images of {self.name} are of different sizes: crop them by `image_size`")
        return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


class DataImages(Images):
    """A data set as :func:`sit.data.factory.open_images` names it, cropped to a size."""

    def __init__(self, spec: str, image_size: int | None) -> None:
        self.data = open_images(spec, image_size)
        self.name, self.count, self.labels = spec, len(self.data), np.asarray(self.data.labels)
        self.classes, self.class_names = len(self.data.classes), self.data.classes

    @functools.cached_property
    def identity(self) -> str:
        return f"{self.name}, size {self.data.image_size}, list {self.data.fingerprint()}, files {stamp(self.name)}"

    def batch(self, numbers: np.ndarray) -> torch.Tensor:
        return torch.stack([self.data[int(number)][0] for number in numbers])


class RegisteredImages(Images):
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
        self.identity = f"{name}, size {image_size}"

    def batch(self, numbers: np.ndarray) -> torch.Tensor:
        images = [Image.fromarray(self.data[int(number)].permute(1, 2, 0).numpy()) for number in numbers]
        arrays = [_pixels(image, self.image_size) for image in images]
        return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


def _pixels(image: Image.Image, image_size: int | None) -> np.ndarray:
    """An RGB image as (H, W, 3) uint8, cropped as training data are; None leaves it as it is."""
    return np.array(image if image_size is None else center_crop(image, image_size))


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
        cache = CachedLatents(folder)
        name = vae or cache.manifest.vae
        self.vae = load_vae(name, device)
        cache.check(self.vae, name)
        self.cache, self.name, self.count, self.labels = cache, folder, len(cache), np.asarray(cache.labels)
        self.classes, self.class_names = len(cache.classes), cache.classes
        self.identity = f"{folder}, VAE {name}, files {stamp(cache.folder / MANIFEST)}"

    def batch(self, numbers: np.ndarray) -> torch.Tensor:
        mean = torch.from_numpy(self.cache.moments(numbers, np.zeros(len(numbers), dtype=bool)))[:, 0].float()
        shift, scale = self.cache.scaling
        return decode(self.vae, (mean - shift) * scale).permute(0, 3, 1, 2)


@dataclass(frozen=True)
class Statistics:
    """An ADM reference: the moments of its features and of its spatial features, and some of its images.

    ``name`` and ``identity`` are as those of :class:`Images`.
    """

    name: str
    features: Moments
    spatial: Moments | None
    images: ArrayImages | None
    identity: str = ""


def open_reference(
    spec: str, image_size: int | None = None, vae: str | None = None, device: torch.device | str = "cpu"
) -> Images | Statistics:
    """Open a reference: ADM statistics, or whatever :func:`open_samples` opens.

    Raises:
        UserError: there is no such thing, or it is of a wrong form.
    """
    path = Path(spec)
    if path.suffix == ".npz":
        arrays = _read_npz(path)
        if "mu" in arrays or "sigma" in arrays:
            return _statistics(path, arrays)
        return _images_of(path, arrays)
    return open_samples(spec, image_size, vae, device)


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
        return _images_of(path, _read_npz(path))
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
    if path.is_file() or spec.split(":")[0] == "digits" or ":" in spec:
        return DataImages(spec, image_size)
    raise UserError(f"{spec}: no such folder, npz file or data set")


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise UserError(f"{path} is a single array; give an npz file with arr_0, or with mu and sigma")
        with archive:
            return dict(archive)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise UserError(f"{path} is not a complete npz file ({error})") from error


def _images_of(path: Path, arrays: dict[str, np.ndarray]) -> ArrayImages:
    if "arr_0" not in arrays:
        raise UserError(f"{path} has no arr_0 with images; it has {', '.join(arrays) or 'nothing'}")
    return ArrayImages(path, arrays["arr_0"], arrays.get("arr_1"))


def _statistics(path: Path, arrays: dict[str, np.ndarray]) -> Statistics:
    def moments(mu: str, sigma: str) -> Moments | None:
        if mu not in arrays and sigma not in arrays:
            return None
        if mu not in arrays or sigma not in arrays:
            raise UserError(f"{path}: {mu} and {sigma} must both be there")
        for name in (mu, sigma):
            if arrays[name].dtype.kind not in "fiu" or not np.isfinite(arrays[name]).all():
                raise UserError(f"{path}: {name} ({arrays[name].dtype}) must be finite real numbers")
        mean, covariance = arrays[mu].astype(np.float64), arrays[sigma].astype(np.float64)
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            raise UserError(f"{path}: {mu} {mean.shape} and {sigma} {covariance.shape} are not moments of one thing")
        return Moments(mean, covariance)

    images = _images_of(path, arrays) if "arr_0" in arrays else None
    identity = f"{path}, files {stamp(path)}"
    return Statistics(str(path), moments("mu", "sigma"), moments("mu_s", "sigma_s"), images, identity)


class GeneratedImages(Images):
    """Images that a checkpoint samples when they are asked for: number i under the seed.

    Args:
        loaded: the checkpoint.
        count: how many there are.
        seed: the seed.
        labels: ``balanced`` (every class as often) or ``uniform`` (drawn at random).
        config: the sampler.
        image_size: (height, width); None as the network was trained.
        hints: how a published file was read, which is part of what tells these images from others.

    Raises:
        UserError: the network or its VAE can't make images of that size.
    """

    def __init__(
        self,
        loaded: Loaded,
        count: int,
        *,
        seed: int = 0,
        labels: Literal["balanced", "uniform"] = "balanced",
        config: SamplerConfig,
        image_size: tuple[int, int] | None = None,
        hints: FileHints | None = None,
    ) -> None:
        latent_shape_for(loaded, image_size)  # a size that doesn't fit is told before anything is made
        self.classes, self.class_names = loaded.model.config.num_classes, loaded.info.label_names
        classes = range(self.classes)
        numbers = range(count)
        drawn = balanced_labels(numbers, classes) if labels == "balanced" else uniform_labels(numbers, classes, seed)
        self.loaded, self.count, self.seed, self.config = loaded, count, seed, config
        self.labels, self.image_size = drawn.numpy(), image_size
        size = f", {image_size[0]} x {image_size[1]} pixels" if image_size else ""
        self.name = f"{loaded.path}, seed {seed}, {labels} labels{size}, {config}"
        place = loaded.path
        read = [place]
        if place.is_dir():  # the weights and what else sampling depends on, but not the training's state
            read = [place / "transformer", place / "transport", *sorted(place.glob("*.safetensors"))]
        files = stamp(*read, loaded.vae_source or "")
        precision = f"{loaded.model.dtype}, products in {torch.get_float32_matmul_precision()} precision"
        self.identity = f"{self.name}, VAE {loaded.vae_source}, {hints or FileHints()}, {precision}, files {files}"

    def batch(self, numbers: np.ndarray) -> torch.Tensor:
        indices = torch.from_numpy(numbers)
        (made,) = sample_images(
            self.loaded,
            indices,
            torch.from_numpy(self.labels[numbers]),
            seed=self.seed,
            config=self.config,
            image_size=self.image_size,
            batch_size=len(numbers),
        )
        return made.images.permute(0, 3, 1, 2)
