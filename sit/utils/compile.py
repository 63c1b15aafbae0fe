"""When the network is compiled by ``torch.compile``, and how for sampling."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import nn

from sit.utils.errors import UserError

WORTH_IT = 1000
"""network evaluations from which on sampling is compiled by default: compiling a large network takes about a minute"""


def obstacle(device: torch.device) -> str | None:
    """Why torch.compile can't work on the device; None if nothing is known to be in its way."""
    if device.type == "cpu":
        if not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
            return "compiling for the CPU needs a C++ compiler: install g++, or name one in CXX"
    elif device.type == "cuda":
        if find_spec("triton") is None:
            return "compiling for a GPU needs the package triton"
        if not any(map(shutil.which, (os.environ.get("CC", "gcc"), "clang"))):
            return "compiling for a GPU needs a C compiler: install gcc, or name one in CC"
        if torch.version.hip is None and torch.cuda.get_device_capability(device) < (7, 0):
            return "compiling needs a GPU of compute capability 7.0 or more"
    return None


def should_compile(
    wanted: bool | None, device: torch.device, notice: Callable[[str], object], helps: bool = True
) -> bool:
    """Whether to compile: as ``wanted`` says; None compiles on GPUs where it ``helps``, with a ``notice`` if it can't.

    Raises:
        UserError: it is wanted and can't be done.
    """
    if wanted is None and (device.type != "cuda" or not helps):
        return False
    if wanted is False:
        return False
    reason = obstacle(device)
    if reason is None:
        return True
    if wanted:
        raise UserError(f"`compile`: {reason}; or leave it out")
    notice(f"not compiled: {reason}")
    return False


def compile_for_sampling(model: nn.Module, backend: str = "inductor") -> None:
    """Compile the network in place, for static shapes, on GPUs as CUDA graphs.

    A graph writes each result to the same memory, where samplers still need the one before; so it is copied.
    ``backend`` is torch.compile's.
    """
    graphs = next(model.parameters()).device.type == "cuda"
    mode = "reduce-overhead" if graphs else None
    compiled = torch.compile(model.forward, backend=backend, mode=mode, dynamic=False)

    def forward(*args, **kwargs) -> torch.Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        result = compiled(*args, **kwargs)
        return result.clone() if graphs else result

    forward.is_compiled = True  # type: ignore[attr-defined]
    model.forward = forward


def is_compiled(model: nn.Module) -> bool:
    """Whether a network was compiled, by :func:`compile_for_sampling` or by torch's own functions."""
    by_torch = hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None
    return by_torch or getattr(model.forward, "is_compiled", False)
