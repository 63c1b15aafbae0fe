"""The training configuration: one dataclass, filled from a YAML recipe and then from the command line."""

from __future__ import annotations

import argparse
import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import typeguard
import tyro
import yaml

from sit.cli import one_line_errors
from sit.errors import UserError

RECIPES = Path(__file__).with_name("recipes")


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a training run. The defaults are those of the published 400k-step comparison, except
    for the data and the size of the network."""

    # what is learnt
    data: str = "digits"
    """digits (embedded), a folder with one subfolder a class, a latent cache, or another source of sit.data"""
    image_size: int = 32
    """side of the square images, in pixels"""
    flip: bool = False
    """mirror every second image, drawn at random"""
    vae: str = "digits"
    """digits (embedded), a name on the Hub such as stabilityai/sd-vae-ft-ema, or a local folder"""

    # the network
    model: str = "SiT-XS/2"
    """SiT-SIZE/PATCH with sizes XS, S, B, L, XL and patches 1, 2, 4, 8"""
    mixer: str = "attention"
    """token mixer, e.g. attention, atconv, atconv:kernel_size=5; a comma-separated pattern repeats over the depth"""
    learn_sigma: bool = False
    """twice the output channels, the second half unused, as in the published checkpoints"""
    class_dropout: float = 0.1
    """probability of training without the label, for classifier-free guidance"""

    # the objective
    interpolant: Literal["linear", "gvp", "vp"] = "linear"
    """path from noise to data"""
    prediction: Literal["velocity", "score", "noise"] = "velocity"
    """what the network predicts"""
    loss_weight: Literal["none", "velocity", "likelihood"] = "none"
    """weight of the loss over time, for score and noise prediction"""
    train_eps: float | None = None
    """how far training stays from time's singular ends; None: as published. Ignored by velocity with linear or gvp"""
    sample_eps: float | None = None
    """the same for sampling"""

    repa: str | None = None
    """align tokens with a frozen encoder (REPA): a timm model, e.g. vit_base_patch14_dinov2.lvd142m, or a folder"""
    repa_weight: float = 0.5
    """weight of the alignment beside the loss"""
    repa_block: int = 8
    """the block, counted from 1, whose tokens are aligned"""

    # the optimisation
    steps: int = 1000
    """optimiser steps of the whole run"""
    batch_size: int = 256
    """images a step, over all processes and accumulated micro-batches together"""
    gradient_accumulation: int = 1
    """micro-batches a step"""
    learning_rate: float = 1e-4
    """AdamW's learning rate"""
    warmup_steps: int = 0
    """steps over which the learning rate rises linearly from zero"""
    final_learning_rate: float | None = None
    """learning rate at the last step, reached by a cosine; None keeps it constant"""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's betas"""
    weight_decay: float = 0.0
    """AdamW's weight decay"""
    max_grad_norm: float | None = None
    """clip the gradient to this norm; None clips nothing"""
    ema_decay: float = 0.9999
    """decay of the weights' moving average, after a warm-up of (1 + step) / (10 + step)"""
    seed: int = 0
    """names all randomness of the run: initial weights, order of the images, noise"""

    # how it runs
    mixed_precision: Literal["no", "bf16", "fp16"] | None = None
    """None takes what `accelerate launch` or `accelerate config` say"""
    tf32: bool = True
    """round float32 matrix products to TF32 on GPUs, as published"""
    compile: bool | None = None
    """torch.compile the network; None does so on GPUs where it can"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass, to save memory"""
    cpu_threads: int | None = None
    """threads of a process that trains on the CPU; None divides the machine's cores among its processes"""
    workers: int = 0
    """loader processes for each training process"""
    non_finite_limit: int = 10
    """steps in a row whose loss or gradient is not finite, and which are skipped, before the run stops"""

    # what is kept
    output_dir: str | None = None
    """the run's folder; None makes a new one under runs/"""
    resume: str | None = None
    """a run or checkpoint to continue; `auto` continues the newest whole checkpoint of --output-dir, if any"""
    trackers: tuple[str, ...] = ("tensorboard",)
    """Accelerate's trackers, e.g. tensorboard wandb trackio; metrics.jsonl is always written"""
    log_every: int = 10
    """steps between logged metrics"""
    preview_every: int = 250
    """steps between preview grids; 0 makes none"""
    preview_steps: int = 25
    """sampling steps of a preview"""
    preview_cfg_scale: float = 1.5
    """guidance of a preview"""
    checkpoint_every: int = 500
    """steps between checkpoints; the last step always makes one"""
    keep_last: int = 2
    """checkpoints kept besides those of --keep-every; 0 keeps all"""
    keep_every: int | None = None
    """steps between checkpoints that are kept for good"""

    def __post_init__(self) -> None:
        for name in ("image_size", "steps", "batch_size", "gradient_accumulation", "log_every", "checkpoint_every",
                     "preview_steps", "non_finite_limit", "repa_block"):  # fmt: skip
            if getattr(self, name) < 1:
                raise UserError(f"{_flag(name)} must be at least 1, not {getattr(self, name)}")
        if self.cpu_threads is not None and self.cpu_threads < 1:
            raise UserError(f"--cpu-threads must be at least 1, not {self.cpu_threads}; leave it out to use all cores")
        for name in ("warmup_steps", "workers", "preview_every", "keep_last", "weight_decay", "repa_weight"):
            if getattr(self, name) < 0:
                raise UserError(f"{_flag(name)} can't be negative: {getattr(self, name)}")
        for name in ("learning_rate", "final_learning_rate", "preview_cfg_scale"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise UserError(f"{_flag(name)} must be a number of at least 0, not {value}")
        for name in ("class_dropout", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{_flag(name)} must be in [0, 1), not {getattr(self, name)}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"--betas must be two numbers in [0, 1), not {self.betas[0]} {self.betas[1]}")
        if self.preview_every and self.preview_steps < 2:
            raise UserError(
                "--preview-steps 1 leaves the SDE no step before its last one: use at least 2, or --preview-every 0"
            )
        if self.batch_size % self.gradient_accumulation:
            raise UserError(
                f"--batch-size {self.batch_size} can't be divided into --gradient-accumulation "
                f"{self.gradient_accumulation} equal micro-batches"
            )

    def to_yaml(self) -> str:
        """All fields as YAML, which :func:`from_mapping` reads back."""
        plain = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}
        return yaml.safe_dump(plain, sort_keys=False)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def known_recipes() -> list[str]:
    """The names of the recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def from_mapping(values: dict[str, Any], source: str, base: TrainConfig | None = None) -> TrainConfig:
    """A config from a YAML mapping of field names, over the values of ``base``.

    Raises:
        UserError: an unknown field or a value of the wrong type; the message names ``source``.
    """
    hints = get_type_hints(TrainConfig)
    checked = {}
    for name, value in values.items():
        if name not in hints:
            raise UserError(f"{source}: unknown setting {name!r}; the settings are {', '.join(hints)}")
        if isinstance(value, list):
            value = tuple(value)
        try:
            checked[name] = typeguard.check_type(value, hints[name])
        except typeguard.TypeCheckError as error:
            reason = str(error).split(" ", 1)[1]
            raise UserError(f"{source}: {name}: {value!r} {reason}") from error
    return dataclasses.replace(base or TrainConfig(), **checked)


def load_recipe(name: str) -> TrainConfig:
    """Read a recipe: a name of :func:`known_recipes`, or a YAML file. Its ``base``, if any, is a recipe to start from.

    Raises:
        UserError: there is no such recipe, or the file is not a YAML mapping of settings.
    """
    path = RECIPES / f"{name}.yaml"
    if not path.is_file():
        path = Path(name)
    if not path.is_file():
        raise UserError(f"--recipe {name}: neither a file nor a recipe; the recipes are {', '.join(known_recipes())}")
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--recipe {path}: not readable YAML: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"--recipe {path}: must be a mapping of settings")
    base = values.pop("base", None)
    return from_mapping(values, f"--recipe {path}", load_recipe(str(base)) if base else None)


@dataclass(frozen=True)
class TrainArguments:
    """Train a SiT. A recipe, or the run to resume, sets the defaults of all other flags."""

    config: Annotated[TrainConfig, tyro.conf.OmitArgPrefixes]
    recipe: str = "digits"
    """a recipe's name or a YAML file"""
    dry_run: bool = False
    """print what the run would be and cost, and start nothing"""
    gpus: int = 1
    """with --dry-run: the number of GPUs to plan for"""
    images_per_second: float | None = None
    """with --dry-run: the measured speed of all GPUs together, for the time that it would take"""


