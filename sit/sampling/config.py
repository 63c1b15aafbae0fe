"""How to sample: solver, steps, guidance. The defaults are those of the published SiT."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

from sit.utils.errors import UserError

if TYPE_CHECKING:
    import torch  # seconds that a command's flags can be read without

OnStep: TypeAlias = "Callable[[int, int | None, torch.Tensor, float | torch.Tensor], None]"
"""Called after step number ``step`` of ``total`` (None if the solver chooses its steps) with the state (B, C, h, w) and
the time t that it stands at, a number or 0-dim tensor."""


DiffusionForm = Literal["constant", "sbdm", "sigma", "linear", "decreasing", "increasing-decreasing"]
LastStep = Literal["mean", "tweedie", "euler", "none"]
LabelOrder = Literal["balanced", "uniform"]
"""every class as often, in turn; or each label drawn at random, as the published systems do"""

SDE_METHODS = ("euler", "heun")
ADAPTIVE_METHODS = ("dopri8", "dopri5", "bosh3", "fehlberg2", "adaptive_heun", "scipy_solver")
"""torchdiffeq's solvers that choose their own steps."""
FIXED_METHODS = ("euler", "midpoint", "heun2", "heun3", "rk4", "explicit_adams", "implicit_adams", "fixed_adams")
"""torchdiffeq's solvers that make the steps they are told."""
ODE_METHODS = ADAPTIVE_METHODS + FIXED_METHODS
TOLERANT_METHODS = (*ADAPTIVE_METHODS, "implicit_adams", "fixed_adams")
"""those that heed ``atol`` and ``rtol``, two by iterating each step until it changes no more"""
METHODS: dict[str, tuple[str, ...]] = {"sde": SDE_METHODS, "ode": ODE_METHODS, "meanflow": ()}
"""the samplers, and the methods of each"""


SETTINGS_OF = {
    "sde": ("diffusion_form", "diffusion_norm", "last_step", "last_step_size"),
    "ode": ("atol", "rtol"),
}
"""the settings that only one of the samplers reads"""


@dataclass(frozen=True)
class SamplerConfig:
    """How to sample; the defaults are those of the published SiT.

    Raises:
        UserError: a value that can't be.
    """

    sampler: Literal["sde", "ode", "meanflow"] | None = None
    """the reverse SDE; the probability-flow ODE; or the average velocities that a network of MeanFlow has learned. None
    takes meanflow for such a network, and the SDE for all others"""
    steps: int = 250
    """network steps: SDE steps with the last step included, steps of a fixed-step ODE solver or of meanflow"""
    method: str | None = None
    """SDE: euler (Euler-Maruyama, the default) or heun. ODE: a solver of torchdiffeq, by default dopri5"""
    diffusion_form: DiffusionForm = "sigma"
    """how much noise the SDE adds over time"""
    diffusion_norm: float = 1.0
    """factor of the diffusion coefficient"""
    last_step: LastStep = "mean"
    """how the SDE ends, without adding noise"""
    last_step_size: float = 0.04
    """time that the SDE's last step covers"""
    atol: float = 1e-6
    """absolute tolerance of ODE solvers that are adaptive, and of implicit_adams and fixed_adams"""
    rtol: float = 1e-3
    """relative tolerance of the same"""
    cfg_scale: float = 1.0
    """classifier-free guidance; 1 is none, and then the network runs once a step instead of twice"""
    cfg_channels: int | None = None
    """the first latent channels, which guidance acts on; 0 for all. None: 3 of latents of 4, as published, and all of
    any others"""
    cfg_interval: tuple[float, float] = (0.0, 1.0)
    """guide only where the noise level 1 - t is within these bounds (as REPA counts it), which belong to it; outside,
    no second pass. An upper bound above 1 is 1"""

    def __post_init__(self) -> None:
        if self.method is not None:
            object.__setattr__(self, "method", self.method.lower())  # Euler and Heun, as the published script has them
        if self.sampler not in (None, *METHODS):
            raise UserError(f"`sampler={self.sampler}` is none of {', '.join(METHODS)}")
        known = METHODS[self.sampler or "sde"]
        if self.method is not None and self.method not in known:
            has = (
                f"the methods of `sampler={self.sampler or 'sde'}` are {', '.join(known)}"
                if known
                else ("`sampler=meanflow` has none: leave it out")
            )
            raise UserError(f"`method={self.method}`: {has}")
        for name, known in (("diffusion_form", get_args(DiffusionForm)), ("last_step", get_args(LastStep))):
            if getattr(self, name) not in known:
                raise UserError(f"`{name}={getattr(self, name)}` is none of {', '.join(known)}")
        for sampler, names in SETTINGS_OF.items():
            for field in dataclasses.fields(self):
                given = field.name in names and getattr(self, field.name) != field.default
                if given and self.sampler not in (None, sampler):
                    raise UserError(
                        f"`{field.name}` is of `sampler={sampler}`, and {self.sampler} has none: leave it out"
                    )
        if self.steps < 1:
            raise UserError(f"`steps` must be at least 1, not {self.steps}")
        if self.sampler == "sde" and self.last_step != "none" and self.steps < 2:
            raise UserError("`steps=1` leaves the SDE no step before its last one: use at least 2, or `last_step=none`")
        if not 0 <= self.diffusion_norm < math.inf:
            raise UserError(f"`diffusion_norm` must be a number of at least 0, not {self.diffusion_norm}")
        if not 0 < self.last_step_size < 1:
            raise UserError(f"`last_step_size` must be between 0 and 1, not {self.last_step_size}")
        if not (self.atol > 0 and self.rtol > 0):
            raise UserError("`atol` and `rtol` must be positive")
        if self.cfg_scale < 0 or not math.isfinite(self.cfg_scale):
            raise UserError(f"`cfg_scale` must be a number of at least 0, not {self.cfg_scale}")
        if self.sampler == "meanflow" and self.cfg_scale != 1:
            raise UserError(
                f"`cfg_scale={self.cfg_scale:g}`: guidance is part of what MeanFlow trains, and is not added to its "
                "average velocities: leave it at 1, or take `sampler=ode`"
            )
        if self.cfg_channels is not None and self.cfg_channels < 0:
            raise UserError(f"`cfg_channels` must be 0 (all) or more, not {self.cfg_channels}")
        low, high = self.cfg_interval
        if not (0 <= low <= high < math.inf and low <= 1):
            raise UserError(f"`cfg_interval={low} {high}`: needs 0 <= LOW <= HIGH, and LOW <= 1")
        object.__setattr__(self, "cfg_interval", (low, min(high, 1.0)))  # REPA's --guidance-high 3.0 is "always"

    @property
    def resolved_method(self) -> str:
        """The method, with the default filled in."""
        return self.method or {"ode": "dopri5", "meanflow": "meanflow"}.get(self.sampler or "sde", "euler")

    @property
    def adaptive(self) -> bool:
        """Whether the solver chooses its own steps, and so doesn't heed ``steps``."""
        return self.sampler == "ode" and self.resolved_method in ADAPTIVE_METHODS

    def resolve(self, averages: bool) -> SamplerConfig:
        """The same with its sampler decided, for a network that predicts average velocities, or for another.

        Raises:
            UserError: average velocities are asked of another; or the steps or guidance don't go with the sampler.
        """
        if self.sampler == "meanflow" and not averages:
            raise UserError("`sampler=meanflow`: this network predicts no average velocity: take sde or ode")
        return dataclasses.replace(self, sampler="meanflow" if averages else "sde") if self.sampler is None else self

    def for_latents(self, channels: int) -> SamplerConfig:
        """The same with its guided channels decided, for latents of so many, as records have them."""
        return dataclasses.replace(self, cfg_channels=usual_channels(channels)) if self.cfg_channels is None else self


