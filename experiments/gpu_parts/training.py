"""Training steps: on the GPU and on the CPU, by Triton's kernels and plain operations, compiled and not, alike.

A step is the trainer's, of its own parts, without a run's folder. The losses of two ways differ by rounding, which
training makes larger: the first steps are held to a narrow bound, means over many steps to a wider one. And in a step
on the GPU the host must not wait for it; PyTorch tells of most waits, not of all (``torch.cuda.set_sync_debug_mode``).
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import os
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState

from gpu_parts.pieces import ROOT, Figures, Part, Piece
from sit.model import SiT
from sit.training.config import TrainConfig
from sit.training.data import open_training_data
from sit.training.distributed import set_up_processes
from sit.training.ema import averaged_parameters, moving_average, trained_parameters
from sit.training.loader import training_batches
from sit.training.non_finite import NonFinitePolicy
from sit.training.optimization import gradient_norm, make_optimizer
from sit.training.recipes import load_recipe
from sit.training.rows import Rows
from sit.training.start import Start
from sit.training.step_checks import Updated, make_step_checks
from sit.training.trainer import accumulate_gradients, make_network, make_objective
from sit.transport.transport import Transport
from sit.utils.precision import full_float32

FIRST, WINDOW = 10, 50
"""steps that are compared one by one, and steps that means are taken of"""
BOUNDS = {"no": (1e-5, 1e-3), "bf16": (1e-3, 5e-3)}
"""on the relative difference of a loss in the first steps, and of a mean, by precision. On a CPU rounding alone makes
1e-8 and 2e-5 of SiT-XS/4 in 60 steps, a layer without its inhibition 2e-2"""
WARM_UP = 3
"""steps in which compiling and allocating may wait"""
BASE = "Triton"
WAYS = {BASE: "triton", "plain operations": "taps", "compiled": "triton", "CPU": "channels_last"}
"""how the steps are made, and ATConv's backend then"""


def settings(way: str, precision: str, tiny: bool) -> TrainConfig:
    """The digits as 32×32 pixels; a tiny network has one layer of ATConv, as the interpreter takes its time."""
    mixer = f"atconv:backend={WAYS[way]}" + (5 * ",depthwise" if tiny else "")
    return dataclasses.replace(
        load_recipe("digits"), vae="none:channels=1", model="SiT-XS/8" if tiny else "SiT-B/2", mixer=mixer,
        batch_size=1 if tiny else 16, learning_rate=1e-4, final_learning_rate=None, warmup_steps=0, tf32=False,
        mixed_precision=precision,
    )  # fmt: skip


@contextlib.contextmanager
def fresh_accelerate(on_cpu: bool) -> Iterator[None]:
    """Within the block, Accelerate knows of no settings of before; and of no GPU if it is to be ``on_cpu``."""
    before = os.environ.get("ACCELERATE_USE_CPU")
    AcceleratorState._reset_state(reset_partial_state=True)
    if on_cpu:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    try:
        yield
    finally:
        if on_cpu:
            del os.environ["ACCELERATE_USE_CPU"]
            if before is not None:
                os.environ["ACCELERATE_USE_CPU"] = before
        AcceleratorState._reset_state(reset_partial_state=True)


@contextlib.contextmanager
def waits(device: torch.device, found: collections.Counter[str]) -> Iterator[None]:
    """Count in ``found``, by line, where within the block the host waits for a GPU."""
    if device.type != "cuda":
        yield
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
    count_waits(caught, found)


def count_waits(caught: list[warnings.WarningMessage], found: collections.Counter[str]) -> None:
    """Add to ``found`` the lines of the warnings that tell of waiting."""
    for warning in caught:
        if "synchroniz" in str(warning.message):
            place = Path(warning.filename)
            name = place.relative_to(ROOT).as_posix() if place.is_relative_to(ROOT) else place.name
            found[f"{name}:{warning.lineno}"] += 1


@torch.no_grad()
def opened_gates(network: SiT) -> SiT:
    """The network with something added to each initial value, where a fresh one's mixers don't change its loss."""
    source = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter += 0.02 * torch.randn(parameter.shape, generator=source)
    return network


