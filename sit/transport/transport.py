"""The training objective, and what a network trained on it says of velocity and score."""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerOutput

from sit.transport.draws import check_dropout, noise, uniform
from sit.transport.interpolants import Interpolant, expand_t_like_x, get_interpolant
from sit.utils.errors import UserError

Field = Callable[..., torch.Tensor]
"""A function (x (B, …), t (B,), **conditions) → (B, …)."""

PREDICTIONS = ("velocity", "score", "noise", "average-velocity")
LOSS_WEIGHTS = ("none", "velocity", "likelihood")


def logit_normal(u: torch.Tensor, location: float = 0.0) -> torch.Tensor:
    """Uniform draws in [0, 1) to draws whose logit is normal, of variance 1 (SD3, arXiv 2403.03206, section 3.1).

    The normal's inverse distribution function is −∞ at u = 0, and its sigmoid 0.
    """
    return torch.sigmoid(torch.special.ndtri(u) + location)


TIME_DISTRIBUTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "uniform": lambda u: u,
    "logit-normal": logit_normal,
    "logit-normal-0.4": lambda u: logit_normal(u, 0.4),
}
"""From uniform draws in [0, 1) to those of a distribution on [0, 1]."""


class Transport(SchedulerMixin, ConfigMixin):
    """Interpolant × prediction × loss weight, with the published intervals of t (SiT's ``create_transport``).

    A component of the diffusers pipeline: saved as ``transport/transport_config.json``. It is a scheduler in
    diffusers' sense too, of Euler's method along the ODE, for loops of one's own (``set_timesteps``, ``step``); the
    samplers of :mod:`sit.sampling` do not use that.

    Args:
        interpolant: ``linear``, ``gvp`` or ``vp``.
        prediction: what the network's output is: ``velocity``, ``score``, ``noise``, or ``average-velocity`` over a
            step, which is trained by :class:`sit.transport.meanflow.MeanFlow`; over a step of no length it is the
            velocity, and serves wherever a velocity does.
        loss_weight: for score and noise: ``none``, ``velocity`` (the loss of the implied velocity) or
            ``likelihood``. The velocity prediction has no weight.
        train_eps: how far training stays from the singular ends of [0, 1]; None is the published value. As published,
            the velocity prediction under ``linear`` and ``gvp``, which has no singular end, takes no ε.
        sample_eps: the same for sampling.
        time_distribution: how training draws t within its interval: ``uniform``, as published, or ``logit-normal``
            with location 0 and scale 1 (SD3); ``logit-normal-0.4`` has location 0.4, MeanFlow's in this direction of
            time.

    Raises:
        UserError: an unknown name, an ε outside [0, 0.5), or a sampling ε of 0 where the ends are singular.
    """

    config_name = "transport_config.json"  # type: ignore[assignment]
    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        interpolant: str = "linear",
        prediction: str = "velocity",
        loss_weight: str = "none",
        train_eps: float | None = None,
        sample_eps: float | None = None,
        time_distribution: str = "uniform",
    ) -> None:
        self.interpolant: Interpolant = get_interpolant(interpolant)
        for name, value, known in (
            ("prediction", prediction, PREDICTIONS),
            ("loss_weight", loss_weight, LOSS_WEIGHTS),
            ("time_distribution", time_distribution, tuple(TIME_DISTRIBUTIONS)),
        ):
            if value not in known:
                raise UserError(f"`{name}={value}` is none of {', '.join(known)}")
        self.averages, self.predicts_velocity = prediction == "average-velocity", prediction.endswith("velocity")
        if self.predicts_velocity and loss_weight != "none":
            raise UserError(f"`loss_weight={loss_weight}` serves the predictions score and noise; a velocity has none")
        if self.averages and interpolant == "vp":
            raise UserError(
                "`prediction=average-velocity` reaches the data in a step, and the velocity of `interpolant=vp` is "
                "infinite there: use linear or gvp"
            )
        for name, eps in (("train_eps", train_eps), ("sample_eps", sample_eps)):
            if eps is not None and not 0 <= eps < 0.5:
                raise UserError(f"`{name}` must be in [0, 0.5), not {eps}")
        if sample_eps == 0 and not self.predicts_velocity:
            raise UserError(f"`sample_eps=0`: the prediction {prediction} has no finite drift at the ends: leave it")
        self.prediction, self.loss_weight, self.time_distribution = prediction, loss_weight, time_distribution
        self.is_vp = interpolant == "vp"
        if not self.is_vp and self.predicts_velocity:
            train_eps = sample_eps = 0.0
        self.train_eps = (1e-5 if self.is_vp else 1e-3) if train_eps is None else train_eps
        self.sample_eps = 1e-3 if sample_eps is None else sample_eps

    # ------------------------------------------------------------------ intervals

    def train_interval(self) -> tuple[float, float]:
        """The times between which training draws t."""
        if self.is_vp:
            return 0.0, 1 - self.train_eps
        if not self.predicts_velocity:
            return self.train_eps, 1 - self.train_eps
        return 0.0, 1.0

    def ode_interval(self) -> tuple[float, float]:
        """Where the ODE starts (noise) and ends (data)."""
        eps = self.sample_eps
        if self.is_vp:
            return 0.0, 1 - eps
        if not self.predicts_velocity:
            return eps, 1 - eps
        return 0.0, 1.0

    def must_stop(self, reverse: bool) -> bool:
        """Whether the ODE's drift does not exist just past its interval's end, where adaptive solvers would look."""
        if reverse:
            return not self.is_vp and not self.predicts_velocity
        return self.is_vp and self.prediction == "noise"

    def sde_interval(self, diffusion_form: str, last_step_size: float) -> tuple[float, float]:
        """Where the SDE starts and where its last step, of that size, begins (0: no last step, ends at 1 − ε)."""
        eps = self.sample_eps
        end = 1 - (last_step_size or eps)
        if self.is_vp:
            return 0.0, end
        starts_late = diffusion_form == "sbdm" or not self.predicts_velocity
        return (eps if starts_late else 0.0), end

    # ------------------------------------------------------------------ training

    def sample_times(self, u: torch.Tensor) -> torch.Tensor:
        """Training times t, of u's shape and dtype, from uniform draws u in [0, 1)."""
        start, end = self.train_interval()
        return start + (end - start) * TIME_DISTRIBUTIONS[self.time_distribution](u)

    def training_loss(
        self,
        model: Field,
        x1: torch.Tensor,
        y: torch.Tensor | None = None,
        *,
        class_dropout: float = 0.1,
        null_label: int | None = None,
        u: torch.Tensor | None = None,
        x0: torch.Tensor | None = None,
        drop: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        **conditions,
    ) -> torch.Tensor:
        """The objective: draw times and noise, drop labels for classifier-free guidance, and take the loss.

        Args:
            model: the network, called as ``model(x_t, t, y=labels, **conditions)``, or without ``y`` if there is none.
            x1: data (B, …).
            y: labels (B,) int64, or None.
            class_dropout: probability with which a label is replaced by the null label.
            null_label: the label of no class; None takes ``model.null_label``.
            u: (B,) uniform draws in [0, 1), from which the times come. Draws that are None are made here.
            x0: (B, …) standard normal noise.
            drop: (B,) uniform draws in [0, 1); a label is replaced where they are below ``class_dropout``.
            generator: source of the draws made here, on its own device; None is the global one of x1's device.

        Returns:
            (B,) float32, or float64 if x1 is, the loss of each image.

        Raises:
            UserError: a dropout that is no probability, labels to drop and no null label, or the prediction
                ``average-velocity``, of which this would train steps of no length alone.
        """
        if self.averages:
            raise UserError("`prediction=average-velocity` is trained by the training_loss of a MeanFlow")
        check_dropout(class_dropout)
        u = uniform(x1, len(x1), generator=generator) if u is None else u
        x0 = noise(x1, generator) if x0 is None else x0
        if y is not None:
            if class_dropout > 0:
                null_label = null_label_of(model) if null_label is None else null_label
                drop = uniform(x1, len(x1), generator=generator) if drop is None else drop
                y = torch.where(drop < class_dropout, null_label, y)
            conditions["y"] = y
        return self.loss(model, x1, self.sample_times(u), x0, **conditions)

    def loss(self, model: Field, x1: torch.Tensor, t: torch.Tensor, x0: torch.Tensor, **conditions) -> torch.Tensor:
        """The loss of each image: the weighted mean squared error of the prediction.

        Args:
            model: the network, called as ``model(x_t, t, **conditions)``.
            x1: data (B, …).
            t: times (B,).
            x0: noise (B, …).

        Returns:
            (B,) float32, or float64 if x1 is.
        """
        path = self.interpolant
        out = predicted(model, path.interpolate(x1, x0, t), t, **conditions)
        if self.predicts_velocity:
            error = out - path.velocity(x1, x0, t)
        elif self.prediction == "noise":
            error = out - x0
        else:
            error = out * path.sigma(expand_t_like_x(t, out)) + x0
        return error.square().flatten(1).mean(1) * self._weight(t)

    def _weight(self, t: torch.Tensor) -> torch.Tensor | float:
        """Weight (B,) of the squared error of the noise, or of the score times −σ."""
        if self.loss_weight == "none":
            return 1.0
        rate, sigma = self.interpolant.noise_rate(t), self.interpolant.sigma(t)
        return (rate / sigma) ** 2 if self.loss_weight == "velocity" else rate / sigma**2

    # ------------------------------------------------------------------ sampling

    def to_velocity(self, out: torch.Tensor, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The velocity, the drift of the ODE, that a network's output ``out`` at (x, t) means."""
        if self.predicts_velocity:
            return out
        if self.prediction == "noise":
            out = self.interpolant.score_from_noise(out, x, t)
        return self.interpolant.velocity_from_score(out, x, t)

    def to_score(self, out: torch.Tensor, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The score ∇ log p_t that a network's output ``out`` at (x, t) means."""
        if self.predicts_velocity:
            return self.interpolant.score_from_velocity(out, x, t)
        if self.prediction == "noise":
            return self.interpolant.score_from_noise(out, x, t)
        return out

    # ------------------------------------------------------------------ diffusers' loop

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Set ``timesteps``, (num_inference_steps,) float32: where the steps of Euler's method along the ODE begin.

        They are times t from noise to data, as the network takes them, not numbers of training steps.

        Raises:
            UserError: fewer than one step.
        """
        if num_inference_steps < 1:
            raise UserError(f"`num_inference_steps` must be at least 1, not {num_inference_steps}")
        self._grid = torch.linspace(*self.ode_interval(), num_inference_steps + 1, dtype=torch.float32)
        self.timesteps = self._grid[:-1].to(device)

    def scale_model_input(self, sample: torch.Tensor, timestep: object = None) -> torch.Tensor:
        """The sample as it is: the network takes it so."""
        return sample

    def step(
        self, model_output: torch.Tensor, timestep: torch.Tensor | float, sample: torch.Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple[torch.Tensor]:
        """One step of Euler's method, from one of the ``timesteps`` to the next.

        Args:
            model_output: (B, …) the network's prediction at the sample.
            timestep: the time, one of ``timesteps``.
            sample: (B, …) the state at that time.
            return_dict: whether to answer with a :class:`SchedulerOutput`, which has ``prev_sample``, or a tuple.

        Raises:
            UserError: there are no timesteps yet, or this is none of them.
        """
        time, grid = float(timestep), getattr(self, "_grid", torch.full((2,), torch.nan))
        number = int((grid[:-1] - time).abs().argmin())
        if not abs(float(grid[number]) - time) < 1e-5:
            raise UserError(f"`timestep={time:g}` is none of the scheduler's: call set_timesteps, take its timesteps")
        times = torch.full((len(sample),), time, dtype=sample.dtype, device=sample.device)
        velocity = self.to_velocity(model_output, sample, times)
        moved = sample + (float(grid[number + 1]) - float(grid[number])) * velocity
        return SchedulerOutput(prev_sample=moved) if return_dict else (moved,)

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """x_t (B, …) of data and noise (B, …) at times (B,) in [0, 1]."""
        return self.interpolant.interpolate(original_samples, noise, timesteps)


def predicted(model: Field, x: torch.Tensor, t: torch.Tensor, **conditions: torch.Tensor | None) -> torch.Tensor:
    """What a network says at (x, t), (B, …): float32, or float64 if x is.

    A network that has a ``dtype``, that of its weights, gets x in it, as in sampling.
    """
    out = model(x.to(getattr(model, "dtype", x.dtype)), t, **conditions)
    return out.to(torch.promote_types(x.dtype, torch.float32))


def null_label_of(model: Field) -> int:
    """The label by which a network knows that none is given.

    Raises:
        UserError: the network says none.
    """
    if (label := getattr(model, "null_label", None)) is not None:
        return label
    raise UserError("this model has no null label, which guidance needs: give it the attribute null_label")
