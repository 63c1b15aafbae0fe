"""Reading a single weights file, ``.pt`` or ``.safetensors``, without running anything that it holds."""

from __future__ import annotations

import argparse
import contextlib
import pickle
import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from sit.utils.errors import UserError, first_line
from sit.utils.reading import reading

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
    """A weight's key without the prefixes of wrappers: distributed and compiled ones wherever they stand, and at the
    beginning ``model.``, of whatever held the network as an attribute (ATConv's programs remove the same three)."""
    return re.sub(r"(?:(?<=^)|(?<=\.))(?:module|_orig_mod)\.", "", name).removeprefix("model.")


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
        return WeightsFile(_plain_weights(content, path), "bare", {}, 0)
    arguments = content.get("args", {})
    arguments = arguments if isinstance(arguments, dict) else getattr(arguments, "__dict__", {})
    arguments = {name: value for name, value in arguments.items() if isinstance(name, str)}
    step = next((content[name] for name in _STEPS if type(content.get(name)) is int and content[name] >= 0), 0)
    for kind in (prefer, *(set(CONTAINERS) - {prefer})):
        for name in CONTAINERS[kind]:
            if _is_state(content.get(name)):
                return WeightsFile(_plain_weights(content[name], path), name, arguments, step)
    found = ", ".join(map(str, list(content)[:6])) or "nothing"
    raise UserError(f"{path} is neither a state dict nor a training checkpoint; it holds {found}")


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file by name, whatever they are of: a bare state dict, or one under ``state_dict`` or ``model``.

    Raises:
        UserError: the file can't be read, is cut off, would need code of its own to run, or has no such tensors.
    """
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    if isinstance(content, dict):
        for state in (content, *(content.get(name) for name in CONTAINERS["model"])):
            if _is_state(state):
                return dict(state)
    raise UserError(f"{path} holds no tensors by name")


def _is_state(content: Any) -> bool:
    return (
        isinstance(content, dict)
        and len(content) > 0
        and all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in content.items())
    )


def _plain_weights(state: Mapping[str, torch.Tensor], path: Path) -> dict[str, torch.Tensor]:
    """The weights by :func:`plain_key`.

    Raises:
        UserError: one has no numbers, whole numbers, or fewer numbers in the file than its shape says; or two have the
            same key.
    """
    for name, tensor in state.items():
        if not tensor.is_floating_point() or tensor.layout != torch.strided or not tensor.numel():
            raise UserError(f"{path} is not a SiT: {name} has {tensor.dtype} numbers of shape {tuple(tensor.shape)}")
        if tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
            raise UserError(f"{path}: {name} is not stored whole")
    plain = {plain_key(name): tensor for name, tensor in state.items()}
    if len(plain) < len(state):
        twice = next(key for key, count in Counter(map(plain_key, state)).items() if count > 1)
        raise UserError(f"{path} has {twice} twice, with and without the prefix of a wrapper; save one network alone")
    return plain


def stored_shapes(files: list[Path]) -> dict[str, tuple[int, ...]]:
    """The shapes of the weights in safetensors files by their keys, from their headers alone.

    Raises:
        UserError: a file can't be read or is cut off, or weights are whole numbers.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for path in files:
        with _explained(path), safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no dict
                part = file.get_slice(name)
                if not part.get_dtype().startswith(("F", "BF")):
                    raise UserError(f"{path}: {name} has {part.get_dtype()} numbers, which are no weights of a SiT")
                shapes[name] = tuple(part.get_shape())
    return shapes


def load_folder_weights(files: list[Path]) -> dict[str, torch.Tensor]:
    """The weights in :func:`sit.utils.weight_files.folder_weights` files, by their keys, in the dtype of the files."""
    state: dict[str, torch.Tensor] = {}
    for path in files:
        state |= _read_safetensors(path)
    return state


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    with _explained(path):
        return load_file(path)


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    with reading(path):
        try:
            yield
        except SafetensorError as error:
            raise UserError(f"{path} is cut off or not a safetensors file ({first_line(error)})") from error


def _read_pickle(path: Path) -> Any:
    """``torch.load`` with ``weights_only``; of all classes only the ``argparse.Namespace`` of ``args`` is let in."""
    try:
        if is_zip := zipfile.is_zipfile(path):
            _check_archive(path)
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
    except UserError:
        raise
    except Exception as error:  # torch raises any kind on a file that ends early or was never written by torch.save
        raise UserError(f"{path} is cut off or not a weights file") from error


def _check_archive(path: Path) -> None:
    """Compare the zip file that torch.save writes with its checksums, which torch.load doesn't look at.

    Raises:
        UserError: a member is damaged; or is packed, which torch.save does not do, and could unpack to any size.
    """
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        for member in members:
            if member.flag_bits & 1 or member.compress_type != zipfile.ZIP_STORED:
                raise UserError(f"{path} is not of torch.save: {member.filename} in it is compressed or encrypted")
        damaged = [member.filename for member in members if not _is_whole(archive, member)]
    if damaged and len(damaged) < len(members):  # all of them: torch.serialization.set_crc32_options(False) wrote none
        raise UserError(f"{path} is damaged: {damaged[0]} in it doesn't have its checksum")


def _is_whole(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bool:
    try:
        with archive.open(member) as file:
            while file.read(1 << 20):
                pass
    except (zipfile.BadZipFile, EOFError):
        return False
    return True


def _starts_as_pickle(path: Path) -> bool:
    """Whether the file is a bare pickle (opcode PROTO and a version) long enough to say anything."""
    with path.open("rb") as file:
        start = file.read(16)
    return len(start) == 16 and start[0] == 0x80 and start[1] in range(2, 6)