def usual_channels(channels: int) -> int:
    """The ``cfg_channels`` of latents of so many channels: 3 of 4 as published; else all, of fewer by 3 too."""
    return 3 if channels <= 4 else 0


def guided_channels(chosen: int | None, channels: int) -> int:
    """How many of the latents' channels guidance acts on, from the first, where ``cfg_channels`` is ``chosen``."""
    chosen = usual_channels(channels) if chosen is None else chosen
    return min(chosen or channels, channels)


def height_and_width(size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    """What ``image_size`` means: one number is the side of a square."""
    return (size, size) if isinstance(size, int) else size


def check_heeded(config: SamplerConfig) -> None:
    """Refuse what a user sets of a sampler, and another setting leaves without effect.

    This is for settings as they are given: one that is stored, or whose guidance a callback changes on the way, may
    hold such values.

    Raises:
        UserError: a setting that plays no part differs from its default.
    """
    method = config.resolved_method
    idle = {
        "last_step_size": (config.last_step == "none", "`last_step=none`"),
        "atol": (config.sampler == "ode" and method not in TOLERANT_METHODS, f"`method={method}`"),
        "cfg_channels": (config.cfg_scale == 1, "`cfg_scale=1`, which guides nothing"),
    }
    idle |= {"rtol": idle["atol"], "cfg_interval": idle["cfg_channels"]}
    for field in dataclasses.fields(config):
        plays_no_part, cause = idle.get(field.name, (False, ""))
        if plays_no_part and getattr(config, field.name) != field.default:
            raise UserError(f"`{field.name}` plays no part with {cause}: leave it out, or change that")


def check_guide(guide: str | None, config: SamplerConfig) -> None:
    """Raise UserError if there is a guide and nothing is guided."""
    if guide is not None and config.sampler == "meanflow":
        raise UserError(
            f"`guide={guide}`: MeanFlow's average velocities are not guided: take `sampler=ode`, or no guide"
        )
    if guide is not None and config.cfg_scale == 1:
        raise UserError(f"`guide={guide}` guides by `cfg_scale`, and 1 is none: give another, such as 2")
