"""How long a training step of each variant takes, measured apart from the runs: in one process, in turn.

Runs of a study share the machine with each other and with whatever else it does, so their own speeds are those of their
hour. What is measured here is written to ``OUT/speed.json``, and the report takes it in place of the runs' own.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sit.model import create_model
from sit.study.config import Study
from sit.study.record import without_folders
from sit.training.config import TrainConfig
from sit.training.distributed import compile_for_training
from sit.training.ema import averaged_parameters, moving_average, trained_parameters
from sit.training.frozen import freeze
from sit.training.objective import TransportObjective
from sit.training.optimization import gradient_norm, make_optimizer
from sit.training.plan import describe_data
from sit.training.posthoc_ema import PowerAverage
from sit.transport.transport import Transport
from sit.utils.compile import should_compile
from sit.utils.device import process_state
from sit.utils.errors import UserError
from sit.utils.precision import allow_tf32
from sit.utils.record import write_record
from sit.utils.threads import use_threads
from sit.utils.timing import interleaved

FILE = "speed.json"
REPEATS = 9
"""steps of each variant, whose median counts"""
BEARING = (
    "data", "vae", "image_size", "model", "mixer", "positional_embedding", "block", "learn_sigma", "class_dropout",
    "interpolant", "prediction", "loss_weight", "time_distribution", "repa", "distill_from", "freeze", "train_only",
    "batch_size", "gradient_accumulation", "optimizer", "max_grad_norm", "posthoc_ema", "mixed_precision", "tf32",
    "compile", "gradient_checkpointing", "cpu_threads",
)  # fmt: skip
"""Fields of TrainConfig that bear on how long a step takes."""


def measure(study: Study, repeats: int = REPEATS) -> Path:
    """Time a training step of each variant, on random latents, interleaved; the medians go to ``OUT/speed.json``.

    A step is what a run's process does with a batch that lies ready: forward and backward pass, the norm of the
    gradient, optimizer and moving averages. With REPA, distillation or MeanFlow it would be another: those are refused.

    Raises:
        UserError: a variant's objective is not the plain one, or variants differ in threads or TF32, which are the
            process's.
    """
    device = process_state().device
    configs = _configs(study)
    for name in ("cpu_threads", "tf32"):
        if len({getattr(config, name) for config in configs.values()}) > 1:
            raise UserError(f"`measure_speed`: variants differ in {name}, so they can't be timed in one process")
    first = next(iter(configs.values()))
    allow_tf32(device, first.tf32)
    if device.type == "cpu":
        use_threads(first.cpu_threads)
    steps = {name: training_step(config, device, name) for name, config in configs.items()}
    seconds = interleaved(steps, device, repeats)
    file = study.out / FILE
    file.parent.mkdir(parents=True, exist_ok=True)
    settings = {name: _bearing(config) for name, config in configs.items()}
    write_record(file, device, {"repeats": repeats, "settings": settings, "seconds_per_step": seconds})
    return file


def measured(study: Study) -> dict[str, Any] | None:
    """What ``OUT/speed.json`` says, without the speeds of variants that are others now; None if it is not there.

    A file of an earlier program doesn't say what its variants were, and is taken as it is.

    Raises:
        UserError: it is there and can't be read.
    """
    file = study.out / FILE
    now, usual = {name: _bearing(config) for name, config in _configs(study).items()}, _bearing(TrainConfig())
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        paces = found["seconds_per_step"]
        for pace in paces.values():
            float(pace)
        if (then := found.pop("settings", None)) is not None:
            same = {name for name in then.keys() & now.keys() if usual | then[name] == now[name]}
            found["seconds_per_step"] = {name: pace for name, pace in paces.items() if name in same}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} holds no speeds ({error!r}); remove it, or give `measure_speed`") from error
    return found


def _configs(study: Study) -> dict[str, TrainConfig]:
    """Variant → the training whose steps are timed; of choices, the first."""
    return {variant.name: study.config(variant, 0 if study.select else None) for variant in study.variants}


def _bearing(config: TrainConfig) -> dict[str, Any]:
    """The settings of :data:`BEARING` as a JSON has them, of places what stays the same on another machine."""
    values = {name: getattr(config, name) for name in BEARING}
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    return values | {name: without_folders(values[name]) for name in ("data", "vae")}


def training_step(config: TrainConfig, device: torch.device, name: str) -> Callable[[], None]:
    """One step of a training like ``config``'s on one process, on a batch that lies ready."""
    if config.averages or config.repa is not None or config.distill_from is not None:
        raise UserError(f"`measure_speed`: {name} minimizes more than the plain objective, whose step is timed")
    shape, classes, _, _ = describe_data(config)
    network = create_model(config.model, 0, **config.network_options(shape, classes)).to(device).train()
    freeze(network, config.freeze, config.train_only)
    if config.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    if should_compile(config.compile, device, print):
        compile_for_training(network, False)
    objective = TransportObjective(Transport(**config.transport_options()), config.class_dropout, null_label=classes)
    optimizer, averaged = make_optimizer(network, config), averaged_parameters(network)
    averages = [moving_average(averaged, config.ema_decay, config.ema_warmup)]
    averages += [PowerAverage(averaged, sigma) for sigma in config.posthoc_ema]
    size = config.batch_size // config.gradient_accumulation
    batch = {
        "latents": torch.randn(size, *shape, device=device),
        "noise": torch.randn(size, *shape, device=device),
        "labels": torch.arange(size, device=device) % classes,
        "t_uniform": torch.rand(size, device=device),
        "drop": torch.rand(size, device=device),
    }
    low = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.mixed_precision)

    def step() -> None:
        for _ in range(config.gradient_accumulation):
            with torch.autocast(device.type, dtype=low, enabled=low is not None):
                loss, _ = objective(network, batch)
            loss.mean().backward()
        gradient_norm(trained_parameters(network), config.max_grad_norm)
        optimizer.step()
        for average in averages:
            average.step(averaged)
        optimizer.zero_grad()

    return step
