"""The blocks of SiT around their token mixers, as published and as in networks of today.

``published`` is DiT's block: LayerNorm and a GELU MLP. ``modern`` is what LightningDiT (arXiv 2501.01423) and others
have in its place: RMSNorm, SwiGLU of as many parameters, and, in mixers that have these options, normalized queries and
keys and rotary positions. Both are modulated by adaLN-Zero, and their norms have no parameters.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from timm.layers import Mlp
from torch import nn
from torch.nn import functional as F

from sit.utils.errors import UserError

EPSILON = 1e-6
"""of the norms"""


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """adaLN: x·(1 + scale) + shift, with x (B, N, C) and shift, scale (B, C)."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class SwiGLU(nn.Module):
    """(SiLU(x W_g + b_g) ⊙ (x W_u + b_u)) W_d + b_d (arXiv 2002.05202, equation 6, with biases).

    Args:
        dim: C.
        hidden: width of the two that are multiplied.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(dim, hidden), nn.Linear(dim, hidden)
        self.down = nn.Linear(hidden, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, N, C) to (B, N, C)."""
        return self.down(F.silu(self.gate(x)) * self.up(x))


def gelu_mlp(dim: int, ratio: float) -> nn.Module:
    """The published MLP, ``ratio`` times as wide inside, with GELU by its tanh approximation."""
    return Mlp(dim, int(dim * ratio), act_layer=lambda: nn.GELU(approximate="tanh"))


def swiglu(dim: int, ratio: float) -> nn.Module:
    """SwiGLU with the parameters of :func:`gelu_mlp`: three matrices 2/3 as wide, to the nearest multiple of 8."""
    return SwiGLU(dim, 8 * max(1, round(dim * ratio / 12)))


PARTS: dict[str, tuple[type[nn.LayerNorm] | type[nn.RMSNorm], Callable[[int, float], nn.Module]]] = {
    "published": (nn.LayerNorm, gelu_mlp),
    "modern": (nn.RMSNorm, swiglu),
}
"""The norm (RMSNorm: arXiv 1910.07467, equation 4) and the MLP of each kind of block."""

MIXER_OPTIONS: dict[str, tuple[str, ...]] = {"published": (), "modern": ("qk_norm", "rope")}
"""What mixers that have such an option are made with, unless the pattern says otherwise."""


def check_block(block: str) -> None:
    """Raise UserError unless the kind of block is known."""
    if block not in PARTS:
        raise UserError(f"`block={block}` must be one of {', '.join(PARTS)}")


class SiTBlock(nn.Module):
    """A transformer block with adaLN-Zero conditioning, around a token mixer (:mod:`sit.mixers`)."""

    def __init__(self, hidden_size: int, mlp_ratio: float, mixer: nn.Module, block: str = "published") -> None:
        super().__init__()
        norm, mlp = PARTS[block]
        self.norm1 = norm(hidden_size, elementwise_affine=False, eps=EPSILON)
        self.attn = mixer
        self.norm2 = norm(hidden_size, elementwise_affine=False, eps=EPSILON)
        self.mlp = mlp(hidden_size, mlp_ratio)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x: torch.Tensor, c: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Tokens x (B, N, C) and condition c (B, C) to tokens (B, N, C)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift1, scale1), grid)
        return x + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FinalLayer(nn.Module):
    """adaLN and the linear map from tokens to patches."""

    def __init__(self, hidden_size: int, patch_channels: int, block: str = "published") -> None:
        super().__init__()
        norm, _ = PARTS[block]
        self.norm_final = norm(hidden_size, elementwise_affine=False, eps=EPSILON)
        self.linear = nn.Linear(hidden_size, patch_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        """Tokens x (B, N, C) and condition c (B, C) to flattened patches (B, N, p·p·channels)."""
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))
