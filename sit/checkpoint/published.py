"""The published checkpoints of SiT and ATConv: what a file is, told from its keys and shapes; conversion both ways.

Our network has the keys of the published SiT, so only two things need converting. ATConv's REPA variant keeps its
projections as 1×1 convolutions, whose weights (C, C, 1, 1) are ours (C, C) seen otherwise. And its time runs from data
to noise, which the network's ``time_reversed`` answers for. No value is changed: the way there and back is bitwise.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sit.checkpoint.hints import Hints
from sit.checkpoint.info import CheckpointInfo
from sit.checkpoint.weights_file import WeightsFile, read_weights
from sit.latents.vae import check_channels, downsampling, empty_vae
from sit.model import MODELS, SIZES, SiT, sincos_table
from sit.transport.transport import Transport
from sit.utils.errors import UserError
from sit.utils.reading import reading, typed

DOWNSAMPLING = 8  # pixels per latent of the VAE that all published networks use, unless another is named


VAE_NAMES = {name: f"stabilityai/sd-vae-ft-{name}" for name in ("ema", "mse")}


_FREQUENCIES = 256


CONVOLUTIONS = ("kernel_proj", "x_proj", "proj")  # of ATConv, which its REPA variant has as 1×1 convolutions


ACTIVATIONS = {"published": "gelu_tanh", "repa": "silu"}  # of ATConv's kernel branch, which no file tells


_INTERPOLANTS = {"linear": "linear", "gvp": "gvp", "cosine": "gvp", "vp": "vp"}


_PREDICTIONS = {"velocity": "velocity", "v": "velocity", "score": "score", "noise": "noise"}


_LATER_BLOCKS = "decoder_blocks."  # REPA's older files, for the blocks beyond the one that is aligned


_REPA_ARGUMENTS = {"enc_type", "proj_coeff", "encoder_depth"}


_ARGUMENTS = {
    "model": str | None,
    "image_size": int | tuple[int, int] | None,
    "resolution": int | tuple[int, int] | None,
    "num_classes": int | None,
    "class_dropout_prob": float | None,
    "path_type": str | None,
    "prediction": str | None,
    "loss_weight": str | None,
    "train_eps": float | None,
    "sample_eps": float | None,
    "vae": str | None,
    "data_path": str | None,
    "data_dir": str | None,
}
"""What is read of the training's command line in a file, and of which type it is."""


logger = logging.getLogger(__name__)


@dataclass
class Published:
    """What a published file was found to be.

    Attributes:
        path: the file.
        layout: ``published`` (SiT, and ATConv's SiT variant and hybrid) or ``repa``.
        container: ``bare``, or the name under which the weights stood.
        config: arguments of our network; complete if there are no questions.
        state: the weights in our layout.
        transport_config: arguments of the transport.
        info: what sampling wants to know.
        vae_name: the VAE it was trained with, as the file says or as all published ones were.
        questions: what the file leaves open, each naming the argument that answers it.
        notices: what the user should know about the reading.
    """

    path: Path
    layout: str
    container: str
    config: dict[str, Any]
    state: dict[str, torch.Tensor]
    transport_config: dict[str, Any]
    info: CheckpointInfo
    vae_name: str | None
    questions: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    def network(self) -> SiT:
        """The network on the meta device: its shapes and configuration without memory.

        Raises:
            UserError: the file leaves something open, or the shapes do not fit together.
        """
        if self.questions:
            raise UserError(f"{self.path}: {'; '.join(self.questions)}")
        with reading(self.path), torch.device("meta"):
            network = SiT(**self.config)
        own = network.state_dict()
        for name in own.keys() | self.state.keys():
            if name not in self.state or name not in own or own[name].shape != self.state[name].shape:
                raise UserError(f"{self.path} is a SiT of another make: its {name} does not fit the rest")
        return network

    def build(self) -> SiT:
        """The network with its weights, of the file's dtype.

        Raises:
            UserError: as :meth:`network`.
        """
        network = self.network()
        for notice in self.notices:
            logger.warning("note: %s: %s", self.path, notice)
        network.load_state_dict(self.state, assign=True)
        return network

    def transport(self) -> Transport:
        """The transport that the network was trained with, as far as the file says; else the published default."""
        with reading(self.path):
            return Transport(**self.transport_config)


