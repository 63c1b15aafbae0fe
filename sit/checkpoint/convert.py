"""``python -m sit.checkpoint``: tell what a checkpoint is, and convert between ours and the published layouts."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from sit.checkpoint.arguments import Convert, Inspect
from sit.checkpoint.export import to_layout
from sit.checkpoint.find import find_checkpoints, is_run, resolve
from sit.checkpoint.hints import Hints
from sit.checkpoint.info import CheckpointInfo, read_info, read_vae_name
from sit.checkpoint.integrity import INDEX, flaw
from sit.checkpoint.load import read_network, transport_options
from sit.checkpoint.published import read_published
from sit.checkpoint.save import save_checkpoint
from sit.model import MODELS
from sit.utils.errors import UserError, with_flags
from sit.utils.files import atomic_write, save_torch
from sit.utils.reading import read_json
from sit.utils.tables import text_table

PUBLISHED_CLASS_DROPOUT = 0.1
"""What the published training script has for a network with a null class; a network doesn't say what it was."""


def convert(options: Convert) -> Path:
    """Do what ``options`` say, and return the target.

    Raises:
        UserError: the source can't be read or leaves something open, or the target exists or can't be written.
    """
    if options.target.exists():
        raise UserError(f"{options.target} exists already; it is not overwritten")
    suffix = options.target.suffix
    if options.layout == "ours" and suffix in (".pt", ".safetensors"):
        raise UserError(f"`layout=ours` writes a folder, and {options.target} is a file's name; change `layout`")
    kinds = (".pt",) if options.layout == "training" else (".pt", ".safetensors")
    if options.layout != "ours" and suffix not in kinds:
        raise UserError(f"`layout={options.layout}` writes a file: {options.target} must end in {' or '.join(kinds)}")
    if options.vae is not None and options.layout != "ours":
        raise UserError(f"`vae={options.vae}`: a file of `layout={options.layout}` names no VAE; leave it out")
    source = resolve(options.source)
    return _to_ours(source, options) if options.layout == "ours" else _to_file(source, options)


def _to_ours(source: Path, options: Convert) -> Path:
    if source.is_dir():
        raise UserError(f"{source} is in our layout already; choose `layout=published`, training or repa")
    published = read_published(source, options.hints, options.vae)
    return save_checkpoint(
        options.target,
        model=published.build(),
        transport=published.transport(),
        vae_source=options.vae or published.vae_name,
        info=published.info,
    )


def _to_file(source: Path, options: Convert) -> Path:
    if source.is_dir():
        options.hints.refuse_for(source)
        network = read_network(_network_folder(source))
        config, state, info = dict(network.config), network.state_dict(), read_info(source)
        transport = transport_options(source)
    else:
        published = read_published(source, options.hints)
        config, info = dict(published.build().config), published.info
        state, transport = published.state, published.transport_config
    layout = "published" if options.layout == "training" else options.layout
    weights: dict[str, Any] = to_layout(state, config, layout)
    if options.layout == "training":
        weights = {"model": weights, "ema": weights, "args": _arguments(config, info, transport), "steps": info.step}
    with atomic_write(options.target) as temporary:
        if options.target.suffix == ".pt":
            save_torch(weights, temporary)
        else:
            save_file(weights, temporary, metadata={"format": "pt"})
    return options.target


def _arguments(config: dict[str, Any], info: CheckpointInfo, transport: dict[str, Any]) -> argparse.Namespace:
    """The published training script's command line, as far as it describes the network and the transport."""
    interpolants = {"linear": "Linear", "gvp": "GVP", "vp": "VP"}
    loss_weight = transport.get("loss_weight", "none")
    size = info.image_size or (None, None)
    return argparse.Namespace(
        model=model_name(config),
        image_size=size[0] if size[0] == size[1] else list(size),
        num_classes=config["num_classes"],
        class_dropout_prob=PUBLISHED_CLASS_DROPOUT if config["null_class"] else 0.0,
        path_type=interpolants[transport.get("interpolant", "linear")],
        prediction=transport.get("prediction", "velocity"),
        loss_weight=None if loss_weight == "none" else loss_weight,
        train_eps=transport.get("train_eps"),
        sample_eps=transport.get("sample_eps"),
    )


