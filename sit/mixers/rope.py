"""Rotary position embedding on the grid: queries and keys turned by angles that grow with where their tokens are."""

from __future__ import annotations

import torch
from torch import nn

from sit.mixers.layers import places_along
from sit.utils.constant_tensors import made_once

BASE = 10000.0
"""of the frequencies, as in RoFormer (section 3.2.2), and that of the positional table"""


class Rope(nn.Module):
    """Axial rotary position embedding (RoFormer, arXiv 2104.09864, equation 34, for each of the two axes).

    The first half of a head's channels is turned by the token's column and the second by its row, as the positional
    table has them: of d channels, channels j and j + d/4 of a half, as real and imaginary part, are multiplied by
    exp(i·ω_j·coordinate), ω_j = 10000^(−j/(d/4)). So norms stay, and the product of a query and a key depends on their
    tokens' offset alone. It has no parameters.

    Args:
        width: d, the channels of a head, a multiple of 4.

    Attributes:
        laid_over: the (H, W) whose coordinates the tokens of any grid have, each axis stretched by itself, as the
            positional table is (:meth:`sit.model.SiT.positional_table`); None is the grid that it is called on.

    Raises:
        ValueError: a width that is not a multiple of 4.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        if width % 4:
            raise ValueError(f"`rope` needs heads of a multiple of 4 channels, not {width}")
        self.width = width
        self.laid_over: tuple[int, int] | None = None

    def forward(self, q: torch.Tensor, k: torch.Tensor, grid: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and keys (B, heads, N, d), row-major over ``grid`` = (H, W), turned; float32 or wider."""
        wide = torch.promote_types(q.dtype, torch.float32)  # the widths of half precision would move far tokens
        turns = turns_of(self.width, self.laid_over or grid, grid, wide, q.device)
        return turned(q, turns), turned(k, turns)


def turned(x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """x (B, heads, N, d) multiplied by ``turns`` (2, N, 2, d/4), cosines and sines, of their dtype."""
    cosine, sine = turns
    real, imaginary = x.to(turns.dtype).unflatten(-1, (2, 2, -1)).unbind(-2)
    return torch.stack([real * cosine - imaginary * sine, real * sine + imaginary * cosine], dim=-2).flatten(-3)


@made_once
def turns_of(
    width: int, trained: tuple[int, int], grid: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Cosines and sines (2, N, 2, d/4) of the tokens of ``grid`` laid over ``trained``; the axes are column and row."""
    quarter = width // 4
    omega = BASE ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    rows, columns = (places_along(old, new).double()[:, None] * omega for old, new in zip(trained, grid, strict=True))
    height, width = grid
    by_token = [columns[None].expand(height, -1, -1), rows[:, None].expand(-1, width, -1)]
    angles = torch.stack(by_token, dim=2).flatten(0, 1)
    return torch.stack([angles.cos(), angles.sin()]).to(device, dtype)
