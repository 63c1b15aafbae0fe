"""What a measured figure was measured on, by which command, and when."""

from __future__ import annotations

import os
import platform
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import torch

from sit.utils.files import atomic_write
from sit.utils.json_text import json_text


def machine(device: torch.device | str) -> str:
    """The device, and the version of torch, in words."""
    device = torch.device(device)
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    return f"{_processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def record(device: torch.device | str) -> dict[str, str]:
    """``machine``, ``date`` and ``command`` of this process, for the JSON beside the figures."""
    command = shlex.join(["python", *_program(), *sys.argv[1:]])
    return {"machine": machine(device), "date": time.strftime("%Y-%m-%d"), "command": command}


def write_record(path: str | Path, device: torch.device | str, figures: dict[str, Any]) -> None:
    """Write :func:`record` and the figures as JSON; a file that is there is replaced whole."""
    with atomic_write(path) as temporary:
        temporary.write_text(json_text(record(device) | figures, indent=2) + "\n", encoding="utf-8")


def _program() -> list[str]:
    """What this process runs, as ``python`` is told it: a module or a file."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is not None:
        return ["-m", spec.name.removesuffix(".__main__")]
    return [os.path.relpath(sys.argv[0])] if sys.argv[0] else []


def _processor() -> str:
    told = Path("/proc/cpuinfo")
    lines = told.read_text().splitlines() if told.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()} CPU"