def model_name(config: dict[str, Any]) -> str:
    """The published name of a configuration, e.g. ``SiT-XL/2``, or ``SiT`` if it is none of the table's."""
    for name, entry in MODELS.items():
        if all(config[key] == value for key, value in entry.items()):
            return name
    return "SiT"


def inspect(options: Inspect) -> str:
    """What is at a path, as lines of text.

    Raises:
        UserError: nothing is there, or it is unreadable or no SiT.
    """
    path = options.path
    if path.is_dir():
        options.hints.refuse_for(path)
    if path.is_dir() and is_run(path):
        lines = [f"{path}: a run"]
        for step, folder in find_checkpoints(path):
            reason = flaw(folder)
            lines.append(f"  step {step}: {folder}, {'complete' if reason is None else f'not usable: {reason}'}")
        if not find_checkpoints(path):
            return "\n".join([*lines, "  no checkpoint yet"])
        path = resolve(path)
        return "\n".join([*lines, "", _describe_folder(path)])
    place = resolve(path, unread=None)
    return _describe_folder(place) if place.is_dir() else _describe_file(place, options.hints)


def _describe_folder(place: Path) -> str:
    if (name := read_json(_network_folder(place) / "config.json").get("_class_name")) != "SiT":
        return f"{place}: a diffusers folder of {name}, not of SiT"
    network = read_network(_network_folder(place))
    config, tensors, transport, info = network.config, network.state_dict(), transport_options(place), read_info(place)
    kind = "a checkpoint of ours, complete" if (place / INDEX).is_file() else "a diffusers folder"
    vae = "in the folder" if (place / "vae").is_dir() else read_vae_name(place)
    resumes = "yes" if (place / "training").is_dir() else "no (no training/)"
    return "\n".join([f"{place}: {kind}", _table(config, tensors, transport, info, vae), f"  resumable: {resumes}"])


def _network_folder(place: Path) -> Path:
    return place / "transformer" if (place / "transformer").is_dir() else place


def _describe_file(path: Path, hints: Hints) -> str:
    published = read_published(path, hints)
    is_bare = published.container == "bare"
    container = "a bare state dict" if is_bare else f"a training checkpoint, {published.container!r}"
    layout = {"published": "the published SiT layout", "repa": "the REPA layout"}[published.layout]
    config = {"input_size": None, **published.config}
    lines = [
        f"{path}: {container} in {layout}",
        _table(config, published.state, published.transport_config, published.info, published.vae_name),
    ]
    lines += [f"  note: {notice}" for notice in published.notices]
    lines += [f"  open: {with_flags(question)}" for question in published.questions]
    if not published.questions:
        published.network()  # says so if the shapes do not fit together
    return "\n".join(lines)


def _table(
    config: Mapping[str, Any],
    tensors: dict[str, torch.Tensor],
    transport: dict[str, Any],
    info: CheckpointInfo,
    vae: str | None,
) -> str:
    dtypes = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values())
    parameters = sum(tensor.numel() for name, tensor in tensors.items() if name != "pos_embed")
    latent = " x ".join(map(str, config["input_size"])) if config["input_size"] else "unknown"
    rows = {
        "model": f"{model_name(config)}: {config['depth']} blocks of {config['hidden_size']} channels, "
        f"{config['num_heads']} heads, patch {config['patch_size']}",
        "parameters": f"{parameters:,} ({', '.join(dtypes)})",
        "block": config.get("block", "published"),
        "mixer": config["mixer"],
        "positional table": "yes" if config["positional_embedding"] else "no",
        "latent": f"{config['in_channels']} x {latent}" + (", learn_sigma" if config["learn_sigma"] else ""),
        "images": " x ".join(map(str, info.image_size)) if info.image_size else "of unknown size",
        "classes": f"{config['num_classes']}, {'with' if config['null_class'] else 'without'} a null class",
        "time": "from data to noise (reversed when read)" if config.get("time_reversed") else "from noise to data",
        "transport": ", ".join(f"{k} {v}" for k, v in transport.items() if not k.startswith("_") and v is not None)
        or "not stored; linear interpolant and velocity are assumed",
        "VAE": vae or "unknown",
        "training": f"step {info.step:,}, {info.images_seen:,} images seen{f', on {info.data}' if info.data else ''}",
    }
    return text_table([(f"{name}:", value) for name, value in rows.items()], indent="  ")
