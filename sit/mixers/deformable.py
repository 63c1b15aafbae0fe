"""FlowDCN's deformable convolution: each token chooses where it looks, and how much it takes from there."""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch
from torch import nn
from torch.nn import functional as F

from sit.mixers.layers import LinearOfItsDtype, check_choice, check_heads, check_kernel_size, xavier_
from sit.mixers.registry import register_mixer
from sit.utils.constant_tensors import made_once

BACKENDS = ("grid_sample", "gather")


@register_mixer("deformable")
class Deformable(nn.Module):
    """Group-wise multi-scale deformable convolution (FlowDCN, arXiv 2410.22655, section 3).

    Token i of each group of channels gets Σ_k w_k(x_i)·v(p_i + s_k(x_i)·(p_k + Δ_k(x_i))), k over k² taps: v are the
    projected tokens, read between their places bilinearly, and zero beyond the border; p_k is the tap's direction, a
    regular grid over [−1, 1]²; Δ_k a learned change of it; s_k = reach·sigmoid(scale_k(x_i) + prior) its distance in
    tokens, whose prior is another for each group, from near to the whole reach; and w_k a weight, without softmax. All
    of Δ, scale and w are linear in the token. A linear layer follows. FlowDCN's RMSNorm and SwiGLU are no part of it.

    Initial values are the published ones: all tokens begin with the grid scaled by their group's prior and with
    weights that don't depend on them. Places and sums are float32 at least, under autocast too.

    Backends, which agree but for rounding: ``grid_sample`` is PyTorch's, and has no forward-mode derivative; ``gather``
    reads the four tokens around each place and has one.

    Args:
        dim: C.
        num_heads: groups, each of C/groups channels.
        kernel_size: k, odd; 3 in the paper.
        reach: the farthest distance, in tokens along a side; 6 in the published code.
        backend: ``grid_sample`` or ``gather``.

    Raises:
        ValueError: an even kernel size, groups that don't divide the channels, a reach that is not positive, an unknown
            backend.
    """

    positional_embedding = False  # as published: the zeros beyond the border tell where it is

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int = 3,
        *,
        reach: float = 6.0,
        backend: str = "grid_sample",
    ) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        check_kernel_size(kernel_size)
        check_choice("backend", backend, BACKENDS)
        if not 0 < reach < math.inf:
            raise ValueError(f"`reach` must be a positive number, not {reach}")
        self.groups, self.kernel_size, self.reach, self.backend = num_heads, kernel_size, float(reach), backend
        taps = num_heads * kernel_size**2
        self.x_proj = nn.Linear(dim, dim)
        self.offsets = LinearOfItsDtype(dim, 2 * taps)
        self.scales = LinearOfItsDtype(dim, taps, bias=False)
        self.weights = LinearOfItsDtype(dim, taps)
        self.scale_prior = nn.Parameter(torch.logit((torch.arange(num_heads) + 1) / num_heads - 1e-4))
        self.proj = nn.Linear(dim, dim)
        bias = self.weights.bias.detach().clone()  # PyTorch's values, as published
        xavier_(self)
        for zero in (self.offsets.weight, self.scales.weight, self.weights.weight):
            nn.init.zeros_(zero)
        with torch.no_grad():
            self.weights.bias.copy_(bias)

    def plain_backend(self, device: torch.device) -> str:
        """The backend that has forward-mode derivatives."""
        return "gather"

    def forward(self, x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """(B, N, C) tokens, row-major over ``grid`` = (H, W), to (B, N, C)."""
        v, kind = self.x_proj(x), x.device.type
        with torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext():
            places, weights = self._places(x, grid)
            values = v.to(places.dtype).unflatten(-1, (self.groups, -1)).transpose(1, 2)
            sample = _grid_sample if self.backend == "grid_sample" else _gather
            mixed = sample(values.flatten(0, 1), places.flatten(0, 1), weights.flatten(0, 1), grid)
            mixed = mixed.unflatten(0, (x.shape[0], self.groups)).transpose(1, 2).flatten(2)
        return self.proj(mixed.to(v.dtype))

    def _places(self, x: torch.Tensor, grid: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Where each tap looks, (B, groups, N, k², 2) as (column, row) in tokens, and its weight (B, groups, N, k²)."""
        wide = torch.promote_types(x.dtype, torch.float32)

        def linear(layer: nn.Linear) -> torch.Tensor:
            return layer(x).to(wide).unflatten(-1, (self.groups, -1)).transpose(1, 2)

        distance = self.reach * (linear(self.scales) + self.scale_prior.to(wide)[:, None, None]).sigmoid()
        direction = linear(self.offsets).unflatten(-1, (-1, 2)) + directions(self.kernel_size, x.device).to(wide)
        here = places_of_tokens(grid, x.device).to(wide)[:, None]
        return here + distance[..., None] * direction, linear(self.weights)


@made_once
def directions(kernel_size: int, device: torch.device) -> torch.Tensor:
    """The taps' directions (k², 2) as (column, row), row-major: a regular grid over [−1, 1]², or its middle."""
    along = torch.linspace(-1, 1, kernel_size, device=device) if kernel_size > 1 else torch.zeros(1, device=device)
    return torch.stack([along.repeat(kernel_size), along.repeat_interleave(kernel_size)], dim=1)


@made_once
def places_of_tokens(grid: tuple[int, int], device: torch.device) -> torch.Tensor:
    """The tokens' places (N, 2) as (column, row) in tokens, row-major."""
    tokens = torch.arange(grid[0] * grid[1], device=device)
    return torch.stack([tokens % grid[1], tokens // grid[1]], dim=1)


def _grid_sample(v: torch.Tensor, places: torch.Tensor, weights: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Values v (b, N, d) read at places (b, N, k², 2) and summed with weights (b, N, k²): (b, N, d)."""
    height, width = grid
    image = v.unflatten(1, grid).permute(0, 3, 1, 2)
    # the tokens' outer edges are at −1 and 1
    normalized = torch.stack([(2 * places[..., 0] + 1) / width - 1, (2 * places[..., 1] + 1) / height - 1], dim=-1)
    read = F.grid_sample(image, normalized, mode="bilinear", padding_mode="zeros", align_corners=False)
    return (read * weights[:, None]).sum(-1).transpose(1, 2)


def _gather(v: torch.Tensor, places: torch.Tensor, weights: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """As :func:`_grid_sample`, from the four tokens around each place."""
    height, width = grid
    corner = places.detach().floor()
    part = places - corner
    corner = corner.nan_to_num()  # a place that is not a number has a share that is none, and no index
    total = torch.zeros_like(v)
    for right in (0, 1):
        for down in (0, 1):
            column, row = corner[..., 0] + right, corner[..., 1] + down
            inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
            share = (part[..., 0] if right else 1 - part[..., 0]) * (part[..., 1] if down else 1 - part[..., 1])
            token = row.clamp(0, height - 1).long() * width + column.clamp(0, width - 1).long()
            index = token.flatten(1)[..., None].expand(-1, -1, v.shape[2])
            read = v.gather(1, index).unflatten(1, token.shape[1:])  # (b, N, k², d)
            total = total + ((weights * share * inside)[..., None] * read).sum(2)
    return total
