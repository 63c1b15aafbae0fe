"""Self-attention."""

from __future__ import annotations

import torch
from timm.models.vision_transformer import Attention as TimmAttention
from torch.nn import functional as F

from sit.mixers.layers import HeadNorm, join_heads, split_heads, xavier_
from sit.mixers.registry import register_mixer
from sit.mixers.rope import Rope


@register_mixer("attention")
class Attention(TimmAttention):
    """Multi-head self-attention, softmax(QKᵀ/√d)V (arXiv 1706.03762, equation 1), as SiT and DiT have it.

    It is timm's, through PyTorch's scaled-dot-product attention.

    Args:
        dim: C.
        num_heads: heads, each of C/heads channels.
        qk_norm: a LayerNorm over each head's queries and keys.
        rope: rotary positions, of the normalized queries and keys (:class:`sit.mixers.rope.Rope`).

    Raises:
        AssertionError: the heads don't divide the channels.
        ValueError: ``rope`` with heads whose channels are no multiple of 4.
    """

    positional_embedding = True

    def __init__(self, dim: int, num_heads: int, qk_norm: bool = False, rope: bool = False) -> None:
        super().__init__(dim, num_heads=num_heads, qkv_bias=True, qk_norm=qk_norm, norm_layer=HeadNorm)
        self.rope = Rope(dim // num_heads) if rope else None
        xavier_(self)

    def lay_over(self, grid: tuple[int, int]) -> None:
        """Let rotary positions be those of ``grid``, whatever grid it is called on."""
        if self.rope is not None:
            self.rope.laid_over = grid

    def forward(self, x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:  # type: ignore[override]
        """(B, N, C) tokens, row-major over ``grid`` = (H, W), to (B, N, C); only rotary positions need the grid."""
        if self.rope is None:
            return super().forward(x)
        q, k, v = split_heads(self.qkv(x), self.num_heads)
        q, k = self.rope(self.q_norm(q), self.k_norm(k), grid)
        return self.proj(join_heads(F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v)))
