"""Tensors that depend on sizes alone."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import lru_cache, wraps

import torch


def made_once(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Keep the last few results of a function of hashable arguments.

    A compiled network takes them for constants; it would look through a plain ``lru_cache``, making them at each call.
    """
    cached = lru_cache(maxsize=8)(function)

    @torch.compiler.assume_constant_result
    @wraps(function)
    def kept(*arguments: Hashable) -> torch.Tensor:
        return cached(*arguments)

    return kept
