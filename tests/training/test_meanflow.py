"""A run of MeanFlow, from its recipe to one-step samples; what it draws, and what it does not go with."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from tiny_runs import tiny_run

from sit import SiTPipeline
from sit.checkpoint.convert import Inspect, inspect
from sit.checkpoint.load import load_for_sampling
from sit.metrics.generated import GeneratedImages
from sit.sampling.arguments import Arguments
from sit.sampling.config import SamplerConfig
from sit.sampling.run import sample
from sit.training.config import TrainConfig
from sit.training.meanflow import MeanFlowObjective, check_meanflow, make_meanflow
from sit.training.plan import plan
from sit.training.run_folder import read_metrics
from sit.training.trainer import train
from sit.transport.transport import Transport
from sit.utils.errors import UserError
from sit.utils.random import generator


def small(folder: Path, **changes) -> TrainConfig:
    few = dict(mixer="attention,atconv:kernel_size=1", steps=4, preview_every=4, checkpoint_every=2, heldout="auto",
               heldout_images=8)  # fmt: skip
    return tiny_run(folder, "digits-meanflow", **few | changes)


def run(config: TrainConfig) -> Path:
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        train(config)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    return Path(config.output_dir)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    return run(small(tmp_path_factory.mktemp("run") / "a"))


def test_the_run(finished):
    rows = read_metrics(finished / "metrics.jsonl")
    assert [row["step"] for row in rows if "squared_error" in row] == [1, 2, 3, 4]
    assert (finished / "samples" / "step-0000004.png").is_file()
    assert any("heldout_loss" in row for row in rows)
    loaded = load_for_sampling(finished)
    assert loaded.model.config.average_velocity and loaded.transport.prediction == "average-velocity"
    assert loaded.transport.time_distribution == "logit-normal-0.4"
    assert "average-velocity" in inspect(Inspect(path=finished))


def test_resuming_is_exact(finished, tmp_path):
    again = Path(shutil.copytree(finished, tmp_path / "b"))
    shutil.rmtree(again / "checkpoints" / "step-0000004")
    run(small(again, resume=str(again)))
    last = "checkpoints/step-0000004/training/model.safetensors"
    ours, theirs = load_file(again / last), load_file(finished / last)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_one_step_by_the_command_and_the_pipeline(finished, tmp_path):
    """Both are x_0 + u(x_0, 0, 1) decoded, the command's noise named by its seed."""
    loaded = load_for_sampling(finished)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([3, 7])
    with torch.no_grad():
        expected = noise + loaded.model(noise, torch.zeros(2), labels, end=torch.ones(2))
        half = torch.full((2,), 0.5)
        middle = noise + 0.5 * loaded.model(noise, torch.zeros(2), labels, end=half)
        two = middle + 0.5 * loaded.model(middle, half, labels, end=torch.ones(2))
    pipeline = SiTPipeline.from_pretrained(finished / "checkpoints" / "step-0000004")
    pipeline.set_progress_bar_config(disable=True)
    for steps, wanted in ((1, expected), (2, two)):
        made = pipeline([3, 7], num_inference_steps=steps, latents=noise, output_type="latent").images
        torch.testing.assert_close(made, wanted, rtol=1e-5, atol=1e-5)
    config = SamplerConfig(steps=1)
    images = GeneratedImages(loaded, 4, config=config)
    assert images.config.sampler == "meanflow"
    try:
        sample(Arguments(ckpt=str(finished), out=str(tmp_path / "s"), num_samples=4, sampler=config, device="cpu"))
        assert len(list((tmp_path / "s").glob("*.png"))) == 5
        with pytest.raises(UserError, match="guidance is part of what MeanFlow trains"):
            sample(Arguments(ckpt=str(finished), out=str(tmp_path / "t"), sampler=SamplerConfig(cfg_scale=2.0)))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_the_draws_are_the_images_own():
    """An image's second time is keyed by the seed and its position, whatever the batch that it is in."""
    config = TrainConfig(prediction="average-velocity", meanflow_share=0.5)
    objective = make_meanflow(config, Transport(prediction="average-velocity"), null_label=3)
    assert isinstance(objective, MeanFlowObjective)
    calls = []

    def model(x, t, y, end):
        calls.append((t, end))
        return x * (end - t).reshape(-1, 1, 1, 1)

    source = torch.Generator().manual_seed(0)
    batch = {name: torch.randn(6, 1, 2, 2, generator=source) for name in ("latents", "noise")}
    batch |= {name: torch.rand(6, generator=source) for name in ("t_uniform", "drop")}
    batch |= {"labels": torch.arange(6) % 3, "positions": torch.arange(10, 16)}
    losses, metrics = objective(model, batch)
    t, end = calls[-1]
    second = torch.stack([torch.rand((), generator=generator(0, "end of the step", j)) for j in range(10, 16)])
    both = torch.stack([batch["t_uniform"], second])
    assert torch.equal(t, both.amin(0))
    steps = torch.tensor([j % 2 == 1 for j in range(10, 16)])
    assert torch.equal(end, torch.where(steps, both.amax(0), both.amin(0)))
    alone, _ = objective(model, {name: values[2:4] for name, values in batch.items()})
    torch.testing.assert_close(alone, losses[2:4])
    squared = metrics["squared_error"] * 4
    torch.testing.assert_close(losses, squared / (squared + 1e-3))


def test_mistakes_are_told_before_the_data_is_read():
    average = dict(prediction="average-velocity")
    for settings, words in (
        (dict(meanflow_kappa=0.5), "`meanflow_kappa` serves `prediction=average-velocity`, not velocity"),
        (average | dict(meanflow_share=0.0), "`meanflow_share` must be above 0"),
        (average | dict(interpolant="vp"), "infinite there: use linear or gvp"),
        (average | dict(repa="an/encoder"), "`repa` can't be added"),
        (average | dict(distill_from="a/run", distill_steps=2), "`distill_from` can't be added"),
        (average | dict(compile=True), "forward-mode derivatives, which `compile` has none of"),
        (average | dict(meanflow_omega=2.0, class_dropout=0.0), "they need `class_dropout`"),
    ):
        with pytest.raises(UserError, match=words):
            check_meanflow(TrainConfig(**settings))
    check_meanflow(TrainConfig(**average, meanflow_omega=2.0))
    with pytest.raises(UserError, match="`preview_steps=1` leaves the SDE"):
        TrainConfig(preview_steps=1)
    TrainConfig(**average, preview_steps=1)


def test_the_plan_counts_derivatives_and_guidance():
    """3 passes of the plain objective; 2 more for the share that takes a step, and 2 evaluations for the guidance."""

    def whole(**changes) -> float:
        text = plan(TrainConfig(data="digits", steps=1000, **changes), 1, None)
        return float(next(line for line in text.splitlines() if "training" in line).split("training")[1].split()[0])

    options = dict(prediction="average-velocity", meanflow_share=0.5)
    plain = whole()
    assert whole(**options) / plain == pytest.approx(4 / 3, rel=2e-2)
    assert whole(**options, meanflow_kappa=0.5) / plain == pytest.approx(6 / 3, rel=2e-2)
