"""Representation alignment, REPA (arXiv 2410.06940): tokens of one block are drawn towards a frozen encoder's patches.

A projector on the tokens after the block ``repa_block`` is trained with the network to predict the features of the
clean image; the loss gains ``repa_weight`` times their negative cosine similarity (equation 8). Sampling knows nothing
of it. iREPA (arXiv 2512.10794) projects by one convolution over the grid, and normalizes each feature over the tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import timm
import torch
from timm.data import resolve_data_config
from torch import nn
from torch.nn import functional as F

from sit.latents.datasets import Batch
from sit.mixers.layers import on_grid
from sit.model import MODELS, SiT
from sit.training.config import TrainConfig
from sit.training.objective import Objective
from sit.transport.transport import Field
from sit.utils.errors import UserError, first_line
from sit.utils.random import global_generator, key

HIDDEN = 2048
"""Width of the projector's hidden layers, as published."""

PUBLISHED_BLOCKS = {"B": 4, "L": 8, "XL": 8}
"""size of SiT → the block that REPA's authors align"""


def aligned_block(config: TrainConfig) -> int:
    """The block that ``config`` aligns, counted from 1: its own, the published one of the size, or depth // 3."""
    if config.repa_block is not None:
        return config.repa_block
    size = config.model.removeprefix("SiT-").partition("/")[0]
    return PUBLISHED_BLOCKS.get(size, max(1, MODELS[config.model]["depth"] // 3))


def make_projector(hidden_size: int, features: int) -> nn.Sequential:
    """The published projector: (B, N, hidden_size) tokens to (B, N, features), three linear layers with SiLU between.

    Initial values are those of the network's own linear layers: Xavier-uniform weights, zero biases.
    """
    projector = nn.Sequential(
        nn.Linear(hidden_size, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, features)
    )
    for layer in projector:
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
    return projector


class ConvolutionalProjector(nn.Module):
    """iREPA's projector: one 3×3 convolution of the tokens on their grid, with PyTorch's own initial values.

    Args:
        hidden_size: channels of the tokens.
        features: channels of the encoder's features.
        grid: the tokens' (H, W).
    """

    def __init__(self, hidden_size: int, features: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid = tuple(grid)
        self.convolution = nn.Conv2d(hidden_size, features, kernel_size=3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, N, hidden_size) tokens to (B, N, features)."""
        return on_grid(self.convolution, x, self.grid)


def attach_projector(network: SiT, block: int, features: int, kind: Literal["mlp", "conv"] = "mlp") -> None:
    """Give ``network`` a projector to ``features`` channels on the tokens after its ``block``-th block, from 1.

    It is a part of the network, so that DDP and FSDP see its gradients; its keys begin with ``projector.``, and
    neither the moving average nor the weights for sampling have them.
    """
    check_block(block, len(network.blocks))
    width = network.config.hidden_size
    network.projector = (
        ConvolutionalProjector(width, features, network.grid) if kind == "conv" else make_projector(width, features)
    )
    network.projected_block = block


def check_block(block: int, depth: int) -> None:
    """Raise UserError unless the network has that block, counted from 1."""
    if not 1 <= block <= depth:
        raise UserError(f"`repa_block={block}`: the network has the blocks 1 to {depth}")


def cosine_similarity(projected: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Mean over tokens of the cosine between (B, N, D) projections and (B, N, D) features: (B,) float32."""
    return F.cosine_similarity(projected.float(), features.float(), dim=-1).mean(1)


def spatially_normalized(features: torch.Tensor, part: float) -> torch.Tensor:
    """iREPA's normalization of (B, N, D) features: (f − part · mean) / (std + 1e-6), both over an image's N tokens.

    The standard deviation is the unbiased one. Where tokens share much of a feature, their cosines say little of where
    they lie; without its mean they do.
    """
    return (features - part * features.mean(1, keepdim=True)) / (features.std(1, keepdim=True) + 1e-6)


@dataclass(frozen=True)
class Alignment:
    """The loss of another objective minus ``weight`` times the alignment of each image, which is logged.

    Attributes:
        base: the objective that the alignment is added to.
        encoder: gives the features that the network's projector is to predict.
        weight: of the alignment.
        autocast: what the encoder runs in, made anew for each batch.
        spatial_norm: the ``part`` of :func:`spatially_normalized`; None leaves the features as they are.
        until: the last step that has it (:func:`~sit.training.objective.at_step`); None for all.
    """

    base: Objective
    encoder: Encoder
    weight: float
    autocast: Callable[[], AbstractContextManager]
    spatial_norm: float | None = None
    until: int | None = None

    def __call__(self, model: Field, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Losses (b,) and the metric ``alignment`` (b,), of a network that :func:`attach_projector` has changed.

        The batch has ``images`` (b, 3, H, W) uint8 besides what ``base`` needs.
        """
        projected = None

        def network(*args, **conditions) -> torch.Tensor:
            nonlocal projected
            out, projected = model(*args, **conditions, project=True)
            return out

        loss, metrics = self.base(network, batch)
        with self.autocast():
            features = self.encoder.features(batch["images"])
        if self.spatial_norm is not None:
            features = spatially_normalized(features, self.spatial_norm)
        similarity = cosine_similarity(projected, features)
        return loss - self.weight * similarity, metrics | {"alignment": similarity}


def align(
    base: Objective,
    network: SiT,
    config: TrainConfig,
    *,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager],
) -> Alignment:
    """Add the alignment that ``config`` asks for to an objective, and the projector to the network.

    To be called before the network is wrapped or compiled and the optimizer is made.

    Raises:
        UserError: an encoder or a block that is not to be had, or a normalization over a single token.
    """
    if config.repa_spatial_norm is not None and math.prod(network.grid) == 1:
        raise UserError("`repa_spatial_norm` is over an image's tokens, and this network has one: leave it out")
    encoder = load_encoder(config.repa, network.grid, device)
    with global_generator(key(config.seed_of("weights"), "initial projector")):
        attach_projector(network, aligned_block(config), encoder.width, config.repa_projector)
    return Alignment(
        base,
        encoder,
        config.repa_weight,
        autocast,
        spatial_norm=config.repa_spatial_norm,
        until=config.repa_until,
    )


class Encoder:
    """A frozen timm network whose patch features are laid on the token grid of a SiT.

    Images are resized whole, without a crop, so that patches lie where the tokens do. A network in patches that
    takes other input sizes gets the one whose patch grid is the token grid (256 → 224 pixels for patches of 14 and
    16×16 tokens, as published); of all others, the features are resized bilinearly.

    Args:
        network: the timm network, with pretrained weights.
        grid: the tokens' (H, W).
        device: where it works.
    """

    def __init__(self, network: nn.Module, grid: tuple[int, int], device: torch.device | str = "cpu") -> None:
        data = resolve_data_config(model=network)
        self.grid, self.input_size = tuple(grid), tuple(data["input_size"][1:])
        if hasattr(network, "set_input_size") and hasattr(network, "num_prefix_tokens"):  # a vision transformer
            self.input_size = tuple(n * p for n, p in zip(self.grid, network.patch_embed.patch_size, strict=True))
            network.set_input_size(img_size=self.input_size)
        self.network = network.to(device).eval().requires_grad_(False)
        self.device, self.width = torch.device(device), network.num_features
        self.mode = data["interpolation"] if data["interpolation"] in ("bilinear", "bicubic") else "bicubic"
        self.mean, self.std = (torch.tensor(data[name], device=device).view(1, -1, 1, 1) for name in ("mean", "std"))

    @torch.no_grad()
    def features(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) uint8 images to (B, N, width) float32 features, row-major over the token grid."""
        pixels = images.to(self.device).float() / 255
        if pixels.shape[-2:] != self.input_size:
            # no antialiasing, as published
            pixels = F.interpolate(pixels, size=self.input_size, mode=self.mode, align_corners=False)
        out = self.network.forward_features((pixels - self.mean) / self.std).float()
        if out.ndim == 3:
            out = out[:, getattr(self.network, "num_prefix_tokens", 0) :]
            if out.shape[1] == self.grid[0] * self.grid[1]:
                return out
            rows, columns = self.network.patch_embed.grid_size
            out = out.unflatten(1, (rows, columns))
        elif getattr(self.network, "output_fmt", "NCHW") == "NCHW":
            out = out.permute(0, 2, 3, 1)
        if out.shape[1:3] != self.grid:
            out = F.interpolate(out.permute(0, 3, 1, 2), size=self.grid, mode="bilinear", align_corners=False)
            out = out.permute(0, 2, 3, 1)
        return out.flatten(1, 2)


TAKE = "take a vision transformer for color images"


def load_encoder(name: str, grid: tuple[int, int], device: torch.device | str = "cpu") -> Encoder:
    """The encoder that ``repa`` names.

    Args:
        name: a timm model such as ``vit_base_patch14_dinov2.lvd142m``, whose weights timm finds or downloads, or a
            folder with timm's ``config.json`` and the weights (``model.safetensors`` or ``pytorch_model.bin``).
        grid: the SiT's token grid (H, W).
        device: where the encoder works.

    Raises:
        UserError: no such model or folder, weights that can't be had, or a network without a map of features.
    """
    folder = Path(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"`repa={name}`: the folder has no config.json; give one that timm's save_for_hf wrote")
        source = f"local-dir:{folder}"
    elif not timm.is_model(name.split(".")[0]):
        raise UserError(f"`repa={name}`: neither a folder nor a timm model like vit_base_patch14_dinov2.lvd142m")
    else:
        source = name
    try:
        network = timm.create_model(source, pretrained=True, num_classes=0)
    except Exception as error:  # timm, the Hub client and safetensors each raise their own kinds
        mend = "is the folder complete?" if folder.is_dir() else "download it where there is a network, give its folder"
        raise UserError(f"`repa={name}` can't be loaded ({first_line(error)}); {mend}") from error
    try:
        encoder = Encoder(network, grid, device)
        found = encoder.features(torch.zeros(1, 3, *encoder.input_size, dtype=torch.uint8)).shape
    except Exception as error:  # each network's own, as for another number of channels
        raise UserError(f"`repa={name}` gives no map of features ({first_line(error)}); {TAKE}") from error
    if found != (1, grid[0] * grid[1], encoder.width):
        raise UserError(f"`repa={name}` gives no map of {encoder.width} features; {TAKE}")
    return encoder
