"""Reading a single weights file, ``.pt`` or ``.safetensors``, without running anything that it holds."""

from __future__ import annotations

import argparse
import pickle
import re
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from sit.utils.errors import UserError, first_line

# what a training checkpoint calls its weights; the first one found is taken
CONTAINERS = {"ema": ("ema", "model_ema"), "model": ("model", "state_dict", "module")}


_STEPS = ("step", "steps", "train_steps", "global_step")


@dataclass
class WeightsFile:
    """What a weights file holds.

    Attributes:
        state: the weights by key, prefixes of wrappers removed.
        container: ``bare`` if the file is the state dict, else the name under which it stood.
        arguments: the command line of the training, where the file holds it.
        step: optimizer steps, where the file says.
    """

    state: dict[str, torch.Tensor]
    container: str
    arguments: dict[str, Any]
    step: int


def plain_key(name: str) -> str:
    """A weight's key without the prefixes of distributed and compiled wrappers, wherever they stand."""
    return re.sub(r"(?:(?<=^)|(?<=\.))(?:module|_orig_mod)\.", "", name)


def read_weights(path: Path, prefer: Literal["ema", "model"] = "ema") -> WeightsFile:
    """Read a bare state dict, or a training checkpoint with ``model``, ``ema``, ``args`` and more.

    Args:
        path: the file.
        prefer: which weights of a training checkpoint are taken; the other if it is missing.

    Raises:
        UserError: the file can't be read, is cut off, would need code of its own to run, or has no weights in it.
    """
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a dict of weights")
    if _is_state(content):
        return WeightsFile({plain_key(k): v for k, v in content.items()}, "bare", {}, 0)
    arguments = content.get("args", {})
    arguments = dict(arguments) if isinstance(arguments, dict) else dict(getattr(arguments, "__dict__", {}))
    step = next((content[name] for name in _STEPS if isinstance(content.get(name), int)), 0)
    for kind in (prefer, *(set(CONTAINERS) - {prefer})):
        for name in CONTAINERS[kind]:
            if _is_state(content.get(name)):
                return WeightsFile({plain_key(k): v for k, v in content[name].items()}, name, arguments, step)
    found = ", ".join(map(str, list(content)[:6])) or "nothing"
    raise UserError(f"{path} is neither a state dict nor a training checkpoint; it holds {found}")


def _is_state(content: Any) -> bool:
    return (
        isinstance(content, dict)
        and len(content) > 0
        and all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in content.items())
    )


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} is cut off or not a safetensors file ({first_line(error)})") from error
    except OSError as error:
        raise UserError(f"{path} can't be read ({error.strerror or error})") from error


def _read_pickle(path: Path) -> Any:
    """``torch.load`` with ``weights_only``; of all classes only the ``argparse.Namespace`` of ``args`` is let in."""
    try:
        is_zip = zipfile.is_zipfile(path)
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what it warns of, it then refuses
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        if wanted is None and not _starts_as_pickle(path):
            raise UserError(f"{path} is cut off or not a weights file") from error
        what = f"a {wanted[1]}" if wanted else "more than tensors and plain values"
        raise UserError(
            f"{path} is refused: to open it, Python would have to build {what}, and a file that may name what is "
            "built can run any code; save its state dict alone, torch.save(model.state_dict(), …), and read that"
        ) from error
    except PermissionError as error:
        raise UserError(f"{path} can't be read ({error.strerror})") from error
    except (OSError, EOFError, RuntimeError, KeyError, ValueError, AttributeError, TypeError, IndexError) as error:
        # torch raises any of these on a file that ends early or was never written by torch.save
        raise UserError(f"{path} is cut off or not a weights file") from error


def _starts_as_pickle(path: Path) -> bool:
    """Whether the file is a bare pickle (opcode PROTO and a version) long enough to say anything."""
    with path.open("rb") as file:
        start = file.read(16)
    return len(start) == 16 and start[0] == 0x80 and start[1] in range(2, 6)
