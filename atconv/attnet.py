"""AttNet (arXiv 2510.20092): convolutional networks of ATConv and gated MLPs for images, registered with timm.

``import atconv.attnet`` makes ``timm.create_model("attnet_t2")`` and the other sizes known; ``import atconv`` alone
leaves timm unloaded. Parameters have the published names. Blocks work channels last, so the published 1x1 convolutions
are linear layers here; their weights (out, in, 1, 1) are accepted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerScale, SelectAdaptivePool2d, trunc_normal_
from timm.models import (
    build_model_with_cfg,
    checkpoint_seq,
    generate_default_cfgs,
    register_model,
    register_notrace_function,
    register_notrace_module,
)
from timm.models._features import feature_take_indices
from timm.models._helpers import clean_state_dict
from torch import nn

from atconv.module import ATConv, check_kernel_size

__all__ = ["AttNet"]  # register_model adds the sizes

STEM_STRIDES = {4: (2, 2), 2: (2, 1), 1: (1, 1)}
"""The strides of the stem's two convolutions; the published one is 4."""

register_notrace_module(ATConv)  # a leaf to torch.fx, as it looks at the grid's numbers


class RMSNorm(nn.RMSNorm):
    """PyTorch's, with the weight cast to x's dtype: where they differ, under autocast, PyTorch warns and is slow."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, C) to (…, C)."""
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class GatedMLP(nn.Module):
    """The channel mixer: half of the hidden channels, convolved 3×3 and activated, multiplies the other half.

    Args:
        dim: channels C of x.
        hidden: channels of either half.
        norm: an RMS norm (eps 1e-6) over the channels of the product.
    """

    def __init__(self, dim: int, hidden: int, norm: bool = False) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 2 * hidden)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.norm_layer = RMSNorm(hidden, eps=1e-6) if norm else nn.Identity()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, H, W, C) to (B, H, W, C)."""
        gate, value = self.fc1(x).chunk(2, dim=-1)
        gate = self.dwconv(gate.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.fc2(self.norm_layer(F.gelu(gate) * value))


class Block(nn.Module):
    """ATConv, then a gated MLP, each between a LayerNorm (eps 1e-6), layer scale, drop path and a residual sum.

    Args:
        dim: channels C.
        mlp_ratio: the gated MLP has ⌊2·⌊C·mlp_ratio⌋ / 3⌋ hidden channels in either half.
        inner_norm: an RMS norm inside the gated MLP.
        layer_scale: initial value of the layer scales; None for none.
        drop_path: probability of leaving out a residual branch in training.
        mixer: further arguments of :class:`atconv.ATConv`.
    """

    def __init__(
        self,
        dim: int,
        mlp_ratio: float,
        *,
        inner_norm: bool,
        layer_scale: float | None,
        drop_path: float,
        mixer: dict[str, Any],
    ) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(dim, eps=1e-6)
        self.token_mixer = ATConv(dim, activation="gelu", **mixer)
        self.layer_scale_1 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.norm_2 = nn.LayerNorm(dim, eps=1e-6)
        self.channel_mixer = GatedMLP(dim, int(2 * int(dim * mlp_ratio) / 3), inner_norm)
        self.layer_scale_2 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, H, W, C) to (B, H, W, C)."""
        grid = x.shape[1], x.shape[2]
        mixed = self.token_mixer(self.norm_1(x).flatten(1, 2), grid).unflatten(1, grid)
        x = x + self.drop_path(self.layer_scale_1(mixed))
        return x + self.drop_path(self.layer_scale_2(self.channel_mixer(self.norm_2(x))))


def conv_norm(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    """A 3×3 convolution without bias, and BatchNorm."""
    conv = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels))


