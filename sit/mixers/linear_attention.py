"""Linear attention: no softmax, so that keys and values are summed once for all queries."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import nn
from torch.nn import functional as F

from sit.mixers.layers import (
    LayerNormOfAnyDtype,
    check_choice,
    check_heads,
    check_kernel_size,
    head_norms,
    join_heads,
    on_grid,
    split_heads,
    xavier_,
)
from sit.mixers.registry import register_mixer

FEATURE_MAPS = {"elu": lambda x: F.elu(x) + 1, "relu": F.relu}
EPSILON = 1e-6
"""added to the denominator, as a query of no features at all (ReLU) would divide by zero"""


@register_mixer("linear_attention")
class LinearAttention(nn.Module):
    """Linear attention (Katharopoulos et al., arXiv 2006.16236, equations 5 and 7), in N·C·d instead of N²·C.

    Token i of each head gets φ(q_i)ᵀ Σ_j φ(k_j) v_jᵀ / φ(q_i)ᵀ Σ_j φ(k_j), both sums over all tokens, with
    φ = elu + 1; or φ = ReLU, as in SANA (arXiv 2410.10629) and EfficientViT (arXiv 2205.14756). Their convolutions,
    in SANA's MLP and EfficientViT's multi-scale tokens, are not part of it, so it needs a positional embedding. The
    sums are float32 at least, under autocast too. Weights have the names and shapes of ``attention``'s.

    LiT (arXiv 2501.12976) is ``feature_map=relu:heads=2:conv=5``: few heads, whose larger sums cost little, and a
    depthwise convolution of the values, which is added to what the attention makes of them. Each channel has a kernel
    of its own here; LiT's inheritance and distillation of a trained network are no part of the mixer.

    Args:
        dim: C.
        num_heads: heads, each of d = C/heads channels.
        feature_map: φ, ``elu`` (elu + 1) or ``relu``.
        heads: how many instead of ``num_heads``; 0 is that.
        conv: side of the kernels of the values' depthwise convolution, odd; 0 is none.
        qk_norm: a LayerNorm over each head's queries and keys, before φ.

    Raises:
        ValueError: the heads don't divide the channels, an unknown feature map, or an even kernel.
    """

    positional_embedding = True

    def __init__(
        self,
        dim: int,
        num_heads: int,
        feature_map: str = "elu",
        *,
        heads: int = 0,
        conv: int = 0,
        qk_norm: bool = False,
    ) -> None:
        super().__init__()
        num_heads = heads or num_heads
        check_heads(dim, num_heads)
        check_choice("feature_map", feature_map, tuple(FEATURE_MAPS))
        self.num_heads, self.feature_map = num_heads, feature_map
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm, self.k_norm = head_norms(dim, num_heads, qk_norm, LayerNormOfAnyDtype)
        self.conv: nn.Conv2d | None = None
        if conv:
            check_kernel_size(conv, "conv")
            self.conv = nn.Conv2d(dim, dim, conv, padding=conv // 2, groups=dim)
        self.proj = nn.Linear(dim, dim)
        xavier_(self)

    def forward(self, x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """(B, N, C) tokens to (B, N, C), row-major over ``grid`` = (H, W), which the convolution alone needs."""
        qkv, kind = self.qkv(x), x.device.type
        with torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext():
            q, k, v = split_heads(qkv.to(torch.promote_types(qkv.dtype, torch.float32)), self.num_heads)
            q, k = self.q_norm(q), self.k_norm(k)
            q, k = FEATURE_MAPS[self.feature_map](q), FEATURE_MAPS[self.feature_map](k)
            sums = k.transpose(-2, -1) @ F.pad(v, (0, 1), value=1.0)  # the column of ones adds up the keys
            mixed = q @ sums
            mixed = mixed[..., :-1] / (mixed[..., -1:] + EPSILON)
        mixed = join_heads(mixed).to(qkv.dtype)
        if self.conv is not None:
            mixed = mixed + on_grid(self.conv, qkv.chunk(3, dim=-1)[2], grid)
        return self.proj(mixed)
