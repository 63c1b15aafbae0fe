"""ATConv's mathematics on plain tensors: kernels from tokens, lateral inhibition, per-image depthwise convolution."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F


@functools.lru_cache(maxsize=64)
def _pooling_matrix(bins: int, tokens: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    matrix = torch.zeros(bins, tokens, dtype=dtype)
    for j in range(bins):
        start, end = j * tokens // bins, -((-(j + 1) * tokens) // bins)
        matrix[j, start:end] = 1 / (end - start)
    return matrix.to(device)


def pool_tokens(x: torch.Tensor, bins: int) -> torch.Tensor:
    """Adaptive average pooling over the flattened tokens: (B, N, C) to (B, bins, C)."""
    return _pooling_matrix(bins, x.shape[1], x.dtype, x.device) @ x


def inhibit(kernels: torch.Tensor, control: torch.Tensor) -> torch.Tensor:
    """Lateral inhibition: kernels (…, taps, C) less sigmoid(control) (C,) of their mean over the taps."""
    return kernels - control.sigmoid() * kernels.mean(dim=-2, keepdim=True)


def depthwise_conv(v: torch.Tensor, kernels: torch.Tensor) -> torch.Tensor:
    """Zero-padded k×k cross-correlation of each image and channel with its own kernel.

    Args:
        v: values (B, H, W, C).
        kernels: (B, k·k, C), row-major taps; or (1, k·k, C) for the same kernels in all images.

    Returns:
        (B, H, W, C).
    """
    side = int(kernels.shape[1] ** 0.5)
    height, width = v.shape[1:3]
    pad = side // 2
    padded = F.pad(v, (0, 0, pad, pad, pad, pad))
    out = None
    for tap in range(side * side):
        row, column = divmod(tap, side)
        term = padded[:, row : row + height, column : column + width] * kernels[:, tap, None, None]
        out = term if out is None else out + term
    return out
