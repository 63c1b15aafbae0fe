"""Tells whether files are still those that something was made from."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn


def stamp(*places: str | Path) -> str:
    """A short hash of the paths, sizes and times of change of files, and of all files in folders.

    What is not there, such as the name of a VAE on the Hub, counts by its name alone.
    """
    digest = hashlib.blake2b(digest_size=8)
    for place in (os.fspath(place) for place in places):
        walk = sorted(os.walk(place, followlinks=True)) if os.path.isdir(place) else ()
        files = [os.path.join(folder, name) for folder, _, names in walk for name in sorted(names)] or [place]
        for file in files:
            digest.update(os.fsencode(file) + b"\0")
            if os.path.isfile(file):
                state = os.stat(file)
                digest.update(f"{state.st_size} {state.st_mtime_ns}\0".encode())
    return digest.hexdigest()


def weights_fingerprint(network: nn.Module) -> str:
    """Hash of every weight and buffer of a network, bit by bit: blake2b, 32 hexadecimal digits."""
    return state_fingerprint(network.state_dict())


def state_fingerprint(state: Mapping[str, torch.Tensor]) -> str:
    """The same of the weights alone, by their names."""
    import torch

    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
