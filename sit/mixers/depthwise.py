"""A static depthwise convolution between two linear layers."""

from __future__ import annotations

import torch
from torch import nn

from sit.mixers.layers import check_kernel_size, on_grid, xavier_
from sit.mixers.registry import register_mixer


@register_mixer("depthwise")
class Depthwise(nn.Module):
    """Linear layer, depthwise k×k convolution, linear layer: out = (K ∗ (x W_v + b_v) + b) W_o + b_o.

    The plain control for mixers that make their kernels from the image: a depthwise separable convolution (MobileNets,
    arXiv 1704.04861, section 3.1) without activations, in the shape of ATConv's value branch. From
    ``atconv:routing=false`` it differs in that nothing inhibits the kernel, and that the convolution has a bias and is
    PyTorch's own.

    Args:
        dim: C.
        num_heads: has no effect, as a convolution has no heads; every mixer is given it.
        kernel_size: k, odd.

    Raises:
        ValueError: an even kernel size.
    """

    positional_embedding = False  # the zero padding tells where the border is

    def __init__(self, dim: int, num_heads: int = 1, kernel_size: int = 3) -> None:
        super().__init__()
        check_kernel_size(kernel_size)
        self.x_proj = nn.Linear(dim, dim)
        self.conv = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)
        self.proj = nn.Linear(dim, dim)
        xavier_(self)

    def forward(self, x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """(B, N, C) tokens, row-major over ``grid`` = (H, W), to (B, N, C)."""
        return self.proj(on_grid(self.conv, self.x_proj(x), grid))
