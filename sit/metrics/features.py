"""Feature extractors: what turns uint8 images into the features that distances are measured on."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from sit.data.digits import shrink_digits
from sit.metrics.arguments import FeatureWeights
from sit.metrics.classifier import load_classifier
from sit.metrics.digits import DigitsFeatureExtractor
from sit.metrics.identity import About
from sit.utils.errors import UserError, first_line
from sit.utils.fingerprint import weights_fingerprint
from sit.utils.precision import full_float32

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
"""how torch-fidelity names the file of its release v0.2.0"""


DINOV2 = "vit_large_patch14_dinov2.lvd142m"
"""timm's name of the network whose features FD-DINOv2 is measured on"""


SPATIAL_CHANNELS = 7
"""of Inception's ``mixed_6``, whose map the spatial FID is measured on"""


@dataclass(frozen=True)
class Extractor:
    """A way from images to features.

    Attributes:
        name: as :func:`get_extractor` takes it.
        label: what its distances must be called, so that nobody compares the incomparable.
        network: uint8 images (B, 3, H, W) to a tuple of tensors, named by ``outputs``.
        outputs: of ``features`` (B, D), ``logits`` (B, classes), ``spatial`` (B, 2023) and ``small`` (B, 64).
        weights: the file or folder that was named.
        preparation: how images are prepared and the network is changed, where there was another way once.
    """

    name: str
    label: str
    network: nn.Module
    outputs: tuple[str, ...]
    weights: str = ""
    preparation: str = ""

    @functools.cached_property
    def about(self) -> About:
        """What tells its features from others: its name, a hash of its weights, and how images are prepared."""
        return {"features": self.name, "weights": weights_fingerprint(self.network), "preparation": self.preparation}

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> dict[str, np.ndarray]:
        """Features of images (B, 3, H, W) uint8, as float32 arrays, computed without TF32.

        Raises:
            UserError: some are NaN or infinite.
        """
        with full_float32():
            found = self.network(images)
        arrays = {name: values.float().cpu().numpy() for name, values in zip(self.outputs, found, strict=True)}
        if not all(np.isfinite(values).all() for values in arrays.values()):
            raise UserError(f"{self.label}: some are NaN or infinite, as a network's that diverged in its training")
        return arrays


def digits_extractor(device: torch.device, weights: str | None = None) -> Extractor:
    """The committed digit classifier."""
    network = _DigitsWithSmall(DigitsFeatureExtractor(features_list=("features", "logits"))).to(device).eval()
    outputs = ("features", "logits", "small")
    return Extractor("digits", "digits features, not comparable with Inception FID", network, outputs)


class _DigitsWithSmall(nn.Module):
    """The classifier of digits, and beside its features and logits the 8×8 digits (B, 64) for the SVM."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        height, width = images.shape[-2:]
        if height != width or height % 8:
            raise UserError(f"digits must be square with sides that are multiples of 8, not {height}x{width}")
        return *self.classifier(images), torch.from_numpy(shrink_digits(images.cpu().numpy()))


class _InceptionWithSpatial(nn.Module):
    """torch-fidelity's Inception, with the map that the spatial FID is measured on.

    ADM takes the first 7 channels after the first 1×1 branch of TensorFlow's ``mixed_6``, which is torch's
    ``Mixed_6d``: 17·17·7 numbers, in TensorFlow's order (row, column, channel).
    """

    def __init__(self, inception: nn.Module) -> None:
        super().__init__()
        self.inception = inception
        inception.Mixed_6d.branch1x1.register_forward_hook(self._note)

    def _note(self, module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        self.spatial = output[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        features, logits = self.inception(images)
        return features, logits, self.spatial


def inception_extractor(device: torch.device, weights: str | None = None) -> Extractor:
    """torch-fidelity's port of the 2015-12-05 TensorFlow graph (``inception-v3-compat``).

    Args:
        device: where it runs.
        weights: the weights file; None looks in torch-fidelity's usual place.

    Raises:
        UserError: the weights can't be had or are not Inception's.
    """
    from torch_fidelity.utils import create_feature_extractor

    usual = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    path = Path(weights) if weights else usual
    if not path.is_file():
        hint = f"put {INCEPTION_FILE} (torch-fidelity's release v0.2.0) at {usual}, or name them by `inception_weights`"
        raise UserError(f"the Inception weights {path} are missing: {hint}")
    try:
        inception = create_feature_extractor(
            "inception-v3-compat",
            ["2048", "logits_unbiased"],
            cuda=False,
            verbose=False,
            feature_extractor_weights_path=str(path),
        )
    except Exception as error:  # torch's readers raise whatever they meet
        said = f"`inception_weights={path}`: not the weights of {INCEPTION_FILE}: {first_line(error)}"
        raise UserError(said) from error
    network = _InceptionWithSpatial(inception).to(device).eval()
    return Extractor("inception", "Inception features", network, ("features", "logits", "spatial"), str(path))


HUB_OFFSET = 0.1
"""what DINOv2's hub code adds to the number of patches before it divides by the table's side"""


def resample_as_hub(table: torch.Tensor, side: int, prefix: int = 1) -> torch.Tensor:
    """A square table of positions at another side, as DINOv2's hub code resamples it, and so dgm-eval and EDM2.

    Bicubic without antialiasing, at the scale (side + 0.1) / (the table's side) instead of side / (the table's side).
    timm resamples with antialiasing at the exact scale, which gives other features.

    Args:
        table: (1, prefix + n², C).
        side: of the table to be made.
        prefix: entries before the table's, such as that of the class token, which stay.

    Returns:
        (1, prefix + side², C).
    """
    first, grid = table[:, :prefix], table[:, prefix:]
    old = math.isqrt(grid.shape[1])
    if old == side:
        return table
    square = grid.reshape(1, old, old, -1).permute(0, 3, 1, 2)
    scale = (side + HUB_OFFSET) / old
    square = F.interpolate(square, scale_factor=(scale, scale), mode="bicubic", antialias=False)
    return torch.cat([first, square.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


class _Dinov2(nn.Module):
    """DINOv2's class token of uint8 images, resized to 224 by antialiased bicubic interpolation."""

    SIDE = 224

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        config = network.pretrained_cfg
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(config[name]).reshape(3, 1, 1))

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        images = images.float() / 255
        images = F.interpolate(images, size=(self.SIDE, self.SIDE), mode="bicubic", antialias=True).clamp(0, 1)
        return (self.network((images - self.mean) / self.std),)


