"""Reading any checkpoint, of ours or a published one, with all that sampling needs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, get_type_hints

import torch
from diffusers import AutoencoderKL

from sit.checkpoint.find import resolve
from sit.checkpoint.hints import Hints
from sit.checkpoint.info import CheckpointInfo, read_info, read_vae_name
from sit.checkpoint.posthoc_ema import Reconstruction, find_reconstruction
from sit.checkpoint.published import read_published
from sit.checkpoint.weights_file import load_folder_weights, stored_shapes
from sit.latents.likeness import difference
from sit.latents.vae import check_channels, load_vae
from sit.model import SiT, current_config
from sit.transport.transport import Transport
from sit.utils.errors import UserError
from sit.utils.reading import read_json, reading, typed
from sit.utils.weight_files import folder_weights

LARGEST_LATENT = 1 << 13
"""sides of the latents that a configuration may name: 65,536 pixels with a downsampling of 8"""


@dataclass
class Loaded:
    """A checkpoint ready for sampling: the network in evaluation mode on its device, and what goes with it.

    ``vae`` is loaded from ``vae_source`` (a folder, or a name on the Hub) when it is first asked for. ``average`` is
    what the weights were put together from, if they are not those that the checkpoint stores. ``guide`` is a second
    checkpoint, for autoguidance.
    """

    model: SiT
    transport: Transport
    info: CheckpointInfo
    vae_source: str | None
    device: torch.device
    path: Path
    average: Reconstruction | None = None
    guide: Loaded | None = None

    @property
    def guide_network(self) -> SiT | None:
        """The network to guide away from, if it is another one's work than the null label's."""
        return None if self.guide is None else self.guide.model

    @property
    def weights_name(self) -> str:
        """Where the weights are from, and which average they are."""
        which = "as stored" if self.average is None else f"{self.average}, step {self.info.step}"
        return f"{self.path}, {which}"

    @cached_property
    def vae(self) -> AutoencoderKL:
        """The VAE, on the network's device.

        Raises:
            UserError: the checkpoint names none, can't be had, or has latents of other channels than the network's.
        """
        if self.vae_source is None:
            raise UserError(f"{self.path} does not say which VAE it belongs to: give `vae`, a name or a folder")
        vae = load_vae(self.vae_source, self.device)
        check_channels(vae, self.vae_source, self.model.config["in_channels"], f"the network in {self.path}")
        return vae


def load_for_sampling(
    path: str | Path,
    *,
    ema: float | None = None,
    vae: str | Path | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    guide: str | Path | None = None,
    **overrides: Any,
) -> Loaded:
    """Read a checkpoint, of ours or a published one, with everything that sampling needs.

    Args:
        path: a run folder (its newest complete checkpoint is taken), a checkpoint or diffusers folder, or a published
            ``.pt`` or ``.safetensors`` file (see :mod:`sit.checkpoint.published`).
        ema: relative length of the average to reconstruct at the checkpoint's step from its run's snapshots
            (:mod:`sit.checkpoint.posthoc_ema`), instead of the weights that the checkpoint stores.
        vae: a folder or a name on the Hub, instead of the VAE that the checkpoint names.
        device: where the network goes.
        dtype: its dtype; None keeps the file's.
        guide: a second checkpoint to guide away from, of any mixer and size, that was trained to predict the same, of
            the same latents and classes.
        **overrides: fields of :class:`sit.checkpoint.hints.Hints`, for published files that leave something open.

    Returns:
        The network in evaluation mode, without gradients; its transport; the VAE on request; and the information.

    Raises:
        UserError: nothing usable at ``path`` or ``guide``, a guide of other classes or of other latents, as far as the
            files here tell, or a file that is cut off, unsafe to open or of another architecture; an average that can't
            be reconstructed.
    """
    place = resolve(path)
    average = None if ema is None else find_reconstruction(place, ema)
    if place.is_file():
        foreign = read_published(place, Hints(**overrides), vae)
        model, transport, info, vae_source = foreign.build(), foreign.transport(), foreign.info, foreign.vae_name
    else:
        model, transport, info, vae_source = _read_folder(place)
        Hints(**overrides).refuse_for(place, but=("image_size",))  # which may be meant for the images to come
    if average is not None:
        average.load_into(model)
    model = model.to(device).eval().requires_grad_(False)
    if dtype is not None:
        # not model.to: diffusers warns there of layers kept in float32, even if there are none
        torch.nn.Module.to(model, dtype=dtype)
    source = str(vae) if vae is not None else vae_source
    loaded = Loaded(model, transport, info, source, torch.device(device), place, average)
    if guide is not None:
        hints = overrides if resolve(guide).is_file() else {}  # what one file leaves open, its like does too
        loaded.guide = load_for_sampling(guide, vae=vae, device=device, dtype=dtype, **hints)
        _check_guide(loaded, loaded.guide)
    return loaded


def _check_guide(loaded: Loaded, guide: Loaded) -> None:
    """Raise UserError unless both networks answer the same question."""
    both_have_names = bool(loaded.info.label_names and guide.info.label_names)
    for what, of in (
        ("the interpolant", lambda one: one.transport.config["interpolant"]),
        ("the prediction", lambda one: one.transport.prediction),
        ("latent channels:", lambda one: one.model.config["in_channels"]),
        ("classes:", lambda one: one.model.config["num_classes"]),
        ("names of the classes", lambda one: one.info.label_names if both_have_names else None),
    ):
        if of(loaded) != of(guide):
            raise UserError(f"`guide={guide.path}` can't guide {loaded.path}: {what} {of(guide)}, not {of(loaded)}")
    if loaded.vae_source is not None and guide.vae_source is not None:
        if (found := difference(loaded.vae_source, guide.vae_source)) is not None:
            raise UserError(
                f"`guide={guide.path}` can't guide {loaded.path}: its latents are {found}; give a guide that was "
                "trained on the same, or, if both were, their `vae`"
            )


def _read_folder(place: Path) -> tuple[SiT, Transport, CheckpointInfo, str | None]:
    is_pipeline = (place / "model_index.json").is_file()
    model = read_network(place / "transformer" if is_pipeline else place)
    return model, Transport(**transport_options(place)), read_info(place), stored_vae(place)


def stored_vae(place: Path) -> str | None:
    """The VAE that the folder of a checkpoint holds, or else names; None if it does neither."""
    return str(place / "vae") if (place / "vae").is_dir() else read_vae_name(place)


def read_network(folder: Path) -> SiT:
    """Read the network of a folder with ``config.json`` and safetensors weights.

    Raises:
        UserError: the folder holds another class of network, or a file is missing, cut off or does not fit.
    """
    files = folder_weights_of(folder)
    model, shapes = empty_network(folder, files)
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if wrong := [name for name in sorted(own.keys() | shapes.keys()) if own.get(name) != shapes.get(name)]:
        raise UserError(f"the weights in {folder} do not fit its config.json: {len(wrong)} keys, such as {wrong[0]}")
    state = load_folder_weights(files)
    with reading(folder):
        model.load_state_dict(state, assign=True)
    return model.eval()


def folder_weights_of(folder: Path) -> list[Path]:
    """:func:`sit.utils.weight_files.folder_weights` of a SiT's folder.

    Raises:
        UserError: there are none, or its ``config.json`` is that of another class.
    """
    network_config(folder)
    return folder_weights(folder)


def empty_network(folder: Path, files: list[Path]) -> tuple[SiT, dict[str, tuple[int, ...]]]:
    """The network that a folder's ``config.json`` describes, on the meta device, and the shapes of its weights.

    A configuration may name any size: this takes no memory for it, and no more blocks than the files hold.
    """
    config, shapes = network_config(folder), stored_shapes(files)
    blocks = {match[1] for name in shapes if (match := re.match(r"blocks\.(\d+)\.", name))}
    if config.get("depth", len(blocks)) != len(blocks):
        raise UserError(
            f"the weights in {folder} do not fit its config.json: {len(blocks)} blocks for a depth of {config['depth']}"
        )
    with reading(folder / "config.json"), torch.device("meta"):
        return SiT(**config), shapes


def network_config(folder: Path) -> dict[str, Any]:
    """The arguments of the network in a folder's ``config.json``, with today's names.

    Raises:
        UserError: it can't be read, is that of another class, or says nonsense.
    """
    path = folder / "config.json"
    stored = read_json(path)
    if stored.get("_class_name") != "SiT":
        raise UserError(f"{path} is that of {stored.get('_class_name')}, not of SiT")
    with reading(path):
        config = _arguments(current_config(stored), SiT, path)
    size = config.get("input_size", 32)
    if max((size,) if isinstance(size, int) else size) > LARGEST_LATENT:
        raise UserError(f"{path}: input_size {size} is beyond any latent's")
    return config


def transport_options(place: Path) -> dict[str, Any]:
    """The arguments of the transport in a checkpoint's folder; none if it has no transport.

    Raises:
        UserError: its configuration can't be read, or says nonsense.
    """
    path = place / "transport" / Transport.config_name
    if not path.is_file():
        return {}
    options = _arguments(read_json(path), Transport, path)
    with reading(path):
        Transport(**options)
    return options


def _arguments(stored: Mapping[str, Any], made: type, path: Path) -> dict[str, Any]:
    """What a diffusers configuration says as arguments of the class ``made``; an unknown name is refused."""
    said = {name: value for name, value in stored.items() if not name.startswith("_")}
    if "quantization_config" in said:
        raise UserError(f"{path}: quantized weights are not read here; save them in a floating-point type")
    hints = {name: hint for name, hint in get_type_hints(made.__init__).items() if name not in ("return", "seed")}
    return typed(said, hints, path)
