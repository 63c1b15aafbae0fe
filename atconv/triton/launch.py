"""How the kernels are launched: tiles, numbers of programs, and the type to accumulate in."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

PROGRAMS = 512
"""Enough to keep a GPU of 132 multiprocessors busy."""


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type to accumulate in."""
    return torch.promote_types(dtype, torch.float32)


def triton_dtype(dtype: torch.dtype) -> tl.dtype:
    """The same as Triton names it."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def channel_block(channels: int, item: int) -> int:
    """Channels of a tile: a cache line of 128 bytes, less where there are fewer."""
    return min(triton.next_power_of_2(channels), 128 // item)


def tile(batch: int, height: int, width: int, channels: int, *, side: int, item: int) -> dict[str, int]:
    """ROWS, COLUMNS, CHANNELS and num_warps for values (B, H, W, C) of ``item`` bytes and kernels side × side.

    The widest tiles that leave the GPU enough programs, of which the least is in vain: outside the image, or seen by
    two programs. A thread has few enough channels for its k² taps, or sums, to stay in registers.
    """
    vector = 4 if side <= 5 else 2 if side == 7 else 1
    block = min(channel_block(channels, item), 32 * vector if side <= 5 else 8 * vector)

    def waste(length: int, size: int) -> int:
        return triton.cdiv(length, size) * (size + side - 1)

    columns = min((16, 8, 4), key=lambda size: waste(width, size))
    strips = batch * triton.cdiv(channels, block) * triton.cdiv(width, columns)
    fitting = [
        rows for rows in (16, 8, 4) if (side <= 3 or rows <= 8) and strips * triton.cdiv(height, rows) >= PROGRAMS
    ]
    rows = min(fitting, key=lambda size: waste(height, size), default=2)
    warps = max(1, min(8, columns * block // (32 * vector)))
    return {"ROWS": rows, "COLUMNS": columns, "CHANNELS": block, "num_warps": warps}


def programs(v: torch.Tensor, options: dict[str, int]) -> int:
    """The number of tiles of values (B, H, W, C), by the answer of :func:`tile`."""
    batch, height, width, channels = v.shape
    tiles = triton.cdiv(height, options["ROWS"]) * triton.cdiv(width, options["COLUMNS"])
    return batch * tiles * triton.cdiv(channels, options["CHANNELS"])