def dinov2_extractor(device: torch.device, weights: str | None = None, model: str = DINOV2) -> Extractor:
    """DINOv2 ViT-L/14, for FD-DINOv2 (Stein et al. 2023), through timm.

    Args:
        device: where it runs.
        weights: a local file of timm's weights; None lets timm fetch or find them.
        model: timm's name.

    Raises:
        UserError: the weights can't be had or don't fit.
    """
    import timm

    if weights is not None and not Path(weights).is_file():
        raise UserError(f"`dinov2_weights={weights}`: no such file")
    overlay = {"file": weights} if weights is not None else None
    options = dict(num_classes=0, global_pool="token", pretrained_cfg_overlay=overlay)
    try:
        network = timm.create_model(model, pretrained=True, **options)
    except Exception as error:  # the Hub, the disk and the state dict each raise their own
        mend = f"fetch timm's {model} once, or name its file by `dinov2_weights`"
        raise UserError(f"the DINOv2 weights can't be had ({first_line(error)}): {mend}") from error
    table = network.pos_embed.detach().clone()  # as it was trained, before timm resamples it for the size below
    network.set_input_size(img_size=_Dinov2.SIDE)
    prefix = 0 if network.no_embed_class else network.num_prefix_tokens
    network.pos_embed = nn.Parameter(resample_as_hub(table, network.patch_embed.grid_size[0], prefix))
    network = _Dinov2(network).to(device).eval().requires_grad_(False)
    label = "DINOv2 features, not comparable with Inception FID"
    return Extractor("dinov2", label, network, ("features",), weights or "", "positions as DINOv2's hub code has them")


def classifier_extractor(device: torch.device, folder: str | None = None) -> Extractor:
    """The features and logits of a classifier that ``sit.train_classifier`` wrote to ``folder``.

    Raises:
        UserError: no folder is named, or it has no such classifier.
    """
    if not folder:
        raise UserError("`features=classifier`: name its folder, as classifier:FOLDER")
    classifier = load_classifier(folder).to(device)
    # the folder's name alone, as the label is part of metrics' names; the whole path is kept in ``weights``
    name = Path(folder).resolve().name
    label = f"features of the {classifier.config.architecture} in {name}, not comparable with Inception FID"
    config = classifier.config
    prepared = f"{config.architecture} {config.arguments}, images of {config.image_size} pixels"
    return Extractor("classifier", label, classifier, ("features", "logits"), folder, prepared)


EXTRACTORS: dict[str, Callable[[torch.device, str | None], Extractor]] = {
    "digits": digits_extractor,
    "inception": inception_extractor,
    "dinov2": dinov2_extractor,
    "classifier": classifier_extractor,
}


def get_extractor(name: str, device: torch.device, weights: str | None = None) -> Extractor:
    """The extractor of that name; ``classifier:FOLDER`` names its folder with it.

    Raises:
        UserError: an unknown name, or weights that can't be had.
    """
    kind, _, folder = name.partition(":")
    if kind not in EXTRACTORS or (folder and kind != "classifier"):
        several = "; several have spaces between them" if "," in name else ""
        raise UserError(f"`features={name}`: unknown; known features: {', '.join(EXTRACTORS)}:FOLDER{several}")
    return EXTRACTORS[kind](device, folder or weights)


def get_extractors(names: Sequence[str], device: torch.device, weights: FeatureWeights) -> list[Extractor]:
    """The extractors of these names, each once.

    Raises:
        UserError: an unknown name, weights that can't be had, or two of one kind, whose files would have one name.
    """
    kinds = [name.partition(":")[0] for name in names]
    if twice := sorted({kind for kind in kinds if kinds.count(kind) > 1}):
        raise UserError(f"`features={' '.join(names)}`: {twice[0]} stands there twice; give each kind once")
    return [get_extractor(name, device, weights.of(name)) for name in names]
