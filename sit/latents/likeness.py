"""Whether two VAEs give an image the same latents: by what stands before the latents, whatever decodes them."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from sit.latents.autoencoders import with_defaults
from sit.latents.pixels import PixelCodec, is_pixels, pixel_codec
from sit.latents.vae import scaling, vae_folder
from sit.utils.errors import UserError
from sit.utils.reading import read_json, reading
from sit.utils.weight_files import folder_weights

BEFORE_LATENTS = ("encoder.", "quant_conv.")
"""how the names of weights begin that decide the latents, in all of diffusers' autoencoders"""

ROUNDING = 2.0**-7
"""how far a weight may be from itself, in parts of it, when one file has it in bfloat16 and the other doesn't"""


@dataclass(frozen=True)
class Described:
    """A VAE as its files here tell it: its config, with defaults, and its folder; pixels by name have none."""

    config: Mapping[str, Any]
    folder: Path | None

    @property
    def of_pixels(self) -> bool:
        return self.folder is None or self.config.get("_class_name") == PixelCodec.__name__


def difference(first: str | Path, second: str | Path) -> str | None:
    """What tells that two VAEs give an image other latents, as "the scaling …, not …", the second one's first.

    The weights are read one by one and to the first that differs; a decoder's are not.

    Args:
        first: as :func:`sit.latents.vae.load_vae` takes it.
        second: the same.

    Returns:
        None if they give the same, or if the files here can't tell: nothing is downloaded, and a damaged folder is left
        to whoever loads it.
    """
    if str(first) == str(second):
        return None
    with contextlib.suppress(UserError):
        return _difference(_described(first), _described(second))
    return None


def _described(name: str | Path) -> Described | None:
    """None for a VAE that is not here."""
    if is_pixels(name):
        return Described(pixel_codec(str(name)).config, None)
    folder = vae_folder(name)
    if not folder.is_dir():
        return None
    path = folder / "config.json"
    with reading(path):
        return Described(with_defaults(read_json(path)), folder)


def _difference(first: Described | None, second: Described | None) -> str | None:
    if first is None or second is None:
        return None
    told = [
        ("pixels" if one.of_pixels else "latents of an encoder", one.config.get("latent_channels"), _scaling(one))
        for one in (first, second)
    ]
    for what, ours, theirs in zip(("made from", "channels:", "shift and scale"), *told, strict=True):
        if ours != theirs:
            return f"{what} {theirs}, not {ours}"
    if first.folder is None or second.folder is None or first.of_pixels:
        return None
    if _encoders_differ(first.folder, second.folder):
        return f"made by the encoder in {second.folder}, not by that in {first.folder}"
    return None


def _scaling(one: Described) -> str:
    with reading(one.folder or "pixels"):
        return " and ".join(map(str, scaling(one.config)))


def _encoders_differ(first: Path, second: Path) -> bool:
    """Whether there is a weight before the latents that only one has, or that differs by more than rounding.

    Those of attention may go by two names: diffusers has renamed them.
    """
    with reading(second), contextlib.ExitStack() as stack:
        ours, theirs = (_weights(folder, stack) for folder in (first, second))
        if any(".attentions." not in name for name in ours.keys() ^ theirs.keys()):
            return True
        for name in sorted(ours.keys() & theirs.keys()):
            one, other = (files[name].get_tensor(name).float() for files in (ours, theirs))
            if one.shape != other.shape or torch.dist(one, other) > ROUNDING * one.norm():
                return True
    return False


def _weights(folder: Path, stack: contextlib.ExitStack) -> dict[str, Any]:
    """The weights before the latents by name, as the open file that has them."""
    found: dict[str, Any] = {}
    for path in folder_weights(folder):
        file = stack.enter_context(safe_open(path, "pt"))
        found |= {name: file for name in file.keys() if name.startswith(BEFORE_LATENTS)}  # noqa: SIM118
    return found
