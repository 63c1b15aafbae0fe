"""MeanFlow (arXiv 2505.13447): a network of average velocities, which goes from noise to data in one step or a few.

The average velocity from time t to a time r ≥ t on the way of the flow through x_t is

    u(x_t, t, r) = 1/(r − t) ∫ v(x_s, s) ds from t to r,   so that x_r = x_t + (r − t)·u(x_t, t, r),

and u(x, t, t) = v(x, t). Differentiating (r − t)·u by t along the flow, where r stays, gives the identity that is
trained (the paper's equation 6):

    u(x_t, t, r) = v + (r − t)·du/dt,   du/dt = v·∂u/∂x + ∂u/∂t.

Time here runs from noise (0) to data (1), the paper's from data to noise: its t, r, v and u are our 1 − t, 1 − r, −v
and −u, its r ≤ t is our r ≥ t, its z_r = z_t − (t − r)·u is x_r above, and the sign before du/dt, a minus there, is a
plus here. Its logit-normal times of location −0.4 have location +0.4 (``time_distribution="logit-normal-0.4"``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from sit.mixers.forward_mode import plain_operations
from sit.transport.draws import check_dropout, consecutive, noise, uniform
from sit.transport.interpolants import expand_t_like_x
from sit.transport.transport import Field, Transport, null_label_of, predicted
from sit.utils.errors import UserError


@dataclass(frozen=True)
class MeanFlow:
    """The objective of average velocities (section 4 of the paper), with guidance inside it (its section 4.2, and the
    mixture by κ of its appendix).

    Attributes:
        transport: the path, and the distribution of times; its prediction is ``average-velocity``.
        share: of the images, those that are trained on a step of some length; the others have r = t. 0.25 in the paper.
        weight_power: p of the weight (‖error‖² + c)⁻ᵖ of an image's ‖error‖², which is not differentiated; 0 is none.
        weight_floor: c of that weight.
        omega: ω, with which the target's velocity is ω·v + κ·u(x, t, t | label) + (1 − ω − κ)·u(x, t, t | no label)
            where the label is not dropped. The effective scale of guidance is ω/(1 − κ).
        kappa: κ of that.

    Raises:
        UserError: a transport of another prediction, or a number that can't be.
    """

    transport: Transport
    share: float = 0.25
    weight_power: float = 1.0
    weight_floor: float = 1e-3
    omega: float = 1.0
    kappa: float = 0.0

    def __post_init__(self) -> None:
        if not self.transport.averages:
            raise UserError(
                f"MeanFlow is the objective of `prediction=average-velocity`, not of {self.transport.prediction}"
            )
        if not 0 < self.share <= 1:
            raise UserError(f"`meanflow_share` must be above 0 and at most 1, not {self.share}")
        if not (0 <= self.weight_power < math.inf and 0 < self.weight_floor < math.inf):
            raise UserError("`meanflow_weight_power` must be at least 0, `meanflow_weight_floor` above 0, both finite")
        if not (0 <= self.omega < math.inf and 0 <= self.kappa < 1):
            raise UserError("`meanflow_omega` must be finite and at least 0, and `meanflow_kappa` in [0, 1)")

    @property
    def guides(self) -> bool:
        """Whether guidance is part of the objective."""
        return (self.omega, self.kappa) != (1.0, 0.0)

    @property
    def evaluations(self) -> float:
        """Forward passes that an image costs besides the one that is trained: derivatives, of two each, and guidance.

        Of the guidance's two, that with the label is left out where κ = 0, and that without where ω + κ = 1.
        """
        return 2 * self.share + self.guides * ((self.kappa != 0) + (self.omega + self.kappa != 1))

    def takes_a_step(self, positions: torch.Tensor) -> torch.Tensor:
        """Which of the images number ``positions`` (b,) int64 are trained on a step of some length: (b,) bool.

        Spread evenly over the numbers, so that of any b images in a row as many are, but for one. Equal positions
        answer alike, and the order of the images, which is shuffled, has nothing to do with it.
        """
        at = positions.double()
        return ((at + 1) * self.share).floor() > (at * self.share).floor()

    def weighted(self, squared: torch.Tensor) -> torch.Tensor:
        """The loss (B,) of squared errors (B,), each summed over an image: times the adaptive weight."""
        return squared / (squared.detach() + self.weight_floor) ** self.weight_power

    def training_loss(
        self, model: Field, x1: torch.Tensor, y: torch.Tensor | None = None, **draws: Any
    ) -> torch.Tensor:
        """The loss (B,) of each image: :meth:`training_error`, which has the arguments, with its weight."""
        return self.weighted(self.training_error(model, x1, y, **draws))

    def training_error(
        self,
        model: Field,
        x1: torch.Tensor,
        y: torch.Tensor | None = None,
        *,
        class_dropout: float = 0.1,
        null_label: int | None = None,
        u: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        x0: torch.Tensor | None = None,
        drop: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """Draw times, noise and dropped labels as :meth:`Transport.training_loss` does; take :meth:`squared_error`.

        Args:
            model: the network, called as ``model(x_t, t, y=labels, end=r)``, or without ``y`` if there is none.
            x1: data (B, …).
            y: labels (B,) int64, or None.
            class_dropout: probability with which a label is replaced by the null label.
            null_label: the label of no class; None takes ``model.null_label``.
            u: (B, 2) uniform draws in [0, 1), from which two times come: the earlier, noisier one is t, and the later
                is r, or for those without a step t, as published. Draws that are None are made here.
            positions: (B,) int64, numbers that :meth:`takes_a_step` decides by; None counts from a number that is drawn
                here, so that the images of every batch, however small, take their share of the steps.
            x0: (B, …) standard normal noise.
            drop: (B,) uniform draws in [0, 1); a label is replaced where they are below ``class_dropout``.
            generator: source of the draws made here, on its own device; None is the global one of x1's device.

        Returns:
            (B,) float32, or float64 if x1 is, the squared error of each image, without its weight.

        Raises:
            UserError: a dropout that is no probability, or labels to drop, or guidance, and no null label.
        """
        check_dropout(class_dropout)
        if self.guides and y is None:
            raise UserError("`meanflow_omega` and `meanflow_kappa` guide by labels, and there are none")
        u = uniform(x1, len(x1), 2, generator=generator) if u is None else u
        x0 = noise(x1, generator) if x0 is None else x0
        null_labels = dropped = None
        if y is not None and (class_dropout > 0 or self.guides):
            null_labels = torch.full_like(y, null_label_of(model) if null_label is None else null_label)
            drop = uniform(x1, len(x1), generator=generator) if drop is None else drop
            dropped = drop < class_dropout
            y = torch.where(dropped, null_labels, y)
        if positions is None:  # drawn last, so that one generator gives the other draws with and without positions
            positions = consecutive(x1, len(x1), generator=generator)
        t, late = self.transport.sample_times(u).aminmax(dim=1)
        end = torch.where(self.takes_a_step(positions), late, t)
        return self.squared_error(model, x1, t, end, x0, y=y, null_labels=null_labels, dropped=dropped)

    def squared_error(
        self,
        model: Field,
        x1: torch.Tensor,
        t: torch.Tensor,
        end: torch.Tensor,
        x0: torch.Tensor,
        *,
        y: torch.Tensor | None = None,
        null_labels: torch.Tensor | None = None,
        dropped: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """‖u(x_t, t, r) − target‖² of each image, the target a constant: (B,) float32, or float64 if x1 is.

        The derivative is taken of the images with a step alone (of the first, if none has one, so that the processes
        of a launch call the network equally often), in forward mode and without a graph; the network is called once
        more for what is differentiated, on the whole batch.

        Args:
            model: the network.
            x1: data (B, …).
            t: times (B,).
            end: times r (B,), each at least t.
            x0: noise (B, …).
            y: labels (B,) int64 with those that are dropped replaced, or None.
            null_labels: (B,) int64, of no class; needed by guidance.
            dropped: (B,) bool, where guidance leaves the velocity alone; needed by it.
        """
        path = self.transport.interpolant
        x, target = path.interpolate(x1, x0, t), path.velocity(x1, x0, t)
        labels = {} if y is None else {"y": y}
        with torch.no_grad():
            if self.guides:
                assert dropped is not None, "guidance has labels, some of which are dropped"
                guided = self._guided(model, x, t, velocity=target, y=y, null_labels=null_labels)
                target = torch.where(expand_t_like_x(dropped, x), target, guided)
            rows = (end > t).nonzero()[:, 0]
            rows = rows if len(rows) else torch.zeros(1, dtype=torch.int64, device=x.device)
            chosen = {name: values[rows] for name, values in labels.items()}
            slopes = derivative(model, x[rows], t[rows], end[rows], target[rows], **chosen)
            steps = expand_t_like_x((end - t)[rows], x)
            target = target.index_add(0, rows, (steps * slopes).to(target.dtype))
        error = predicted(model, x, t, **labels, end=end) - target
        return error.square().flatten(1).sum(1)

    def _guided(
        self,
        model: Field,
        x: torch.Tensor,
        t: torch.Tensor,
        *,
        velocity: torch.Tensor,
        y: torch.Tensor | None,
        null_labels: torch.Tensor | None,
    ) -> torch.Tensor:
        """ω·v + κ·u(x, t, t | label) + (1 − ω − κ)·u(x, t, t | no label), (B, …)."""
        guided = self.omega * velocity
        if self.kappa:
            guided = guided + self.kappa * predicted(model, x, t, y=y, end=t).to(velocity.dtype)
        if rest := 1 - (self.omega + self.kappa):
            guided = guided + rest * predicted(model, x, t, y=null_labels, end=t).to(velocity.dtype)
        return guided


def derivative(
    model: Field, x: torch.Tensor, t: torch.Tensor, end: torch.Tensor, velocity: torch.Tensor, **labels: torch.Tensor
) -> torch.Tensor:
    """du/dt of the average velocity u(x, t, end) along ``velocity`` (B, …), the end held: v·∂u/∂x + ∂u/∂t, (B, …).

    A Jacobian-vector product in forward mode. Kernels that have none are set aside (:func:`plain_operations`).
    """

    def average(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return predicted(model, x, t, **labels, end=end)

    with plain_operations(model, x.device):
        return torch.func.jvp(average, (x, t), (velocity.to(x.dtype), torch.ones_like(t)))[1]
