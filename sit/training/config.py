"""The training configuration: one dataclass, filled from a YAML recipe and then from the command line."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import yaml

from sit.utils.errors import UserError


def fixed(default: Any, group: str | None = None) -> Any:
    """A field that the first step of a run fixes: it can't be another when the run goes on.

    With a ``group`` it begins one of the groups that the help has.
    """
    return dataclasses.field(default=default, metadata={"fixed": True, "group": group})


def first_of(group: str, default: Any) -> Any:
    """A field that begins a group and may change when a run goes on."""
    return dataclasses.field(default=default, metadata={"group": group})


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a training run. The defaults are those of the published 400k-step comparison, except
    for the data and the size of the network."""

    data: str = fixed("digits", group="data")
    """digits (embedded), a folder with one subfolder a class, a latent cache, or another source of sit.data"""
    image_size: int = fixed(32)
    """side of the square images, in pixels"""
    flip: bool = fixed(False)
    """flip each image left to right with probability 0.5"""
    vae: str = fixed("digits")
    """digits (embedded), a name on the Hub such as stabilityai/sd-vae-ft-ema, a local folder, or none: pixels as they
    are, e.g. none, none:channels=1, none:shift=-0.43:scale=1.42"""
    heldout: str | float = fixed("none")
    """images to measure the loss on and never train on: none; auto (the data's own test set, or 5 % of the data where
    there is none); a share of the data such as 0.05; or another data set"""

    model: str = fixed("SiT-XS/2", group="network")
    """SiT-SIZE/PATCH with sizes XS, XS12 (XS at twice the depth), S, B, L, XL and patches 1, 2, 4, 8"""
    mixer: str = fixed("attention")
    """token mixer, e.g. attention, atconv, atconv:kernel_size=5; a comma-separated pattern repeats over the depth"""
    positional_embedding: Literal["auto", "on", "off"] = fixed("auto")
    """whether the sine-cosine table is added to the tokens; auto: if a mixer of the pattern needs it, as published"""
    block: Literal["published", "modern"] = fixed("published")
    """modern: RMSNorm, SwiGLU of as many parameters, and, in mixers that take them, normalized queries and keys and
    rotary positions"""
    learn_sigma: bool = fixed(False)
    """twice the output channels, the second half unused, as in the published checkpoints"""
    class_dropout: float = fixed(0.1)
    """probability of training without the label, for classifier-free guidance"""

    interpolant: Literal["linear", "gvp", "vp"] = fixed("linear", group="objective")
    """path from noise to data"""
    prediction: Literal["velocity", "score", "noise", "average-velocity"] = fixed("velocity")
    """what the network predicts; average-velocity is MeanFlow's, which samples in one step or a few"""
    loss_weight: Literal["none", "velocity", "likelihood"] = fixed("none")
    """weight of the loss over time, for score and noise prediction"""
    time_distribution: Literal["uniform", "logit-normal", "logit-normal-0.4"] = fixed("uniform")
    """how training draws t from its interval; logit-normal (Stable Diffusion 3) prefers the middle, logit-normal-0.4
    (MeanFlow) a little more of the image"""
    train_eps: float | None = fixed(None)
    """how far training stays from time's singular ends; None: as published. Velocity with linear or gvp has none"""
    sample_eps: float | None = None
    """the same for sampling"""

    meanflow_share: float = fixed(0.25, group="meanflow")
    """share of the images that are trained on a step of some length; the others on the velocity"""
    meanflow_omega: float = fixed(1.0)
    """weight of the velocity of an image in that which is learned: guidance that is part of the network; 1 is none"""
    meanflow_kappa: float = fixed(0.0)
    """weight of the network's own velocity with the label; the scale of the guidance is omega / (1 - kappa)"""
    meanflow_weight_power: float = fixed(1.0)
    """power p of the weight 1 / (squared error + c)^p of each image's loss; 0 is none"""
    meanflow_weight_floor: float = fixed(1e-3)
    """c of that weight"""

    repa: str | None = fixed(None, group="alignment")
    """align tokens with a frozen encoder (REPA): a timm model, e.g. vit_base_patch14_dinov2.lvd142m, or a folder"""
    repa_weight: float = fixed(0.5)
    """weight of the alignment beside the loss"""
    repa_block: int | None = fixed(None)
    """the block, counted from 1, whose tokens are aligned; None: 4 of SiT-B, 8 of L and XL, as published, depth // 3
    of others"""
    repa_projector: Literal["mlp", "conv"] = fixed("mlp")
    """from tokens to features: mlp (REPA), or one 3x3 convolution over the grid of tokens (iREPA)"""
    repa_spatial_norm: float | None = fixed(None)
    """normalize each feature over the tokens after subtracting this part of its mean (iREPA: 0.6); None doesn't"""
    repa_until: int | None = fixed(None)
    """the last step with alignment; None aligns to the end"""
    repa_images: str | None = None
    """where the images of a latent cache are now; None: where they were encoded from"""

    init_from: str | None = fixed(None, group="beginning")
    """a checkpoint to begin with: what fits of its weights is taken (a run, folder, published file or name, as
    sampling takes it). Not to be confused with resume, which goes on with a run"""
    freeze: tuple[str, ...] = fixed(())
    """names of parameters that are not trained, as patterns: "blocks.*.mlp.*" x_embedder.proj.weight"""
    train_only: tuple[str, ...] = fixed(())
    """names of the only parameters that are trained, as patterns"""
    distill_from: str | None = fixed(None)
    """a checkpoint whose prediction is matched too, and the outputs of its mixers by those that take their place"""
    distill_steps: int = fixed(0)
    """for how many of the first steps"""
    distill_weight: float = fixed(1.0)
    """weight of the distance to it beside the loss"""

    steps: int = first_of("optimization", 1000)
    """optimizer steps of the whole run"""
    batch_size: int = fixed(256)
    """images a step, over all processes and accumulated micro-batches together"""
    gradient_accumulation: int = 1
    """micro-batches a step"""
    optimizer: Literal["adamw", "muon"] = fixed("adamw")
    """muon: Muon for the matrices in the blocks, AdamW for all else, both with the same learning rate"""
    learning_rate: float = 1e-4
    """the optimizer's learning rate"""
    warmup_steps: int = 0
    """steps over which the learning rate rises linearly from zero"""
    final_learning_rate: float | None = None
    """learning rate that half a cosine falls to by the end of the steps; None keeps it constant"""
    betas: tuple[float, float] = fixed((0.9, 0.999))
    """AdamW's betas"""
    weight_decay: float = fixed(0.0)
    """decoupled weight decay"""
    max_grad_norm: float | None = None
    """clip the gradient to this norm; None or 0 clips nothing"""
    ema_decay: float = fixed(0.9999)
    """decay of the weights' moving average"""
    ema_warmup: bool = fixed(True)
    """let that decay be at most (1 + step) / (10 + step); the published code has no warm-up"""
    posthoc_ema: tuple[float, ...] = fixed(())
    """relative lengths of averages kept for post-hoc EMA, which gives any other afterwards: 0.05 0.1, as published"""
    posthoc_ema_every: int | None = None
    """steps between snapshots of these averages, which are kept for good; None: as between checkpoints"""
    seed: int = fixed(0)
    """names all randomness of the run: initial weights, order of the images, noise"""
    seed_weights: int | None = fixed(None)
    """the seed of the initial weights; None: `seed`"""
    seed_order: int | None = fixed(None)
    """the seed of the order of the images and of which are flipped; None: `seed`"""
    seed_noise: int | None = fixed(None)
    """the seed of all noise in the loss (t, x_0, dropped labels, the posterior's); None: `seed`"""

    mixed_precision: Literal["no", "bf16", "fp16"] | None = first_of("execution", None)
    """None takes what `accelerate launch` or `accelerate config` say"""
    tf32: bool = True
    """round float32 matrix products to TF32 on GPUs, as published"""
    compile: bool | None = None
    """torch.compile the network; None does so on GPUs where it can"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass, to save memory"""
    cpu_threads: int | None = None
    """computing threads of a process on a CPU; None takes OMP_NUM_THREADS, or without it the cores that it may use"""
    workers: int = 0
    """loader processes for each training process"""
    non_finite_limit: int = 10
    """steps in a row whose loss or gradient is not finite, and which are skipped, before the run stops"""

    output_dir: str | None = first_of("files", None)
    """the run's folder; None makes a new one under runs/, or is that of the run to resume"""
    resume: str | None = None
    """a run or checkpoint to continue; `auto` continues the newest complete checkpoint of the output folder, if any"""
    trackers: tuple[str, ...] = ("tensorboard",)
    """Accelerate's trackers, e.g. tensorboard wandb trackio: these and no others, none where none follows the flag.
    metrics.jsonl is always written"""
    project: str = "sit"
    """the trackers' project; the run has the name of its folder"""
    log_every: int = 10
    """steps between logged metrics; on a GPU the host also learns of skipped steps only then"""
    heldout_every: int = 0
    """steps between measurements of the held-out loss; 0: after the last step alone. `heldout` says of which images"""
    heldout_images: int = 1024
    """held-out images that are measured, at most"""
    eval_every: int = 0
    """steps between evaluations of the averaged weights on few samples: FID and what else the reference allows, and
    the held-out loss if there is one; 0 makes none"""
    eval_samples: int = 500
    """samples of such an evaluation, made as a preview's are"""
    eval_reference: str | None = None
    """what they are compared with, as eval_fid.py takes its reference; None: digits, where the data is digits"""
    preview_every: int = 250
    """steps between preview grids; 0 makes none"""
    preview_steps: int = 25
    """sampling steps of a preview"""
    preview_cfg_scale: float = 1.5
    """guidance of a preview"""
    checkpoint_every: int = 500
    """steps between checkpoints; the last step always makes one"""
    keep_last: int = 2
    """checkpoints kept besides those that are kept for good; 0 keeps all"""
    keep_every: int | None = None
    """steps between checkpoints that are kept for good"""

    def __post_init__(self) -> None:
        if empty := [field.name for field in dataclasses.fields(self) if getattr(self, field.name) == ""]:
            raise UserError(f"`{empty[0]}` is empty: give a value, or leave it out")
        for names, holds, words in CHECKS:
            for name in names:
                value = getattr(self, name)
                if value is not None and not holds(value):
                    said = " ".join(map(str, value)) if isinstance(value, tuple) else value
                    raise UserError(f"`{name}` must be {words}, not {said}")
        if (self.preview_every or self.eval_every) and self.preview_steps < 2 and not self.averages:
            raise UserError(
                "`preview_steps=1` leaves the SDE no step before its last one: use at least 2, or `preview_every=0` "
                "and `eval_every=0`"
            )
        object.__setattr__(self, "heldout", str(self.heldout))
        if self.heldout_share is not None and not 0 < self.heldout_share < 1:
            raise UserError(
                f"`heldout={self.heldout}`: a share must be above 0 and below 1, or a folder's path as ./{self.heldout}"
            )
        if self.heldout_every and self.heldout == "none":
            raise UserError(
                f"`heldout_every={self.heldout_every}` needs held-out images: give `heldout=auto` or others"
            )
        if (self.distill_from is None) != (self.distill_steps == 0):
            raise UserError("`distill_from` and `distill_steps`, above 0, belong together: give both or none")
        if self.distill_from is not None and self.compile:
            raise UserError("`compile` and `distill_from` exclude each other: what is matched is inside the network")
        for name in ("repa_spatial_norm", "repa_until", "repa_images"):
            if getattr(self, name) is not None and self.repa is None:
                raise UserError(f"`{name}={getattr(self, name)}` needs an encoder to align with: give `repa`")
        if self.eval_every and self.eval_reference is None and self.data.split(":")[0] != "digits":
            raise UserError(f"`eval_every={self.eval_every}` needs `eval_reference`: images or statistics of them")
        if self.batch_size % self.gradient_accumulation:
            raise UserError(
                f"`batch_size={self.batch_size}` can't be divided into "
                f"`gradient_accumulation={self.gradient_accumulation}` equal micro-batches"
            )

    @property
    def preview_guidance(self) -> float:
        """The guidance of previews and evaluations: none without a null label, or where training has it inside."""
        return self.preview_cfg_scale if self.class_dropout and not self.averages else 1.0

    @property
    def averages(self) -> bool:
        """Whether the network predicts average velocities, which MeanFlow trains."""
        return self.prediction == "average-velocity"

    @property
    def heldout_share(self) -> float | None:
        """The part of the data that ``heldout`` names by a number; None if it is no number."""
        try:
            return float(self.heldout)
        except ValueError:
            return None

    def seed_of(self, cause: Literal["weights", "order", "noise"]) -> int:
        """The seed of one cause of randomness: its own, or ``seed``."""
        own = getattr(self, f"seed_{cause}")
        return self.seed if own is None else own

    def network_options(self, latent_shape: tuple[int, int, int], classes: int) -> dict[str, Any]:
        """What :func:`~sit.model.create_model` needs beside the model's name, for latents of (c, h, w)."""
        channels, height, width = latent_shape
        return dict(
            mixer=self.mixer,
            input_size=(height, width),
            in_channels=channels,
            num_classes=classes,
            null_class=self.class_dropout > 0,
            learn_sigma=self.learn_sigma,
            positional_embedding={"auto": None, "on": True, "off": False}[self.positional_embedding],
            average_velocity=self.averages,
            block=self.block,
        )

    def transport_options(self) -> dict[str, Any]:
        """The arguments of :class:`~sit.transport.transport.Transport`."""
        return dict(
            interpolant=self.interpolant,
            prediction=self.prediction,
            loss_weight=self.loss_weight,
            train_eps=self.train_eps,
            sample_eps=self.sample_eps,
            time_distribution=self.time_distribution,
        )

    def meanflow_options(self) -> dict[str, Any]:
        """The arguments of :class:`~sit.transport.meanflow.MeanFlow` besides its transport."""
        return dict(
            share=self.meanflow_share,
            omega=self.meanflow_omega,
            kappa=self.meanflow_kappa,
            weight_power=self.meanflow_weight_power,
            weight_floor=self.meanflow_weight_floor,
        )

    def to_yaml(self) -> str:
        """All fields as YAML, which :func:`~sit.training.recipes.from_mapping` reads back."""
        plain = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}
        return yaml.safe_dump(plain, sort_keys=False)


