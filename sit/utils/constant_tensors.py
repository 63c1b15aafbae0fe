"""Tensors that depend on sizes alone."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import lru_cache, wraps
from types import SimpleNamespace
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

    It would look through :func:`kept`, making the tensor at each call. The compiler names a constant after the code of
    the function that gives it, and takes two of one name in a network for a mistake; so each set of arguments gets a
    function of its own, which the compiler finds by name.
    """
    recalled, names = kept(function), dict[tuple[Hashable, ...], str]()
    constants = SimpleNamespace()

    @torch.compiler.assume_constant_result
    def name_of(*arguments: Hashable) -> str:
        if arguments not in names:
            name = f"{function.__module__}.{function.__name__}.{len(names)}".replace(".", "_")

            def constant(*arguments: Hashable) -> torch.Tensor:
                return recalled(*arguments)

            constant.__code__ = constant.__code__.replace(co_name=name)
            setattr(constants, name, torch.compiler.assume_constant_result(constant))
            names[arguments] = name
        return names[arguments]

    @wraps(function)
    def made(*arguments: Hashable) -> torch.Tensor:
        if torch.compiler.is_dynamo_compiling():
            return getattr(constants, name_of(*arguments))(*arguments)
        return recalled(*arguments)

    return made


def _is_traced() -> bool:
    """Whether new tensors are stand-ins without numbers, as in ``torch.export`` and under a ``FakeTensorMode``."""
    return torch.compiler.is_exporting() or type(torch.empty(0)) is not torch.Tensor
