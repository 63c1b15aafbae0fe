"""From the name of a data set to its images.

=============================  ================================================================================
``data``                       what it is
=============================  ================================================================================
``digits``                     the embedded 1,797 handwritten digits; ``digits:train`` and ``digits:heldout`` are
                               the parts of :func:`~sit.data.digits.digits_split`
``<folder>``                   a folder with one subfolder a class; a folder around these is looked through. Images
                               alone, without subfolders, are one class
``flat:<folder>``              all images below a folder, at any depth, as one class (FFHQ); or in a tar
``<file>.tar``                 ImageNet's ``ILSVRC2012_img_train.tar`` as downloaded (a tar of one tar a class), or
                               a tar with one folder a class; read in place, nothing is unpacked
``<folder of .tar files>``     one tar a class
``webdataset:<shards>``        WebDataset: a folder of shards, one shard, or a pattern such as ``a-{000..012}.tar``,
                               which needs no ``webdataset:``; labels in ``.cls`` or ``.json``
``lmdb:<path>``                an LMDB of encoded images, one class, as FFHQ's; ``@256`` may follow, the side in its
                               keys; needs the ``lmdb`` library
``fashion-mnist:<folder>``     torchvision's FashionMNIST; ``fashion-mnist-test:`` for its test part
``cifar10:<folder>``           torchvision's CIFAR-10; ``cifar10-test:``
``imagenet:<folder>``          torchvision's ImageNet, unpacked (``train/`` and the devkit); ``imagenet-val:``
``datasets:<folder or name>``  a set of the ``datasets`` library, saved to disk or on the Hub; ``@split`` may follow,
                               ``train`` if not; needs a column of images and one of class labels
``<file>.parquet``             the same set in Parquet files, as the Hub keeps them; ``*`` stands for several;
                               a slice may follow, as in ``@train[:10%]``
=============================  ================================================================================
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from pathlib import Path

from sit.data.dataset import ImageData, Source
from sit.data.digits import Digits
from sit.data.folder import FolderSource
from sit.data.hub import HubSource
from sit.data.lmdb import LmdbSource
from sit.data.spec import split_at
from sit.data.tar import TarSource, is_tar
from sit.data.torchvision import TORCHVISION, TorchvisionSource
from sit.data.webdataset import WebDatasetSource
from sit.utils.errors import UserError

logger = logging.getLogger(__name__)

KINDS: dict[str, Callable[[str], Source]] = {
    "digits": Digits,
    **{kind: functools.partial(TorchvisionSource, kind) for kind in TORCHVISION},
    "datasets": HubSource,
    "flat": lambda path: (TarSource if is_tar(path) else FolderSource)(path, flat=True),
    "webdataset": WebDatasetSource,
    "lmdb": LmdbSource,
}
"""What stands before the colon → the source of what stands behind it."""


def open_images(spec: str, image_size: int | None = None) -> ImageData:
    """Open the data set that ``spec`` names, as the table above says.

    A folder or file that exists is taken as such, whatever its name begins with; only ``digits`` always means the
    embedded ones.

    Args:
        spec: what the argument ``data`` says.
        image_size: side in pixels; None for the source's own (32 for digits, 256 for folders and tars).

    Raises:
        UserError: no such data, no class subfolders, no images, or they can't be read.
    """
    if image_size is not None and image_size < 1:
        raise UserError(f"`image_size={image_size}` must be positive")
    images = ImageData(_source(spec), image_size)
    announce(spec, len(images), len(images.classes))
    return images


@functools.cache
def announce(spec: str, images: int, classes: int) -> None:
    """Say once a program, in the first process of a launch, what a data set was found to be."""
    if os.environ.get("RANK", "0") == "0":
        logger.warning("note: %s: %s in %s", spec, *counted(images, classes))


def counted(images: int, classes: int) -> tuple[str, str]:
    """Numbers of images and classes in words."""
    return f"{images:,} image{'s' * (images != 1)}", f"{classes:,} class{'es' * (classes != 1)}"


def _source(spec: str) -> Source:
    kind, _, rest = spec.partition(":")
    if kind == "digits" or (rest and kind in KINDS and not Path(spec).exists()):
        return KINDS[kind](rest)
    if split_at(spec)[0].endswith(".parquet"):
        return HubSource(spec)
    if spec.endswith(".tar") and "{" in spec and not Path(spec).exists():
        return WebDatasetSource(spec)
    return TarSource(spec) if is_tar(spec) else FolderSource(spec)