class AttNet(nn.Module):
    """An image classifier: stem, stages of blocks, mean over the tokens, LayerNorm, linear classifier.

    Before each stage but the first a 3×3 convolution of stride 2 with BatchNorm halves the grid.

    Args:
        in_chans: channels of the images.
        num_classes: classes of the classifier; 0 leaves it out.
        global_pool: ``avg`` (published), ``max``, ``avgmax``, or empty: no pooling, an answer for every token.
        depths: blocks of each stage.
        dims: channels of each stage.
        mlp_ratios: expansion of the gated MLPs of each stage, before the factor 2/3 (:class:`Block`).
        inner_norm: an RMS norm inside the gated MLPs.
        layer_scale: initial value of the layer scales; None for none.
        kernel_size: ATConv's, odd.
        inhibition, routing: False leaves out ATConv's lateral inhibition, or its adaptive routing (the ablations).
        stem_stride: 4 (published); 2 or 1 for small images.
        drop_rate: dropout before the classifier.
        drop_path_rate: probability of leaving out a branch of the last block; it grows linearly from 0 at the first.

    Raises:
        ValueError: lists of unequal length, or an unknown stem_stride, global_pool or kernel size.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        *,
        depths: Sequence[int] = (3, 3, 16, 3),
        dims: Sequence[int] = (64, 128, 288, 512),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        inner_norm: bool = True,
        layer_scale: float | None = 1e-6,
        kernel_size: int = 3,
        inhibition: bool = True,
        routing: bool = True,
        stem_stride: int = 4,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if not len(depths) == len(dims) == len(mlp_ratios):
            raise ValueError(f"`{depths=}`, `{dims=}` and `{mlp_ratios=}` must be of one length")
        check_kernel_size(kernel_size)
        if stem_stride not in STEM_STRIDES:
            raise ValueError(f"`stem_stride` must be 4, 2 or 1, not {stem_stride}")
        self.num_classes, self.in_chans, self.drop_rate = num_classes, in_chans, drop_rate
        self.num_features = self.head_hidden_size = dims[-1]
        self.least_tokens = kernel_size**2 if routing else 1
        self.grad_checkpointing = False
        first, second = STEM_STRIDES[stem_stride]
        stem = (conv_norm(in_chans, dims[0] // 2, first), nn.GELU(), conv_norm(dims[0] // 2, dims[0], second))
        between = (conv_norm(before, after, 2) for before, after in zip(dims, dims[1:], strict=False))
        self.downsample_layers = nn.ModuleList([nn.Sequential(*stem), *between])
        mixer = {"kernel_size": kernel_size, "inhibition": inhibition, "routing": routing}
        drop_paths = torch.linspace(0, drop_path_rate, sum(depths), device="cpu").split(list(depths))
        self.stages = nn.ModuleList()
        self.feature_info = []
        for stage, (dim, ratio) in enumerate(zip(dims, mlp_ratios, strict=True)):
            rates = drop_paths[stage].tolist()
            blocks = (
                Block(dim, ratio, inner_norm=inner_norm, layer_scale=layer_scale, drop_path=rate, mixer=mixer)
                for rate in rates
            )
            self.stages.append(nn.Sequential(*blocks))
            info = {"num_chs": dim, "reduction": stem_stride * 2**stage, "module": f"stages.{stage}"}
            self.feature_info.append(info)
        self.global_pool = _pooling(global_pool)
        self.norm: nn.Module = nn.LayerNorm(dims[-1], eps=1e-5)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = _classifier(dims[-1], num_classes)
        self.apply(_init_weights)
        self.register_load_state_dict_pre_hook(_accept_convolutions)

    def no_weight_decay(self) -> set[str]:
        """The names that timm's optimizers must not decay, besides biases and norms."""
        return {name for name, _ in self.named_parameters() if name.endswith(("difference_control", "gamma"))}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that order the parameters by depth, for timm's layer-wise learning rates."""
        blocks = [
            (r"^downsample_layers\.(\d+)", (0,)),  # with its stage's first block
            (r"^stages\.(\d+)\.(\d+)", None),
            (r"^norm\.", (99999,)),
        ]
        coarse_blocks = r"^(?:downsample_layers|stages)\.(\d+)"
        return {"stem": r"^downsample_layers\.0\.", "blocks": coarse_blocks if coarse else blocks}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The classifier, ``nn.Identity`` where there is none."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a fresh one, and the pooling if ``global_pool`` is given."""
        self.num_classes = num_classes
        if global_pool is not None:
            self.global_pool = _pooling(global_pool)
        example = next(self.parameters())
        self.head = _classifier(self.num_features, num_classes).to(device=example.device, dtype=example.dtype)
        self.head.apply(_init_weights)

    def _stage(self, stage: int, x: torch.Tensor, image_size: tuple[int, int]) -> torch.Tensor:
        """Downsampling and blocks of one stage: (B, C, H, W) to (B, C', H', W')."""
        x = self.downsample_layers[stage](x).permute(0, 2, 3, 1).contiguous()
        blocks, (height, width) = self.stages[stage], x.shape[1:3]
        check_tokens((height, width), self.least_tokens, stage, image_size)
        recompute = self.grad_checkpointing and torch.is_grad_enabled()
        x = checkpoint_seq(blocks, x) if recompute else blocks(x)
        return x.permute(0, 3, 1, 2)

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | list[int] | None = None,
        *,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """The outputs of chosen stages, by timm's convention.

        Args:
            x: images (B, in_chans, H, W).
            indices: stages to return; the last n if an int, all if None.
            norm: has no effect, as the norm comes after the pooling.
            stop_early: run no stage after the last chosen one.
            output_fmt: ``NCHW`` or ``NHWC``, of the intermediates.
            intermediates_only: leave out the final features.

        Returns:
            The final features (B, C, H', W'), if asked for, and the chosen outputs.

        Raises:
            ValueError: an unknown output_fmt, or images too small for the kernels of a stage.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"`output_fmt` must be NCHW or NHWC, not {output_fmt!r}")
        chosen, last = feature_take_indices(len(self.stages), indices)
        image_size, intermediates = (x.shape[2], x.shape[3]), []
        x = _channels_last(x)
        for stage in range(last + 1 if stop_early else len(self.stages)):
            x = self._stage(stage, x, image_size)
            if stage in chosen:
                intermediates.append(x if output_fmt == "NCHW" else x.permute(0, 2, 3, 1))
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the layers that :meth:`forward_intermediates` at ``indices`` does not need; the stages it returns."""
        chosen, last = feature_take_indices(len(self.stages), indices)
        cut = last < len(self.stages) - 1
        self.downsample_layers, self.stages = self.downsample_layers[: last + 1], self.stages[: last + 1]
        self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if prune_norm or cut:
            self.norm = nn.Identity()
        if prune_head or cut:
            self.reset_classifier(0, "")
        return chosen

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Images (B, in_chans, H, W) to the last stage's (B, C, H', W'), before pooling and norm."""
        image_size = x.shape[2], x.shape[3]
        x = _channels_last(x)
        for stage in range(len(self.stages)):
            x = self._stage(stage, x, image_size)
        return x

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Features (B, C, H', W') to logits (B, classes); with ``pre_logits`` to the classifier's input (B, C).

        Without global pooling the answer is a map (B, classes or C, H', W').
        """
        x = self.global_pool(x.permute(0, 2, 3, 1))
        x = self.head_drop(self.norm(x))
        x = x if pre_logits else self.head(x)
        return x.permute(0, 3, 1, 2) if self.global_pool.is_identity() else x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images (B, in_chans, H, W) to logits (B, classes)."""
        return self.forward_head(self.forward_features(x))


