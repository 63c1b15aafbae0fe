"""Interpolants x_t = α_t·x_1 + σ_t·x_0 between noise x_0 (t = 0) and data x_1 (t = 1), and what follows from one.

Velocity, score and noise determine each other by linear equations in x_t (SiT, arXiv 2401.08740, section 2 and
appendix A). With λ = α̇/α and g = λσ² − σσ̇ the velocity of the probability flow is v = λ·x + g·score.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from sit.utils.errors import UserError


def expand_t_like_x(t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Times (B,) shaped to multiply images (B, …)."""
    return t.reshape(-1, *[1] * (x.ndim - 1))


class Interpolant:
    """α, σ, their time derivatives, and the conversions. Times are tensors of any shape that broadcasts with x."""

    def alpha(self, t: torch.Tensor) -> torch.Tensor:
        """Weight of the data."""
        raise NotImplementedError

    def sigma(self, t: torch.Tensor) -> torch.Tensor:
        """Weight of the noise."""
        raise NotImplementedError

    def d_alpha(self, t: torch.Tensor) -> torch.Tensor:
        """dα/dt."""
        raise NotImplementedError

    def d_sigma(self, t: torch.Tensor) -> torch.Tensor:
        """dσ/dt."""
        raise NotImplementedError

    def d_log_alpha(self, t: torch.Tensor) -> torch.Tensor:
        """λ = α̇/α; infinite at t = 0 where α is zero there."""
        return self.d_alpha(t) / self.alpha(t)

    def noise_rate(self, t: torch.Tensor) -> torch.Tensor:
        """g = λσ² − σσ̇ ≥ 0, the factor of the score in the velocity; the SBDM diffusion coefficient."""
        sigma = self.sigma(t)
        return self.d_log_alpha(t) * sigma**2 - sigma * self.d_sigma(t)

    def interpolate(self, x1: torch.Tensor, x0: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """x_t of data x1 and noise x0 (B, …) at times t (B,)."""
        t = expand_t_like_x(t, x1)
        return self.alpha(t) * x1 + self.sigma(t) * x0

    def velocity(self, x1: torch.Tensor, x0: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """α̇·x1 + σ̇·x0: what the velocity prediction is trained on."""
        t = expand_t_like_x(t, x1)
        return self.d_alpha(t) * x1 + self.d_sigma(t) * x0

    # The conversions below take x (B, …) and times t (B,).

    def velocity_from_score(self, score: torch.Tensor, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        t = expand_t_like_x(t, x)
        return self.d_log_alpha(t) * x + self.noise_rate(t) * score

    def score_from_noise(self, noise: torch.Tensor, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return -noise / self.sigma(expand_t_like_x(t, x))

    def score_from_velocity(self, velocity: torch.Tensor, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        # multiplied through by α/α̇, so that t = 0, where λ is infinite, stays regular
        t = expand_t_like_x(t, x)
        ratio, sigma = self.alpha(t) / self.d_alpha(t), self.sigma(t)
        return (ratio * velocity - x) / (sigma**2 - ratio * self.d_sigma(t) * sigma)


class Linear(Interpolant):
    """α = t, σ = 1 − t."""

    def alpha(self, t):
        return t

    def sigma(self, t):
        return 1 - t

    def d_alpha(self, t):
        return torch.ones_like(t)

    def d_sigma(self, t):
        return -torch.ones_like(t)


class GVP(Interpolant):
    """Generalized variance-preserving: α = sin(πt/2), σ = cos(πt/2).

    The cosine is taken as the sine of π(1 − t)/2, which in float32 keeps its relative precision at t → 1.
    """

    def alpha(self, t):
        return torch.sin(t * math.pi / 2)

    def sigma(self, t):
        return torch.sin((1 - t) * math.pi / 2)

    def d_alpha(self, t):
        return math.pi / 2 * torch.sin((1 - t) * math.pi / 2)

    def d_sigma(self, t):
        return -math.pi / 2 * torch.sin(t * math.pi / 2)


@dataclass(frozen=True)
class VP(Interpolant):
    """The variance-preserving diffusion (Song et al. 2021) in this direction of time: β(t) linear in 1 − t."""

    beta_min: float = 0.1
    beta_max: float = 20.0

    def beta(self, t):
        return self.beta_min + (1 - t) * (self.beta_max - self.beta_min)

    def log_alpha(self, t):
        return -0.25 * (1 - t) ** 2 * (self.beta_max - self.beta_min) - 0.5 * (1 - t) * self.beta_min

    def alpha(self, t):
        return torch.exp(self.log_alpha(t))

    def sigma(self, t):
        return torch.sqrt(-torch.expm1(2 * self.log_alpha(t)))  # 1 − α² without its cancellation at t → 1

    def d_alpha(self, t):
        return self.alpha(t) * self.d_log_alpha(t)

    def d_sigma(self, t):
        return -torch.exp(2 * self.log_alpha(t)) * self.d_log_alpha(t) / self.sigma(t)

    def d_log_alpha(self, t):
        return 0.5 * self.beta(t)

    def noise_rate(self, t):
        return 0.5 * self.beta(t)


INTERPOLANTS: dict[str, type[Interpolant]] = {"linear": Linear, "gvp": GVP, "vp": VP}


def get_interpolant(name: str) -> Interpolant:
    """The interpolant of that name: ``linear``, ``gvp`` or ``vp``.

    Raises:
        UserError: another name.
    """
    if name not in INTERPOLANTS:
        raise UserError(f"`interpolant={name}` is none of {', '.join(INTERPOLANTS)}")
    return INTERPOLANTS[name]()
