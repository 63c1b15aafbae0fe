"""Steps that are not finite never reach the weights, on a CPU and as on a GPU, where the host waits for rows alone."""

from __future__ import annotations

import copy
import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sit.training import trainer
from sit.training.ema import moving_average
from sit.training.non_finite import NonFinitePolicy
from sit.training.optimization import gradient_norm, make_optimizer
from sit.training.recipes import load_recipe
from sit.training.rows import Rows
from sit.training.run_folder import read_metrics
from sit.training.step_checks import AtOnce, OnDevice, StepChecks, Updated, make_step_checks
from sit.training.stop_signal import StopSignal
from sit.utils.errors import UserError

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
CONFIG = dataclasses.replace(load_recipe("digits"), learning_rate=0.1, weight_decay=0.3)
BAD = {2: math.nan, 3: math.inf, 6: math.nan}
STEPS = 7


def network() -> nn.Linear:
    layer = nn.Linear(3, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.arange(6.0).reshape(2, 3) / 6)
        layer.bias.fill_(0.5)
    return layer


def gradients(step: int) -> list[torch.Tensor]:
    source = torch.Generator().manual_seed(step)
    weight, bias = torch.randn(2, 3, generator=source), torch.randn(2, generator=source)
    bias[1] += BAD.get(step, 0.0)
    return [weight, bias]


def set_up(kind: type, scaler: torch.amp.GradScaler | None = None, limit: int = 3, every: int = 4):
    """A small network and its checks; every step's images are numbered by the step."""
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = scaler
    layer = network()
    parameters = list(layer.parameters())
    ema = moving_average(parameters, 0.99, warmup=True)
    updated = Updated(accelerator.prepare(make_optimizer(layer, CONFIG)), ema, parameters)
    rows, policy = Rows(accelerator, 0, 1), NonFinitePolicy(accelerator, limit)
    further = (every,) if kind is OnDevice else ()
    return layer, updated, rows, kind(accelerator, updated, rows, policy, *further)


def take(checks: StepChecks, layer: nn.Module, step: int, made: list[torch.Tensor]) -> None:
    for parameter, gradient in zip(layer.parameters(), made, strict=True):
        parameter.grad = gradient
    norm = gradient_norm(list(layer.parameters()), None)
    checks.update(step, norm, {"loss": torch.tensor([float(step)])}, torch.tensor([10 * step]))


def by_good_steps_alone() -> tuple[nn.Module, dict, EMAModel]:
    """The same training by PyTorch and diffusers themselves, from which the bad steps are left out."""
    layer = network()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, betas=CONFIG.betas, weight_decay=0.3)
    ema = EMAModel(layer.parameters(), decay=0.99)
    for step in range(1, STEPS + 1):
        if step not in BAD:
            for parameter, gradient in zip(layer.parameters(), gradients(step), strict=True):
                parameter.grad = gradient
            optimizer.step()
            ema.step(layer.parameters())
    return layer, optimizer.state_dict()["state"], ema


