"""ATConv as it was published, kept as the baseline that ours is measured against."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from atconv import ATConv


class PublishedATConv(ATConv):
    """The published order: project all N tokens, pool, and one grouped convolution of B·C groups between transposes."""

    def forward(self, x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        batch, tokens, dim = x.shape
        pooled = F.adaptive_avg_pool1d(self.kernel_proj(x).transpose(1, 2), self.kernel_size**2)
        kernels = self.kernel_gen(F.gelu(pooled, approximate="tanh"))
        kernels = kernels - self.difference_control.sigmoid()[:, None] * kernels.mean(dim=2, keepdim=True)
        values = self.x_proj(x).transpose(1, 2).reshape(1, batch * dim, *grid)
        weight = kernels.reshape(batch * dim, 1, self.kernel_size, self.kernel_size).to(values.dtype)
        mixed = F.conv2d(values, weight, padding=self.kernel_size // 2, groups=batch * dim)
        return self.proj(mixed.reshape(batch, dim, tokens).transpose(1, 2))
