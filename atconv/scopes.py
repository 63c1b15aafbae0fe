"""ATConv with kernels of a part of the image: of windows, or of the surroundings of each token.

A question of ours, not of the paper: what of *adaptive routing* needs the whole image? The parameters are those of the
published operator, whose kernels are the image's (``scope="image"``, :mod:`atconv.functional`), and so is all but the
context that a kernel is made from:

- ``window``: the image's rows and columns are cut into windows; each makes its own kernel from its own tokens, pooled
  in row-major order within the window, and its tokens are convolved with it, the values beyond its edge included.
- ``token``: each token makes its own kernel from the k² tokens that the kernel covers, one a tap, with zeros beyond the
  border: what is left when the window moves with the token.

All of it is plain PyTorch operations, with forward-mode derivatives.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from atconv.functional import pool_tokens

SCOPES = ("image", "window", "token")


def windows_along(length: int, window: int) -> int:
    """How many windows a side of ``length`` tokens has: as many as fit, and at least one."""
    return max(1, length // window)


def cuts(length: int, window: int, device: torch.device) -> torch.Tensor:
    """Where the n windows of a side of ``length`` tokens begin, and its end: (n + 1,) int64.

    Each is ``window`` tokens long where that divides the length, and a little longer where it doesn't.
    """
    count = windows_along(length, window)
    return torch.arange(count + 1, device=device) * length // count


def smallest_window(grid: tuple[int, int], window: int) -> int:
    """How many tokens the smallest window of a grid (H, W) has."""
    height, width = (side // windows_along(side, window) for side in grid)
    return height * width


def window_of_tokens(grid: tuple[int, int], window: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The number of each token's window, row-major over the windows, and its place in it: two (N,) int64."""
    rows, columns = (cuts(side, window, device) for side in grid)
    y, x = (torch.arange(side, device=device) for side in grid)
    row, column = (torch.bucketize(at, edges, right=True) - 1 for at, edges in ((y, rows), (x, columns)))
    number = row[:, None] * (len(columns) - 1) + column
    place = (y - rows[row])[:, None] * columns.diff()[column] + (x - columns[column])
    return number.flatten(), place.flatten()


def pool_windows(
    x: torch.Tensor, grid: tuple[int, int], window: int, bins: int, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """:func:`atconv.functional.pool_tokens` in each window: tokens x (B, N, C) to (B, M, bins, C), M windows."""
    (height, width), batch, channels = grid, x.shape[0], x.shape[2]
    if not (height % window or width % window):
        tall, wide = height // window, width // window
        split = x.view(batch, tall, window, wide, window, channels).transpose(2, 3)
        pooled = pool_tokens(split.reshape(-1, window**2, channels), bins, dtype)
        return pooled.view(batch, tall * wide, bins, channels)
    number, place = window_of_tokens(grid, window, x.device)
    rows, columns = (cuts(side, window, x.device).diff() for side in grid)
    sizes = (rows[:, None] * columns).flatten()[:, None, None]
    bin_ = torch.arange(bins, device=x.device)[:, None]
    start, end = bin_ * sizes // bins, -((-(bin_ + 1) * sizes) // bins)  # (M, bins, 1)
    own = number == torch.arange(len(sizes), device=x.device)[:, None, None]
    inside = own & (place >= start) & (place < end)  # (M, bins, N)
    wide_dtype = torch.promote_types(x.dtype, torch.float32)
    sums = inside.flatten(0, 1).to(wide_dtype) @ x.to(wide_dtype)
    return (sums / (end - start).flatten(0, 1)).to(dtype or x.dtype).unflatten(1, (-1, bins))


def window_kernels(kernels: torch.Tensor, grid: tuple[int, int], window: int) -> torch.Tensor:
    """Kernels (B, M, k², C) of the windows to those of the tokens, (B, N, k², C)."""
    return kernels[:, window_of_tokens(grid, window, kernels.device)[0]]


def around(x: torch.Tensor, side: int) -> torch.Tensor:
    """Padded images (B, H + k − 1, W + k − 1, C) to what a k×k kernel covers at each place: (B, H·W, k², C)."""
    patches = x.unfold(1, side, 1).unfold(2, side, 1)  # (B, H, W, C, k, k)
    return patches.flatten(4).transpose(3, 4).flatten(1, 2)


def pad(x: torch.Tensor, side: int) -> torch.Tensor:
    """Images (B, H, W, C) with zeros around them, as far as a k×k kernel reaches."""
    margin = side // 2
    return F.pad(x, (0, 0, margin, margin, margin, margin))


def convolve_tokens(v: torch.Tensor, kernels: torch.Tensor, side: int) -> torch.Tensor:
    """Zero-padded cross-correlation of v (B, H, W, C) with the kernel of each token, (B, H·W, k², C): (B, H, W, C)."""
    height, width = v.shape[1:3]
    padded, kernels = pad(v, side), kernels.to(v.dtype).unflatten(1, (height, width))
    total = torch.zeros_like(v)
    for tap in range(side * side):
        row, column = divmod(tap, side)
        total = torch.addcmul(total, padded[:, row : row + height, column : column + width], kernels[:, :, :, tap])
    return total
