"""The network as samplers call it: with classifier-free guidance, at one time for all images."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from sit.sampling.config import SamplerConfig, guided_channels
from sit.transport.transport import null_label_of

GRID_ERROR = 1e-6
"""How far a time of float32 may be from the grid's, so that a bound of the guided interval that lies on the grid is on
it: float32 rounds by up to 6e-8, and steps are longer than this."""


class GuidedModel:
    """A network with classifier-free guidance, as a function of the state and one time for all images.

    v(null) + scale·(v(label) − v(null)), here on the first ``cfg_channels`` channels (Ho & Salimans, arXiv 2207.12598).
    With a ``guide`` it is autoguidance (Karras et al., arXiv 2406.02507, equation 3): a worse network, given the same
    label, takes the place of the one without.

    Args:
        model: called as ``model(x, t, y=labels)``; its ``null_label`` is needed for guidance.
        labels: (B,) int64, or None for a network without labels (called without ``y``, never guided).
        config: the guidance.
        guide: the network to guide away from, called as ``model`` is; None is ``model`` with the null label.

    Raises:
        UserError: guidance of a network that has no null label, without a guide.
    """

    def __init__(
        self,
        model: Callable[..., torch.Tensor],
        labels: torch.Tensor | None,
        config: SamplerConfig,
        guide: Callable[..., torch.Tensor] | None = None,
    ) -> None:
        self.model, self.labels, self.config = model, labels, config
        self.guide = guide
        self.evaluations = 0
        self.both: torch.Tensor | None = None
        self._look_for_null_label()

    def set_scale(self, scale: float) -> None:
        """Guide the evaluations to come by this scale; 1 is none.

        Raises:
            UserError: guidance of a network that has no null label, without a guide, or that has it inside.
        """
        self.config = dataclasses.replace(self.config, cfg_scale=scale)
        self._look_for_null_label()

    def _look_for_null_label(self) -> None:
        if self.config.cfg_scale == 1 or self.labels is None or self.guide is not None:
            self.both = None
        elif self.both is None:
            self.both = torch.cat([self.labels, torch.full_like(self.labels, null_label_of(self.model))])

    def __call__(self, x: torch.Tensor, t: float | torch.Tensor, end: float | None = None) -> torch.Tensor:
        """State (B, C, h, w), and a time as number or 0-dim tensor, to the prediction (B, C, h, w) in x's dtype.

        With an ``end`` it is the average velocity from t to there, without guidance.
        """
        self.evaluations += 1
        if end is not None:
            return self._run(x, t, self.labels, end=times(end, x))
        alone = self.both is None and (self.guide is None or self.config.cfg_scale == 1)
        if alone or not self._guided(t):
            return self._run(x, t, self.labels)
        if self.guide is not None:
            with_label, without = self._run(x, t, self.labels), self._run(x, t, self.labels, model=self.guide)
        else:
            with_label, without = self._run(torch.cat([x, x]), t, self.both).chunk(2)
        guided = without + self.config.cfg_scale * (with_label - without)
        channels = guided_channels(self.config.cfg_channels, x.shape[1])
        return torch.cat([guided[:, :channels], with_label[:, channels:]], dim=1)

    def _guided(self, t: float | torch.Tensor) -> bool:
        """Whether the noise level is within the guided interval; where that is all of time, t is not looked at."""
        low, high = self.config.cfg_interval
        return (low, high) == (0.0, 1.0) or low - GRID_ERROR <= 1 - float(t) <= high + GRID_ERROR

    def _run(
        self,
        x: torch.Tensor,
        t: float | torch.Tensor,
        labels: torch.Tensor | None,
        *,
        model: Callable[..., torch.Tensor] | None = None,
        **conditions: torch.Tensor,
    ) -> torch.Tensor:
        if labels is not None:
            conditions["y"] = savable(labels)
        model = self.model if model is None else model
        return model(x.to(getattr(model, "dtype", x.dtype)), times(t, x), **conditions).to(x.dtype)


def savable(x: torch.Tensor) -> torch.Tensor:
    """The tensor, copied if inference mode made it and is off now: a backward pass can't save it as it is."""
    return x.clone() if x.is_inference() and not torch.is_inference_mode_enabled() else x


def times(t: float | torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """One time for every image of x: (B,) in x's dtype, made without a transfer to the device."""
    if isinstance(t, torch.Tensor):
        return t.to(x.dtype).expand(len(x))
    return torch.full((len(x),), t, dtype=x.dtype, device=x.device)