@pytest.mark.parametrize("kind", [AtOnce, OnDevice])
@pytest.mark.parametrize("every", [1, 4, STEPS])
def test_bad_steps_leave_weights_moments_and_average_alone(kind, every, capsys):
    layer, updated, rows, checks = set_up(kind, every=every)
    for step in range(1, STEPS + 1):
        take(checks, layer, step, gradients(step))
        if step % every == 0:
            checks.read()
    assert checks.read() == pytest.approx(torch.cat([part.flatten() for part in gradients(STEPS)]).norm().item())

    expected, state, ema = by_good_steps_alone()
    for ours, theirs in zip(layer.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
    for number, moments in updated.optimizer.optimizer.state_dict()["state"].items():
        for name, moment in moments.items():
            torch.testing.assert_close(moment, state[number][name])
    for ours, theirs in zip(updated.ema.shadow_params, ema.shadow_params, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert updated.ema.optimization_step == ema.optimization_step == STEPS - len(BAD)
    assert torch.cat(rows.collected["loss"]).tolist() == [1, 4, 5, 7]
    told = [line for line in capsys.readouterr().out.splitlines() if "skipped" in line]
    assert told == [
        "warning: step 2: gradient norm nan of images [20]; the step is skipped (1 in a row)",
        "warning: step 3: gradient norm inf of images [30]; the step is skipped (2 in a row)",
        "warning: step 6: gradient norm nan of images [60]; the step is skipped (1 in a row)",
    ]


def test_on_the_device_too_many_in_a_row_end_the_run_when_they_are_read():
    layer, _, _, checks = set_up(OnDevice, limit=2)
    for step in range(1, 4):
        take(checks, layer, step, gradients(step))
    with pytest.raises(UserError, match="step 3: gradient norm inf .* `non_finite_limit` is 2"):
        checks.read()


@pytest.mark.parametrize("kind", [AtOnce, OnDevice])
def test_float16_overflows_lower_the_loss_scale_and_do_not_count(kind, capsys):
    """A norm that overflows where no gradient does is skipped as well; the scale is right as it is then."""
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    layer, updated, _, checks = set_up(kind, scaler, limit=1)
    before = copy.deepcopy(layer.state_dict())
    for step, value in enumerate((math.inf, math.inf, 2e19), start=1):
        scaled = [torch.full_like(parameter, value) for parameter in layer.parameters()]
        for parameter, gradient in zip(layer.parameters(), scaled, strict=True):
            parameter.grad = gradient
        scaler.scale(torch.ones(()))
        scaler.unscale_(updated.optimizer.optimizer)
        norm = gradient_norm(list(layer.parameters()), None)
        checks.update(step, norm, {"loss": torch.ones(1)}, torch.tensor([step]))
    checks.read()
    assert scaler.get_scale() == 1.0
    assert all(torch.equal(before[name], tensor) for name, tensor in layer.state_dict().items())
    told = capsys.readouterr().out
    assert [
        f"step {step}: gradient overflow at the loss scale {scale}" in told for step, scale in ((1, 4), (2, 2), (3, 1))
    ]


class Waits(TorchDispatchMode):
    """Counts, while ``counting``, what would let the host wait for a GPU: values, and shapes that depend on them."""

    READERS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.counting = False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.note(next((name for name in self.READERS if function.__name__.startswith(f"{name}.")), None))
        return function(*args, **kwargs or {})

    def note(self, name: str | None) -> None:
        if self.counting and name is not None:
            self.seen.append(name)

    def noting(self, name: str, function):
        """``function``, whose calls are counted under ``name``."""

        def noted(*args, **kwargs):
            self.note(name)
            return function(*args, **kwargs)

        return noted

    def without(self, function):
        """``function``, during which nothing is counted."""

        def silent(*args, **kwargs):
            before, self.counting = self.counting, False
            try:
                return function(*args, **kwargs)
            finally:
                self.counting = before

        return silent


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("kind", [AtOnce, OnDevice])
def test_between_rows_the_host_never_waits_for_the_device(kind, optimizer, tmp_path, monkeypatch):
    """Of the loop all is counted but what the rows, the checkpoints and the loader do."""
    waits = Waits()
    for name in ("tolist", "cpu", "numpy"):  # on a CPU these dispatch nothing
        monkeypatch.setattr(torch.Tensor, name, waits.noting(name, getattr(torch.Tensor, name)))
    written = ((trainer, "write_snapshot"), (trainer, "write_checkpoint"))
    for owner, name in ((kind, "read"), (Rows, "write"), *written):
        monkeypatch.setattr(owner, name, waits.without(getattr(owner, name)))
    original = trainer.training_batches

    def counted_batches(*args, **kwargs):
        batches = original(*args, **kwargs)
        try:
            while True:
                batch = waits.without(next)(batches)
                waits.counting = True
                yield batch
        finally:
            waits.counting = False
            batches.close()

    def make(accelerator, updated, rows, policy, *, every):
        made = make_step_checks(accelerator, updated, rows, policy, every=every)
        assert type(made) is AtOnce
        return made if kind is AtOnce else OnDevice(accelerator, updated, rows, policy, every)

    monkeypatch.setattr(trainer, "training_batches", counted_batches)
    monkeypatch.setattr(trainer, "make_step_checks", make)
    config = dataclasses.replace(
        load_recipe("digits"), model="SiT-XS/2", mixer="atconv", steps=5, batch_size=4, log_every=2, preview_every=0,
        max_grad_norm=1.0, posthoc_ema=(0.1,), trackers=(), cpu_threads=1, output_dir=str(tmp_path / "a"),
        optimizer=optimizer,
    )  # fmt: skip
    with waits:
        trainer.train(config)
    assert waits.seen == ([] if kind is OnDevice else 5 * ["_local_scalar_dense"])
    assert [row["step"] for row in read_metrics(tmp_path / "a" / "metrics.jsonl")] == [2, 4, 5]


@pytest.mark.parametrize(("processes", "device", "asked"), [(1, "cuda", 6), (8, "cpu", 6), (8, "cuda", 1)])
def test_processes_on_gpus_ask_for_signals_every_ten_steps(processes, device, asked):
    accelerator = SimpleNamespace(num_processes=processes, device=torch.device(device))
    assert sum(StopSignal.is_asked_at(step, accelerator) for step in range(15, 21)) == asked


@pytest.mark.parametrize(("device", "kind"), [("cuda", OnDevice), ("cpu", AtOnce), ("mps", AtOnce)])
def test_the_device_decides_on_gpus_with_fused_skipping_alone(device, kind, monkeypatch):
    monkeypatch.setattr(OnDevice, "_begin", lambda checks: None)
    accelerator = SimpleNamespace(device=torch.device(device))
    assert type(make_step_checks(accelerator, None, None, None, every=1)) is kind
