"""What each training setting does, by the numbers in a run's folder: recomputed by hand, or compared with a run
without the setting."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file

from sit.model import SiT, create_model
from sit.training.recipes import load_recipe
from sit.training.run_folder import read_metrics
from sit.training.trainer import train
from sit.utils.errors import UserError
from sit.utils.random import generator

STEPS, BATCH = 6, 8
BETAS, WEIGHT_DECAY, EMA_DECAY = (0.6, 0.8), 0.5, 0.2
RATES = [0.001, 0.002, 0.003] + [0.0005 + 0.0025 * (1 + math.cos(math.pi * part / 3)) / 2 for part in (0, 1, 2)]
"""The learning rates of six steps: a linear warm-up of three to 0.003, then a cosine of three on its way to 0.0005."""


@pytest.fixture(scope="module")
def begin(tmp_path_factory):
    """A function that trains on sixteen images of noise in two classes, and gives the run's folder."""
    rng, images = np.random.default_rng(0), tmp_path_factory.mktemp("images")
    for number in range(16):
        place = images / f"class{number % 2}" / f"{number}.png"
        place.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, size=(32, 32, 3), dtype=np.uint8)).save(place)
    small = dict(
        data=str(images),
        model="SiT-XS/4",
        mixer="attention",
        steps=1,
        batch_size=BATCH,
        warmup_steps=0,
        final_learning_rate=None,
        betas=BETAS,
        log_every=1,
        preview_every=0,
        checkpoint_every=1,
        keep_last=0,
        trackers=(),
        cpu_threads=1,
    )

    def begin(**changes) -> Path:
        folder = tmp_path_factory.mktemp("run") / "a"
        AcceleratorState._reset_state(reset_partial_state=True)
        try:
            train(dataclasses.replace(load_recipe("digits"), **small | dict(output_dir=str(folder)) | changes))
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
        return folder

    return begin


@pytest.fixture(scope="module")
def stepwise(begin) -> Path:
    """A run with a checkpoint of every step, under a schedule, weight decay and a short average."""
    return begin(
        steps=STEPS,
        learning_rate=0.003,
        warmup_steps=3,
        final_learning_rate=0.0005,
        weight_decay=WEIGHT_DECAY,
        ema_decay=EMA_DECAY,
    )


@pytest.fixture(scope="module")
def still(begin) -> Path:
    """A run of five steps that never move the weights, with a preview of each."""
    torch.manual_seed(1)
    return begin(steps=5, learning_rate=0.0, preview_every=1, keep_last=1, keep_every=2)


def place(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:07d}"


def raw_weights(run: Path, step: int = 1) -> dict[str, torch.Tensor]:
    return doubled(load_file(place(run, step) / "training" / "model.safetensors"))


def averaged_weights(run: Path, step: int = 1) -> dict[str, torch.Tensor]:
    return doubled(load_file(place(run, step) / "transformer" / "diffusion_pytorch_model.safetensors"))


def optimizer(run: Path, step: int = 1) -> dict[str, Any]:
    """AdamW's state: ``state`` by parameter's name, and ``param_groups``."""
    return torch.load(place(run, step) / "training" / "optimizer.pt", weights_only=True)["optimizer"]


def moments(run: Path, name: str, step: int = 1) -> dict[str, torch.Tensor]:
    """By parameter, the moving average ``exp_avg`` of its gradients or ``exp_avg_sq`` of their squares."""
    return doubled({parameter: state[name] for parameter, state in optimizer(run, step)["state"].items()})


def doubled(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.double() for name, tensor in tensors.items()}


def norm(tensors: dict[str, torch.Tensor]) -> float:
    return torch.cat([tensor.flatten() for tensor in tensors.values()]).norm().item()


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def network_config(run: Path) -> dict[str, Any]:
    return json.loads((place(run, 1) / "transformer" / "config.json").read_text())