def _channels_last(x: torch.Tensor) -> torch.Tensor:
    """``x.contiguous(memory_format=torch.channels_last)``, which torch.func.vmap does not know."""
    return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


@register_notrace_function
def check_tokens(grid: tuple[int, int], least: int, stage: int, image_size: tuple[int, int]) -> None:
    """Raise ValueError unless a stage's grid has as many tokens as its kernels have taps. A node to torch.fx."""
    height, width = grid
    if height * width < least:
        raise ValueError(
            f"images of {image_size[0]} x {image_size[1]} pixels leave stage {stage} a grid of {height} x {width}, "
            f"fewer tokens than the {least} taps of its kernels; "
            "use larger images, a smaller `stem_stride` or a smaller `kernel_size`"
        )


def _pooling(kind: str) -> SelectAdaptivePool2d:
    if kind not in ("", "avg", "max", "avgmax"):
        raise ValueError(f"`global_pool` must be avg, max, avgmax or empty, not {kind!r}")
    return SelectAdaptivePool2d(pool_type=kind, flatten=bool(kind), input_fmt="NHWC")


def _classifier(dim: int, num_classes: int) -> nn.Module:
    return nn.Linear(dim, num_classes) if num_classes > 0 else nn.Identity()


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _accept_convolutions(model: nn.Module, state_dict: dict[str, torch.Tensor], prefix: str, *rest: Any) -> None:
    """Before weights are loaded: those of published 1x1 convolutions, (out, in, 1, 1), become (out, in)."""
    for name, parameter in model.named_parameters():
        weight = state_dict.get(prefix + name)
        if parameter.ndim == 2 and isinstance(weight, torch.Tensor) and weight.shape == (*parameter.shape, 1, 1):
            state_dict[prefix + name] = weight.flatten(1)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, torch.Tensor]:
    """A published or a training checkpoint as a state dict of ``model``.

    Weights may lie under ``state_dict_ema``, ``model_ema``, ``state_dict`` or ``model`` (the first found is taken, as
    timm does), and names may begin with ``module.`` or ``_orig_mod.``.
    """
    for key in ("state_dict_ema", "model_ema", "state_dict", "model"):
        if isinstance(state_dict.get(key), dict):
            state_dict = state_dict[key]
            break
    state_dict = clean_state_dict(state_dict)
    _accept_convolutions(model, state_dict, "")
    return state_dict


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "min_input_size": (3, 65, 65),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "first_conv": "downsample_layers.0.0.0",
        "classifier": "head",
        "paper_ids": "arXiv:2510.20092",
        **kwargs,
    }


