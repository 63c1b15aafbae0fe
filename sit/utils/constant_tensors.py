"""Tensors that depend on sizes alone."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import lru_cache, wraps
from typing import TypeVar

import torch

Made = TypeVar("Made")


def kept(function: Callable[..., Made]) -> Callable[..., Made]:
    """Keep the last few results of a function of hashable arguments, which makes tensors from sizes.

    They can be trained with even if inference mode made them first. What is made while a program is traced is not kept:
    it stands for numbers and has none. An exported program makes its own, whatever was kept before.
    """
    cached = lru_cache(maxsize=8)(function)

    @wraps(function)
    def recalled(*arguments: Hashable) -> Made:
        with torch.inference_mode(False):
            return function(*arguments) if _is_traced() else cached(*arguments)

    return recalled


def made_once(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """As :func:`kept`, for a function whose result a compiled network takes for a constant.

    It would look through :func:`kept`, making the tensor at each call.
    """
    return torch.compiler.assume_constant_result(kept(function))


def _is_traced() -> bool:
    """Whether new tensors are stand-ins without numbers, as in ``torch.export`` and under a ``FakeTensorMode``."""
    return torch.compiler.is_exporting() or type(torch.empty(0)) is not torch.Tensor
