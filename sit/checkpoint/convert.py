"""``python -m sit.checkpoint``: tell what a checkpoint is, and convert between ours and the published layouts."""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from safetensors.torch import load_file, save_file

from sit.checkpoint.export import to_layout
from sit.checkpoint.find import find_checkpoints, is_run, resolve
from sit.checkpoint.info import WEIGHTS, CheckpointInfo, read_info, read_json
from sit.checkpoint.integrity import INDEX, flaw
from sit.checkpoint.published import Hints, read_published
from sit.checkpoint.save import save_checkpoint
from sit.model import MODELS, current_config
from sit.utils.cli import one_line_errors
from sit.utils.errors import UserError, entry_point, with_flags
from sit.utils.files import atomic_write
from sit.utils.tables import text_table

PUBLISHED_CLASS_DROPOUT = 0.1
"""What the published training script has for a network with a null class; a network doesn't say what it was."""


@dataclass
class Convert:
    """Write a checkpoint in another layout. Weights are never changed in value; there and back is bitwise."""

    source: tyro.conf.Positional[Path]
    """a published .pt or .safetensors file, or a run or checkpoint folder of ours"""
    target: tyro.conf.Positional[Path]
    """what to write: a folder in our layout, else a .pt or .safetensors file; must not exist"""
    layout: Literal["ours", "published", "training", "repa"] = "ours"
    """ours: a diffusers folder. published: the bare state dict of SiT, of ATConv's SiT variant and of the hybrid.
    training: the same inside a training checkpoint (model, ema, args). repa: the bare state dict of ATConv's REPA
    variant"""
    vae: str | None = None
    """in our layout: the VAE to name, a Hub name, or a folder to take in"""
    hints: Annotated[Hints, tyro.conf.arg(name="")] = field(default_factory=Hints)


@dataclass
class Inspect:
    """Print what a file or folder is."""

    path: tyro.conf.Positional[Path]
    """any weights file, checkpoint or run"""
    hints: Annotated[Hints, tyro.conf.arg(name="")] = field(default_factory=Hints)


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
    source = resolve(options.source)
    return _to_ours(source, options) if options.layout == "ours" else _to_file(source, options)


def _to_ours(source: Path, options: Convert) -> Path:
    if source.is_dir():
        raise UserError(f"{source} is in our layout already; choose `layout=published`, training or repa")
    published = read_published(source, options.hints)
    return save_checkpoint(
        options.target,
        model=published.build(),
        transport=published.transport(),
        vae_source=options.vae or published.vae_name,
        info=published.info,
    )


def _to_file(source: Path, options: Convert) -> Path:
    if source.is_dir():
        network = source / "transformer" if (source / "transformer").is_dir() else source
        config, info = current_config(read_json(network / "config.json")), read_info(source)
        state = load_file(network / WEIGHTS)
        transport = network.parent / "transport" / "transport_config.json"
        transport = read_json(transport) if transport.is_file() else {}
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
            torch.save(weights, temporary)
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
    if path.is_dir() and is_run(path):
        lines = [f"{path}: a run"]
        for step, folder in find_checkpoints(path):
            reason = flaw(folder)
            lines.append(f"  step {step}: {folder}, {'complete' if reason is None else f'not usable: {reason}'}")
        if not find_checkpoints(path):
            return "\n".join([*lines, "  no checkpoint yet"])
        path = resolve(path)
        return "\n".join([*lines, "", _describe_folder(path)])
    place = resolve(path)
    return _describe_folder(place) if place.is_dir() else _describe_file(place, options.hints)


def _describe_folder(place: Path) -> str:
    network = place / "transformer" if (place / "transformer").is_dir() else place
    config = current_config(read_json(network / "config.json"))
    if config.get("_class_name") != "SiT":
        return f"{place}: a diffusers folder of {config.get('_class_name')}, not of SiT"
    transport_file = place / "transport" / "transport_config.json"
    transport = read_json(transport_file) if transport_file.is_file() else {}
    kind = "a checkpoint of ours, complete" if (place / INDEX).is_file() else "a diffusers folder"
    tensors = {}
    for file in sorted(network.glob("*.safetensors")):
        tensors |= load_file(file)
    info = read_info(place)
    vae = "in the folder" if (place / "vae").is_dir() else _vae_name(place)
    resumes = "yes" if (place / "training").is_dir() else "no (no training/)"
    return "\n".join([f"{place}: {kind}", _table(config, tensors, transport, info, vae), f"  resumable: {resumes}"])


def _vae_name(place: Path) -> str | None:
    index = place / "model_index.json"
    return read_json(index).get("vae_name") if index.is_file() else None


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
    config: dict[str, Any],
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


@entry_point
def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    with one_line_errors():
        options = tyro.cli(
            Annotated[Convert, tyro.conf.subcommand("convert")] | Annotated[Inspect, tyro.conf.subcommand("inspect")],
            args=arguments,
            prog="python -m sit.checkpoint",
            description=__doc__,
        )
    if isinstance(options, Convert):
        print(f"wrote {convert(options)}")
    else:
        print(inspect(options))
