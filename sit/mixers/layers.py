"""What several mixers share: checks of options, tokens as an image or as heads, initial values."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


def check_kernel_size(kernel_size: int, option: str = "kernel_size") -> None:
    """Raise ValueError unless ``kernel_size`` is odd and positive, so that a kernel or neighborhood has a center."""
    if not isinstance(kernel_size, int) or kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"`{option}` must be an odd number, not {kernel_size}")


def check_heads(dim: int, num_heads: int) -> None:
    """Raise ValueError unless the heads are at least one, and divide the channels."""
    if num_heads < 1:
        raise ValueError(f"there must be at least 1 head, not {num_heads}")
    if dim % num_heads:
        raise ValueError(f"{dim} channels can't be divided among {num_heads} heads")


def check_choice(option: str, value: str | None, known: tuple[str, ...]) -> None:
    """Raise ValueError unless ``value`` is among the known ones of ``option``."""
    if value not in known:
        raise ValueError(f"`{option}` must be one of {', '.join(known)}, not {value!r}")


def on_grid(convolution: nn.Module, x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Apply a convolution of images (B, C, H, W) to tokens (B, N, C), seen without a copy as a channels-last image."""
    image = x.unflatten(1, grid).permute(0, 3, 1, 2)
    return convolution(image).permute(0, 2, 3, 1).flatten(1, 2)


def places_along(trained: int, side: int) -> torch.Tensor:
    """Coordinates (side,) float32 of a side's tokens laid over ``trained`` ones, centers mapped as resizing does."""
    return (torch.arange(side) + 0.5) * trained / side - 0.5


def split_heads(qkv: torch.Tensor, num_heads: int) -> tuple[torch.Tensor, ...]:
    """Split (B, N, 3·C), queries, keys and values side by side, into three tensors (B, heads, N, C/heads)."""
    return qkv.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def join_heads(x: torch.Tensor) -> torch.Tensor:
    """(B, heads, N, C/heads) to tokens (B, N, C)."""
    return x.transpose(1, 2).flatten(2)


class LinearOfItsDtype(nn.Linear):
    """A linear layer that computes in the dtype of its weights, whatever that of its input.

    It is told as the layer is called: before and after, weights may be stored in eight bits.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.to(self.weight.dtype))


class HeadNorm(nn.LayerNorm):
    """A LayerNorm that takes another half precision than its weights': autocast may be float16, a network bfloat16."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        narrow = self.weight.dtype.itemsize == x.dtype.itemsize == 2
        return super().forward(x.to(self.weight.dtype) if narrow else x)


class LayerNormOfAnyDtype(nn.LayerNorm):
    """A LayerNorm that computes in the dtype of its input, whatever that of its weights."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


def head_norms(
    dim: int, num_heads: int, wanted: bool, kind: type[nn.LayerNorm] = HeadNorm
) -> tuple[nn.Module, nn.Module]:
    """LayerNorms over each head's queries, and keys (ViT-22B, arXiv 2302.05442, section 2); or two that do nothing."""
    if not wanted:
        return nn.Identity(), nn.Identity()
    return kind(dim // num_heads), kind(dim // num_heads)


def xavier_(mixer: nn.Module) -> None:
    """The published initial values of a mixer's linear layers, in place: Xavier-uniform weights and zero biases."""
    for module in mixer.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