def train(config: TrainConfig, steps: int, backend: str | None) -> dict[str, Any]:
    """The loss of each of ``steps`` steps, the seconds of one, and waits in them; ``backend``: compiled by it."""
    accelerator = set_up_processes(config)
    device = accelerator.device
    data = open_training_data(config, device, progress=False).data
    transport = Transport(**config.transport_options())
    network = opened_gates(make_network(config, data, None, Start()))
    objective = make_objective(config, data, transport, network, accelerator, first_step=1)
    if backend is not None:
        network.compile(backend=backend)
    model, optimizer = accelerator.prepare(network, make_optimizer(network, config))
    network = accelerator.unwrap_model(model)
    parameters, averaged = trained_parameters(network), averaged_parameters(network)
    ema = moving_average(averaged, config.ema_decay, config.ema_warmup)
    checks = make_step_checks(
        accelerator, Updated(optimizer, ema, averaged), Rows(accelerator, 0, config.batch_size),
        NonFinitePolicy(accelerator, config.non_finite_limit), every=steps,
    )  # fmt: skip
    batches = training_batches(data, seed=config.seed, global_batch=config.batch_size)
    losses, found, started = [], collections.Counter(), time.perf_counter()
    model.train()
    with contextlib.closing(batches):
        for step, batch in enumerate(itertools.islice(batches, steps), start=1):
            if step == min(WARM_UP, steps - 1) + 1:
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                started, counted = time.perf_counter(), step - 1
            with waits(device, found if step > WARM_UP else collections.Counter()):
                values, indices = accumulate_gradients(model, objective, [batch], accelerator)
                norm = gradient_norm(parameters, config.max_grad_norm)
                checks.update(step, norm, values, indices)
                optimizer.zero_grad()
            losses.append(values["loss"].mean())
    told = torch.stack(losses).tolist()  # waits for the last step
    seconds = (time.perf_counter() - started) / (steps - counted)
    checks.read()
    return {"steps": steps, "losses": told, "seconds_per_step": seconds, "waits": dict(found),
            "device": device.type, "watched": device.type == "cuda"}  # fmt: skip


def agreement(losses: list[float], base: list[float], precision: str) -> dict[str, Any]:
    """How far two series of losses are apart, of as many steps as both have, beside the bounds."""
    pairs = list(zip(losses, base, strict=False))
    apart = [abs(one - other) / abs(other) for one, other in pairs]
    means = [
        [sum(series) / len(window) for series in zip(*window, strict=True)]
        for window in (pairs[start : start + WINDOW] for start in range(0, len(pairs), WINDOW))
    ]
    found = (max(apart[:FIRST]), max(abs(one - other) / abs(other) for one, other in means))
    rows = zip(("first", "means"), found, BOUNDS[precision], strict=True)
    return {name: {"difference": value, "bound": bound, "passed": value <= bound} for name, value, bound in rows}


def piece(way: str, precision: str, steps: int, tiny: bool, done: dict[str, Figures]) -> Figures:
    """The steps made one way, and how far their losses are from those of :data:`BASE` in the same precision."""
    backend = ("eager" if tiny else "inductor") if way == "compiled" else None
    with fresh_accelerate(way == "CPU" or tiny), full_float32():
        found = train(settings(way, precision, tiny), steps, backend)
    passed = not found["waits"]
    if way != BASE:
        base = done.get(name_of(BASE, precision), {}).get("losses")
        if base is None:
            raise RuntimeError(f"there are no losses of {name_of(BASE, precision)} to compare with")
        found["agreement"] = agreement(found["losses"], base, precision)
        passed = passed and all(row["passed"] for row in found["agreement"].values())
    return {"passed": passed, **found}


def name_of(way: str, precision: str) -> str:
    return f"{way}, {'bfloat16' if precision == 'bf16' else 'float32'}"


def part(tiny: bool) -> Part:
    """A piece of each way in each precision; the CPU makes a few steps, in float32."""
    counts = dict.fromkeys(WAYS, 2) | {"compiled": 1} if tiny else dict.fromkeys(WAYS, 300) | {"CPU": 5}
    pieces = []
    for precision in ("bf16",) if tiny else ("bf16", "no"):
        for way in WAYS:
            if way == "CPU" and precision == "bf16" and not tiny:
                continue
            seconds = 2 if tiny else {"compiled": 120, "CPU": 60}.get(way, 40)
            pieces.append(Piece(
                name_of(way, precision), seconds,
                lambda done, left, way=way, precision=precision: piece(way, precision, counts[way], tiny, done),
            ))  # fmt: skip
    sources = ("atconv", "sit/model.py", "sit/mixers", "sit/training", "sit/transport", "sit/latents", "sit/data",
               "experiments/gpu_parts/training.py")  # fmt: skip
    return Part("training", pieces, sources, {"tiny": tiny})
