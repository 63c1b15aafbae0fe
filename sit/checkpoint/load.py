"""Reading any checkpoint, of ours or a published one, with all that sampling needs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from safetensors import SafetensorError

from sit.checkpoint.find import resolve
from sit.checkpoint.info import WEIGHTS, CheckpointInfo, read_info, read_json
from sit.checkpoint.published import Hints, read_published
from sit.latents.vae import load_vae
from sit.model import SiT
from sit.transport.transport import Transport
from sit.utils.errors import UserError, first_line


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
        if self.vae_source is None:
            raise UserError(f"{self.path} does not say which VAE it belongs to: give `vae`, a name or a folder")
        return load_vae(self.vae_source, self.device)


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
        path: a run folder (its newest complete checkpoint is taken), a checkpoint or diffusers folder, or a published
            ``.pt`` or ``.safetensors`` file (see :mod:`sit.checkpoint.published`).
        vae: a folder or a name on the Hub, instead of the VAE that the checkpoint names.
        device: where the network goes.
        dtype: its dtype; None keeps the file's.
        **overrides: fields of :class:`sit.checkpoint.published.Hints`, for published files that leave something open.

    Returns:
        The network in evaluation mode, without gradients; its transport; the VAE on request; and the information.

    Raises:
        UserError: nothing usable at ``path``, or a file that is cut off, unsafe to open or of another architecture.
    """
    place = resolve(path)
    if place.is_file():
        foreign = read_published(place, Hints(**overrides))
        model, transport, info, vae_source = foreign.build(), foreign.transport(), foreign.info, foreign.vae_name
    else:
        model, transport, info, vae_source = _read_folder(place)
        told = {name for name, value in overrides.items() if value != getattr(Hints(), name)}
        if unused := sorted(told - {"image_size"}):  # which may be meant for the images to come
            names = ", ".join(f"`{name}`" for name in unused)
            raise UserError(f"{place} says itself what it is; {names} only serve for published weights files")
    model = model.to(device).eval().requires_grad_(False)
    if dtype is not None:
        # not model.to: diffusers warns there of layers kept in float32, even if there are none
        torch.nn.Module.to(model, dtype=dtype)
    source = str(vae) if vae is not None else vae_source
    return Loaded(model, transport, info, source, torch.device(device), place)


def _read_folder(place: Path) -> tuple[SiT, Transport, CheckpointInfo, str | None]:
    is_pipeline = (place / "model_index.json").is_file()
    model = read_network(place / "transformer" if is_pipeline else place)
    has_transport = (place / "transport" / Transport.config_name).is_file()
    transport = Transport.from_pretrained(place / "transport") if has_transport else Transport()
    model_index = read_json(place / "model_index.json") if is_pipeline else {}
    vae = str(place / "vae") if (place / "vae").is_dir() else model_index.get("vae_name")
    return model, transport, read_info(place), vae


def read_network(folder: Path) -> SiT:
    """Read the network of a folder with ``config.json`` and safetensors weights.

    Raises:
        UserError: the folder holds another class of network, or a file is missing, cut off or does not fit.
    """
    config = read_json(folder / "config.json")
    if config.get("_class_name") != "SiT":
        raise UserError(f"{folder / 'config.json'} is that of {config.get('_class_name')}, not of SiT")
    if not any(folder.glob("diffusion_pytorch_model*.safetensors*")):
        raise UserError(f"{folder} has no {WEIGHTS}")
    try:
        model, report = SiT.from_pretrained(folder, use_safetensors=True, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"the network in {folder} can't be read: {first_line(error)}") from error
    if wrong := [*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]]:
        raise UserError(f"the weights in {folder} do not fit its config.json: {len(wrong)} keys, such as {wrong[0]}")
    return model