def preview(run: Path, step: int) -> np.ndarray:
    return np.asarray(Image.open(run / "samples" / f"step-{step:07d}.png"))


# ---------------------------------------------------------------- the steps of one run


def test_the_average_decays_as_told_once_it_is_warm(stepwise):
    """The warm-up's decay is (1 + step) / (10 + step), counted from the second step; the setting is its upper bound."""
    average = raw_weights(stepwise, 1)
    for step in range(1, STEPS + 1):
        decay = 0.0 if step == 1 else min(EMA_DECAY, step / (9 + step))
        average = {name: decay * average[name] + (1 - decay) * raw for name, raw in raw_weights(stepwise, step).items()}
        for name, saved in averaged_weights(stepwise, step).items():
            torch.testing.assert_close(saved, average[name], atol=1e-6, rtol=1e-5)
    assert not same(averaged_weights(stepwise, STEPS), raw_weights(stepwise, STEPS))


def test_without_a_warm_up_the_average_begins_at_the_initial_weights(begin):
    """As in the published program: the first step's decay is the last one's."""
    run = begin(steps=2, learning_rate=0.003, ema_decay=EMA_DECAY, ema_warmup=False)
    config = load_recipe(str(run / "config.yaml"))
    initial = create_model(config.model, config.seed, **config.network_options((4, 8, 8), 2)).state_dict()
    average = doubled({name: initial[name] for name in raw_weights(run)})
    for step in (1, 2):
        raw = raw_weights(run, step)
        average = {name: EMA_DECAY * average[name] + (1 - EMA_DECAY) * raw[name] for name in raw}
        for name, saved in averaged_weights(run, step).items():
            torch.testing.assert_close(saved, average[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("step", range(2, STEPS + 1))
def test_a_step_moves_the_weights_by_the_schedules_rate_and_the_weight_decay(stepwise, step):
    rate, before, after = RATES[step - 1], raw_weights(stepwise, step - 1), raw_weights(stepwise, step)
    mean, square = moments(stepwise, "exp_avg", step), moments(stepwise, "exp_avg_sq", step)
    assert norm(mean) > 0
    for name in mean:
        direction = mean[name] / (1 - BETAS[0] ** step) / ((square[name] / (1 - BETAS[1] ** step)).sqrt() + 1e-8)
        expected = (1 - rate * WEIGHT_DECAY) * before[name] - rate * direction
        torch.testing.assert_close(after[name], expected, atol=5e-7, rtol=1e-6)


@pytest.mark.parametrize("step", range(2, STEPS + 1))
def test_the_moments_decay_by_the_betas(stepwise, step):
    """The gradient that explains the step from mean to mean explains that from square to square."""
    means, squares = ([moments(stepwise, name, at) for at in (step - 1, step)] for name in ("exp_avg", "exp_avg_sq"))
    for name in means[0]:
        gradient = (means[1][name] - BETAS[0] * means[0][name]) / (1 - BETAS[0])
        expected = BETAS[1] * squares[0][name] + (1 - BETAS[1]) * gradient**2
        torch.testing.assert_close(squares[1][name], expected, rtol=1e-3, atol=1e-5 * expected.max().item())


def test_the_optimizer_file_has_the_settings_in_force(stepwise):
    for step, rate in enumerate(RATES, start=1):
        for group in optimizer(stepwise, step)["param_groups"]:
            assert group["lr"] == pytest.approx(rate) and group["weight_decay"] == WEIGHT_DECAY
            assert tuple(group["betas"]) == BETAS


def test_the_learning_rate_and_the_images_seen_are_logged(stepwise):
    rows = read_metrics(stepwise / "metrics.jsonl")
    assert [row["learning_rate"] for row in rows] == pytest.approx(RATES)
    assert [row["images_seen"] for row in rows] == [BATCH * step for step in range(1, STEPS + 1)]


@pytest.mark.parametrize("part", [0.5, 2.0])
def test_the_gradient_is_clipped_to_the_norm_given(begin, stepwise, part):
    """A bound below the gradient's norm scales it down to that, one above leaves it; what is logged is the norm before.

    After one step, the mean of the gradients is the gradient times (1 − β₁).
    """
    whole = norm(moments(stepwise, "exp_avg")) / (1 - BETAS[0])
    assert read_metrics(stepwise / "metrics.jsonl")[0]["gradient_norm"] == pytest.approx(whole, rel=1e-4)
    clipped = begin(max_grad_norm=part * whole)
    assert read_metrics(clipped / "metrics.jsonl")[0]["gradient_norm"] == pytest.approx(whole, rel=1e-4)
    means, unclipped = moments(clipped, "exp_avg"), moments(stepwise, "exp_avg")
    assert norm(means) / (1 - BETAS[0]) == pytest.approx(min(1, part) * whole, rel=1e-4)
    for name in means:
        torch.testing.assert_close(means[name], min(1, part) * unclipped[name], rtol=1e-4, atol=1e-8)


# ---------------------------------------------------------------- what the network is, and what it is trained on


def test_the_seed_alone_decides_the_initial_weights(begin, still):
    torch.manual_seed(2)
    assert same(raw_weights(still, 5), raw_weights(begin(learning_rate=0.0)))
    other = raw_weights(begin(learning_rate=0.0, seed=1))
    assert not torch.equal(other["x_embedder.proj.weight"], raw_weights(still, 5)["x_embedder.proj.weight"])


@pytest.mark.parametrize("cause", ["weights", "order", "noise"])
def test_a_seed_of_one_cause_changes_that_alone(begin, monkeypatch, cause):
    """By what the network is given in the first step, and its weights, which a learning rate of 0 leaves alone."""
    given, forward = [], SiT.forward

    def note(network, x, t, y, **options):
        given.append((x, t, y))
        return forward(network, x, t, y, **options)

    monkeypatch.setattr(SiT, "forward", note)
    runs = [
        raw_weights(begin(learning_rate=0.0, class_dropout=0.0, flip=True, **seeds))
        for seeds in ({}, {f"seed_{cause}": 7}, dict(seed_weights=0, seed_order=0, seed_noise=0))
    ]
    (x, t, y), (other_x, other_t, other_y), explicit = given
    assert all(torch.equal(one, other) for one, other in zip(given[0], explicit, strict=True)) and same(
        runs[0], runs[2]
    )
    assert same(runs[0], runs[1]) == (cause != "weights")
    assert torch.equal(x, other_x) == (cause == "weights")
    assert torch.equal(t, other_t) == (cause != "noise")
    assert torch.equal(y, other_y) == (cause != "order")


def test_learn_sigma_doubles_the_output_channels(begin, stepwise):
    both = begin(learn_sigma=True)
    assert (network_config(stepwise)["learn_sigma"], network_config(both)["learn_sigma"]) == (False, True)
    outputs = [raw_weights(run)["final_layer.linear.weight"].shape[0] for run in (stepwise, both)]
    assert outputs[1] == 2 * outputs[0]


@pytest.mark.parametrize("seed", [0, 3])
def test_times_are_drawn_from_the_training_interval(begin, seed):
    """The untrained network answers zero, and then the loss of the score under the velocity's weight is x0² / t²."""
    run = begin(prediction="score", loss_weight="velocity", train_eps=0.2, seed=seed)
    network = network_config(run)
    losses = []
    for position in range(BATCH):
        source = generator(seed, "train", position)
        _, uniform, _ = torch.rand(3, generator=source).double()
        _, noise = torch.randn(2, network["in_channels"], *network["input_size"], generator=source).double()
        losses.append(noise.square().mean() / (0.2 + 0.6 * uniform) ** 2)
    expected = torch.stack(losses).mean().item()
    assert read_metrics(run / "metrics.jsonl")[0]["loss"] == pytest.approx(expected, rel=1e-4)


def test_logit_normal_times_are_drawn_if_asked_for(begin):
    """As above, with the normal quantile of the uniform draw, through a sigmoid, in the place of that draw."""
    run = begin(prediction="score", loss_weight="velocity", train_eps=0.2, time_distribution="logit-normal")
    network = network_config(run)
    losses = []
    for position in range(BATCH):
        source = generator(0, "train", position)
        _, uniform, _ = torch.rand(3, generator=source).double()
        _, noise = torch.randn(2, network["in_channels"], *network["input_size"], generator=source).double()
        time = 1 / (1 + math.exp(-NormalDist().inv_cdf(uniform.item())))
        losses.append(noise.square().mean() / (0.2 + 0.6 * time) ** 2)
    expected = torch.stack(losses).mean().item()
    assert read_metrics(run / "metrics.jsonl")[0]["loss"] == pytest.approx(expected, rel=1e-4)


def test_gradient_checkpointing_computes_the_blocks_twice_and_changes_nothing(begin, stepwise):
    calls = []

    def count(module, arguments):
        if isinstance(module, torch.nn.GELU):  # one a block, and none in the VAE
            calls[-1] += 1

    runs = []
    with contextlib.ExitStack() as stack:
        hook = torch.nn.modules.module.register_module_forward_pre_hook(count)
        stack.callback(hook.remove)
        for checkpointing in (False, True):
            calls.append(0)
            runs.append(begin(gradient_checkpointing=checkpointing))
    assert calls == [6, 12]
    plain, checkpointed = (moments(run, "exp_avg") for run in runs)
    for name in plain:
        torch.testing.assert_close(checkpointed[name], plain[name], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("allowed, products", [(True, "high"), (False, "highest")])
def test_tf32_is_as_told_before_a_gpu_is_used(begin, monkeypatch, allowed, products):
    """Where there is no GPU, the run ends at the first thing that is to be put on it."""
    before = torch.get_float32_matmul_precision()
    end = contextlib.nullcontext()
    if not torch.cuda.is_available():
        monkeypatch.setattr(Accelerator, "device", property(lambda accelerator: torch.device("cuda")))
        end = pytest.raises((RuntimeError, AssertionError), match="CUDA|NVIDIA")
    try:
        torch.set_float32_matmul_precision("medium")
        with end:
            begin(tf32=allowed)
        assert torch.get_float32_matmul_precision() == products
    finally:
        torch.set_float32_matmul_precision(before)


# ---------------------------------------------------------------- what is kept


def test_previews_show_the_averaged_weights(begin):
    """Two runs whose weights are the same but for their averages: the images differ."""
    settings = dict(steps=4, learning_rate=0.004, preview_every=4, checkpoint_every=4)
    without, averaged = begin(**settings, ema_decay=0.0), begin(**settings, ema_decay=0.9)
    assert same(raw_weights(without, 4), raw_weights(averaged, 4))
    assert not same(averaged_weights(without, 4), averaged_weights(averaged, 4))
    assert not np.array_equal(preview(without, 4), preview(averaged, 4))


def test_all_previews_begin_with_the_same_noise(still):
    first = preview(still, 1)
    assert first.std() > 10
    for step in range(2, 6):
        np.testing.assert_array_equal(preview(still, step), first)


def test_checkpoints_of_every_few_steps_are_kept_besides_the_last(still):
    assert [path.name for path in sorted((still / "checkpoints").iterdir())] == [
        place(still, step).name for step in (2, 4, 5)
    ]


def test_a_run_is_not_continued_as_another(still):
    """Refused before anything is changed."""
    written = (still / "config.yaml").read_bytes()
    AcceleratorState._reset_state(reset_partial_state=True)
    config = dataclasses.replace(load_recipe(str(still / "config.yaml")), resume="auto", steps=7, seed=1)
    with pytest.raises(UserError, match="`seed=1` can't continue the run .* begun with 0"):
        train(config)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert (still / "config.yaml").read_bytes() == written