CHECKS = (
    (
        ("image_size", "steps", "batch_size", "gradient_accumulation", "log_every", "checkpoint_every",
         "preview_steps", "non_finite_limit", "repa_block", "repa_until", "cpu_threads", "heldout_images",
         "posthoc_ema_every", "keep_every"),
        lambda value: value >= 1,
        "at least 1",
    ),
    (
        ("warmup_steps", "workers", "preview_every", "keep_last", "max_grad_norm", "heldout_every", "eval_every",
         "distill_steps"),
        lambda value: value >= 0,
        "at least 0",
    ),
    (
        ("learning_rate", "final_learning_rate", "preview_cfg_scale", "weight_decay", "repa_weight", "distill_weight"),
        lambda value: 0 <= value < math.inf,
        "a number of at least 0",
    ),
    (("repa_spatial_norm",), lambda value: 0 <= value <= 1, "in [0, 1]"),
    (("eval_samples",), lambda value: value >= 2, "at least 2"),
    (("class_dropout", "ema_decay"), lambda value: 0 <= value < 1, "in [0, 1)"),
    (
        ("posthoc_ema",),
        lambda value: len(set(value)) == len(value) and all(0 < sigma < 12**-0.5 for sigma in value),
        "different relative lengths between 0 and 0.2887",
    ),
    (("betas",), lambda value: all(0 <= beta < 1 for beta in value), "two numbers in [0, 1)"),
)  # fmt: skip
"""(fields, what must hold of their values, in words); None, where a field takes it, is always right."""


