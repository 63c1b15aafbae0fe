"""Forward-mode derivatives of networks whose mixers would otherwise run through kernels that have none."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextmanager
def plain_operations(network: object, device: torch.device) -> Iterator[None]:
    """Within the block all that ``network`` computes on ``device`` has forward-mode derivatives (``torch.func.jvp``).

    Scaled-dot-product attention takes its slow path, PyTorch's backend ``MATH``; a module with a method
    ``plain_backend(device)`` gets the name that it returns as its attribute ``backend``, and then its own back.

    Args:
        network: a module; anything else is taken to be made of plain operations.
        device: where it computes.
    """
    modules: list[Any] = [*network.modules()] if isinstance(network, nn.Module) else []
    before = {module: module.backend for module in modules if hasattr(module, "plain_backend")}
    try:
        for module in before:
            module.backend = module.plain_backend(device)
        with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated")  # PyTorch's own use of it
            yield
    finally:
        for module, backend in before.items():
            module.backend = backend
