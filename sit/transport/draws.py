"""What an objective draws for a batch, where its caller gives no draws of its own."""

from __future__ import annotations

import torch

from sit.utils.errors import UserError


def uniform(x1: torch.Tensor, *shape: int, generator: torch.Generator | None) -> torch.Tensor:
    """Uniform draws in [0, 1) of a shape, float32 on x1's device; made on the generator's device, if there is one."""
    device = x1.device if generator is None else generator.device
    return torch.rand(shape, generator=generator, device=device).to(x1.device)


def noise(x1: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """Standard normal draws of x1's shape, dtype and device; made on the generator's device, if there is one."""
    device = x1.device if generator is None else generator.device
    return torch.randn(x1.shape, generator=generator, device=device, dtype=x1.dtype).to(x1.device)


def consecutive(x1: torch.Tensor, count: int, *, generator: torch.Generator | None) -> torch.Tensor:
    """``count`` numbers in a row from one that is drawn below 2³¹, int64 on x1's device; made as :func:`uniform` is."""
    device = x1.device if generator is None else generator.device
    first = torch.randint(2**31, (), generator=generator, device=device)
    return first.to(x1.device) + torch.arange(count, device=x1.device)


def check_dropout(probability: float) -> None:
    """Raise UserError unless the ``class_dropout`` is a probability."""
    if not 0 <= probability <= 1:
        raise UserError(f"`class_dropout` must be in [0, 1], not {probability}")
