"""The training objective, and what a network trained on it says of velocity and score."""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config

from sit.transport.interpolants import Interpolant, expand_t_like_x, get_interpolant
from sit.utils.errors import UserError

Field = Callable[..., torch.Tensor]
"""A function (x (B, C, h, w), t (B,), **conditions) → (B, C, h, w)."""


PREDICTIONS = ("velocity", "score", "noise")


LOSS_WEIGHTS = ("none", "velocity", "likelihood")


class Transport(SchedulerMixin, ConfigMixin):
    """Interpolant × prediction × loss weight, with the published intervals of t (SiT's ``create_transport``).

    A component of the diffusers pipeline: saved as ``transport/transport_config.json``.

    Args:
        interpolant: ``linear``, ``gvp`` or ``vp``.
        prediction: what the network's output is: ``velocity``, ``score`` or ``noise``.
        loss_weight: for score and noise: ``none``, ``velocity`` (the loss of the implied velocity) or
            ``likelihood``. The velocity prediction has no weight.
        train_eps: how far training stays from the singular ends of [0, 1]; None is the published value. As published,
            the velocity prediction under ``linear`` and ``gvp``, which has no singular end, takes no ε.
        sample_eps: the same for sampling.

    Raises:
        UserError: an unknown name, an ε outside [0, 0.5), or a sampling ε of 0 where the ends are singular.
    """

    config_name = "transport_config.json"

    @register_to_config
    def __init__(
        self,
        interpolant: str = "linear",
        prediction: str = "velocity",
        loss_weight: str = "none",
        train_eps: float | None = None,
        sample_eps: float | None = None,
    ) -> None:
        self.interpolant: Interpolant = get_interpolant(interpolant)
        for value, known, what in (
            (prediction, PREDICTIONS, "prediction"),
            (loss_weight, LOSS_WEIGHTS, "loss weight"),
        ):
            if value not in known:
                raise UserError(f"unknown {what} {value!r}; known: {', '.join(known)}")
        if prediction == "velocity" and loss_weight != "none":
            raise UserError(f"--loss-weight {loss_weight} serves the predictions score and noise; velocity has none")
        for name, value in (("train", train_eps), ("sample", sample_eps)):
            if value is not None and not 0 <= value < 0.5:
                raise UserError(f"--{name}-eps must be in [0, 0.5), not {value}")
        if sample_eps == 0 and prediction != "velocity":
            raise UserError(f"--sample-eps 0: the prediction {prediction} has no finite drift at the ends: leave it")
        if interpolant != "vp" and prediction == "velocity":
            train_eps = sample_eps = 0.0
        self.train_eps = (1e-5 if interpolant == "vp" else 1e-3) if train_eps is None else train_eps
        self.sample_eps = 1e-3 if sample_eps is None else sample_eps

    # ------------------------------------------------------------------ intervals

    def train_interval(self) -> tuple[float, float]:
        """The times from which training draws t uniformly."""
        if self.config.interpolant == "vp":
            return 0.0, 1 - self.train_eps
        if self.config.prediction != "velocity":
            return self.train_eps, 1 - self.train_eps
        return 0.0, 1.0

    def ode_interval(self) -> tuple[float, float]:
        """Where the ODE starts (noise) and ends (data)."""
        eps = self.sample_eps
        if self.config.interpolant == "vp":
            return 0.0, 1 - eps
        if self.config.prediction != "velocity":
            return eps, 1 - eps
        return 0.0, 1.0

    def must_stop(self, reverse: bool) -> bool:
        """Whether the ODE's drift does not exist just past its interval's end, where adaptive solvers would look."""
        vp, prediction = self.config.interpolant == "vp", self.config.prediction
        return (not vp and prediction != "velocity") if reverse else (vp and prediction == "noise")

    def sde_interval(self, diffusion_form: str, last_step_size: float) -> tuple[float, float]:
        """Where the SDE starts and where its last step, of that size, begins (0: no last step, ends at 1 − ε)."""
        eps = self.sample_eps
        end = 1 - (last_step_size or eps)
        if self.config.interpolant == "vp":
            return 0.0, end
        starts_late = diffusion_form == "sbdm" or self.config.prediction != "velocity"
        return (eps if starts_late else 0.0), end

    # ------------------------------------------------------------------ training

    def loss(self, model: Field, x1: torch.Tensor, t: torch.Tensor, x0: torch.Tensor, **conditions) -> torch.Tensor:
        """The loss of each image: the weighted mean squared error of the prediction.

        Args:
            model: the network, called as ``model(x_t, t, **conditions)``.
            x1: data (B, C, h, w).
            t: times (B,).
            x0: noise (B, C, h, w).

        Returns:
            (B,) float32.
        """
        path = self.interpolant
        out = model(path.interpolate(x1, x0, t), t, **conditions).float()
        if self.config.prediction == "velocity":
            error = out - path.velocity(x1, x0, t)
        elif self.config.prediction == "noise":
            error = out - x0
        else:
            error = out * path.sigma(expand_t_like_x(t, out)) + x0
        return error.square().flatten(1).mean(1) * self._weight(t)

    def _weight(self, t: torch.Tensor) -> torch.Tensor | float:
        """Weight (B,) of the squared error of the noise, or of the score times −σ."""
        if self.config.loss_weight == "none":
            return 1.0
        rate, sigma = self.interpolant.noise_rate(t), self.interpolant.sigma(t)
        return (rate / sigma) ** 2 if self.config.loss_weight == "velocity" else rate / sigma**2

    # ------------------------------------------------------------------ sampling

    def to_velocity(self, out: torch.Tensor, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The velocity, the drift of the ODE, that a network's output ``out`` at (x, t) means."""
        if self.config.prediction == "velocity":
            return out
        if self.config.prediction == "noise":
            out = self.interpolant.score_from_noise(out, x, t)
        return self.interpolant.velocity_from_score(out, x, t)

    def to_score(self, out: torch.Tensor, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The score ∇ log p_t that a network's output ``out`` at (x, t) means."""
        if self.config.prediction == "velocity":
            return self.interpolant.score_from_velocity(out, x, t)
        if self.config.prediction == "noise":
            return self.interpolant.score_from_noise(out, x, t)
        return out
