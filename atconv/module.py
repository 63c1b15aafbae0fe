"""ATConv as a module, with the published parameter names."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from atconv.functional import depthwise_conv, inhibit, pool_tokens

ACTIVATIONS = {
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
    "silu": F.silu,
}


class ATConv(nn.Module):
    """Attentive Convolution (arXiv 2510.20092): (B, N, C) tokens to (B, N, C)."""

    positional_embedding = False

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        kernel_size: int = 3,
        inhibition: bool = True,
        routing: bool = True,
        activation: str = "gelu_tanh",
    ) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, not {kernel_size}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, not {activation!r}")
        self.taps = kernel_size**2
        self.activation = activation
        if routing:
            self.kernel_proj = nn.Linear(dim, dim)
            self.kernel_gen = nn.Linear(self.taps, self.taps)
        else:
            self.kernel = nn.Parameter(torch.empty(self.taps, dim).uniform_(-1 / kernel_size, 1 / kernel_size))
        if inhibition:
            self.difference_control = nn.Parameter(torch.zeros(dim))
        self.x_proj = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)
        self.routing, self.inhibition = routing, inhibition

    def kernels(self, x: torch.Tensor) -> torch.Tensor:
        """The kernels (B or 1, taps, C) in float32 before inhibition."""
        if not self.routing:
            return self.kernel[None].float()
        g = ACTIVATIONS[self.activation](self.kernel_proj(pool_tokens(x, self.taps)))
        return self.kernel_gen.weight @ g + self.kernel_gen.bias[:, None]

    def forward(self, x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        batch, tokens, dim = x.shape
        if tokens != grid[0] * grid[1]:
            raise ValueError(f"{tokens} tokens are no grid of {grid[0]}x{grid[1]}")
        kernels = self.kernels(x)
        if self.inhibition:
            kernels = inhibit(kernels, self.difference_control)
        v = self.x_proj(x)
        y = depthwise_conv(v.view(batch, *grid, dim), kernels.to(v.dtype))
        return self.proj(y.reshape(batch, tokens, dim))
