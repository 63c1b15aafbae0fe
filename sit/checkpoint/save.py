"""Writing checkpoints, completely or not at all.

A checkpoint of ours is a diffusers pipeline folder with additions::

    model_index.json, pipeline.py, README.md                         the pipeline, its class for diffusers, a model card
    transformer/config.json, diffusion_pytorch_model.safetensors     the EMA weights
    transport/transport_config.json
    vae/config.json, diffusion_pytorch_model.safetensors             absent if the VAE is one of the Hugging Face Hub
    training/…                                                       what resuming needs; whatever the loop puts there
    sit.json                                                         what this is, and the size and checksum of the rest

``sit.json`` is written after all but the card, which may be edited, and has a checksum of itself too, so a checkpoint
that was cut off or changed anywhere is recognized.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from sit.checkpoint.hub import PIPELINE_CLASS, model_card, write_loader
from sit.checkpoint.info import CheckpointInfo
from sit.checkpoint.integrity import write_index, write_json
from sit.checkpoint.weights_file import load_folder_weights, plain_key
from sit.latents.pixels import is_pixels, pixel_codec
from sit.latents.vae import DIGITS_VAE, vae_folder
from sit.model import SiT
from sit.transport.transport import Transport
from sit.utils.errors import UserError
from sit.utils.files import atomic_folder
from sit.utils.reading import read_json
from sit.utils.weight_files import WEIGHTS, folder_weights
from sit.version import __version__


def save_checkpoint(
    folder: str | Path,
    *,
    model: SiT,
    weights: Mapping[str, torch.Tensor] | None = None,
    transport: Transport,
    vae_source: str | Path | Callable[[Path], object] | None,
    info: CheckpointInfo,
    training_state: Callable[[Path], None] | None = None,
    recipe: str = "",
    metrics: Mapping[str, float] | None = None,
) -> Path:
    """Write one checkpoint folder; it appears under its name only when it is complete.

    Args:
        folder: where; must not exist.
        model: the network, whose configuration is saved.
        weights: the weights to sample with (the EMA's), by the network's keys, buffers optional; None takes the
            network's own.
        transport: the training objective, a component of the pipeline.
        vae_source: a local folder, whose files are copied; ``digits`` or ``none``; a name on the Hub; or a function
            that writes the VAE's folder, or returns its name on the Hub.
        info: what the checkpoint is.
        training_state: called with the folder ``training/`` to fill it; None for a checkpoint that only samples.
        recipe: the settings of the training as YAML, for the model card; empty if unknown.
        metrics: the last ones by name, for the model card.

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
        write_loader(place)
        _write_index(place, vae_name, info)
        # after the index, which so has no checksum of it: who publishes a checkpoint edits its card
        (place / "README.md").write_text(model_card(model, transport, info, recipe=recipe, metrics=metrics or {}))
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


def _put_vae(place: Path, source: str | Path | Callable[[Path], object] | None) -> str | None:
    """Put a VAE that is not on the Hub into the checkpoint, and return None; or return the name of one on the Hub."""
    if source is None:
        return None
    if callable(source):
        name = source(place)
        return None if place.is_dir() else str(name)
    if is_pixels(source):
        pixel_codec(str(source)).save_pretrained(place)
        return None
    if str(source) == "digits":
        source = DIGITS_VAE
    if not Path(source).is_dir():
        if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(source)):
            raise UserError(f"`vae={source}`: no such folder, and not a Hub name like stabilityai/sd-vae-ft-ema")
        return str(source)
    source = vae_folder(source)
    weights = folder_weights(source)
    place.mkdir()
    shutil.copyfile(source / "config.json", place / "config.json")  # no link: damage to one would be damage to all
    if weights == [source / WEIGHTS]:
        shutil.copyfile(weights[0], place / WEIGHTS)
    else:  # shards or a variant, which would have to be asked for by name
        save_file(load_folder_weights(weights), place / WEIGHTS, metadata={"format": "pt"})
    return None


def _model_index(place: Path, vae_name: str | None, info: CheckpointInfo) -> dict[str, Any]:
    import diffusers

    found: list[str | None] = [None, None]
    if (place / "vae").is_dir():
        name = read_json(place / "vae" / "config.json").get("_class_name", "AutoencoderKL")
        found = ["sit" if name == "PixelCodec" else "diffusers", name]
    return {
        "_class_name": PIPELINE_CLASS,
        "_diffusers_version": diffusers.__version__,
        "transformer": ["sit", "SiT"],
        "transport": ["sit", "Transport"],
        "vae": found,
        "vae_name": vae_name,
        "id2label": {str(label): name for label, name in enumerate(info.label_names)} or None,
    }


def _write_index(place: Path, vae_name: str | None, info: CheckpointInfo) -> None:
    write_index(place, {"written_by": f"sit-atconv {__version__}", **dataclasses.asdict(info), "vae": vae_name})