# fmt: off
_COLUMNS = ("depths", "dims", "inner_norm", "drop_path_rate", "layer_scale")
_TABLE = {
    "attnet_xxs": ((2, 2, 4, 2), (32, 64, 128, 240), False, 0.02, None),
    "attnet_xs": ((2, 2, 7, 2), (40, 80, 160, 320), False, 0.02, 1e-6),
    "attnet_s": ((2, 3, 10, 3), (40, 80, 160, 320), False, 0.1, None),
    "attnet_t1": ((2, 3, 12, 3), (48, 96, 224, 384), True, 0.1, 1e-6),
    "attnet_t2": ((3, 3, 16, 3), (64, 128, 288, 512), True, 0.2, 1e-6),
    "attnet_t3": ((4, 4, 26, 4), (72, 144, 320, 576), True, 0.4, 1e-6),
    "attnet_t4": ((5, 5, 28, 5), (96, 192, 384, 768), True, 0.5, 1e-6),
}
# fmt: on
SIZES: dict[str, dict[str, Any]] = {name: dict(zip(_COLUMNS, row, strict=True)) for name, row in _TABLE.items()}
"""The published sizes, as arguments of :class:`AttNet`."""

default_cfgs = generate_default_cfgs({f"{name}.untrained": _cfg() for name in SIZES})


def _create(variant: str, pretrained: bool, **kwargs: Any) -> AttNet:
    arguments = SIZES[variant] | kwargs
    feature_cfg = {"out_indices": tuple(range(len(arguments["depths"]))), "feature_cls": "getter"}
    if (asked := kwargs.get("feature_cls", "getter")) in ("hook", "fx"):
        feature_cfg["output_fmt"] = "NHWC"  # they read the stages themselves, which are channels last
    elif asked != "getter":
        raise ValueError(f"`feature_cls={asked}` is not for AttNet: leave it out, or take hook or fx")
    return build_model_with_cfg(
        AttNet, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, feature_cfg=feature_cfg, **arguments
    )


@register_model
def attnet_xxs(pretrained: bool = False, **kwargs: Any) -> AttNet:
    """AttNet-XXS, 2.854 M parameters."""
    return _create("attnet_xxs", pretrained, **kwargs)


@register_model
def attnet_xs(pretrained: bool = False, **kwargs: Any) -> AttNet:
    """AttNet-XS, 5.555 M parameters."""
    return _create("attnet_xs", pretrained, **kwargs)


@register_model
def attnet_s(pretrained: bool = False, **kwargs: Any) -> AttNet:
    """AttNet-S, 7.681 M parameters."""
    return _create("attnet_s", pretrained, **kwargs)


@register_model
def attnet_t1(pretrained: bool = False, **kwargs: Any) -> AttNet:
    """AttNet-T1, 13.715 M parameters."""
    return _create("attnet_t1", pretrained, **kwargs)


@register_model
def attnet_t2(pretrained: bool = False, **kwargs: Any) -> AttNet:
    """AttNet-T2, 27.011 M parameters."""
    return _create("attnet_t2", pretrained, **kwargs)


@register_model
def attnet_t3(pretrained: bool = False, **kwargs: Any) -> AttNet:
    """AttNet-T3, 49.176 M parameters."""
    return _create("attnet_t3", pretrained, **kwargs)


@register_model
def attnet_t4(pretrained: bool = False, **kwargs: Any) -> AttNet:
    """AttNet-T4, 87.320 M parameters."""
    return _create("attnet_t4", pretrained, **kwargs)
