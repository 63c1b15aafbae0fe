"""Post-hoc EMA (EDM2, arXiv 2312.02696, section 3 and appendix C): averages of any length from a run's snapshots.

A power-function average of the weights θ(τ) over the training time 0 < τ ≤ t is

    θ̂_γ(t) = (γ + 1) / t^(γ + 1) · ∫ τ^γ θ(τ) dτ,

so the profile that it weights them with is p(τ) = (γ + 1) τ^γ / t^(γ + 1). Its relative length σ_rel is the standard
deviation of p at t = 1. A run keeps averages of a few lengths and stores snapshots of them; the average of another
length is the linear combination of snapshots whose profile is nearest to that length's in the least-squares sense.
Time is counted in optimizer steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike

from sit.checkpoint.info import read_info
from sit.checkpoint.snapshots import SNAPSHOTS, whole_snapshots
from sit.checkpoint.weights_file import read_weights
from sit.model import SiT
from sit.utils.errors import UserError

LONGEST = 12**-0.5
"""The relative length of γ = 0, the plain mean over the whole run."""

LIMIT = 0.1
"""The largest error of a profile, relative to its norm, that a reconstruction may have."""

NEGLIGIBLE = 1e-6
"""Snapshots with a smaller coefficient are not read: far below the rounding of their float16."""


def gamma_of(sigma_rel: float) -> float:
    """The exponent γ > 0 of a relative length: the largest root of (γ + 2)² (γ + 3) = (γ + 1) / σ_rel².

    Raises:
        ValueError: no γ > 0 has that length.
    """
    if not 0 < sigma_rel < LONGEST:
        raise ValueError(f"a relative length must lie between 0 and {LONGEST:.4f}, not be {sigma_rel}")
    inverse = sigma_rel**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())  # all three are real


def sigma_of(gamma: float) -> float:
    """The relative length of the exponent γ: sqrt(γ + 1) / ((γ + 2) sqrt(γ + 3))."""
    return float(np.sqrt(gamma + 1) / ((gamma + 2) * np.sqrt(gamma + 3)))


def decay_at(step: int, gamma: float) -> float:
    """β(t) = (1 − 1/t)^(γ + 1), by which step t's update θ̂(t) = β θ̂(t − 1) + (1 − β) θ(t) gives the average."""
    return (1 - 1 / step) ** (gamma + 1)


