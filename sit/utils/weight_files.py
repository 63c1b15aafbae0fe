"""The files that diffusers keeps a network's weights in: one, shards, or either of a variant such as ``fp16``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from sit.utils.errors import UserError
from sit.utils.reading import read_json, reading

WEIGHTS = "diffusion_pytorch_model.safetensors"

_NAME = re.compile(
    r"diffusion_pytorch_model(?:\.([\w-]+?))?(?:-\d+-of-\d+)?\.safetensors(?:\.index(?:\.([\w-]+))?\.json)?"
)


def folder_weights(folder: Path) -> list[Path]:
    """The files of a folder's weights: :data:`WEIGHTS` if it is there, else shards, else those of the only variant.

    Raises:
        UserError: there are none, a shard is missing, or there are several variants.
    """
    stem = WEIGHTS.removesuffix(".safetensors")
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    index = folder / f"{WEIGHTS}.index.json"
    singles = [path for path in sorted(folder.glob(f"{stem}.*.safetensors")) if "-of-" not in path.name]
    found = [index] if index.is_file() else [*sorted(folder.glob(f"{WEIGHTS}.index.*.json")), *singles]
    if not found:
        raise UserError(f"{folder} has no {WEIGHTS}")
    if len(found) > 1:
        raise UserError(f"{folder} has several variants of its weights ({', '.join(p.name for p in found)}); keep one")
    if found[0] in singles:
        return singles
    shards: Any = read_json(found[0]).get("weight_map")
    with reading(found[0]):
        files = [folder / name for name in sorted(set(shards.values()))]
        if any(file.parent != folder for file in files):
            raise ValueError("a shard that is not beside it")
    for file in files:
        if not file.is_file():
            raise UserError(f"{folder} has no {file.name}, which {found[0].name} names")
    return files


def is_weights_name(name: str) -> bool:
    """Whether a file of this name is one of diffusers' weights, or the index of their shards."""
    return _NAME.fullmatch(name) is not None


def variant_of(name: str) -> str | None:
    """The variant that a file of diffusers' weights is of; None for the weights without one."""
    match = _NAME.fullmatch(name)
    return None if match is None else match[1] or match[2]
