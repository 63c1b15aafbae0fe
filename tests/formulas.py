"""The formulas of interpolants, conversions and diffusion forms, written a second time: float64, NumPy, no classes."""

from __future__ import annotations

import numpy as np

INTERPOLANTS = ("linear", "gvp", "vp")
PREDICTIONS = ("velocity", "score", "noise")


def coefficients(name: str, t):
    """α, σ, dα/dt, dσ/dt in closed form."""
    t = np.asarray(t, np.float64)
    if name == "linear":
        return t, 1 - t, np.ones_like(t), -np.ones_like(t)
    if name == "gvp":
        angle = np.pi * t / 2
        return np.sin(angle), np.cos(angle), np.pi / 2 * np.cos(angle), -np.pi / 2 * np.sin(angle)
    s = 1 - t
    exponent = -(19.9 * s**2 / 4 + 0.1 * s / 2)
    alpha = np.exp(exponent)
    d_alpha = alpha * (19.9 * s + 0.1) / 2
    sigma = np.sqrt(1 - alpha**2)
    return alpha, sigma, d_alpha, -alpha * d_alpha / sigma


def ends(name: str, x, velocity, t):
    """Data and noise (x1, x0) implied by a state and a velocity: the two linear equations, solved as such."""
    alpha, sigma, d_alpha, d_sigma = coefficients(name, t)
    determinant = alpha * d_sigma - sigma * d_alpha
    return (d_sigma * x - sigma * velocity) / determinant, (alpha * velocity - d_alpha * x) / determinant


def velocity_and_score(name: str, prediction: str, out, x, t):
    """What a network's output means, by way of the data and noise that it implies."""
    alpha, sigma, d_alpha, d_sigma = coefficients(name, t)
    if prediction == "velocity":
        noise = ends(name, x, out, t)[1]
        return out, -noise / sigma
    noise = out if prediction == "noise" else -sigma * out
    return d_alpha * (x - sigma * noise) / alpha + d_sigma * noise, -noise / sigma


def diffusion(form: str, name: str, norm: float, t):
    """w(t) of the six forms."""
    alpha, sigma, d_alpha, d_sigma = coefficients(name, t)
    return {
        "constant": lambda: norm + 0 * np.asarray(t),
        "sbdm": lambda: norm * sigma * (d_alpha * sigma - d_sigma * alpha) / alpha,
        "sigma": lambda: norm * sigma,
        "linear": lambda: norm * (1 - np.asarray(t)),
        "decreasing": lambda: (norm * np.cos(np.pi * np.asarray(t)) + 1) ** 2 / 4,
        "increasing-decreasing": lambda: norm * np.sin(np.pi * np.asarray(t)) ** 2,
    }[form]()


def mixture_velocity(name: str, x, t, means, deviations, weights):
    """The exact velocity for data from a mixture of Gaussians: posterior means of data and noise, in closed form.

    x has any shape, every coordinate of it on its own a sample of the one-dimensional mixture.
    """
    alpha, sigma, d_alpha, d_sigma = coefficients(name, t)
    x = np.asarray(x, np.float64)[..., None]
    variance = (alpha * deviations) ** 2 + sigma**2
    logits = np.log(weights) - 0.5 * np.log(variance) - 0.5 * (x - alpha * means) ** 2 / variance
    share = np.exp(logits - logits.max(-1, keepdims=True))
    share /= share.sum(-1, keepdims=True)
    away = (x - alpha * means) / variance
    data, noise = means + alpha * deviations**2 * away, sigma * away
    return (share * (d_alpha * data + d_sigma * noise)).sum(-1)
