"""What several mixers do with their tokens: see them as an image, or as heads."""

from __future__ import annotations

import torch
from torch import nn


def check_kernel_size(kernel_size: int) -> None:
    """Refuse a kernel or neighborhood that has no middle.

    Raises:
        ValueError: it has none.
    """
    if not isinstance(kernel_size, int) or kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be an odd number, not {kernel_size}")


def check_heads(dim: int, num_heads: int) -> None:
    """Refuse channels that can't be divided among the heads.

    Raises:
        ValueError: they can't.
    """
    if dim % num_heads:
        raise ValueError(f"{dim} channels can't be divided among {num_heads} heads")


def check_choice(option: str, value: str | None, known: tuple[str, ...]) -> None:
    """Refuse a value that an option does not know.

    Raises:
        ValueError: it does not know it.
    """
    if value not in known:
        raise ValueError(f"{option} must be one of {', '.join(known)}, not {value!r}")


def on_grid(convolution: nn.Module, x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Apply a convolution of images (B, C, H, W) to tokens (B, N, C); no copies, the image is channels last."""
    image = x.unflatten(1, grid).permute(0, 3, 1, 2)
    return convolution(image).permute(0, 2, 3, 1).flatten(1, 2)


def split_heads(qkv: torch.Tensor, num_heads: int) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values (B, N, 3·C), one after the other, as three tensors (B, heads, N, C/heads)."""
    return qkv.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def join_heads(x: torch.Tensor) -> torch.Tensor:
    """(B, heads, N, C/heads) to tokens (B, N, C)."""
    return x.transpose(1, 2).flatten(2)
