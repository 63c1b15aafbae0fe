"""Checkpoints on disk: writing them whole, telling whole ones from cut ones, and reading any checkpoint for sampling.

A checkpoint of ours is a diffusers pipeline folder with two additions::

    model_index.json
    transformer/config.json, diffusion_pytorch_model.safetensors     the EMA weights
    transport/transport_config.json
    vae/config.json, diffusion_pytorch_model.safetensors             absent if the VAE is one of the Hugging Face Hub
    training/…                                                       what resuming needs; whatever the loop puts there
    sit.json                                                         what this is, and the size and checksum of the rest

``sit.json`` is written last and its closing brace is the last byte, so a checkpoint cut off anywhere is recognised.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from sit.errors import UserError
from sit.files import atomic_folder
from sit.integrity import FORMAT, INDEX, fingerprints, flaw, write_json
from sit.weights_file import plain_key

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

    from sit.model import SiT
    from sit.transport import Transport

WEIGHTS = "diffusion_pytorch_model.safetensors"
_STEP = re.compile(r"step-(\d+)$")

logger = logging.getLogger(__name__)


@dataclass
class CheckpointInfo:
    """What a checkpoint is, beyond its network.

    Attributes:
        step: optimiser steps taken.
        images_seen: training images shown, counted with repetition.
        image_size: height and width of the images in pixels; None if unknown.
        classes: number of classes.
        label_names: their names by label; empty if unknown.
        data: the data set it was trained on, as ``--data`` takes it.
        mixer: the mixer pattern.
    """

    step: int = 0
    images_seen: int = 0
    image_size: tuple[int, int] | None = None
    classes: int = 0
    label_names: list[str] = field(default_factory=list)
    data: str = ""
    mixer: str = ""


@dataclass
class Loaded:
    """A checkpoint ready for sampling: the network in evaluation mode on its device, and what goes with it.

    ``vae`` is loaded from ``vae_source`` (a folder, or a name on the Hub) when it is first asked for.
    """

    model: SiT
    transport: Transport
    info: CheckpointInfo
    vae_source: str | None
    device: torch.device
    path: Path

    @cached_property
    def vae(self) -> AutoencoderKL:
        """The VAE, on the network's device.

        Raises:
            UserError: the checkpoint names none, or it can't be had.
        """
        from sit.latents import load_vae

        if self.vae_source is None:
            raise UserError(f"{self.path} does not say which VAE it belongs to: pass --vae NAME_OR_FOLDER")
        return load_vae(self.vae_source, self.device)


# --- writing -------------------------------------------------------------------------------------------------------


def save_checkpoint(
    folder: str | Path,
    *,
    model: SiT,
    weights: Mapping[str, torch.Tensor] | None = None,
    transport: Transport,
    vae_source: str | Path | None,
    info: CheckpointInfo,
    training_state: Callable[[Path], None] | None = None,
) -> Path:
    """Write one checkpoint folder; it appears under its name only when it is complete.

    Args:
        folder: where; must not exist.
        model: the network, whose configuration is saved.
        weights: the weights to sample with (the EMA's), by the network's keys, buffers optional; None takes the
            network's own.
        transport: the training objective, a component of the pipeline.
        vae_source: a local folder, whose files are hard-linked (copied where the disk can't), or a name on the Hub.
        info: what the checkpoint is.
        training_state: called with the folder ``training/`` to fill it; None for a checkpoint that only samples.

    Returns:
        The folder.

    Raises:
        UserError: the folder exists, can't be written, the disk is full, or the VAE's folder lacks its files.
    """
    folder = Path(folder)
    with atomic_folder(folder) as place:
        save_network(place / "transformer", model, weights)
        transport.save_pretrained(place / "transport")
        vae_name = _put_vae(place / "vae", vae_source)
        if training_state is not None:
            training = place / "training"
            training.mkdir()
            training_state(training)
        write_json(place / "model_index.json", _model_index(place, vae_name, info))
        _write_index(place, vae_name, info)
    return folder


def save_network(folder: Path, model: SiT, weights: Mapping[str, torch.Tensor] | None = None) -> None:
    """Write ``config.json`` and the weights as safetensors into ``folder``, as ``SiT.from_pretrained`` reads them.

    Raises:
        ValueError: ``weights`` lacks a parameter of the network or has a key that the network has not.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model.save_config(folder)
    own = {plain_key(name): tensor for name, tensor in model.state_dict().items()}
    own = {name: tensor for name, tensor in own.items() if not name.startswith(model.PROJECTOR)}
    given = own if weights is None else {plain_key(name): tensor for name, tensor in weights.items()}
    buffers = {plain_key(name) for name, _ in model.named_buffers()}
    if wrong := (set(own) - buffers - set(given)) | (set(given) - set(own)):
        raise ValueError(f"the weights are not this network's: {', '.join(sorted(wrong)[:3])} …")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in (own | given).items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def is_local_vae(source: str | Path) -> bool:
    """Whether a VAE source is a folder here rather than a name on the Hub."""
    return Path(source).is_dir()


def _put_vae(place: Path, source: str | Path | None) -> str | None:
    """Link a local VAE into the checkpoint, and return None; or return the name of one on the Hub."""
    if source is None:
        return None
    if str(source) == "digits":
        from sit.latents import DIGITS_VAE as source
    if not is_local_vae(source):
        if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(source)):
            raise UserError(f"--vae {source}: no such folder, and not a Hub name like stabilityai/sd-vae-ft-ema")
        return str(source)
    source = Path(source)
    files = [source / "config.json", *sorted(source.glob("diffusion_pytorch_model*.safetensors"))]
    if len(files) < 2 or not files[0].is_file():
        raise UserError(f"the VAE folder {source} has no config.json with safetensors weights beside it")
    place.mkdir()
    for file in files:
        try:
            os.link(file.resolve(), place / file.name)
        except OSError:
            shutil.copyfile(file, place / file.name)
    return None


def _model_index(place: Path, vae_name: str | None, info: CheckpointInfo) -> dict[str, Any]:
    import diffusers

    has_vae = (place / "vae").is_dir()
    return {
        "_class_name": "SiTPipeline",
        "_diffusers_version": diffusers.__version__,
        "transformer": ["sit", "SiT"],
        "transport": ["sit", "Transport"],
        "vae": ["diffusers", "AutoencoderKL"] if has_vae else [None, None],
        "vae_name": vae_name,
        "id2label": {str(label): name for label, name in enumerate(info.label_names)} or None,
    }


def _write_index(place: Path, vae_name: str | None, info: CheckpointInfo) -> None:
    index = {
        "format": FORMAT,
        "written_by": f"sit-atconv {_version()}",
        **dataclasses.asdict(info),
        "vae": vae_name,
        "files": fingerprints(place),
    }
    write_json(place / INDEX, index)


def _version() -> str:
    try:
        return version("sit-atconv")
    except PackageNotFoundError:
        return "unknown"


# --- finding -------------------------------------------------------------------------------------------------------


def find_checkpoints(run: str | Path) -> list[tuple[int, Path]]:
    """The checkpoints of a run folder, whole or not, as (step, folder), by step."""
    folders = (Path(run) / "checkpoints").glob("step-*")
    found = [(int(match[1]), folder) for folder in folders if (match := _STEP.match(folder.name)) and folder.is_dir()]
    return sorted(found)


def newest_checkpoint(run: str | Path, resumable: bool = False) -> Path | None:
    """The newest whole checkpoint of a run folder; None if there is none at all yet.

    Damaged ones are skipped with a notice; with ``resumable``, so are those without ``training/``.

    Raises:
        UserError: there are checkpoints, but none can be used.
    """
    checkpoints = find_checkpoints(run)
    for _, folder in reversed(checkpoints):
        reason = flaw(folder)
        if reason is None and resumable and not (folder / "training").is_dir():
            reason = "it has no training/ to resume from"
        if reason is None:
            return folder
        logger.warning("note: skipping the checkpoint %s: %s", folder, reason)
    if checkpoints:
        raise UserError(f"none of the {len(checkpoints)} checkpoints in {run} can be used; the newest: {reason}")
    return None


def is_run(path: Path) -> bool:
    """Whether a folder is a run's."""
    return (path / "checkpoints").is_dir() or (path / "config.yaml").is_file()


# --- reading -------------------------------------------------------------------------------------------------------


def resolve(path: str | Path) -> Path:
    """The checkpoint that a path means: a run's newest whole one, a checkpoint folder, or a single weights file.

    Raises:
        UserError: nothing is there, nothing usable is there, or it is something else.
    """
    path = Path(path)
    if path.is_file():
        if path.name != WEIGHTS or not (path.parent / "config.json").is_file():
            return path
        path = path.parent.parent if (path.parent.parent / "model_index.json").is_file() else path.parent
    if path.name == "checkpoints" and is_run(path.parent):
        path = path.parent
    if path.name == "transformer" and (path.parent / "model_index.json").is_file():
        path = path.parent
    if not path.exists():
        raise UserError(f"{path}: no such run, checkpoint folder or file")
    if is_run(path):
        newest = newest_checkpoint(path)
        if newest is None:
            raise UserError(f"the run {path} has no checkpoint yet")
        return newest
    if (path / INDEX).exists():
        if reason := flaw(path):
            raise UserError(f"the checkpoint {path} is not whole: {reason}; use another one")
        return path
    if (path / "model_index.json").is_file() or (path / "config.json").is_file():
        return path
    raise UserError(f"{path} is neither a run, nor a checkpoint folder, nor a weights file")


def load_for_sampling(
    path: str | Path,
    *,
    vae: str | Path | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    **overrides: Any,
) -> Loaded:
    """Read a checkpoint, of ours or a published one, with everything that sampling needs.

    Args:
        path: a run folder (its newest whole checkpoint is taken), a checkpoint or diffusers folder, or a published
            ``.pt`` or ``.safetensors`` file (see :mod:`sit.published`).
        vae: a folder or a name on the Hub, instead of the VAE that the checkpoint names.
        device: where the network goes.
        dtype: its dtype; None keeps the file's.
        **overrides: fields of :class:`sit.published.Hints`, for published files that leave something open.

    Returns:
        The network in evaluation mode, without gradients; its transport; the VAE on request; and the information.

    Raises:
        UserError: nothing usable at ``path``, or a file that is cut off, unsafe to open or of another architecture.
    """
    from sit.published import Hints, read_published

    place = resolve(path)
    if place.is_file():
        foreign = read_published(place, Hints(**overrides))
        model, transport, info, vae_source = foreign.build(), foreign.transport(), foreign.info, foreign.vae_name
    else:
        model, transport, info, vae_source = _read_folder(place)
        told = {name for name, value in overrides.items() if value != getattr(Hints(), name)}
        if unused := sorted(told - {"image_size"}):  # which may be meant for the images to come
            flags = ", ".join("--" + name.replace("_", "-") for name in unused)
            raise UserError(f"{place} says itself what it is; {flags} only serve for published weights files")
    model = model.to(device).eval().requires_grad_(False)
    if dtype is not None:
        # not model.to: diffusers warns there of layers kept in float32, even if there are none
        torch.nn.Module.to(model, dtype=dtype)
    source = str(vae) if vae is not None else vae_source
    return Loaded(model, transport, info, source, torch.device(device), place)


def _read_folder(place: Path) -> tuple[SiT, Transport, CheckpointInfo, str | None]:
    from sit.transport import Transport

    whole_pipeline = (place / "model_index.json").is_file()
    model = read_network(place / "transformer" if whole_pipeline else place)
    has_transport = (place / "transport" / Transport.config_name).is_file()
    transport = Transport.from_pretrained(place / "transport") if has_transport else Transport()
    model_index = read_json(place / "model_index.json") if whole_pipeline else {}
    vae = str(place / "vae") if (place / "vae").is_dir() else model_index.get("vae_name")
    return model, transport, read_info(place), vae


def read_info(place: Path) -> CheckpointInfo:
    """What a folder says about itself: in ``sit.json``, else in diffusers' own files.

    Raises:
        UserError: a file is missing or unreadable.
    """
    if (place / INDEX).is_file():
        index = read_json(place / INDEX)
        info = CheckpointInfo(**{f.name: index[f.name] for f in dataclasses.fields(CheckpointInfo) if f.name in index})
        info.image_size = tuple(info.image_size) if info.image_size else None
        return info
    pipeline = (place / "model_index.json").is_file()
    config = read_json((place / "transformer" if pipeline else place) / "config.json")
    info = CheckpointInfo(classes=config.get("num_classes", 0), mixer=config.get("mixer", ""))
    if pipeline:
        id2label = read_json(place / "model_index.json").get("id2label") or {}
        names = {int(label): name for label, name in id2label.items()}
        info.label_names = [names[label] for label in range(len(names)) if label in names]
    return info


def read_network(folder: Path) -> SiT:
    """Read the network of a folder with ``config.json`` and safetensors weights.

    Raises:
        UserError: the folder holds another class of network, or a file is missing, cut off or does not fit.
    """
    from sit.model import SiT

    config = read_json(folder / "config.json")
    if config.get("_class_name") != "SiT":
        raise UserError(f"{folder / 'config.json'} is that of {config.get('_class_name')}, not of SiT")
    if not any(folder.glob("diffusion_pytorch_model*.safetensors*")):
        raise UserError(f"{folder} has no {WEIGHTS}")
    try:
        model, report = SiT.from_pretrained(folder, use_safetensors=True, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"the network in {folder} can't be read: {str(error).strip().splitlines()[0]}") from error
    if wrong := [*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]]:
        raise UserError(f"the weights in {folder} do not fit its config.json: {len(wrong)} keys, such as {wrong[0]}")
    return model


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} can't be read ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"{path} is cut off or not JSON") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object")
    return content


if __name__ == "__main__":
    from sit.convert import main

    main()