def read_published(path: str | Path, hints: Hints | None = None, vae: str | Path | None = None) -> Published:
    """Read a published file and tell what it is.

    Args:
        path: a ``.pt`` or ``.safetensors`` file: a bare state dict or a training checkpoint.
        hints: what the user knows better.
        vae: the VAE of its latents, which says how many pixels a latent is; if None or not here, as published ones.

    Raises:
        UserError: the file is unreadable or of another architecture, or the VAE's latents have other channels. What it
            merely leaves open is listed in ``questions`` and raised when the network is built.
    """
    hints = hints or Hints()
    file = read_weights(Path(path), hints.weights)
    codec = None if vae is None else empty_vae(vae)
    with reading(path):
        found = infer(file, Path(path), hints, DOWNSAMPLING if codec is None else downsampling(codec))
    if codec is not None:
        check_channels(codec, str(vae), found.config["in_channels"], str(path))
    return found


def infer(file: WeightsFile, path: Path, hints: Hints, factor: int = DOWNSAMPLING) -> Published:
    """Tell the architecture from keys and shapes; see :func:`read_published`."""
    state, arguments = one_row_of_blocks(file.state), _known_arguments(file.arguments, path)
    _refuse_other_architectures(state, path)
    result = Published(path, "published", file.container, {}, state, {}, CheckpointInfo(step=file.step), None)

    projectors = [name for name in state if name.startswith("projectors.")]
    for name in projectors:
        del state[name]
    if projectors:
        result.notices.append(f"dropped {len(projectors)} weights of projector heads, which only REPA's loss uses")

    hidden, channels, patch, _ = state["x_embedder.proj.weight"].shape
    depth = _depth(state, path)
    mixers = [_mixer(state, index, hidden, path) for index in range(depth)]
    has_two_rows = any(name.startswith(_LATER_BLOCKS) for name in file.state)
    is_repa = (
        bool(projectors)
        or has_two_rows
        or any("silu" in mixer for mixer in mixers)
        or bool(_REPA_ARGUMENTS & set(arguments))
    )
    result.layout = "repa" if is_repa else "published"
    for name in [name for name in state if name.endswith("_proj.weight") or name.endswith("attn.proj.weight")]:
        if state[name].dim() == 4 and state[name].shape[2:] == (1, 1):
            state[name] = state[name].flatten(1)

    out_channels = state["final_layer.linear.weight"].shape[0] / patch**2
    if out_channels not in (channels, 2 * channels):
        raise UserError(f"{path} is a SiT of another make: {channels} channels in, {out_channels:g} out")
    mixer = ",".join(_shortest_period(mixers))
    result.config = dict(
        patch_size=patch,
        in_channels=channels,
        hidden_size=hidden,
        depth=depth,
        num_heads=_num_heads(state, hidden, mixers, arguments=arguments, hints=hints, questions=result.questions),
        mlp_ratio=state["blocks.0.mlp.fc1.weight"].shape[0] / hidden,
        mixer=mixer,
        learn_sigma=out_channels == 2 * channels,
        positional_embedding="pos_embed" in state,
        time_reversed=is_repa if hints.time_reversed is None else hints.time_reversed,
        **_classes(state["y_embedder.embedding_table.weight"].shape[0], arguments, hints, path),
    )
    if "pos_embed" not in state and any(mixer.startswith("attention") for mixer in mixers):
        result.notices.append("attention without a positional table: it sees no order among its tokens")
    if grid := _grid(state, patch, factor, arguments=arguments, hints=hints, result=result):
        result.config["input_size"] = tuple(side * patch for side in grid)
        result.info.image_size = tuple(side * factor for side in result.config["input_size"])
        _check_told_size(arguments, factor, result)

    result.transport_config = _transport(arguments, hints, path)
    if result.config["time_reversed"] and result.transport_config.get("prediction", "velocity") != "velocity":
        raise UserError(f"{path}: a network with reversed time must predict the velocity (`prediction=velocity`)")
    if channels == 4:
        result.vae_name = VAE_NAMES.get(arguments.get("vae"), VAE_NAMES["ema"])
    result.info.classes, result.info.mixer = result.config["num_classes"], mixer
    result.info.data = str(arguments.get("data_path") or arguments.get("data_dir") or "")
    return result


# --- inference, part by part ---------------------------------------------------------------------------------------

_NEEDED = (
    "x_embedder.proj.weight",
    "t_embedder.mlp.0.weight",
    "y_embedder.embedding_table.weight",
    "blocks.0.mlp.fc1.weight",
    "blocks.0.adaLN_modulation.1.weight",
    "final_layer.linear.weight",
)


