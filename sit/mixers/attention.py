"""Self-attention."""

from __future__ import annotations

import torch
from timm.models.vision_transformer import Attention as TimmAttention
from torch import nn

from sit.mixers.layers import xavier_
from sit.mixers.registry import register_mixer


@register_mixer("attention")
class Attention(TimmAttention):
    """Multi-head self-attention, softmax(QKᵀ/√d)V (arXiv 1706.03762, equation 1), as SiT and DiT have it.

    It is timm's, through PyTorch's scaled-dot-product attention.

    Args:
        dim: C.
        num_heads: heads, each of C/heads channels.
        qk_norm: a LayerNorm over each head's queries and keys.

    Raises:
        AssertionError: the heads don't divide the channels.
    """

    positional_embedding = True

    def __init__(self, dim: int, num_heads: int, qk_norm: bool = False) -> None:
        super().__init__(dim, num_heads=num_heads, qkv_bias=True, qk_norm=qk_norm, norm_layer=nn.LayerNorm)
        xavier_(self)

    def forward(self, x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:  # type: ignore[override]
        """(B, N, C) tokens to (B, N, C); the grid is not needed, as every token sees every other."""
        return super().forward(x)
