"""Randomness keyed by what it is for, never by when it is drawn.

A draw is named by a seed and a key, e.g. ``(seed, "noise", sample_index)``. The same name gives the same numbers
whatever the batch size, the number of processes or the number of draws before it (EDM2 reseeds from seed, rank and
images seen; here the rank is left out).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch


def key(seed: int, *parts: int | str) -> int:
    """Hash a seed and a key to a 63-bit integer: independent streams for different names."""
    digest = hashlib.blake2b(repr((int(seed), *parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(seed: int, *parts: int | str) -> torch.Generator:
    """A CPU generator for the draw named ``(seed, *parts)``."""
    return torch.Generator().manual_seed(key(seed, *parts))


def draw_seed() -> int:
    """A seed from torch's global generator, by one draw."""
    return int(torch.empty((), dtype=torch.int64, device="cpu").random_())


@contextmanager
def global_generator(seed: int) -> Iterator[None]:
    """Inside, torch's global CPU generator begins at ``seed``, and tensors are made on the CPU; then all is as before.

    For code that draws from the global generator and can't be given another. The meta device, where nothing is drawn,
    stays the default if it is.
    """
    device = torch.get_default_device()
    with torch.random.fork_rng(devices=[]), torch.device("meta" if device.type == "meta" else "cpu"):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would change the accelerators' generators too
        yield


def randn(shape: Sequence[int], generators: Sequence[torch.Generator]) -> torch.Tensor:
    """Standard normal noise, one row a generator: (B, *shape) float32 on the CPU."""
    out = torch.empty(len(generators), *shape)
    for row, source in zip(out, generators, strict=True):
        torch.randn(tuple(shape), generator=source, out=row)
    return out