def _refuse_other_architectures(state: Mapping[str, torch.Tensor], path: Path) -> None:
    missing = [name for name in _NEEDED if name not in state]
    if missing:
        first = next(iter(state))
        raise UserError(f"{path} is not a SiT: it has no {missing[0]}, and keys such as {first}")
    for name in _NEEDED:
        if state[name].dim() != (4 if name == "x_embedder.proj.weight" else 2):
            raise UserError(f"{path} is a SiT of another make: its {name} is of shape {tuple(state[name].shape)}")
    if state["t_embedder.mlp.0.weight"].shape[1] != _FREQUENCIES:
        raise UserError(f"{path} is a SiT of another make: its embedders have other shapes than the published ones")
    if (table := state.get("pos_embed")) is not None and (table.dim() != 3 or len(table) != 1):
        raise UserError(f"{path} is a SiT of another make: its pos_embed is of shape {tuple(table.shape)}")


def _known_arguments(arguments: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Of the training's command line, what is read here.

    Raises:
        UserError: a value of another type, or the training was not that of a SiT.
    """
    known = {name: arguments[name] for name in arguments if name in _ARGUMENTS}
    known = typed(known, _ARGUMENTS, f"{path}: its args")
    model = known.get("model") or "SiT"
    if not model.startswith("SiT"):
        raise UserError(f"{path} is not a SiT: its args say that it was trained as {model}, which is sampled otherwise")
    return known | {name: arguments[name] for name in _REPA_ARGUMENTS & set(arguments)}


def one_row_of_blocks(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights with ``decoder_blocks.{i}`` counted on after the last of ``blocks.{i}``.

    REPA's older files have the blocks in two rows, parted after the aligned one (its ``load_legacy_checkpoints``).
    """
    first = len({name.split(".")[1] for name in state if re.match(r"blocks\.\d+\.", name)})
    later = re.compile(rf"{re.escape(_LATER_BLOCKS)}(\d+)\.")
    return {later.sub(lambda match: f"blocks.{first + int(match[1])}.", name): w for name, w in state.items()}


def _depth(state: Mapping[str, torch.Tensor], path: Path) -> int:
    """The number of blocks, which must be those from 0 on."""
    blocks = {match[1] for name in state if (match := re.match(r"blocks\.(\d+)\.", name))}
    if beyond := blocks - {str(number) for number in range(len(blocks))}:
        raise UserError(f"{path} is a SiT of another make: it has a block {min(beyond)[:20]}, and {len(blocks)} in all")
    return len(blocks)


def _mixer(state: Mapping[str, torch.Tensor], index: int, hidden: int, path: Path) -> str:
    """The mixer of one block, as a pattern entry, from the keys under ``blocks.{index}.attn``."""
    prefix = f"blocks.{index}.attn."
    weights = {name.removeprefix(prefix): w for name, w in state.items() if name.startswith(prefix)}
    if "qkv.weight" in weights:
        return "attention:qk_norm=true" if "q_norm.weight" in weights else "attention"
    taps = weights.get("kernel_gen.weight", weights.get("kernel"))  # the latter without routing, an ablation of ours
    if taps is not None and "x_proj.weight" in weights:
        kernel_size = math.isqrt(taps.shape[0])
        options = [] if kernel_size == 3 else [f"kernel_size={kernel_size}"]
        options += ["routing=false"] if "kernel" in weights else []
        options += [] if "difference_control" in weights else ["inhibition=false"]
        options += ["activation=silu"] if weights["x_proj.weight"].dim() == 4 else []
        return ":".join(["atconv", *options])
    found = ", ".join(sorted(weights)[:4]) or "nothing"
    raise UserError(f"{path}: block {index} mixes its tokens by neither attention nor ATConv; it has {found}")


def _shortest_period(entries: list[str]) -> list[str]:
    """The shortest list whose repetition gives ``entries``."""
    for length in range(1, len(entries) + 1):
        if all(entry == entries[index % length] for index, entry in enumerate(entries)):
            return entries[:length]
    return entries


def _num_heads(
    state: Mapping[str, torch.Tensor],
    hidden: int,
    mixers: list[str],
    *,
    arguments: Mapping[str, Any],
    hints: Hints,
    questions: list[str],
) -> int:
    """The attention heads, as the user, the file's args, its weights or the published sizes say; 1 if none does."""
    if hints.num_heads is not None:
        return hints.num_heads
    named = MODELS.get(str(arguments.get("model", "")))
    if named and named["hidden_size"] == hidden:
        return named["num_heads"]
    for name, weight in state.items():
        if name.endswith("attn.q_norm.weight"):
            return hidden // weight.shape[0]
    heads = {width: number for _, width, number in SIZES.values()}
    if hidden not in heads and any(mixer.startswith("attention") for mixer in mixers):
        questions.append(f"no published size is {hidden} wide, so the attention heads must be told: `num_heads`")
    return heads.get(hidden, 1)


def _classes(rows: int, arguments: Mapping[str, Any], hints: Hints, path: Path) -> dict[str, Any]:
    """The number of classes, and whether the label table has a null class."""
    classes = hints.num_classes if hints.num_classes is not None else arguments.get("num_classes")
    if classes is None:
        # known cases without a null class: the full table of ImageNet, and data of one class (FFHQ)
        classes = rows if rows in (1, 1000) else rows - 1
    if classes not in (rows, rows - 1) or classes < 1:
        told = f"its args tell of {classes} classes: give" if hints.num_classes is None else f"not {classes}: correct"
        raise UserError(f"{path} has a label table of {rows} rows, and {told} `num_classes`")
    return dict(num_classes=classes, null_class=classes == rows - 1)


def _grid(
    state: Mapping[str, torch.Tensor],
    patch: int,
    factor: int,
    *,
    arguments: Mapping[str, Any],
    hints: Hints,
    result: Published,
) -> tuple[int, int] | None:
    """The token grid (H, W) of the training: from the positional table, else as the user or the file's args say."""
    if "pos_embed" in state:
        grid = grid_of_table(state["pos_embed"])
        if grid is not None:
            return grid
        tokens = state["pos_embed"].shape[1]
        if math.isqrt(tokens) ** 2 == tokens:
            result.notices.append("its positional table is not the published one; a square grid is assumed")
            return math.isqrt(tokens), math.isqrt(tokens)
    size = hints.image_size or arguments.get("image_size") or arguments.get("resolution")
    if size is None:
        result.questions.append(
            "nothing in it says at which image size it was trained, as it has no positional table: give `image_size`"
        )
        return None
    height, width = (size, size) if isinstance(size, int) else size
    unit = patch * factor
    if height < unit or width < unit or height % unit or width % unit:
        raise UserError(f"{result.path}: `image_size={height} {width}` must be multiples of {unit} (patches × VAE)")
    return height // unit, width // unit


def _check_told_size(arguments: Mapping[str, Any], factor: int, result: Published) -> None:
    """Ask for the VAE if the file's args say another image size than the table's grid has with ``factor`` pixels."""
    told = arguments.get("image_size") or arguments.get("resolution")
    if told is not None and result.info.image_size not in ((told, told), told):
        says = told if isinstance(told, int) else "{}×{}".format(*told)
        latent, image = ("{}×{}".format(*sides) for sides in (result.config["input_size"], result.info.image_size))
        result.questions.append(
            f"its args say that it was trained on images of {says} pixels, and its {latent} latents are images of "
            f"{image} by a VAE of {factor} pixels a latent: give the one it was trained with, in a folder, as `vae`"
        )


def grid_of_table(table: torch.Tensor) -> tuple[int, int] | None:
    """The grid (H, W) whose sine-cosine table this (1, N, C) is, or None."""
    tokens, hidden = table.shape[1:]
    if hidden % 4:
        return None
    for height in sorted((h for h in range(1, tokens + 1) if tokens % h == 0), key=lambda h: abs(h * h - tokens)):
        width = tokens // height
        expected = sincos_table(hidden, torch.arange(height), torch.arange(width))
        if torch.allclose(table.float(), expected, atol=1e-2):  # half precision files round their table
            return height, width
    return None


def _transport(arguments: Mapping[str, Any], hints: Hints, path: Path) -> dict[str, Any]:
    """The transport's arguments, from the training's command line in the file and the user's hints."""
    config: dict[str, Any] = {}
    for field_name, argument, table in (
        ("interpolant", "path_type", _INTERPOLANTS),
        ("prediction", "prediction", _PREDICTIONS),
    ):
        told = getattr(hints, field_name)
        value = arguments.get(argument) if told is None else told
        if value is not None:
            if str(value).lower() not in table:
                raise UserError(f"{path} was trained with {argument} {value!r}, which is not known here")
            config[field_name] = table[str(value).lower()]
    is_velocity = config.get("prediction", "velocity") == "velocity"  # which the published code never weights
    if arguments.get("loss_weight") in ("velocity", "likelihood") and not is_velocity:
        config["loss_weight"] = arguments["loss_weight"]
    config |= {name: arguments[name] for name in ("train_eps", "sample_eps") if arguments.get(name) is not None}
    return config