def parse_train_arguments(arguments: list[str]) -> TrainArguments:
    """Read train.py's command line: ``--recipe`` (default ``digits``) or a resumed run's config, then the flags.

    Raises:
        UserError: a bad recipe or value. Unknown flags exit with tyro's message.
    """
    recipe, resume = _value_of("--recipe", arguments), _value_of("--resume", arguments)
    if resume not in (None, "auto"):
        if recipe is not None:
            raise UserError("--recipe and --resume RUN exclude each other: a resumed run has its config")
        base = load_recipe(str(run_folder(resume) / "config.yaml"))
    else:
        base = load_recipe(recipe or TrainArguments.recipe)
    description = f"{TrainArguments.__doc__} Recipes: {', '.join(known_recipes())}."
    with one_line_errors():
        parsed = tyro.cli(
            TrainArguments, args=arguments, default=TrainArguments(base), prog="train.py", description=description
        )
    if parsed.gpus < 1:
        raise UserError(f"--gpus must be at least 1, not {parsed.gpus}")
    if parsed.images_per_second is not None and parsed.images_per_second <= 0:
        raise UserError(f"--images-per-second must be positive, not {parsed.images_per_second}")
    return parsed


FIXED_BY_THE_FIRST_STEP = (
    "data", "image_size", "flip", "vae", "model", "mixer", "learn_sigma", "class_dropout", "interpolant", "prediction",
    "loss_weight", "train_eps", "batch_size", "betas", "weight_decay", "ema_decay", "seed",
    "repa", "repa_weight", "repa_block",
)  # fmt: skip


def check_same_run(config: TrainConfig, folder: Path) -> None:
    """Whether ``config`` may continue the run in ``folder``: what decides the network and its data must not change.

    Raises:
        UserError: it must not; the message names the flag and both values.
    """
    begun = load_recipe(str(folder / "config.yaml"))
    for name in FIXED_BY_THE_FIRST_STEP:
        now, then = getattr(config, name), getattr(begun, name)
        if now != then:
            raise UserError(f"{_flag(name)} {now} can't continue the run {folder}, which was begun with {then}")


def run_folder(path: str) -> Path:
    """The run's folder, of a run or of one of its checkpoints.

    Raises:
        UserError: neither is there.
    """
    folder = Path(path).resolve()
    for candidate in (folder, *folder.parents[:2]):
        if (candidate / "config.yaml").is_file():
            return candidate
    raise UserError(f"--resume {path}: neither a run's folder nor a checkpoint in one (there is no config.yaml)")


def _value_of(flag: str, arguments: list[str]) -> str | None:
    """The value of ``flag`` on a command line, before the rest is understood; None if it is not there."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(flag, dest="value", nargs="?")
    return parser.parse_known_args(arguments)[0].value