def inner_products(gamma_a: ArrayLike, t_a: ArrayLike, gamma_b: ArrayLike, t_b: ArrayLike) -> np.ndarray:
    """∫ p_a(τ) p_b(τ) dτ of two profiles, in closed form; the arguments broadcast.

    With m the earlier of the two times it is
    (γ_a + 1)(γ_b + 1) / (γ_a + γ_b + 1) · m^(γ_a + γ_b + 1) / (t_a^(γ_a + 1) t_b^(γ_b + 1)).
    """
    gamma_a, t_a, gamma_b, t_b = (np.asarray(value, np.float64) for value in (gamma_a, t_a, gamma_b, t_b))
    earlier, later = np.minimum(t_a, t_b), np.maximum(t_a, t_b)
    power = np.where(t_a < t_b, gamma_b, gamma_a)  # of the later one; of equal times, none counts
    return (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * (earlier / later) ** power / later


def coefficients(stored: list[tuple[float, int]], sigma_rel: float, step: int) -> tuple[np.ndarray, float]:
    """How to combine stored averages into that of the length ``sigma_rel`` at ``step``.

    Solves the least-squares system A x = b of the profiles' inner products and, as EDM2 does, divides x by its sum:
    weights that never moved are reconstructed as they are.

    Args:
        stored: (relative length, step) of each.
        sigma_rel: the length wanted.
        step: the training time that it is wanted at.

    Returns:
        The coefficients (len(stored),) float64, and the L2 norm of what the combined profile misses, relative to that
        of the profile wanted.
    """
    gammas, steps = np.array([gamma_of(sigma) for sigma, _ in stored]), np.array([at for _, at in stored], np.float64)
    gamma = gamma_of(sigma_rel)
    a = inner_products(gammas[:, None], steps[:, None], gammas, steps)
    b = inner_products(gammas, steps, gamma, step)
    square = float(inner_products(gamma, step, gamma, step))
    scale = np.diag(a) ** -0.5  # profiles of unit norm: the system is better conditioned
    x = scale * np.linalg.lstsq(scale[:, None] * a * scale, scale * b, rcond=None)[0]
    x = x / x.sum()
    missed = square - 2 * b @ x + x @ a @ x
    return x, float(np.sqrt(max(missed, 0.0) / square))


@dataclass(frozen=True)
class Reconstruction:
    """An average that can be put together from snapshots.

    Attributes:
        sigma_rel: its relative length.
        step: the step at which it is taken.
        parts: the files of stored averages, each with its coefficient.
        error: as :func:`coefficients` tells it.
    """

    sigma_rel: float
    step: int
    parts: tuple[tuple[Path, float], ...]
    error: float

    def __str__(self) -> str:
        return f"EMA of relative length {self.sigma_rel:g} (profile {100 * self.error:.2g} % off)"

    def weights(self) -> dict[str, torch.Tensor]:
        """The weights by parameter, float32; reads the snapshots one by one.

        Raises:
            UserError: a snapshot can't be read.
        """
        total: dict[str, torch.Tensor] = {}
        for file, coefficient in self.parts:
            for name, tensor in read_weights(file).state.items():
                total.setdefault(name, torch.zeros(tensor.shape)).add_(tensor.float(), alpha=coefficient)
        return total

    def load_into(self, network: SiT) -> None:
        """Give the network these weights.

        Raises:
            UserError: a snapshot can't be read, or it is of another network.
        """
        weights = self.weights()
        own = {name: parameter.shape for name, parameter in network.named_parameters()}
        if {name: tensor.shape for name, tensor in weights.items()} != own:
            raise UserError(f"the snapshot {self.parts[-1][0].parent} does not fit the network of its run's checkpoint")
        network.load_state_dict(weights, strict=False)  # all parameters, no buffers


def find_reconstruction(checkpoint: Path, sigma_rel: float) -> Reconstruction:
    """How to put together the average of the length ``sigma_rel`` at a checkpoint's step, from its run's snapshots.

    Args:
        checkpoint: a folder in ``checkpoints/`` of a run.
        sigma_rel: the relative length, the argument ``ema`` of those who ask.

    Raises:
        UserError: no such length, no snapshots, or none that it can be reached from: see :data:`LIMIT`.
    """
    try:
        gamma_of(sigma_rel)
    except ValueError as error:
        raise UserError(f"`ema={sigma_rel:g}`: {error}") from error
    if checkpoint.is_file() or checkpoint.resolve().parent.name != "checkpoints":
        raise UserError(
            f"`ema={sigma_rel:g}`: {checkpoint} is no checkpoint in a run's folder, where its snapshots would be"
        )
    run, step = checkpoint.resolve().parents[1], read_info(checkpoint).step
    found = [(at, averages) for at, averages in whole_snapshots(run) if at <= step]
    if not found:
        raise UserError(
            f"`ema={sigma_rel:g}`: {run / SNAPSHOTS} has no snapshot up to step {step}; a run trained with "
            "`posthoc_ema=0.05 0.1` makes them"
        )
    stored = [(sigma, at) for at, averages in found for sigma in averages]
    files = [file for _, averages in found for file in averages.values()]
    x, error = coefficients(stored, sigma_rel, step)
    if error > LIMIT:
        newest = found[-1][0]
        mend = "take a length nearer to the stored ones"
        if newest != step:
            mend = f"take a checkpoint whose step has a snapshot, as step {newest} has"
        lengths = ", ".join(f"{sigma:g}" for sigma in found[-1][1])
        raise UserError(
            f"`ema={sigma_rel:g}` can't be reached at step {step} from {len(found)} snapshots of the lengths {lengths} "
            f"in {run / SNAPSHOTS}: the profile would be {100 * error:.0f} % off, more than {100 * LIMIT:.0f} %; {mend}"
        )
    parts = [(file, float(part)) for file, part in zip(files, x, strict=True) if abs(part) >= NEGLIGIBLE]
    return Reconstruction(sigma_rel, step, tuple(parts), error)
