"""Neighborhood attention: each token sees the k×k tokens around it."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from sit.mixers.layers import (
    check_choice,
    check_heads,
    check_kernel_size,
    head_norms,
    join_heads,
    split_heads,
    xavier_,
)
from sit.mixers.registry import register_mixer
from sit.mixers.rope import Rope
from sit.utils.constant_tensors import kept, made_once
from sit.utils.errors import UserError

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

BACKENDS = ("auto", "sdpa", "flex")

BLOCK = 128
"""queries, and keys, in a block of flex_attention, which skips the blocks that hold no pair of a neighborhood"""


@register_mixer("neighborhood")
class Neighborhood(nn.Module):
    """Self-attention of each token over its k×k neighborhood (NAT, arXiv 2204.07143, section 3).

    Token i of each head gets softmax(q_i K_ρᵀ/√d) V_ρ, ρ(i) the k² tokens nearest to it on the grid: at a border the
    neighborhood is shifted inwards, not cut. NAT's relative positional bias is left out: the network's positional
    embedding is there instead. Weights have the names and shapes of ``attention``'s, and with k the side of a square
    grid both compute the same.

    Backends, which agree but for rounding: ``sdpa`` is PyTorch's scaled-dot-product attention with a boolean mask of
    the grid (it computes all N² products); ``flex`` is its flex_attention, compiled, with a block mask, which skips
    blocks of 128×128 pairs that hold none of a neighborhood. flex_attention has no backward pass on CPU (PyTorch
    2.15 and before). ``auto`` takes ``flex`` on CUDA where the grid is large enough for a block to be skipped, and
    ``sdpa`` elsewhere.

    Args:
        dim: C.
        num_heads: heads, each of C/heads channels.
        kernel_size: k, odd; NAT has 7.
        backend: ``auto``, ``sdpa`` or ``flex``.
        qk_norm: a LayerNorm over each head's queries and keys.
        rope: rotary positions, of the normalized queries and keys (:class:`sit.mixers.rope.Rope`).

    Raises:
        ValueError: an even kernel size, heads that don't divide the channels, an unknown backend, ``rope`` with heads
            whose channels are no multiple of 4.
    """

    positional_embedding = True

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int = 3,
        *,
        backend: str = "auto",
        qk_norm: bool = False,
        rope: bool = False,
    ) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        check_kernel_size(kernel_size)
        check_choice("backend", backend, BACKENDS)
        self.num_heads, self.kernel_size, self.backend = num_heads, kernel_size, backend
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm, self.k_norm = head_norms(dim, num_heads, qk_norm)
        self.rope = Rope(dim // num_heads) if rope else None
        self.proj = nn.Linear(dim, dim)
        xavier_(self)

    def lay_over(self, grid: tuple[int, int]) -> None:
        """Let rotary positions be those of ``grid``, whatever grid it is called on."""
        if self.rope is not None:
            self.rope.laid_over = grid

    def check_grid(self, grid: tuple[int, int]) -> None:
        """Raise ValueError unless a neighborhood fits into ``grid`` = (H, W)."""
        side = self.kernel_size
        if min(grid) < side:
            raise ValueError(
                f"a {side}x{side} neighborhood does not fit into a {grid[0]} x {grid[1]} grid: use a smaller "
                "`kernel_size` or smaller patches"
            )

    def plain_backend(self, device: torch.device) -> str:
        """The backend that has forward-mode derivatives, with PyTorch's slow path."""
        return "sdpa"

    def masked_multiply_accumulates(self, grid: tuple[int, int]) -> int:
        """How many of the 2·N²·C multiply-accumulates of attention for one image the mask hides."""
        tokens = grid[0] * grid[1]
        return 2 * tokens * (tokens - self.kernel_size**2) * self.proj.in_features

    def forward(self, x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """(B, N, C) tokens, row-major over ``grid`` = (H, W), to (B, N, C).

        Raises:
            ValueError: a neighborhood does not fit into the grid.
            UserError: backend ``flex`` on CPU with gradients.
        """
        self.check_grid(grid)
        q, k, v = split_heads(self.qkv(x), self.num_heads)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.rope is not None:
            q, k = self.rope(q, k, grid)
        q, k = q.to(v.dtype), k.to(v.dtype)  # norms under autocast and positions are float32
        if self._flex(q, grid):
            mixed = _flex_attention()(q, k, v, block_mask=block_mask(grid, self.kernel_size, x.device))
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=dense_mask(grid, self.kernel_size, x.device))
        return self.proj(join_heads(mixed))

    def _flex(self, q: torch.Tensor, grid: tuple[int, int]) -> bool:
        if self.backend == "flex" and q.device.type == "cpu" and q.requires_grad:
            raise UserError("mixer 'neighborhood:backend=flex' can't be trained on CPU: leave out backend=flex there")
        if self.backend != "auto":
            return self.backend == "flex"
        can = q.is_cuda and q.dtype != torch.float64 and q.shape[-1] >= 16
        return can and skips_blocks(grid, self.kernel_size)


def sees(grid: tuple[int, int], kernel_size: int) -> Callable[..., torch.Tensor]:
    """The function (batch, head, query, key) → whether the query sees the key, as flex_attention takes it."""

    def near(query: torch.Tensor, key: torch.Tensor, side: int) -> torch.Tensor:
        first = (query - kernel_size // 2).clamp(0, side - kernel_size)
        return (key >= first) & (key < first + kernel_size)

    def mask(batch: object, head: object, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        height, width = grid
        return near(query // width, key // width, height) & near(query % width, key % width, width)

    return mask


@made_once
def dense_mask(grid: tuple[int, int], kernel_size: int, device: torch.device) -> torch.Tensor:
    """(N, N) bool: whether a query (row) sees a key (column)."""
    token = torch.arange(grid[0] * grid[1], device=device)
    return sees(grid, kernel_size)(None, None, token[:, None], token[None, :])


@kept
def block_mask(grid: tuple[int, int], kernel_size: int, device: torch.device) -> BlockMask:
    """The mask of :func:`dense_mask` as flex_attention takes it."""
    from torch.nn.attention.flex_attention import create_block_mask

    tokens = grid[0] * grid[1]
    return create_block_mask(sees(grid, kernel_size), None, None, tokens, tokens, str(device), BLOCK)


def skips_blocks(grid: tuple[int, int], kernel_size: int) -> bool:
    """Whether the first block of queries leaves out a block of keys."""
    (height, width), tokens = grid, grid[0] * grid[1]
    last_row = min(BLOCK, tokens) - 1
    rows = min(height, max(kernel_size, last_row // width + kernel_size // 2 + 1))
    return (rows * width - 1) // BLOCK < (tokens - 1) // BLOCK


def _flex_attention() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention if torch.compiler.is_compiling() else _compiled_flex_attention()


@lru_cache(maxsize=1)
def _compiled_flex_attention() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)