ALWAYS_FIXED = (
    "data", "image_size", "flip", "vae", "model", "mixer", "learn_sigma", "class_dropout", "interpolant", "prediction",
    "loss_weight", "train_eps", "repa", "repa_weight", "repa_block", "batch_size", "betas", "weight_decay", "ema_decay",
    "seed",
)  # fmt: skip
"""settings that the first step fixes in every version, by which those of a run are told from a recipe's"""


def as_said_today(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A run's settings, all of them, with today's default of what serves nothing: a block without ``repa``, and an ε
    that the velocity does not take."""
    is_unsaid = "repa" in settings and settings["repa"] is None and settings.get("repa_block") == 8
    unsaid = {"repa_block": None} if is_unsaid else {}
    if settings.keys() >= {*ALWAYS_FIXED}:
        unsaid |= dict.fromkeys(idle_eps(settings))
    return {**settings, **unsaid}


def idle_eps(settings: Mapping[str, Any]) -> list[str]:
    """The ε that are set and play no part: as published, the velocity has no singular end under linear and gvp."""
    if settings["interpolant"] == "vp" or not str(settings["prediction"]).endswith("velocity"):
        return []
    return [name for name in ("train_eps", "sample_eps") if isinstance(eps := settings.get(name), int | float) and eps]


NEEDS = (
    ("posthoc_ema_every", ("posthoc_ema",)), ("repa_weight", ("repa",)), ("repa_block", ("repa",)),
    ("repa_projector", ("repa",)), ("distill_weight", ("distill_from",)), ("eval_samples", ("eval_every",)),
    ("eval_reference", ("eval_every",)),
)  # fmt: skip
"""(a setting, those others of which one must be on, or it has no effect)"""

NEEDS_OF_FLAGS = (
    *NEEDS, ("heldout_images", ("heldout",)), ("keep_every", ("keep_last",)), ("project", ("trackers",)),
    ("preview_steps", ("preview_every", "eval_every")), ("preview_cfg_scale", ("preview_every", "eval_every")),
    ("preview_cfg_scale", ("class_dropout",)),
)  # fmt: skip
"""the same of what is typed; a program may switch previews off, say, and let their settings be"""


def check_heeded(config: TrainConfig) -> None:
    """Refuse what a user sets, and another setting leaves without effect.

    Raises:
        UserError: an ε of a velocity that takes none.
    """
    for name in idle_eps(vars(config)):
        cause = f"`prediction={config.prediction}` and `interpolant={config.interpolant}`, which has no singular end"
        raise UserError(f"`{name}={getattr(config, name):g}` plays no part with {cause}: leave it out, or change those")


def check_needed(config: TrainConfig, base: TrainConfig | None = None) -> None:
    """Refuse a setting of what is off.

    Args:
        config: the settings.
        base: what they were given by flags over; None for a new run as a program begins it.

    Raises:
        UserError: one of :data:`NEEDS`, or of :data:`NEEDS_OF_FLAGS` that is another than in ``base``.
    """
    for name, needs in NEEDS if base is None else NEEDS_OF_FLAGS:
        value = getattr(config, name)
        usual = _default(name) if base is None else getattr(base, name)
        if value not in (usual, _default(name)) and not _any_is_on(config, needs):
            without = " or ".join(f"`{need}`" for need in needs)
            off = ", which is 0 and keeps all checkpoints," if needs == ("keep_last",) else ""
            raise UserError(f"`{name}={value}` plays no part without {without}{off}: leave it out, or give that too")


def without_idle(config: TrainConfig, base: TrainConfig) -> TrainConfig:
    """The config, which was made from ``base``, with the defaults of what belongs to what it switches off.

    So ``repa=None`` switches off the alignment that a recipe has, with all that the recipe says of it.
    """
    idle = {
        name: _default(name)
        for name, needs in NEEDS_OF_FLAGS
        if _any_is_on(base, needs) and not _any_is_on(config, needs) and getattr(config, name) == getattr(base, name)
    }
    return dataclasses.replace(config, **idle) if idle else config


def _default(name: str) -> Any:
    return TrainConfig.__dataclass_fields__[name].default


def _any_is_on(config: TrainConfig, names: tuple[str, ...]) -> bool:
    return any(getattr(config, name) not in (None, 0, (), "none") for name in names)


def fixed_fields() -> list[str]:
    """The names of the fields that the first step of a run fixes."""
    return [field.name for field in dataclasses.fields(TrainConfig) if field.metadata.get("fixed")]
