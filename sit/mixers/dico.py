"""DiCo's convolution with compact channel attention."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from sit.mixers.layers import check_kernel_size, on_grid, xavier_
from sit.mixers.registry import register_mixer


@register_mixer("dico")
class DiCo(nn.Module):
    """The Conv Module of DiCo (arXiv 2505.11196, figure 6 and its equations for it and for CCA).

    z = GELU(K ∗ (x W_1 + b_1) + b_k), a 1×1 and a 3×3 depthwise convolution; *compact channel attention* scales each
    channel by s = sigmoid(mean_tokens(z) W_a + b_a); out = (z ⊙ s) W_2 + b_2. A 1×1 convolution is a linear layer of
    the tokens, and is one here. Each token depends on the whole image through s, and only through it beyond the
    kernel. DiCo's U-shape and its embedding without patches are no part of the mixer.

    Args:
        dim: C.
        num_heads: has no effect, as a convolution has no heads; every mixer is given it.
        kernel_size: of the depthwise convolution, odd; 3 in the paper.

    Raises:
        ValueError: an even kernel size.
    """

    positional_embedding = False  # as published: the zero padding tells where the border is

    def __init__(self, dim: int, num_heads: int = 1, kernel_size: int = 3) -> None:
        super().__init__()
        check_kernel_size(kernel_size)
        self.x_proj = nn.Linear(dim, dim)
        self.conv = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)
        self.channel_attention = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)
        xavier_(self)

    def forward(self, x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """(B, N, C) tokens, row-major over ``grid`` = (H, W), to (B, N, C)."""
        z = F.gelu(on_grid(self.conv, self.x_proj(x), grid))
        scale = self.channel_attention(z.mean(1, keepdim=True)).sigmoid()
        return self.proj(z * scale)
